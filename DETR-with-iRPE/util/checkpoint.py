"""What a checkpoint contains, how a run resumes from it, and how another run starts from its weights."""

import argparse
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from datasets.coco import check_same_categories
from util import runtime
from util.runtime import Checkpoint, UserError, key_differences, model_weights, print_once, replacing


@dataclass
class TrainingState:
    """Everything that changes in training; `model` is the bare one, without DistributedDataParallel."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    loss_scaler: torch.amp.GradScaler
    categories: dict = field(default_factory=dict)  # id → name

    def save(
        self, path: pathlib.Path, epoch: int, args: argparse.Namespace, progress: dict[str, Any] | None = None
    ) -> None:
        """Write the state in the format of the released checkpoints, with the names of the categories.

        After some epochs, a copy with the epoch's number in its name is kept.

        Args:
            epoch: the epoch that is done, or with `progress` the one that is being trained.
            progress: what of the epoch is done, as in `runtime.resume_point`.
        """
        if not all(value.isfinite().all() for value in self.model.state_dict().values()):
            raise UserError("the weights are not finite and are not saved")
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "epoch": epoch,
            "args": args,
            "scaler": self.loss_scaler.state_dict(),
            "categories": self.categories,
        }
        if progress:
            state["progress"] = progress
        elif (epoch + 1) % args.lr_drop == 0 or (epoch + 1) % 100 == 0:
            with replacing(path.with_name(f"checkpoint{epoch:04}.pth")) as file:
                torch.save(state, file)
        with replacing(path, keep_previous=True) as file:
            torch.save(state, file)

    def check_categories(self, checkpoint: Mapping[str, Any], path: str) -> None:
        """Raise UserError if the checkpoint names its categories and they differ from those of the data set."""
        check_same_categories(checkpoint.get("categories") or {}, f"checkpoint {path}", self.categories, "the data set")

    def start_at(self, epoch: int) -> None:
        """Set the learning rates of an epoch, for a start there without the state of the schedule."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.lr_scheduler.gamma ** (epoch // self.lr_scheduler.step_size)
        self.lr_scheduler.last_epoch = epoch

    def resume(self, checkpoint: Checkpoint, args: argparse.Namespace) -> tuple[int, dict[str, Any] | None] | None:
        """Take over what the checkpoint holds. A note lists the flags of `args` that are not followed.

        Returns: the epoch to train and the progress in it; None if the checkpoint holds weights only.
        Raises: UserError if it is damaged, or belongs to another model or optimizer.
        """
        path, content = checkpoint.path, checkpoint.content
        load_weights(self.model, content, path, classes_cure=FINETUNE_CURE)
        self.check_categories(content, path)
        if not {"optimizer", "lr_scheduler", "epoch"} <= content.keys():
            print_once(f"note: {path} holds weights only; the optimizer starts from scratch")
            _note_values_kept(path, args, content, None, {})
            return None
        asked = _kept_values(self.optimizer, self.lr_scheduler)
        try:
            self.optimizer.load_state_dict(content["optimizer"])
            self.lr_scheduler.load_state_dict(content["lr_scheduler"])
            if content.get("scaler"):
                self.loss_scaler.load_state_dict(content["scaler"])
            epoch, progress = runtime.resume_point(content)
            kept = _kept_values(self.optimizer, self.lr_scheduler)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"checkpoint {path} is damaged, or its run trained other parameters ({error!r}): give that run's "
                "--frozen_weights, --no_pretrained_backbone and --lr_backbone to continue with it, or --finetune to "
                "start from its weights"
            ) from error
        values = {flag: (asked[flag], kept[flag]) for flag in asked if flag in kept}
        _note_values_kept(path, args, content, epoch, values)
        return epoch, progress


# A resumed run follows the flags of main.py, except those of _kept_values, whose values come from the checkpoint, and
# these, which matter only at the start of a run; each is given with the value that means "not given".
START_FLAGS = {"frozen_weights": None, "start_epoch": 0}


def _kept_values(optimizer, scheduler):
    """The values of the flags that a checkpoint keeps, as the optimizer and the schedule hold them.

    They are not read from the checkpoint's `args`: some files lack them, and after a resume they are the flags of the
    resumed run, not those of the first one.
    """
    rates = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    values = {"lr": rates[0], "weight_decay": optimizer.param_groups[0]["weight_decay"], "lr_drop": scheduler.step_size}
    if optimizer.param_groups[1]["params"]:
        values["lr_backbone"] = rates[1]
    return values


def _note_values_kept(path, args, checkpoint, epoch, values):
    """Note the flags that are ignored: among `values` (asked, in use), and among START_FLAGS."""
    values = values | runtime.start_values_kept(args, checkpoint, START_FLAGS, epoch)
    runtime.note_values_kept(
        path,
        {f"--{flag}": pair for flag, pair in values.items()},
        f"A new run follows the command line: leave --resume out, or use --resume {path} --finetune to start from "
        "these weights",
    )


def count_classes(weights: Mapping[str, torch.Tensor]) -> int | None:
    """The `num_classes` of a model with these weights; None if they have no class head."""
    return next((len(weight) - 1 for key, weight in weights.items() if key.endswith("class_embed.weight")), None)


# What a user can do about a checkpoint for another number of classes than the data has, or about one of another model.
# `{classes}` stands for the checkpoint's number.
CLASSES_CURE = "check --coco_path, or add --num_classes {classes} if the category ids mean the same"
FINETUNE_CURE = f"{CLASSES_CURE}, or use --finetune with --resume to start from its weights with a new class head"
MODEL_CURE = "check --enc_rpe2d, --backbone and the other flags of the model"


def load_weights(
    model: nn.Module,
    checkpoint: Mapping[str, Any],
    path: str,
    new_class_head: bool = False,
    classes_cure: str = CLASSES_CURE,
    model_cure: str = MODEL_CURE,
) -> None:
    """Load a checkpoint's weights into the model. Batch norm may be frozen or trainable on either side.

    Args:
        new_class_head: keep the model's own class head, with a note, if the numbers of classes differ.
        classes_cure: end of the message for another number of classes: what to do. `{classes}` stands for the
            checkpoint's number.
        model_cure: end of the message for other differences.
    Raises: UserError that says which keys differ.
    """
    weights = model_weights(checkpoint, path)
    expected = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    _check_mask_head(weights, expected, path)
    head = [
        key for key in expected if "class_embed." in key and key in weights and len(weights[key]) != len(expected[key])
    ]
    if head:
        counts = [len(values[head[0]]) - 1 for values in (weights, expected)]
        if not new_class_head:
            cure = classes_cure.format(classes=counts[0])
            raise UserError(f"checkpoint {path} has {counts[0]} classes and this run {counts[1]}: {cure}")
        print_once(f"finetune: new class head for {counts[1]} classes instead of {counts[0]}")
        weights.update({key: expected[key] for key in head})
    differences = key_differences(
        expected, {key: value for key, value in weights.items() if not key.endswith("num_batches_tracked")}
    )
    if differences:
        raise UserError(f"checkpoint {path} belongs to another configuration: {differences}; {model_cure}")
    model.load_state_dict(weights, strict=False)


def _check_mask_head(weights: Mapping[str, Any], expected: Mapping[str, Any], path: str) -> None:
    """Raise UserError if only one of the checkpoint and the model has a mask head."""
    in_checkpoint = any(key.startswith("mask_head.") for key in weights)
    in_model = any(key.startswith("mask_head.") for key in expected)
    if in_checkpoint and not in_model:
        raise UserError(f"checkpoint {path} has a mask head: give it to --resume, with --masks")
    if in_model and not in_checkpoint:
        raise UserError(
            f"checkpoint {path} has no mask head: omit --masks to detect boxes only, or train a mask head on this "
            f"detector with --frozen_weights {path}"
        )
