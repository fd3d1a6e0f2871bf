"""What a checkpoint contains, how a run resumes from it, and how another model starts from its weights."""

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.scheduler.plateau_lr import PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

import runtime
from runtime import Checkpoint, UserError, key_differences, load_checkpoint, model_weights, print_once, replacing


@dataclass
class TrainingState:
    """Everything that changes in training.

    ``model`` is the bare one, without DistributedDataParallel. ``classes`` are the names of the classes in the order
    of their ids.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: Scheduler | None
    loss_scaler: torch.amp.GradScaler
    model_ema: ModelEmaV3 | None
    classes: Sequence[str] = ()
    max_accuracy: float = 0.0

    def save(
        self, path: str | os.PathLike, epoch: int, args: argparse.Namespace, progress: dict[str, Any] | None = None
    ) -> None:
        """Write the state in the format of the released checkpoints, with the best top-1 and the names of the classes.

        Args:
            epoch: the epoch that is done, or with ``progress`` the one that is being trained.
            progress: what of the epoch is done, as in ``runtime.resume_point``.
        """
        if not all(value.isfinite().all() for value in self.model.state_dict().values()):
            raise UserError("the weights are not finite and are not saved")
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": _scheduler_state(self.lr_scheduler),
            "epoch": epoch,
            "model_ema": self.model_ema.module.state_dict() if self.model_ema else None,
            "scaler": self.loss_scaler.state_dict(),
            "args": args,
            "max_accuracy": self.max_accuracy,
            "classes": list(self.classes),
        }
        with replacing(path, keep_previous=True) as file:
            torch.save(state | ({"progress": progress} if progress else {}), file)

    def resume(self, checkpoint: Checkpoint, args: argparse.Namespace) -> tuple[int, dict | None] | None:
        """Take over what the checkpoint holds.

        If the checkpoint has no moving average, the average starts from its weights.

        Returns: the epoch to train and the progress in it; None if the checkpoint holds weights only.
        Raises: UserError if it is damaged, or belongs to another model, or to an optimizer or schedule other than those
            of ``args``.
        """
        path, content = checkpoint.path, checkpoint.content
        weights = load_weights(self.model, content, path, or_else=", or give it to --finetune for a new head")
        check_classes(content, path, self.classes)
        if self.model_ema:
            averages = model_weights(content, path, "model_ema") if content.get("model_ema") else weights
            _load(self.model_ema.module, averages, f"checkpoint {path}: its 'model_ema'")
        if "optimizer" not in content or "epoch" not in content:
            print_once(f"note: {path} holds weights only; the optimizer starts from scratch")
            _note_values_kept(path, args, content, None, {})
            return None
        _check_same_flags(checkpoint.args, args, path)
        asked = _kept_values(self.optimizer, self.lr_scheduler)
        self._resume_optimizer(checkpoint, args)
        epoch, progress = self._resume_schedule(checkpoint, args)
        kept = _kept_values(self.optimizer, self.lr_scheduler)
        if isinstance(self.lr_scheduler, PlateauLRScheduler) and epoch <= self.lr_scheduler.warmup_t:
            del kept["lr"]  # the rest of the warm-up leads to the rate of the flags
        values = {flag: (asked[flag], kept[flag]) for flag in asked if flag in kept}
        _note_values_kept(path, args, content, epoch, values)
        return epoch, progress

    def _resume_optimizer(self, checkpoint: Checkpoint, args: argparse.Namespace) -> None:
        state = checkpoint.content["optimizer"]
        try:
            if not hasattr(checkpoint.args, "opt"):
                _check_hyperparameters(self.optimizer, state)
            _load_optimizer_state(self.optimizer, state)
        except _MISFITS as error:
            raise UserError(
                f"the optimizer in {checkpoint.path} is not --opt {args.opt} of this model: {error}"
            ) from error

    def _resume_schedule(self, checkpoint: Checkpoint, args: argparse.Namespace) -> tuple[int, dict | None]:
        """Take over the schedule, the loss scale and the best accuracy; returns the epoch and the progress in it."""
        content = checkpoint.content
        try:
            if self.lr_scheduler and content.get("lr_scheduler"):
                _load_scheduler_state(self.lr_scheduler, content["lr_scheduler"])
            if content.get("scaler"):
                self.loss_scaler.load_state_dict(content["scaler"])
            self.max_accuracy = float(content.get("max_accuracy", 0.0))
            _kept_values(self.optimizer, self.lr_scheduler)  # a damaged schedule may lack one of them
            return runtime.resume_point(content)
        except _MISFITS as error:
            raise UserError(
                f"the schedule in {checkpoint.path} is not --sched {args.sched}, or the file is damaged: {error}"
            ) from error


def check_classes(checkpoint: Mapping[str, Any], path: str, classes: Sequence[str]) -> None:
    """Raise ``UserError`` if the checkpoint names its classes and they differ from those of the data set."""
    saved = checkpoint.get("classes") or []
    if not (isinstance(saved, list) and all(isinstance(name, str) for name in saved)):
        raise UserError(f"checkpoint {path} is damaged: its classes are not a list of names")
    pairs = zip(saved, classes, strict=False)
    if differing := [(number, *names) for number, names in enumerate(pairs) if names[0] != names[1]]:
        number, before, now = differing[0]
        raise UserError(
            f"checkpoint {path} was trained on other classes than those of the data set: {len(differing)} class "
            f"{'id has' if len(differing) == 1 else 'ids have'} another name, such as {number} ({before} in the "
            f"checkpoint, {now} in the data set); check --data-set and --data-path (if it has a train/, that folder "
            "determines the class ids)"
        )


def with_model_flags(args: argparse.Namespace, checkpoint: Checkpoint) -> argparse.Namespace:
    """A copy of the flags with the ``rpe`` and ``model_kwargs`` of the checkpoint's run, if the checkpoint has them.

    A note reports another image size if the model has no absolute positions; with absolute positions, loading would
    fail anyway.

    Raises: UserError if ``args`` has other values for them.
    """
    path, saved = checkpoint.path, checkpoint.args
    size = getattr(saved, "input_size", args.input_size)
    if size != args.input_size and "pos_embed" not in model_weights(checkpoint.content, path):
        print_once(f"note: {path} was trained with --input-size {size}, and this is with {args.input_size}")
    flags = {}
    for name, flag, kind in (("rpe", "--rpe", str), ("model_kwargs", "--model-kwargs", dict)):
        before, now = getattr(saved, name, None), getattr(args, name)
        if not isinstance(before, (kind, type(None))):
            raise UserError(f"checkpoint {path} is damaged: its {flag} is {before!r}")
        if before is not None and now and now != before:
            raise UserError(
                f"{path} was trained with {flag} {before or 'left out'}, not with {now}: leave it out"
                + ("" if args.eval else ", or use --finetune for a new run from its weights")
            )
        flags[name] = now or before or kind()
    return argparse.Namespace(**{**vars(args), **flags})


# A resumed run follows the flags of main.py, except --lr, the length of the schedule in --epochs (see _kept_values) and
# the flags in these three tables, whose values come from the checkpoint. Of --seed, only the schedule's noise does.
# Flags whose values are in the optimizer: their names in the parameter groups of timm's optimizers.
OPTIMIZER_FLAGS = {
    "weight_decay": ("weight_decay",),
    "opt_betas": ("betas", "beta1"),
    "opt_eps": ("eps",),
    "momentum": ("momentum",),
}
# Flags whose values are in the schedule: their names in timm's schedules, or in PyTorch's plateau schedule.
SCHEDULE_FLAGS = {
    "warmup_epochs": ("warmup_t",),
    "warmup_lr": ("warmup_lr_init",),
    "min_lr": ("lr_min", "min_lrs"),
    "decay_epochs": ("decay_t",),
    "decay_rate": ("decay_rate", "power", "factor"),
    "patience_epochs": ("patience",),
    "cooldown_epochs": ("cooldown",),
    "lr_noise": ("noise_range_t",),
    "lr_noise_pct": ("noise_pct",),
    "lr_noise_std": ("noise_std",),
    "seed": ("noise_seed",),
}
# Flags that matter only at the start of a run, each with the value that means "not given".
START_FLAGS = {"pretrained": False, "finetune": "", "start_epoch": 0}


def _kept_values(optimizer: torch.optim.Optimizer, scheduler: Scheduler | None) -> dict[str, Any]:
    """The values of the flags that a checkpoint keeps, as far as this optimizer and this schedule have them.

    They are read from the states, not from the checkpoint's ``args``: some files lack them; they do not show that the
    learning rate was scaled for another number of images per step; and after a resume they are the flags of the resumed
    run.
    """
    group = optimizer.param_groups[-1]  # timm puts the weights without decay first
    values = {"lr": group.get("initial_lr", group["lr"])}
    values |= {flag: group[name] for flag, names in OPTIMIZER_FLAGS.items() for name in names if name in group}
    if scheduler is None:
        return values
    held = dict(vars(scheduler))
    if isinstance(scheduler, PlateauLRScheduler):
        held |= {**vars(scheduler.lr_scheduler), "min_lrs": scheduler.lr_scheduler.min_lrs[-1]}
    else:
        values["lr"] = held["base_values"][-1]
    if "t_initial" in held:
        values["epochs"] = held["t_initial"] + (held["warmup_t"] if "stable_fn" in held else 0)  # wsd warms up before
    if held["noise_range_t"] is None:  # then nothing else about the noise matters
        held = {name: value for name, value in held.items() if name not in ("noise_pct", "noise_std", "noise_seed")}
    return values | {flag: held[name] for flag, names in SCHEDULE_FLAGS.items() for name in names if name in held}


def _note_values_kept(
    path: str,
    args: argparse.Namespace,
    checkpoint: Mapping[str, Any],
    epoch: int | None,
    values: Mapping[str, tuple[Any, Any]],
) -> None:
    """Note the flags that are ignored: among ``values`` (asked, in use), and among ``START_FLAGS``."""
    values = values | runtime.start_values_kept(args, checkpoint, START_FLAGS, epoch)
    images = args.batch_size * args.world_size
    words = {
        "lr": f" scaled to {images} images a step",
        "epochs": " for the learning-rate schedule",
        "lr_noise": " in epochs",
        "seed": " for --lr-noise",
        "pretrained": " for the initial weights",
        "finetune": " for the initial weights",
    }
    names = {flag: flag if flag == "start_epoch" else flag.replace("_", "-") for flag in values}
    runtime.note_values_kept(
        path,
        {f"--{names[flag]}{words.get(flag, '')}": pair for flag, pair in values.items()},
        f"A new run follows the command line: leave --resume out, or use --finetune {path} instead to start from "
        "these weights",
    )


# What the libraries raise for a state that does not fit.
_MISFITS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
# Entries of parameter groups that do not change the result of a step; they differ between versions of PyTorch.
_NO_HYPERPARAMETERS = {
    "params",
    "param_names",
    "initial_lr",
    "foreach",
    "fused",
    "capturable",
    "differentiable",
    "maximize",
    "decoupled_weight_decay",
}


def _check_same_flags(saved: Any, args: argparse.Namespace, path: str) -> None:
    for name in ("opt", "sched"):
        before, now = getattr(saved, name, None), getattr(args, name)
        if before is not None and str(before).lower() != now.lower():
            raise UserError(
                f"{path} was trained with --{name} {before} and cannot continue with --{name} {now}: use the "
                "same, or --finetune for a new run from its weights"
            )


def _check_hyperparameters(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Raise ``ValueError`` if the state is another optimizer's, for files that do not name their optimizer."""
    for number, (own, saved) in enumerate(zip(optimizer.param_groups, state["param_groups"], strict=False)):
        if different := (own.keys() ^ saved.keys()) - _NO_HYPERPARAMETERS:
            raise ValueError(
                "only one of the two optimizers, the checkpoint's and this run's, has "
                f"{', '.join(sorted(different))} in group {number}"
            )


def _load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    if len(state["param_groups"]) != len(optimizer.param_groups):
        raise ValueError(
            f"it has {len(state['param_groups'])} parameter groups instead of {len(optimizer.param_groups)}, for "
            "example because only one of the two runs has --weight-decay 0"
        )
    optimizer.load_state_dict(state)
    for parameter, values in optimizer.state.items():
        for name in ("exp_avg", "momentum_buffer"):  # the others are not of the parameter's shape in all optimizers
            if values.get(name) is not None and values[name].shape != parameter.shape:
                raise ValueError(f"{name} is {tuple(values[name].shape)} for a weight of {tuple(parameter.shape)}")


def _scheduler_state(scheduler: Scheduler | None) -> dict[str, Any] | None:
    if not isinstance(scheduler, PlateauLRScheduler):
        return scheduler and scheduler.state_dict()
    # timm's state dict lacks the counters that decide when the next decay comes.
    return {
        **scheduler.state_dict(),
        "plateau": scheduler.lr_scheduler.state_dict(),
        "restore_lr": scheduler.restore_lr,
    }


def _load_scheduler_state(scheduler: Scheduler, state: dict[str, Any]) -> None:
    if not isinstance(scheduler, PlateauLRScheduler) and len(state["base_values"]) != len(scheduler.base_values):
        raise ValueError("it is for another number of parameter groups")
    scheduler.load_state_dict(state)
    if isinstance(scheduler, PlateauLRScheduler) and "plateau" in state:
        scheduler.lr_scheduler.load_state_dict(state["plateau"])
        scheduler.restore_lr = state["restore_lr"]


def load_weights(
    model: nn.Module, checkpoint: Mapping[str, Any], path: str, or_else: str = ""
) -> dict[str, torch.Tensor]:
    """Load a checkpoint of the same model, and return its weights.

    Args:
        or_else: end of the message for another number of classes: what to do besides choosing other data.
    Raises: UserError that names the keys that differ, or the numbers of classes.
    """
    weights = model_weights(checkpoint, path)
    if counts := _other_classes(model, weights):
        raise UserError(
            f"checkpoint {path} has {counts[0]} classes and the data set {counts[1]}: "
            f"check --data-set and --data-path{or_else}"
        )
    _load(model, weights, f"checkpoint {path}")
    return weights


def load_teacher(teacher: nn.Module, name: str, path: str, classes: Sequence[str] = ()) -> None:
    """Load the weights of ``--teacher-path`` into the teacher.

    Absolute positions of another resolution are interpolated.

    Args:
        name: value of ``--teacher-model``, for messages.
        path: value of ``--teacher-path``.
        classes: names of the data set's classes in the order of their ids.
    Raises: UserError if the weights belong to another model or to other classes.
    """
    checkpoint = load_checkpoint(path)
    weights = model_weights(checkpoint, path)
    if counts := _other_classes(teacher, weights):
        raise UserError(
            f"the teacher {path} has {counts[0]} classes and the data set {counts[1]}: a teacher must know "
            "the classes that it teaches; check --data-set and --data-path, or give a --teacher-path that "
            "was trained on them"
        )
    check_classes(checkpoint, path, classes)
    _fit_positions(weights, teacher)
    _load(teacher, weights, f"checkpoint {path}", f" than --teacher-model {name}")


def finetune_from(model: nn.Module, path: str) -> bool:
    """Start ``model`` from a checkpoint, which may be of another resolution, for other classes, or without iRPE.

    Absolute positions are interpolated (bicubic). The model keeps its own head if the numbers of classes differ, and
    its own RPE tables if the checkpoint has none. A line is printed for each of these.

    Returns: whether the model kept its own head.
    Raises: UserError for any other difference.
    """
    weights, expected = model_weights(load_checkpoint(path), path), model.state_dict()
    heads = _heads_of_other_classes(model, expected, weights)
    if heads:
        print_once(
            f"finetune: new {', '.join(heads)}, for {len(expected[heads[0]])} classes instead of "
            f"{len(weights[heads[0]])}"
        )
    tables = [key for key in expected if "lookup_table" in key and key not in weights]
    if tables:
        print_once(f"finetune: {path} lacks {len(tables)} tables of the relative positions; they start at zero")
    _fit_positions(weights, model)
    _load(model, {**weights, **{key: expected[key] for key in heads + tables}}, f"checkpoint {path}")
    return bool(heads)


def _load(model: nn.Module, weights: Mapping[str, torch.Tensor], source: str, than: str = "") -> None:
    if differences := key_differences(model.state_dict(), weights):
        side = _map_side(weights, model)
        hint = (
            f"; its position embeddings are for --input-size {side * model.patch_embed.patch_size[0]}"
            if side and weights["pos_embed"].shape[1] != model.pos_embed.shape[1]
            else ""
        )
        raise UserError(f"{source} belongs to another model{than}: {differences}{hint}")
    model.load_state_dict(weights)


def _heads_of_other_classes(
    model: nn.Module, expected: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]
) -> list[str]:
    """Keys of the classifiers that differ from the checkpoint's in nothing but the number of classes."""
    names = model.pretrained_cfg.get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
    return [
        key
        for key, value in expected.items()
        if key.startswith(prefixes)
        and key in weights
        and value.ndim == weights[key].ndim
        and len(value) != len(weights[key])
        and value.shape[1:] == weights[key].shape[1:]
    ]


def _other_classes(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> tuple[int, int] | None:
    """(the checkpoint's number of classes, the model's) if they differ."""
    expected = model.state_dict()
    heads = _heads_of_other_classes(model, expected, weights)
    return (len(weights[heads[0]]), len(expected[heads[0]])) if heads else None


def _prefix_positions(model: nn.Module) -> int:
    # In timm 1.0.15, an Eva has positions for every prefix token, and lacks the attribute that would say so.
    return 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens


def _map_side(weights: Mapping[str, torch.Tensor], model: nn.Module) -> int | None:
    """Patches along a side of the square map that the positions (1, L, C) belong to; None if there is none."""
    has_positions = isinstance(model, (VisionTransformer, Eva)) and model.pos_embed is not None
    if not has_positions or "pos_embed" not in weights or weights["pos_embed"].ndim != 3:
        return None
    patches = weights["pos_embed"].shape[1] - _prefix_positions(model)
    side = math.isqrt(max(0, patches))
    return side if side * side == patches else None


def _fit_positions(weights: dict[str, torch.Tensor], model: nn.Module) -> None:
    """Interpolate the positions of a square map to the model's map if that has another size."""
    side = _map_side(weights, model)
    if side and weights["pos_embed"].shape[1] != model.pos_embed.shape[1]:
        height, width = model.patch_embed.grid_size
        print_once(f"positions interpolated from {side}×{side} to {height}×{width}")
        weights["pos_embed"] = resample_abs_pos_embed(
            weights["pos_embed"], (height, width), num_prefix_tokens=_prefix_positions(model)
        )
