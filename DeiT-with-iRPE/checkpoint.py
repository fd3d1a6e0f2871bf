"""What a checkpoint holds and how it comes back: resuming a run, or starting another model from its weights."""
import argparse
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.scheduler.plateau_lr import PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from runtime import UserError, key_differences, load_checkpoint, model_weights, print_once, save_atomically


@dataclass
class TrainingState:
    """Everything that changes in training; ``model`` is the bare one, without DistributedDataParallel."""
    model: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: Scheduler | None
    loss_scaler: torch.amp.GradScaler
    model_ema: ModelEmaV3 | None

    def save(self, path: str | os.PathLike, epoch: int, args: argparse.Namespace) -> None:
        """Write the state after ``epoch`` in the format of the released checkpoints."""
        save_atomically({
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": _scheduler_state(self.lr_scheduler),
            "epoch": epoch,
            "model_ema": self.model_ema.module.state_dict() if self.model_ema else None,
            "scaler": self.loss_scaler.state_dict(),
            "args": args,
        }, path)

    def resume(self, path: str) -> int | None:
        """Take over what the checkpoint holds; returns the last finished epoch, None if it holds weights only.

        Averages that the checkpoint lacks start from its weights. Raises ``UserError`` if it belongs to another
        model or optimizer.
        """
        checkpoint = load_checkpoint(path)
        weights = load_weights(self.model, checkpoint, path)
        if self.model_ema:
            self.model_ema.module.load_state_dict(checkpoint.get("model_ema") or weights)
        if "optimizer" not in checkpoint or "epoch" not in checkpoint:
            print_once(f"note: {path} holds weights only; the optimizer starts anew")
            return None
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        except (ValueError, KeyError) as error:
            raise UserError(f"the optimizer in {path} is not --opt's: {error}") from error
        if self.lr_scheduler and checkpoint.get("lr_scheduler"):
            _load_scheduler_state(self.lr_scheduler, checkpoint["lr_scheduler"])
        if checkpoint.get("scaler"):
            self.loss_scaler.load_state_dict(checkpoint["scaler"])
        return checkpoint["epoch"]


def _scheduler_state(scheduler: Scheduler | None) -> dict[str, Any] | None:
    if not isinstance(scheduler, PlateauLRScheduler):
        return scheduler and scheduler.state_dict()
    # timm leaves out the counters that decide when the next decay comes
    return {**scheduler.state_dict(), "plateau": scheduler.lr_scheduler.state_dict(),
            "restore_lr": scheduler.restore_lr}


def _load_scheduler_state(scheduler: Scheduler, state: dict[str, Any]) -> None:
    scheduler.load_state_dict(state)
    if isinstance(scheduler, PlateauLRScheduler) and "plateau" in state:
        scheduler.lr_scheduler.load_state_dict(state["plateau"])
        scheduler.restore_lr = state["restore_lr"]


def load_weights(model: nn.Module, checkpoint: Mapping[str, Any], path: str) -> dict[str, torch.Tensor]:
    """Load a checkpoint of this very model and return its weights.

    Raises ``UserError`` that says which keys differ, or that the numbers of classes do.
    """
    weights = model_weights(checkpoint, path)
    expected = model.state_dict()
    if heads := _heads_of_other_classes(model, expected, weights):
        raise UserError(f"checkpoint {path} has {len(weights[heads[0]])} classes and the data set "
                        f"{len(expected[heads[0]])}: "
                        "check --data-set and --data-path, or give it to --finetune for a new head")
    _load(model, expected, weights, path)
    return weights


def finetune_from(model: nn.Module, path: str) -> None:
    """Start ``model`` from a checkpoint of another resolution, number of classes, or without iRPE.

    Absolute positions are interpolated (bicubic), a head for other classes keeps its new values, and so do RPE
    tables that the checkpoint lacks; each is said in a line. Raises ``UserError`` for any other difference.
    """
    weights = model_weights(load_checkpoint(path), path)
    expected = model.state_dict()
    heads = _heads_of_other_classes(model, expected, weights)
    if heads:
        print_once(f"finetune: new {', '.join(heads)}, for {len(expected[heads[0]])} classes instead of "
                   f"{len(weights[heads[0]])}")
    tables = [key for key in expected if "lookup_table" in key and key not in weights]
    if tables:
        print_once(f"finetune: {path} lacks {len(tables)} tables of the relative positions; they start at zero")
    if "pos_embed" in expected and "pos_embed" in weights:
        weights["pos_embed"] = _fit_positions(weights["pos_embed"], model)
    new = {key: expected[key] for key in heads + tables}
    _load(model, expected, {**weights, **new}, path)


def _load(model: nn.Module, expected: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor],
          path: str) -> None:
    if differences := key_differences(expected, weights):
        raise UserError(f"checkpoint {path} belongs to another model: {differences}")
    model.load_state_dict(weights)


def _heads_of_other_classes(model: nn.Module, expected: Mapping[str, torch.Tensor],
                            weights: Mapping[str, torch.Tensor]) -> list[str]:
    """Keys of the classifiers that differ from the checkpoint's in nothing but the number of classes."""
    names = model.pretrained_cfg.get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
    return [key for key, value in expected.items() if key.startswith(prefixes) and key in weights
            and len(value) != len(weights[key]) and value.shape[1:] == weights[key].shape[1:]]


def _fit_positions(positions: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """Positions (1, L, C) of a square map, interpolated to the model's map if that has another size."""
    height, width = model.patch_embed.grid_size
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    side = math.isqrt(positions.shape[1] - prefix)
    if positions.shape[1] == prefix + height * width or side * side != positions.shape[1] - prefix:
        return positions
    print_once(f"finetune: positions interpolated from {side}×{side} to {height}×{width}")
    return resample_abs_pos_embed(positions, (height, width), num_prefix_tokens=prefix)
