"""The two loops: one epoch of training, and evaluation over a whole data set."""

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torch.utils.data import DataLoader

from datasets.coco_eval import CocoEvaluator
from datasets.panoptic_eval import PanopticEvaluator
from util.images import notes_on
from util.runtime import (
    Interrupted,
    Job,
    Progress,
    Run,
    UserError,
    gather,
    gather_on_main,
    get_rank,
    print_once,
    read_batches,
    seed_everything,
    step_optimizer,
)

SHOWN = ("loss", "loss_ce", "loss_bbox", "loss_giou", "class_error", "grad_norm", "lr")


def named_losses(criterion: nn.Module, losses: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The total, the weighted losses, and the unweighted ones as `..._unscaled` (class_error keeps its name)."""
    weighted = {name: losses[name] * weight for name, weight in criterion.weight_dict.items() if name in losses}
    unweighted = {name if name == "class_error" else f"{name}_unscaled": value for name, value in losses.items()}
    return {"loss": sum(weighted.values()), **weighted, **unweighted}


def train_one_epoch(
    model: nn.Module,
    criterion: nn.Module,
    run: Run,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    loss_scaler: torch.amp.GradScaler,
    max_norm: float = 0.0,
    amp_dtype: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Train `run.epoch`, from its current step to the end of the epoch.

    Args:
        run: provides the loader, saves checkpoints and receives stop signals.
        loss_scaler: scales the loss of float16; a disabled one leaves it alone.
        max_norm: bound on the norm of the gradient; 0 for no bound.
    Returns: means of all losses, the gradient's norm and the learning rates over steps and ranks.
    Raises:
        Interrupted: after a signal, once the step it came in is saved.
        UserError: on all ranks, if a loss or the norm of the gradient is not finite on any rank, or the gradients
            overflow at every loss scale.
    """
    model.train()
    criterion.train()
    job, epoch, lr = run.job, run.epoch, optimizer.param_groups[0]["lr"]
    progress = Progress(
        f"epoch {epoch}",
        len(run.loader),
        run.images_per_step,
        SHOWN,
        first_step=run.first_step,
        values=run.values,
        group=job.training_group,
        describe_step=functools.partial(run.describe_step, lr=lr),
        lr=lr,
        lr_backbone=optimizer.param_groups[-1]["lr"],
    )
    with job.training_steps():
        for step, (samples, targets) in enumerate(read_batches(run.loader), run.first_step):
            job.place = f"epoch {epoch}, step {step}"
            # The seeds depend on the position in training only, so that a resumed run draws the same numbers. The last
            # one starts at 1: NumPy pads the seeds of an image, (seed, epoch, position), with 0, and no step may share
            # the random numbers of an image.
            seed_everything(run.args.seed, epoch, step, 1 + get_rank())

            samples, targets = to_device(samples, targets, device)
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype != torch.float32):
                outputs = model(samples)
            losses = named_losses(criterion, criterion(outputs, targets))
            optimizer.zero_grad()
            loss_scaler.scale(losses["loss"]).backward()
            loss_scaler.unscale_(optimizer)
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf)
            step_optimizer(loss_scaler, optimizer)
            # In float16 the first steps overflow until the scale has come down; the scaler skips them.
            norm = grad_norm.nan_to_num(posinf=0.0) if loss_scaler.is_enabled() else grad_norm
            progress.step(**losses, grad_norm=norm)

            signal_number = run.agreed_signal(progress.done)
            if signal_number or run.save_is_due(progress.done):
                run.save(progress.done, progress.read())
            if signal_number:
                raise Interrupted(signal_number, job.place)
    print_notes(run.loader, job)
    return progress.averages()


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    criterion: nn.Module,
    postprocessors: Mapping[str, nn.Module],
    data_loader: DataLoader,
    ground_truth: COCO | None,
    device: torch.device,
    amp_dtype: torch.dtype = torch.float32,
    output_dir: str = "",
    job: Job | None = None,
) -> tuple[dict[str, Any], COCOeval | None]:
    """Losses, COCO's metrics and panoptic quality over every image of the set, counted once.

    Args:
        model: the bare one, without DistributedDataParallel: ranks may have different numbers of batches.
        postprocessors: `bbox`; `segm` to evaluate masks too, and `panoptic` for panoptic quality.
        ground_truth: pycocotools.COCO of the set; None to evaluate neither boxes nor masks.
        output_dir: where `panoptic_eval/` goes; nothing is written without it.
        job: this process's part in a job of several ranks; by default there are no others.
    Returns: (stats, COCOeval of the boxes) on rank 0, ({}, None) on other ranks. `stats` has the mean of every loss
        over all images, `AP`, `AP50`, `coco_eval_bbox` and `coco_eval_masks` (COCO's twelve metrics each), and the
        result of PanopticEvaluator. Independent of the number of ranks.
    Raises:
        Interrupted: after a signal that asks training to stop.
        UserError: when a loss is not finite.
    """
    model.eval()
    criterion.eval()
    job = job or Job()
    evaluators = _evaluators(postprocessors, data_loader, ground_truth, output_dir)
    batches = []
    progress = Progress("Test", len(data_loader), len(data_loader.dataset) / max(len(data_loader), 1))
    for samples, targets in job.evaluation_steps("Test", data_loader):
        samples, targets = to_device(samples, targets, device)
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype != torch.float32):
            outputs = model(samples)
        losses = named_losses(criterion, criterion(outputs, targets))
        values = dict(zip(losses, torch.stack([value.float() for value in losses.values()]).tolist(), strict=True))
        results = postprocess(postprocessors, outputs, targets)
        batches.append((next(iter(results)), len(results), values))
        with job.waiting():  # the maps of panoptic_eval/ may go to a slow disk
            for evaluator in evaluators.values():
                evaluator.update(results)
        progress.step()
        job.stop_if_signalled()
    print_notes(data_loader, job)
    with job.waiting():  # rank 0 computes the metrics, which may take minutes
        gathered = gather_on_main(batches)
        stats = _average(gathered, amp_dtype) if gathered else {}
        measured = {name: evaluator.summarize() for name, evaluator in evaluators.items()}
    boxes, masks = measured.get("bbox"), measured.get("segm")
    if boxes:
        stats.update(AP=boxes.stats[0].item(), AP50=boxes.stats[1].item(), coco_eval_bbox=boxes.stats.tolist())
    if masks:
        stats["coco_eval_masks"] = masks.stats.tolist()
    return {**stats, **measured.get("panoptic", {})}, boxes


def _evaluators(
    postprocessors: Mapping[str, nn.Module], data_loader: DataLoader, ground_truth: COCO | None, output_dir: str
) -> dict[str, CocoEvaluator | PanopticEvaluator]:
    evaluators = {}
    if ground_truth is not None:
        evaluators = {name: CocoEvaluator(ground_truth, name) for name in ("bbox", "segm") if name in postprocessors}
    if "panoptic" in postprocessors:
        evaluators["panoptic"] = PanopticEvaluator(data_loader.dataset, output_dir)
    return evaluators


def print_notes(data_loader: DataLoader, job: Job) -> None:
    """After the first pass over a loader, print what the user should know of its images. All ranks call this."""
    with job.waiting():
        notes = notes_on(data_loader.dataset, gather)
    for note in notes:
        print_once(note)


def postprocess(
    postprocessors: Mapping[str, nn.Module], outputs: Mapping[str, torch.Tensor], targets: Sequence[dict]
) -> dict[int, dict[str, Any]]:
    """Image id → what was found in it, of every postprocessor: `scores`, `labels`, `boxes`, `masks`, `panoptic`."""
    ids, sizes, processed = (torch.stack([t[name] for t in targets]) for name in ("image_id", "orig_size", "size"))
    results = postprocessors["bbox"](outputs, sizes)
    if "segm" in postprocessors:
        results = postprocessors["segm"](results, outputs, sizes, processed)
    if "panoptic" in postprocessors:
        maps = postprocessors["panoptic"](outputs, processed, sizes)
        results = [{**result, "panoptic": found} for result, found in zip(results, maps, strict=True)]
    return dict(zip(ids.tolist(), results, strict=True))


def _average(gathered: list[list[tuple]], amp_dtype: torch.dtype) -> dict[str, float]:
    """Return the means over all images, and print for each loss the median over batches and, in brackets, the mean.

    Batches are summed in data-set order, so the result is bit-identical for any number of ranks.
    """
    batches = sorted((batch for batches in gathered for batch in batches), key=lambda batch: batch[0])
    columns = {name: [values[name] for _, _, values in batches] for name in batches[0][2]}
    counts = [count for _, count, _ in batches]
    means = {
        name: sum(value * count for value, count in zip(column, counts, strict=True)) / sum(counts)
        for name, column in columns.items()
    }
    print_once(
        "Averaged stats: "
        + "  ".join(f"{name}: {statistics.median(column):.4f} ({means[name]:.4f})" for name, column in columns.items())
    )
    if not math.isfinite(means["loss"]):
        raise UserError(
            f"the loss of the evaluation is {means['loss']}: the weights or --amp_dtype "
            f"{str(amp_dtype).removeprefix('torch.')} give outputs that are not finite"
        )
    return means


def to_device(
    samples: Any, targets: Sequence[dict[str, torch.Tensor]], device: torch.device
) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """Batch and targets on the device, copied without waiting where memory is pinned."""
    move = {"device": device, "non_blocking": True}
    return samples.to(**move), [{name: value.to(**move) for name, value in target.items()} for target in targets]
