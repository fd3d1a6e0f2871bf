"""Train and evaluate DeiT with iRPE.

torchrun --nproc_per_node=8 main.py --model NAME --data-path DIR --output_dir OUT
python -m torch.distributed.launch --nproc_per_node=8 --use_env main.py ... --eval --resume OUT/checkpoint.pth
python main.py ... --device cpu
"""

import argparse
import json
import math
import os
import time
from collections.abc import Sequence
from typing import Any

import torch
from timm.data import Mixup
from timm.layers import to_2tuple
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler
from timm.scheduler.plateau_lr import PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, ParseKwargs
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import runtime
from checkpoint import TrainingState, check_classes, finetune_from, load_teacher, load_weights, with_model_flags
from datasets import build_collate, build_dataset
from engine import evaluate, train_one_epoch
from irpe import RPE_GRAMMAR, parse_rpe
from losses import DistillationLoss
from rpe_models import create_model
from runtime import Checkpoint, Job, UserError, get_rank, get_world_size, print_once, seed_everything
from samplers import RASampler, ShardSampler


class KeyValues(ParseKwargs):
    """timm's action for key=value arguments, with one sentence for a word that is not of this form."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: list[str],
        option_string: str | None = None,
    ) -> None:
        try:
            super().__call__(parser, namespace, values, option_string)
        except (SyntaxError, ValueError) as error:
            raise argparse.ArgumentError(self, f"{' '.join(values)} is not key=value ..., such as depth=6") from error


def get_args_parser() -> argparse.ArgumentParser:
    """Parser of all flags, to be given to ``runtime.ArgumentParser`` as a parent."""
    parser = runtime.ArgumentParser("DeiT with iRPE", add_help=False)
    add = parser.add_argument

    add("--batch-size", default=64, type=int, help="images per step and rank")
    add("--epochs", default=300, type=int)

    # Model
    add(
        "--model",
        default="deit_base_patch16_224",
        type=str,
        metavar="NAME",
        help="deit_{size}_patch16_{res}_{bias|ctx}_{method}_{buckets}_{shared|unshared}_{q|k|v|...}, or any timm ViT",
    )
    add(
        "--rpe",
        default="",
        metavar="rpe-{ratio}-{method}-{mode}-{shared_head}-{on}",
        help="iRPE for a ViT without iRPE in its name, such as rpe-1.9-product-ctx-1-k; --resume reads it from the "
        "checkpoint",
    )
    add(
        "--model-kwargs",
        nargs="*",
        default={},
        action=KeyValues,
        metavar="KEY=VALUE",
        help="arguments of timm's model, such as patch_size=4 depth=6; --resume reads them from the checkpoint",
    )
    add(
        "--pretrained",
        action="store_true",
        help="load the authors' released weights or, for other timm models, timm's",
    )
    add("--input-size", default=224, type=int, help="side length of the square input images, in pixels")
    add(
        "--drop",
        type=float,
        default=0.0,
        metavar="P",
        help="dropout after the position embeddings, the attention and both MLP layers",
    )
    add("--drop-path", type=float, default=0.1, metavar="P", help="stochastic depth rate of the last block")
    add("--model-ema", action="store_true", default=True, help="keep a moving average of the weights (the default)")
    add("--no-model-ema", action="store_false", dest="model_ema")
    add("--model-ema-decay", type=float, default=0.99996)
    add("--model-ema-force-cpu", action="store_true", default=False, help="keep the moving average in main memory")

    # Optimizer
    add("--opt", default="adamw", type=str, help="any of timm's optimizers")
    add("--opt-eps", default=1e-8, type=float)
    add("--opt-betas", default=None, type=float, nargs="+")
    add("--clip-grad", type=float, default=None, metavar="NORM")
    add("--momentum", type=float, default=0.9)
    add(
        "--weight-decay",
        type=float,
        default=0.05,
        help="not applied to 1-D weights, biases, position embeddings, and class and distillation tokens",
    )

    # Learning rate
    add("--sched", default="cosine", type=str, help="any of timm's learning rate schedules")
    add(
        "--lr",
        type=float,
        default=5e-4,
        help="learning rate for a total batch size of 512; scaled linearly with the total batch size",
    )
    add(
        "--lr-noise",
        type=float,
        nargs="+",
        default=None,
        help="fraction of the epochs at which noise starts (and ends)",
    )
    add("--lr-noise-pct", type=float, default=0.67, help="limit of the noise, relative to the learning rate")
    add("--lr-noise-std", type=float, default=1.0, help="standard deviation of the noise (timm 1.0.15 ignores it)")
    add("--warmup-lr", type=float, default=1e-6, help="learning rate at the start of the warm-up; not scaled")
    add("--min-lr", type=float, default=1e-5, help="lowest learning rate after the warm-up; not scaled")
    add("--decay-epochs", type=float, default=30, help="epochs between two decays of --sched step")
    add("--warmup-epochs", type=int, default=5)
    add(
        "--cooldown-epochs",
        type=int,
        default=10,
        help="epochs after a decay by --sched plateau that do not count towards --patience-epochs",
    )
    add("--patience-epochs", type=int, default=10, help="epochs without a better top-1 before --sched plateau decays")
    add("--decay-rate", "--dr", type=float, default=0.1)

    # Augmentation
    add(
        "--color-jitter",
        type=float,
        default=0.4,
        help="strength of the colour jitter, which most --aa policies replace",
    )
    add("--aa", type=str, default="rand-m9-mstd0.5-inc1", help="timm's AutoAugment or RandAugment policy, or none")
    add(
        "--hflip",
        type=float,
        default=0.5,
        metavar="P",
        help="probability of a horizontal flip; use 0 for images of text",
    )
    add(
        "--min-crop",
        type=float,
        default=0.08,
        metavar="SHARE",
        help="smallest crop as a fraction of the image's area; use a larger fraction if objects are small",
    )
    add("--smoothing", type=float, default=0.1, help="label smoothing")
    add("--train-interpolation", type=str, default="bicubic", help="bicubic, bilinear or random")
    add(
        "--repeated-aug",
        action="store_true",
        default=True,
        help="repeated augmentation: three differently augmented copies of each image (the default)",
    )
    add("--no-repeated-aug", action="store_false", dest="repeated_aug")
    add("--load-tar", action="store_true", help="read train.tar and val.tar instead of folders")
    add("--reprob", type=float, default=0.25, metavar="P", help="probability of random erasing")
    add("--remode", type=str, default="pixel", help="erase with noise (pixel), one colour (rand) or zero (const)")
    add("--recount", type=int, default=1, help="maximum number of erased rectangles")
    add("--resplit", action="store_true", default=False, help="erase nothing in the first half of a batch")
    add("--mixup", type=float, default=0.8, metavar="ALPHA")
    add("--cutmix", type=float, default=1.0, metavar="ALPHA")
    add(
        "--cutmix-minmax",
        type=float,
        nargs="+",
        default=None,
        help="smallest and largest side of the pasted rectangle, relative to the image's",
    )
    add("--mixup-prob", type=float, default=1.0, metavar="P", help="probability of mixup or cutmix")
    add("--mixup-switch-prob", type=float, default=0.5, metavar="P", help="probability of cutmix if both are on")
    add(
        "--mixup-mode",
        type=str,
        default="batch",
        help="draw the mixing ratio once per batch (batch), per pair of images (pair) or per image (elem)",
    )

    # Distillation and fine-tuning
    add("--teacher-model", default="regnety_160", type=str, metavar="NAME")
    add("--teacher-path", type=str, default="", help="checkpoint or URL")
    add("--distillation-type", default="none", choices=["none", "soft", "hard"], type=str)
    add("--distillation-alpha", default=0.5, type=float, help="weight of the distillation loss, from 0 to 1")
    add("--distillation-tau", default=1.0, type=float, help="temperature of soft distillation")
    add("--finetune", default="", help="checkpoint or URL to start from; resolution and classes may differ")

    # Data
    add("--data-path", default="/datasets01/imagenet_full_size/061417/", type=str, help="folder with train/ and val/")
    add(
        "--data-set",
        default="IMNET",
        choices=["CIFAR", "IMNET", "INAT", "INAT19", "FOLDER"],
        type=str,
        help="FOLDER has the layout of IMNET and any number of classes",
    )
    add(
        "--inat-category",
        default="name",
        type=str,
        choices=["kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name"],
    )

    # Run
    add(
        "--output_dir",
        default="",
        help="folder for checkpoint.pth, log.txt and tensorboard/, or for eval.json with --eval; without it, nothing "
        "is written",
    )
    add("--device", default="cuda", help="cuda or cpu")
    add(
        "--amp-dtype",
        default=None,
        choices=["float32", "bfloat16", "float16"],
        help="data type of mixed precision; by default float16 on CUDA and float32 (none) on CPU",
    )
    add(
        "--compile",
        action="store_true",
        help="compile the whole model (and the teacher) with torch.compile: the first steps are slow, later ones "
        "faster; needs a C++ compiler and, on a GPU, Triton",
    )
    add("--seed", default=0, type=int)
    add(
        "--resume",
        default="",
        help="checkpoint or URL to resume from, or to evaluate; auto takes the newest one in "
        "--output_dir, and starts a new run if there is none",
    )
    add("--save-every", default=0, type=int, metavar="STEPS", help="also save within an epoch, every STEPS steps")
    add(
        "--step-timeout",
        default=60,
        type=int,
        metavar="SECONDS",
        help="end the run if a rank waits this long for another rank or for an image in a training step",
    )
    add("--start_epoch", default=0, type=int, metavar="N", help="first epoch, unless --resume gives it")
    add("--eval", action="store_true", help="evaluate only")
    add("--dist-eval", action="store_true", default=True, help="divide the evaluation among the ranks (the default)")
    add("--no-dist-eval", action="store_false", dest="dist_eval", help="every rank evaluates all images")
    add("--num_workers", default=10, type=int, help="DataLoader workers per rank")
    add("--pin-mem", action="store_true", help="use pinned memory for faster copies to the GPU (the default)")
    add("--no-pin-mem", action="store_false", dest="pin_mem")
    parser.set_defaults(pin_mem=True)

    # Processes
    add("--world_size", default=1, type=int, help="number of ranks; the launcher sets it")
    add(
        "--dist_url",
        default="env://",
        help="URL at which the ranks connect; env:// reads it from the environment variables that the launcher sets",
    )
    add("--local-rank", "--local_rank", type=int, default=None, help=argparse.SUPPRESS)  # torch.distributed.launch's
    return parser


def main(args: argparse.Namespace) -> dict[str, float]:
    """Train, or with ``args.eval`` only evaluate; returns the last evaluation's loss, acc1 and acc5."""
    device = runtime.find_device(args.device, args.world_size)
    check_args(args)
    if not args.eval:
        runtime.need_signals("training", *runtime.STOPPING)
    if args.compile:
        runtime.check_compiler(device)
    with Job(args.dist_url, runtime.step_timeout(args)) as job:
        runtime.prepare_output_dir(args.output_dir)
        with runtime.output_lock(args.output_dir):
            job.meet()
            return train_or_evaluate(args, job, device)


def train_or_evaluate(args: argparse.Namespace, job: Job, device: torch.device) -> dict[str, float]:
    """What ``main`` does after it has checked the flags, met the other ranks and locked the output directory."""
    seed_everything(args.seed)
    torch.backends.cudnn.benchmark = True
    checkpoint = runtime.checkpoint_to_resume(args.resume, args.output_dir, needed=args.eval)
    settings = run_settings(args, checkpoint)
    if settings.eval:
        loader, nb_classes = build_val_loader(settings, device)
        return evaluate_only(settings, job, device, checkpoint, loader, nb_classes)
    train_loader, nb_classes = build_train_loader(settings, device)
    val_loader, _ = build_val_loader(settings, device)
    run, state, criterion = start_run(settings, job, device, checkpoint, bool(args.resume), train_loader, nb_classes)
    del checkpoint  # its memory is needed for training
    with run:
        return train(run, device, state, criterion, val_loader, nb_classes)


def start_run(
    settings: argparse.Namespace,
    job: Job,
    device: torch.device,
    checkpoint: Checkpoint | None,
    rewrites_log: bool,
    train_loader: DataLoader,
    nb_classes: int,
) -> tuple[runtime.Run, TrainingState, DistillationLoss]:
    """A run that starts as ``settings`` say, or resumes from the checkpoint; with its state and loss.

    Args:
        rewrites_log: whether to drop the lines of log.txt that the run will write again; this is also true for
            ``--resume auto`` without a checkpoint.
    """
    classes = class_names(train_loader.dataset.dataset)
    state = build_state(settings, build_model(settings, nb_classes).to(device), classes)
    epoch, progress = resume(settings, state, checkpoint)
    criterion = build_criterion(settings, state.model, nb_classes, device, classes)
    compile_model(settings, state.model)
    job.connect(device)
    log = runtime.RunLog(settings.output_dir, epoch if rewrites_log else None)
    return runtime.Run(settings, job, log, state.save, train_loader, epoch, progress), state, criterion


def run_settings(args: argparse.Namespace, checkpoint: Checkpoint | None) -> argparse.Namespace:
    """A copy of the flags, completed with what the launcher and the checkpoint say.

    ``rank``, ``world_size`` and ``distributed`` are this process's place in the job. ``resume`` is the path that
    ``auto`` stands for ("" for none). ``rpe`` and ``model_kwargs`` are those of the model in the checkpoint.
    """
    settings = runtime.with_place(args)
    settings.resume = checkpoint.path if checkpoint else ""
    return with_model_flags(settings, checkpoint) if checkpoint else settings


# Checks of the flags
_RANGES = {
    "batch_size": (1, None),
    "epochs": (1, None),
    "input_size": (1, None),
    "drop": (0, 0.999),
    "drop_path": (0, 0.999),
    "model_ema_decay": (0, 1),
    "opt_eps": (0, None),
    "clip_grad": (1e-9, None),
    "momentum": (0, 1),
    "weight_decay": (0, None),
    "lr": (0, None),
    "min_lr": (0, None),
    "warmup_lr": (0, None),
    "decay_rate": (0, 1),
    "lr_noise_pct": (0.001, None),
    "lr_noise_std": (0, None),
    "warmup_epochs": (0, None),
    "decay_epochs": (1e-9, None),
    "cooldown_epochs": (0, None),
    "patience_epochs": (0, None),
    "color_jitter": (0, None),
    "hflip": (0, 1),
    "min_crop": (0.001, 1),
    "smoothing": (0, 0.999),
    "reprob": (0, 1),
    "recount": (1, None),
    "mixup": (0, None),
    "cutmix": (0, None),
    "mixup_prob": (0, 1),
    "mixup_switch_prob": (0, 1),
    "distillation_alpha": (0, 1),
    "distillation_tau": (1e-9, None),
    "seed": (0, None),
    "start_epoch": (0, None),
    "num_workers": (0, None),
    "world_size": (1, None),
    "save_every": (0, None),
    "step_timeout": (1, None),
}
_NAMES = {
    "mixup_mode": ("batch", "pair", "elem"),
    "remode": ("pixel", "rand", "const"),
    "train_interpolation": ("bicubic", "bilinear", "random"),
}


def check_args(args: argparse.Namespace) -> None:
    """Raise ``UserError`` for values that are impossible, alone or together."""
    _check_ranges(args)
    _check_names(args)
    _check_lists(args)
    model_arguments(args)
    _check_combinations(args)


def _check_ranges(args: argparse.Namespace) -> None:
    for name, (low, high) in _RANGES.items():
        value = getattr(args, name)
        if value is not None and not (low <= value < math.inf and (high is None or value <= high)):
            raise UserError(
                f"{_flag(name)} {value} is out of range: it must be "
                + (f"at least {low:g}" if high is None else f"from {low:g} to {high:g}")
            )


def _check_names(args: argparse.Namespace) -> None:
    for name, allowed in _NAMES.items():
        if getattr(args, name) not in allowed:
            raise UserError(f"{_flag(name)} {getattr(args, name)!r} is unknown: it must be one of {', '.join(allowed)}")
    if (attention := os.environ.get("IRPE_ATTENTION")) not in (None, "composed", "rows"):
        raise UserError(f"IRPE_ATTENTION is {attention!r}; it must be composed or rows, or not be set")


def _check_combinations(args: argparse.Namespace) -> None:
    if args.pretrained and args.finetune:
        raise UserError("--pretrained and --finetune both give the initial weights: leave one out")
    if not args.eval and _mixes(args) and args.batch_size % 2:
        raise UserError(
            f"--batch-size {args.batch_size} is odd, and mixup mixes pairs: use an even one, or --mixup 0 --cutmix 0"
        )
    if not args.eval and args.distillation_type != "none" and not args.teacher_path:
        raise UserError(
            f"--distillation-type {args.distillation_type} needs the teacher's weights: --teacher-path FILE"
        )


def _check_lists(args: argparse.Namespace) -> None:
    minmax, noise = args.cutmix_minmax, args.lr_noise
    if minmax is not None and not (
        len(minmax) == 2
        and 0 <= minmax[0] <= minmax[1] <= 1
        and int(args.input_size * minmax[0]) < int(args.input_size * minmax[1])
    ):
        raise UserError(
            f"--cutmix-minmax {minmax} must be two shares of the side, at least a pixel apart, such as 0.2 0.8"
        )
    if noise is not None and not (len(noise) <= 2 and all(map(math.isfinite, noise)) and noise == sorted(noise)):
        raise UserError(f"--lr-noise {noise} must be one or two increasing fractions of --epochs, such as 0.4 0.9")
    if noise is not None and args.lr_noise_pct < 0.001 * args.lr_noise_std:  # timm draws until one is small enough
        raise UserError(
            f"--lr-noise-pct {args.lr_noise_pct} must be at least a thousandth of --lr-noise-std {args.lr_noise_std}"
        )


def _flag(name: str) -> str:
    return "--" + (name if name in ("world_size", "num_workers", "start_epoch") else name.replace("_", "-"))


def _mixes(args: argparse.Namespace) -> bool:
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


# Data


def build_train_loader(args: argparse.Namespace, device: torch.device) -> tuple[DataLoader, int]:
    """Loader of full batches for this process, and the number of classes."""
    dataset, nb_classes = build_dataset(True, args)
    loader = _loader(
        args,
        runtime.SeededDataset(dataset),
        device,
        sampler=build_train_sampler(args, dataset),
        drop_last=True,
        collate_fn=build_collate(args),
    )
    return loader, nb_classes


def build_train_sampler(args: argparse.Namespace, dataset: Dataset) -> runtime.SeededSampler:
    """This process's images in the order of training, which depends on ``args.seed`` and the epoch.

    Raises: UserError if there are fewer images than a batch.
    """
    if args.repeated_aug:
        sampler = RASampler(dataset)
    else:
        sampler = DistributedSampler(dataset, get_world_size(), get_rank(), shuffle=True, seed=args.seed)
    if len(sampler) < args.batch_size:
        raise UserError(
            f"--batch-size {args.batch_size} is more than the {len(sampler)} images that each of "
            f"{get_world_size()} ranks sees in an epoch: make it smaller"
        )
    return runtime.SeededSampler(sampler, args.seed)


def build_val_loader(args: argparse.Namespace, device: torch.device) -> tuple[DataLoader, int]:
    """Loader of this process's share of the validation set (all of it with --no-dist-eval), and the classes."""
    dataset, nb_classes = build_dataset(False, args)
    shards = (get_world_size(), get_rank()) if args.dist_eval else (1, 0)
    return _loader(args, dataset, device, sampler=ShardSampler(dataset, *shards)), nb_classes


def class_names(dataset: Dataset) -> list[str]:
    """Names of a data set's classes in the order of their ids."""
    return [str(name) for name in dataset.classes]


def _loader(args: argparse.Namespace, dataset: Dataset, device: torch.device, **options) -> DataLoader:
    return DataLoader(
        dataset,
        args.batch_size,
        num_workers=args.num_workers,
        worker_init_fn=runtime.own_group,
        timeout=args.step_timeout if args.num_workers else 0,
        pin_memory=args.pin_mem and device.type == "cuda",
        **options,
    )


# Model, loss, optimizer

# Arguments of a model that --model-kwargs may not set, and what determines them instead.
_SET_BY = {
    "img_size": "--input-size",
    "pos_drop_rate": "--drop",
    "proj_drop_rate": "--drop",
    "drop_path_rate": "--drop-path",
    "num_classes": "--data-set",
    "pretrained": "--pretrained",
    "rpe_config": "--rpe",
    "checkpoint_path": "--finetune",
    "in_chans": "the images, which are RGB",
}
# What timm raises for arguments that a model does not have.
_UNBUILDABLE = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def model_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of ``create_model`` that the flags give, besides the name, ``pretrained`` and the classes.

    Raises: UserError for an invalid --rpe, or for an argument in --model-kwargs that another flag determines.
    """
    if set_elsewhere := args.model_kwargs.keys() & _SET_BY.keys():
        name = min(set_elsewhere)
        raise UserError(f"--model-kwargs {name}={args.model_kwargs[name]} is set by {_SET_BY[name]}: leave it out")
    try:
        rpe_config = parse_rpe(args.rpe) if args.rpe else None
    except ValueError as error:
        raise UserError(
            f"--rpe {args.rpe}: {error}; it must be {RPE_GRAMMAR}, such as rpe-1.9-product-ctx-1-k"
        ) from error
    return {
        "rpe_config": rpe_config,
        "img_size": args.input_size,
        "pos_drop_rate": args.drop,
        "proj_drop_rate": args.drop,
        "drop_path_rate": args.drop_path,
        **args.model_kwargs,
    }


def build_model(args: argparse.Namespace, nb_classes: int) -> nn.Module:
    """The model of ``--model`` for ``args.input_size`` pixels, with the initial weights that the flags ask for."""
    try:
        model = create_model(
            args.model, args.pretrained and not args.resume, num_classes=nb_classes, **model_arguments(args)
        )
    except _UNBUILDABLE as error:
        kwargs = "".join(f" {name}={value}" for name, value in args.model_kwargs.items())
        raise UserError(
            f"--model {args.model}{kwargs} cannot be built for {args.input_size} pixels: {str(error) or repr(error)}"
        ) from error
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch is None:
        raise UserError(f"--model {args.model} is not a ViT with a single patch size, so it cannot be trained here")
    patch = math.lcm(*to_2tuple(patch))
    if args.input_size % patch:
        raise UserError(
            f"--input-size {args.input_size} is not a multiple of the {patch} pixels of a patch: "
            f"use {max(1, args.input_size // patch) * patch}"
        )
    if not args.resume:
        _take_first_weights(args, model, nb_classes)
    return model


def _take_first_weights(args: argparse.Namespace, model: nn.Module, nb_classes: int) -> None:
    """Load ``--finetune``'s weights, and report random weights where somebody may expect trained ones."""
    new_classifier = finetune_from(model, args.finetune) if args.finetune else False
    if args.pretrained and (trained_on := model.pretrained_cfg.get("num_classes")) != nb_classes:
        new_classifier = True
        if not args.eval:
            print_once(
                f"note: the classifier starts with random weights, because the pretrained weights are for {trained_on} "
                f"classes and the data set has {nb_classes}"
            )
    if args.eval and new_classifier:
        source = "--pretrained" if args.pretrained else f"--finetune {args.finetune}"
        raise UserError(
            f"--eval would evaluate a classifier with random weights, because the weights of {source} are for another "
            f"number of classes than the {nb_classes} of --data-set {args.data_set}: train first, or choose the data "
            "set that the weights are for"
        )
    if args.eval and not (args.pretrained or args.finetune):
        print_once("note: --eval evaluates a model with random weights: add --resume and a checkpoint, or --pretrained")


def build_criterion(
    args: argparse.Namespace, model: nn.Module, nb_classes: int, device: torch.device, classes: Sequence[str] = ()
) -> DistillationLoss:
    """Loss of (images, outputs, targets). With distillation it runs the teacher.

    Args:
        classes: names of the data set's classes in the order of their ids; the teacher's must be the same.
    """
    if _mixes(args):
        base = SoftTargetCrossEntropy()  # the smoothing is in the targets
    elif args.smoothing > 0:
        base = LabelSmoothingCrossEntropy(args.smoothing)
    else:
        base = nn.CrossEntropyLoss()
    teacher = None
    if args.distillation_type != "none":
        if not hasattr(model, "set_distilled_training"):
            raise UserError(
                f"--distillation-type {args.distillation_type} needs a model with a distillation token, "
                f"which {args.model} lacks: use one such as deit_small_distilled_patch16_224"
            )
        model.set_distilled_training(True)
        teacher = build_teacher(args, nb_classes, classes).to(device)
    return DistillationLoss(base, teacher, args.distillation_type, args.distillation_alpha, args.distillation_tau)


def build_teacher(args: argparse.Namespace, nb_classes: int, classes: Sequence[str] = ()) -> nn.Module:
    """The teacher for images of ``args.input_size`` with the weights of ``args.teacher_path``, frozen."""
    try:
        try:
            teacher = create_model(args.teacher_model, num_classes=nb_classes, img_size=args.input_size)
        except TypeError:  # a convolutional network, which takes any size
            teacher = create_model(args.teacher_model, num_classes=nb_classes)
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"--teacher-model {args.teacher_model} cannot be built: {str(error) or repr(error)}") from error
    load_teacher(teacher, args.teacher_model, args.teacher_path, classes)
    compile_model(args, teacher)
    return teacher.eval().requires_grad_(False)


def compile_model(args: argparse.Namespace, model: nn.Module) -> None:
    """With ``args.compile``, compile the model in place, so that the names of its weights stay as they are.

    All training batches have the same size, which is compiled as a constant; ``evaluate`` marks the size of its batches
    as dynamic.
    """
    if args.compile:
        model.compile(dynamic=False)


def build_mixup(args: argparse.Namespace, nb_classes: int) -> Mixup | None:
    if not _mixes(args):
        return None
    return Mixup(
        args.mixup,
        args.cutmix,
        args.cutmix_minmax,
        args.mixup_prob,
        args.mixup_switch_prob,
        args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=nb_classes,
    )


def build_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer with the learning rate for 512 images per step scaled to ``args.batch_size · world_size``."""
    options = argparse.Namespace(**{**vars(args), "lr": args.lr * args.batch_size * args.world_size / 512})
    try:
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(options))
        betas = create_optimizer_v2(nn.Linear(1, 1), args.opt, args.lr).defaults.get("betas")
    except (ValueError, TypeError, AssertionError, IndexError) as error:
        raise UserError(
            f"--opt {args.opt} is unknown to timm or does not take --opt-betas {args.opt_betas}: "
            f"{str(error) or repr(error)}"
        ) from error
    if args.opt_betas and betas and len(betas) != len(args.opt_betas):
        raise UserError(f"--opt-betas {args.opt_betas} must be {len(betas)} numbers for --opt {args.opt}")
    if getattr(optimizer, "is_second_order", False):
        raise UserError(
            f"--opt {args.opt} needs second derivatives, which iRPE's attention does not always support: choose "
            "another, such as adamw"
        )
    return optimizer


def build_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer) -> Scheduler | None:
    """timm's schedule over ``args.epochs``, to be stepped with the number of an epoch after that epoch."""
    try:
        scheduler, _ = create_scheduler(args, optimizer)
    # Some versions of timm's plateau schedule do not work with some versions of PyTorch.
    except (ValueError, AssertionError, TypeError) as error:
        raise UserError(f"--sched {args.sched} cannot be used: {str(error) or repr(error)}") from error
    if scheduler is None and args.sched != "none":
        raise UserError(f"--sched {args.sched} is unknown to timm")
    if isinstance(scheduler, PlateauLRScheduler):
        scheduler.lr_scheduler.cooldown = args.cooldown_epochs  # timm leaves it at 0
        if not args.warmup_epochs:
            scheduler.warmup_lr_init = scheduler.base_values[0]  # timm starts from --warmup-lr all the same
    return scheduler


def build_state(args: argparse.Namespace, model: nn.Module, classes: Sequence[str] = ()) -> TrainingState:
    """The state at the start of training; ``classes`` are the names of the classes, which checkpoints contain."""
    optimizer = build_optimizer(args, model)
    ema = None
    if args.model_ema:
        ema = ModelEmaV3(model, args.model_ema_decay, device="cpu" if args.model_ema_force_cpu else None)
    device = next(model.parameters()).device
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype(args, device) == torch.float16)
    return TrainingState(model, optimizer, build_scheduler(args, optimizer), scaler, ema, classes)


def amp_dtype(args: argparse.Namespace, device: torch.device) -> torch.dtype:
    """Data type of mixed precision; float32 stands for no mixed precision."""
    return getattr(torch, args.amp_dtype or ("float16" if device.type == "cuda" else "float32"))


# Runs


def evaluate_only(
    args: argparse.Namespace,
    job: Job,
    device: torch.device,
    checkpoint: Checkpoint | None,
    loader: DataLoader,
    nb_classes: int,
) -> dict[str, float]:
    """Evaluate the checkpoint, or the model as it is built; with ``args.output_dir`` also write eval.json there."""
    model = build_model(args, nb_classes).to(device)
    if checkpoint:
        load_weights(model, checkpoint.content, checkpoint.path)
        check_classes(checkpoint.content, checkpoint.path, class_names(loader.dataset))
    compile_model(args, model)
    job.connect(device)
    stats = evaluate(loader, model, device, amp_dtype(args, device), job)
    if args.output_dir:
        write_evaluation(args.output_dir, stats, job)
    return stats


def write_evaluation(output_dir: str, stats: dict[str, float], job: Job) -> None:
    """Write what ``evaluate`` returned to eval.json; only rank 0 writes."""
    if get_rank() == 0:
        with job.waiting(), runtime.replacing(os.path.join(output_dir, "eval.json")) as file:
            file.write(json.dumps(stats).encode())


def resume(
    args: argparse.Namespace, state: TrainingState, checkpoint: Checkpoint | None
) -> tuple[int, dict[str, Any] | None]:
    """Bring the state to where the checkpoint's run stopped; returns the epoch to train and the progress in it."""
    old = os.path.join(args.output_dir, "checkpoint.pth")
    if args.output_dir and not checkpoint and os.path.exists(old):
        print_once(
            f"note: {old} of an earlier run will be replaced after the first epoch; to continue from it, stop and "
            f"add --resume {old}"
        )
    place = state.resume(checkpoint, args) if checkpoint else None
    if place is None and args.start_epoch and state.lr_scheduler:
        state.lr_scheduler.step(args.start_epoch - 1)
    return place or (args.start_epoch, None)


def train(
    run: runtime.Run,
    device: torch.device,
    state: TrainingState,
    criterion: nn.Module,
    val_loader: DataLoader,
    nb_classes: int,
) -> dict[str, float]:
    """Train up to ``args.epochs``; after each epoch evaluate, save and log. Returns the last evaluation."""
    args, job, loader = run.args, run.job, run.loader
    model, mixup, dtype = state.model, build_mixup(args, nb_classes), amp_dtype(args, device)
    print_once(
        f"{args.model}: {count_trainable_parameters(model) / 1e6:.2f} M parameters, {nb_classes} classes, "
        f"{len(loader.dataset.dataset)} images, {len(loader)} steps of "
        f"{args.batch_size} x {args.world_size} an epoch, from epoch {run.epoch} to {args.epochs}"
    )
    if args.distributed:
        model = DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None, process_group=job.training_group
        )
    started, test = time.time(), {}
    if run.epoch >= args.epochs:
        print_once(f"nothing to train: the run has finished {run.epoch} epochs, and --epochs is {args.epochs}")
    for _ in run.epochs():
        stats = train_one_epoch(
            model,
            criterion,
            run,
            state.optimizer,
            device,
            state.loss_scaler,
            args.clip_grad,
            state.model_ema,
            mixup,
            dtype,
        )
        test = evaluate(val_loader, state.model, device, dtype, job)
        end_epoch(run, state, stats, test)
    print_once(f"Training time {time.strftime('%H:%M:%S', time.gmtime(time.time() - started))}")
    return test


def end_epoch(run: runtime.Run, state: TrainingState, stats: dict[str, float], test: dict[str, float]) -> None:
    """Step the schedule after ``run.epoch``, save, and log the epoch.

    Args:
        stats: means of training, as ``train_one_epoch`` returns them.
        test: what ``evaluate`` returns after the epoch.
    """
    if state.lr_scheduler:
        state.lr_scheduler.step(run.epoch, test["acc1"])
    state.max_accuracy = max(state.max_accuracy, test["acc1"])
    run.save(
        row={
            "train_lr": stats["lr"],
            "train_loss": stats["loss"],
            **{f"test_{name}": value for name, value in test.items()},
            "epoch": run.epoch,
            "n_parameters": count_trainable_parameters(state.model),
        }
    )
    print_once(f"Max accuracy: {state.max_accuracy:.2f}%")


def count_trainable_parameters(model: nn.Module) -> int:
    """The number of parameters that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


if __name__ == "__main__":
    parser = runtime.ArgumentParser(
        "main.py",
        parents=[get_args_parser()],
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    runtime.run(main, parser.parse_args())
