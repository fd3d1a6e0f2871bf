"""Train DETR with iRPE on a data set in COCO's format, or evaluate it."""

import argparse
import datetime
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from datasets import build_dataset, eval_loader, train_loader
from datasets.coco import check_categories, check_same_sets, note_category_ids, note_misleading_metrics, note_objects
from engine import evaluate, train_one_epoch
from models import NUM_CLASSES, build_model, parse_enc_rpe2d
from models.compiled import compile_detector
from util import runtime
from util.checkpoint import CLASSES_CURE, TrainingState, load_weights
from util.runtime import Checkpoint, Job, UserError, print_once


def get_args_parser() -> argparse.ArgumentParser:
    """Parser of all flags, to be given to `runtime.ArgumentParser` as a parent."""
    parser = runtime.ArgumentParser("DETR with iRPE", add_help=False)
    add = parser.add_argument_group("training").add_argument
    add("--lr", default=1e-4, type=float)
    add("--lr_backbone", default=1e-5, type=float, help="0 freezes the backbone")
    add("--batch_size", default=2, type=int, help="images per step and rank")
    add("--weight_decay", default=1e-4, type=float)
    add("--epochs", default=300, type=int)
    add("--lr_drop", default=200, type=int, metavar="EPOCHS", help="divide learning rates by 10 every EPOCHS epochs")
    add("--clip_max_norm", default=0.1, type=float, help="maximum norm of the gradient; 0 for no limit")
    add(
        "--amp_dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="data type of mixed precision; float32 disables it",
    )
    add("--no_augmentation", action="store_true", help="train on images prepared as for evaluation")
    add(
        "--eval_every",
        default=1,
        type=int,
        metavar="EPOCHS",
        help="evaluate every EPOCHS epochs, and after the last one",
    )

    add = parser.add_argument_group("model").add_argument
    add("--backbone", default="resnet50", help="resnet18, resnet34, resnet50 or resnet101")
    add(
        "--no_pretrained_backbone",
        action="store_true",
        help="initialise the backbone randomly and train all of it, including batch norm",
    )
    add("--dilation", action="store_true", help="DC5: replace the stride of the last stage with a dilation")
    add(
        "--last_stride",
        default=2,
        type=int,
        choices=(1, 2),
        help="stride of the backbone's last stage; 1 gives a finer feature map (16 pixels per token instead of 32)",
    )
    add("--position_embedding", default="sine", choices=("sine", "learned"))
    add("--enc_layers", default=6, type=int)
    add("--dec_layers", default=6, type=int)
    add("--dim_feedforward", default=2048, type=int)
    add("--hidden_dim", default=256, type=int)
    add("--dropout", default=0.1, type=float)
    add("--nheads", default=8, type=int)
    add("--num_queries", default=100, type=int, help="maximum number of detections per image")
    add("--pre_norm", action="store_true")
    add("--enc_rpe2d", default="", help="relative position encoding in the encoder, such as rpe-2.0-product-ctx-1-k")
    add(
        "--num_classes",
        type=int,
        help="highest category id + 1; by default read from the annotations, and at least 250 for coco_panoptic",
    )
    add("--masks", action="store_true", help="predict a mask for every object")
    add(
        "--frozen_weights",
        type=str,
        metavar="FILE",
        help="with --masks: checkpoint of the detector, which is not trained further",
    )

    add = parser.add_argument_group("loss").add_argument
    add(
        "--no_aux_loss",
        dest="aux_loss",
        action="store_false",
        help="train without losses for the earlier decoder layers",
    )
    add("--set_cost_class", default=1, type=float)
    add("--set_cost_bbox", default=5, type=float)
    add("--set_cost_giou", default=2, type=float)
    add("--bbox_loss_coef", default=5, type=float)
    add("--giou_loss_coef", default=2, type=float)
    add("--mask_loss_coef", default=1, type=float)
    add("--dice_loss_coef", default=1, type=float)
    add("--eos_coef", default=0.1, type=float, help="weight of the no-object class in the classification loss")

    add = parser.add_argument_group("data").add_argument
    add("--dataset_file", default="coco", help="coco, or coco_panoptic for things and stuff")
    add("--coco_path", type=str, help="folder with annotations/, train2017 and val2017 (folders or zip files)")
    add(
        "--coco_panoptic_path",
        type=str,
        help="folder with annotations/, panoptic_train2017 and panoptic_val2017 (folders or zip files)",
    )
    add("--remove_difficult", action="store_true", help="train without objects that are marked as difficult")
    add(
        "--short_side",
        default=800,
        type=int,
        help="length of the images' short side in evaluation, in pixels; the training sizes scale with it",
    )
    add("--num_workers", default=4, type=int, help="DataLoader workers per rank")
    add(
        "--eval_batch_size",
        type=int,
        help="images per batch in evaluation; by default --batch_size; with 1, no image is padded",
    )

    add = parser.add_argument_group("run").add_argument
    add("--output_dir", default="", help="folder for checkpoints and logs; without it, nothing is written")
    add("--device", default="cuda")
    add(
        "--compile",
        action="store_true",
        help="use torch.compile for the backbone, the decoder, and the encoder except its iRPE attention; needs a C++ "
        "compiler and, on a GPU, Triton",
    )
    add("--seed", default=42, type=int)
    add(
        "--resume",
        default="",
        help="checkpoint (file or URL) to resume from, or to evaluate; auto "
        "takes the newest one in --output_dir, and starts a new run if there is none",
    )
    add("--save_every", default=0, type=int, metavar="STEPS", help="also save within an epoch, every STEPS steps")
    add(
        "--step_timeout",
        default=60,
        type=int,
        metavar="SECONDS",
        help="end the run if a rank waits this long for another rank or for an image in a training step",
    )
    add(
        "--finetune",
        action="store_true",
        help="start a new run from the weights of --resume, with a new class head if the classes differ",
    )
    add("--start_epoch", default=0, type=int, help="first epoch, unless --resume gives it")
    add("--eval", action="store_true", help="evaluate only")
    add("--world_size", default=1, type=int, help="number of ranks; the launcher sets it")
    add(
        "--dist_url",
        default="env://",
        help="URL at which the ranks connect; env:// reads it from the environment variables that the launcher sets",
    )
    # given by torch.distributed.launch without --use_env; the rank itself is read from the environment
    add("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


# The least values of flags.
_AT_LEAST_1 = (
    "batch_size",
    "short_side",
    "dec_layers",
    "num_queries",
    "eval_every",
    "lr_drop",
    "hidden_dim",
    "nheads",
    "dim_feedforward",
    "eval_batch_size",
    "step_timeout",
)
_AT_LEAST_0 = (
    "enc_layers",
    "num_workers",
    "start_epoch",
    "epochs",
    "seed",
    "save_every",
    "lr",
    "lr_backbone",
    "weight_decay",
    "dropout",
    "clip_max_norm",
    "eos_coef",
    "bbox_loss_coef",
    "giou_loss_coef",
    "mask_loss_coef",
    "dice_loss_coef",
)


def check_args(args: argparse.Namespace, needs_data: bool = True) -> None:
    """Raise UserError for flags that cannot work, before anything is read or built.

    Args:
        needs_data: whether the flags of the data set must be there too.
    """
    _check_data_flags(args, needs_data)
    _check_start_flags(args)
    _check_ranges(args)
    if (attention := os.environ.get("IRPE_ATTENTION")) not in (None, "composed", "rows"):
        raise UserError(f"IRPE_ATTENTION is {attention!r}; it must be composed or rows, or not be set")
    parse_enc_rpe2d(args.enc_rpe2d)


def _check_data_flags(args: argparse.Namespace, needs_data: bool) -> None:
    if args.dataset_file not in NUM_CLASSES:
        raise UserError(
            f"--dataset_file {args.dataset_file} is not known: coco reads any set in COCO's format, and "
            "coco_panoptic any in its panoptic format"
        )
    if needs_data and not args.coco_path:
        raise UserError("--coco_path is missing: the folder with annotations/, train2017 and val2017")
    if needs_data and args.dataset_file == "coco_panoptic" and not args.coco_panoptic_path:
        raise UserError(
            "--coco_panoptic_path is missing: the folder with annotations/, panoptic_train2017 and panoptic_val2017"
        )


def _check_start_flags(args: argparse.Namespace) -> None:
    if args.frozen_weights and not args.masks:
        raise UserError(
            "--frozen_weights gives the frozen detector for training a mask head: add --masks, or use --resume FILE "
            "--finetune to train the detector itself"
        )
    if args.finetune and args.resume in ("", "auto"):
        raise UserError("--finetune needs weights to start from: add --resume FILE")


def _check_ranges(args: argparse.Namespace) -> None:
    for least, names in ((1, _AT_LEAST_1), (0, _AT_LEAST_0)):
        for name in names:
            value = getattr(args, name)
            if value is not None and not value >= least:
                raise UserError(f"--{name} is {value}; it must be at least {least}")
    if args.dropout > 1:
        raise UserError(f"--dropout is {args.dropout}; it is a probability, at most 1")
    if not (args.set_cost_class or args.set_cost_bbox or args.set_cost_giou):
        raise UserError("--set_cost_class, --set_cost_bbox and --set_cost_giou are all 0: at least one must be above 0")


def build_datasets(args: argparse.Namespace) -> tuple[Dataset | None, Dataset]:
    """The training set (None with --eval) and the evaluation set, after checks that they fit the flags and each other.

    Raises: UserError for categories that do not fit.
    """
    val_set = build_dataset("val", args)
    train_set = None if args.eval else build_dataset("train", args)
    datasets = [dataset for dataset in (train_set, val_set) if dataset]
    num_classes = number_of_classes(args, datasets)
    for dataset in datasets:
        check_categories(dataset, num_classes)
        note_objects(dataset, args.num_queries, is_train=dataset is train_set)
    note_category_ids(max(datasets, key=lambda dataset: dataset.num_classes))
    if train_set:
        check_same_sets(train_set, val_set)
    return train_set, val_set


def number_of_classes(args: argparse.Namespace, datasets: Sequence[Dataset]) -> int:
    """`--num_classes`, or else the highest category id of the data sets + 1."""
    if args.num_classes is not None:
        return args.num_classes
    counted = max(dataset.num_classes for dataset in datasets)
    # Smaller panoptic sets get the number of classes of the released panoptic models.
    return max(counted, NUM_CLASSES["coco_panoptic"]) if args.dataset_file == "coco_panoptic" else counted


def build_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW, the backbone at its own rate."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for name, p in trained if "backbone" not in name]},
            {"params": [p for name, p in trained if "backbone" in name], "lr": args.lr_backbone},
        ],
        lr=args.lr,
        weight_decay=args.weight_decay,
    )


def save_precision(measured: COCOeval | None, output_dir: str, names: Sequence[str]) -> None:
    """Write the arrays behind the twelve metrics: precision (T, R, K, A, M), recall (T, K, A, M) and their axes."""
    if not (measured and output_dir):
        return
    arrays = {name: torch.from_numpy(measured.eval[name]) for name in ("precision", "recall", "scores")}
    axes = {
        "iou_thresholds": measured.params.iouThrs,
        "recall_thresholds": measured.params.recThrs,
        "category_ids": measured.params.catIds,
        "max_detections": measured.params.maxDets,
    }
    arrays.update({name: torch.as_tensor(values) for name, values in axes.items()})
    for path in (Path(output_dir, name) for name in names):
        with runtime.writing(path.parent):
            path.parent.mkdir(exist_ok=True)
        with runtime.replacing(path) as file:
            torch.save(arrays, file)


def broadcast_buffers(model: nn.Module) -> None:
    """Broadcast rank 0's batch-norm statistics, which the checkpoint contains: each rank saw different batches."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def train(
    run: runtime.Run,
    state: TrainingState,
    criterion: nn.Module,
    postprocessors: dict[str, nn.Module],
    val_loader: DataLoader,
    ground_truth: COCO | None,
    device: torch.device,
) -> None:
    """Train all epochs. After each, log and save; every `eval_every` epochs and after the last, also evaluate."""
    args, job, model = run.args, run.job, state.model
    if args.distributed:
        model = DistributedDataParallel(
            model, [device] if device.type == "cuda" else None, process_group=job.training_group
        )
    amp_dtype = getattr(torch, args.amp_dtype)
    n_parameters = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
    for epoch in run.epochs():
        trained = train_one_epoch(
            model,
            criterion,
            run,
            state.optimizer,
            device,
            state.loss_scaler,
            args.clip_max_norm,
            amp_dtype,
        )
        with job.waiting():
            broadcast_buffers(state.model)
        state.lr_scheduler.step()
        values = {f"train_{name}": value for name, value in trained.items()}
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            stats, measured = evaluate(
                state.model,
                criterion,
                postprocessors,
                val_loader,
                ground_truth,
                device,
                amp_dtype,
                args.output_dir,
                job,
            )
            names = ["eval/latest.pth"]
            if epoch % 50 == 0:
                names.append(f"eval/{epoch:03}.pth")
            try:
                with job.waiting():
                    save_precision(measured, args.output_dir, names)
            except UserError as error:
                print_once(f"note: {error}: training continues")
            values.update({f"test_{name}": value for name, value in stats.items()})
        run.save(row={**values, "epoch": epoch, "n_parameters": n_parameters})


def start_or_resume(
    state: TrainingState, args: argparse.Namespace, checkpoint: Checkpoint | None
) -> tuple[int, dict[str, Any] | None]:
    """Bring the state to where the flags say that the run starts; returns the epoch and the progress in it.

    Args:
        checkpoint: of `--resume`.
    """
    place = None
    if args.frozen_weights and not checkpoint:
        load_weights(
            state.model.detr,
            runtime.load_checkpoint(args.frozen_weights),
            args.frozen_weights,
            classes_cure=f"{CLASSES_CURE}, or give --frozen_weights a detector of this set",
        )
    if checkpoint and not (args.eval or args.finetune):
        place = state.resume(checkpoint, args)
    elif checkpoint:
        load_weights(state.model, checkpoint.content, checkpoint.path, args.finetune)
        if not args.finetune:
            state.check_categories(checkpoint.content, checkpoint.path)
    elif args.eval:
        part = "mask head" if args.frozen_weights else "model"
        print_once(f"note: --eval without --resume evaluates a {part} with random weights")
    if place is None:
        state.start_at(args.start_epoch)
    return place or (args.start_epoch, None)


def main(args: argparse.Namespace) -> dict[str, Any] | None:
    """Train, or with `args.eval` only evaluate; returns the metrics of `--eval`, and None after training."""
    check_args(args)
    if not args.eval:
        runtime.need_signals("training", *runtime.STOPPING)
    device = runtime.find_device(args.device, args.world_size)
    if args.compile:
        runtime.check_compiler(device)
    with Job(args.dist_url, runtime.step_timeout(args)) as job:
        runtime.prepare_output_dir(args.output_dir)
        with runtime.output_lock(args.output_dir):
            job.meet()
            return train_or_evaluate(args, job, device)


def train_or_evaluate(args: argparse.Namespace, job: Job, device: torch.device) -> dict[str, Any] | None:
    """What `main` does after it has checked the flags, met the other ranks and locked the output directory."""
    checkpoint = runtime.checkpoint_to_resume(args.resume, args.output_dir, needed=args.eval)
    torch.manual_seed(args.seed)
    train_set, val_set = build_datasets(args)
    settings = run_settings(args, checkpoint, [dataset for dataset in (train_set, val_set) if dataset])
    model, criterion, postprocessors = build_model(settings)
    model.to(device)
    criterion.to(device)
    optimizer = build_optimizer(model, settings)
    state = TrainingState(
        model,
        optimizer,
        torch.optim.lr_scheduler.StepLR(optimizer, settings.lr_drop),
        torch.amp.GradScaler(device.type, enabled=settings.amp_dtype == "float16"),
        (train_set or val_set).categories,
    )
    epoch, progress = start_or_resume(state, settings, checkpoint)
    del checkpoint  # its memory is needed for training
    loader = None if settings.eval else train_loader(train_set, settings)
    val_loader, ground_truth = eval_loader(val_set, settings), val_set.ground_truth()
    if ground_truth:
        note_misleading_metrics(ground_truth, val_set.instances)
    if settings.compile:
        compile_detector(model)
    job.connect(device)
    criterion.training_group = job.training_group
    if settings.eval:
        return evaluate_only(settings, job, model, criterion, postprocessors, val_loader, ground_truth, device)
    started = time.perf_counter()
    log = runtime.RunLog(args.output_dir, epoch if args.resume and not args.finetune else None)
    with runtime.Run(settings, job, log, state.save, loader, epoch, progress) as run:
        train(run, state, criterion, postprocessors, val_loader, ground_truth, device)
    print_once(f"Training took {datetime.timedelta(seconds=round(time.perf_counter() - started))}")
    return None


def run_settings(
    args: argparse.Namespace, checkpoint: Checkpoint | None, datasets: Sequence[Dataset]
) -> argparse.Namespace:
    """A copy of the flags, completed with what the launcher, the checkpoint and the data sets say.

    `rank`, `world_size` and `distributed` are this process's place in the job. `resume` is the path that `auto` stands
    for ("" for none). `num_classes` is a number, and `is_thing_map` says which category ids of a panoptic set are
    things (None for other sets).
    """
    settings = runtime.with_place(args)
    settings.resume = checkpoint.path if checkpoint else ""
    settings.num_classes = number_of_classes(args, datasets)
    settings.is_thing_map = getattr(datasets[-1], "is_thing_map", None)
    return settings


def evaluate_only(
    args: argparse.Namespace,
    job: Job,
    model: nn.Module,
    criterion: nn.Module,
    postprocessors: dict[str, nn.Module],
    val_loader: DataLoader,
    ground_truth: COCO | None,
    device: torch.device,
) -> dict[str, Any]:
    """Evaluate, and with `--output_dir` write eval.json, eval.pth and, of a panoptic model, panoptic_eval/ there."""
    if args.output_dir and "panoptic" in postprocessors:
        runtime.prepare_output_dir(os.path.join(args.output_dir, "panoptic_eval"))
    amp_dtype = getattr(torch, args.amp_dtype)
    stats, measured = evaluate(
        model, criterion, postprocessors, val_loader, ground_truth, device, amp_dtype, args.output_dir, job
    )
    with job.waiting():
        save_precision(measured, args.output_dir, ["eval.pth"])
        if args.output_dir and runtime.get_rank() == 0:
            path = Path(args.output_dir, "eval.json")
            with runtime.writing(path):
                path.write_text(json.dumps(stats))
    return stats


if __name__ == "__main__":
    parser = runtime.ArgumentParser("main.py", parents=[get_args_parser()], description=__doc__, allow_abbrev=False)
    runtime.run(main, parser.parse_args())
