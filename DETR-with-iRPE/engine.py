"""The two loops: one epoch of training, and evaluation over a whole data set."""

import math
import statistics

import torch
from torch import nn

from datasets.coco_eval import CocoEvaluator
from datasets.panoptic_eval import PanopticEvaluator
from util.images import notes_on
from util.runtime import (
    Progress,
    UserError,
    gather,
    gather_on_main,
    get_world_size,
    print_once,
    step_optimizer,
    waiting,
)

SHOWN = ("loss", "loss_ce", "loss_bbox", "loss_giou", "class_error", "grad_norm", "lr")


def named_losses(criterion, losses):
    """The total, weighted losses under their names, and the bare ones with `_unscaled` (class_error as it is)."""
    weighted = {name: losses[name] * weight for name, weight in criterion.weight_dict.items() if name in losses}
    bare = {name if name == "class_error" else f"{name}_unscaled": value for name, value in losses.items()}
    return {"loss": sum(weighted.values()), **weighted, **bare}


def train_one_epoch(
    model,
    criterion,
    data_loader,
    optimizer,
    device,
    epoch,
    loss_scaler,
    max_norm=0.0,
    amp_dtype=torch.float32,
    run=None,
):
    """Train over the loader once.

    Args:
        loss_scaler: torch.amp.GradScaler for float16; a disabled one leaves the loss alone.
        max_norm: bound on the norm of the gradient; 0 for no bound.
        run: runtime.Run, which says at which step to begin, saves, and may end training.
    Returns: means of all losses, the gradient's norm and the learning rates over steps and processes.
    Raises: UserError on all processes when a value of one is not finite, or the gradients never are.
    """
    model.train()
    criterion.train()
    progress = Progress(
        f"epoch {epoch}",
        data_loader,
        data_loader.batch_size * get_world_size(),
        SHOWN,
        run,
        lr=optimizer.param_groups[0]["lr"],
        lr_backbone=optimizer.param_groups[-1]["lr"],
    )
    for samples, targets in progress:
        samples, targets = to_device(samples, targets, device)
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype != torch.float32):
            outputs = model(samples)
        losses = named_losses(criterion, criterion(outputs, targets))
        optimizer.zero_grad()
        loss_scaler.scale(losses["loss"]).backward()
        loss_scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf)
        step_optimizer(loss_scaler, optimizer)
        # float16's first steps overflow until the scale has come down, and the scaler leaves them out
        norm = grad_norm.nan_to_num(posinf=0.0) if loss_scaler.is_enabled() else grad_norm
        progress.add(**losses, grad_norm=norm)
    print_notes(data_loader)
    return progress.averages()


@torch.inference_mode()
def evaluate(
    model, criterion, postprocessors, data_loader, ground_truth, device, amp_dtype=torch.float32, output_dir=""
):
    """Losses, COCO's numbers and panoptic quality over every picture of the set, counted once.

    Args:
        model: the bare one, without DistributedDataParallel: processes may have different numbers of batches.
        postprocessors: `bbox`; with `segm` masks are measured too, with `panoptic` panoptic quality.
        ground_truth: pycocotools.COCO of the set; None measures neither boxes nor masks.
        output_dir: where `panoptic_eval/` goes; nothing is written without it.
    Returns: on the main process the means of all losses over the pictures with AP, AP50 and `coco_eval_bbox`, the
        twelve numbers, `coco_eval_masks` and PanopticEvaluator's, and the COCOeval of the boxes; on the others
        ({}, None). Equal for any number of processes.
    Raises: UserError when a loss is not finite.
    """
    model.eval()
    criterion.eval()
    evaluators, batches = {}, []
    if ground_truth is not None:
        evaluators = {name: CocoEvaluator(ground_truth, name) for name in ("bbox", "segm") if name in postprocessors}
    if "panoptic" in postprocessors:
        evaluators["panoptic"] = PanopticEvaluator(data_loader.dataset, output_dir)
    for samples, targets in Progress("Test", data_loader, len(data_loader.dataset) / max(len(data_loader), 1)):
        samples, targets = to_device(samples, targets, device)
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype != torch.float32):
            outputs = model(samples)
        losses = named_losses(criterion, criterion(outputs, targets))
        values = dict(zip(losses, torch.stack([value.float() for value in losses.values()]).tolist(), strict=True))
        results = postprocess(postprocessors, outputs, targets)
        batches.append((next(iter(results)), len(results), values))
        for evaluator in evaluators.values():
            evaluator.update(results)
    print_notes(data_loader)
    gathered = gather_on_main(batches)
    stats = _average(gathered, amp_dtype) if gathered else {}
    with waiting():  # the main process measures, and may take minutes for it
        measured = {name: evaluator.summarize() for name, evaluator in evaluators.items()}
    boxes, masks = measured.get("bbox"), measured.get("segm")
    if boxes:
        stats.update(AP=boxes.stats[0].item(), AP50=boxes.stats[1].item(), coco_eval_bbox=boxes.stats.tolist())
    if masks:
        stats["coco_eval_masks"] = masks.stats.tolist()
    return {**stats, **measured.get("panoptic", {})}, boxes


def print_notes(data_loader):
    """After the first pass over a loader, print what the user should know of its images. All processes call this."""
    for note in notes_on(data_loader.dataset, gather):
        print_once(note)


def postprocess(postprocessors, outputs, targets):
    """Picture id → what was found in it, of every postprocessor: `scores`, `labels`, `boxes`, `masks`, `panoptic`."""
    ids, sizes, processed = (torch.stack([t[name] for t in targets]) for name in ("image_id", "orig_size", "size"))
    results = postprocessors["bbox"](outputs, sizes)
    if "segm" in postprocessors:
        results = postprocessors["segm"](results, outputs, sizes, processed)
    if "panoptic" in postprocessors:
        maps = postprocessors["panoptic"](outputs, processed, sizes)
        results = [{**result, "panoptic": found} for result, found in zip(results, maps, strict=True)]
    return dict(zip(ids.tolist(), results, strict=True))


def _average(gathered, amp_dtype):
    """Print and return the mean over the pictures, summed in the set's order so that the last digit is the same."""
    batches = sorted((batch for batches in gathered for batch in batches), key=lambda batch: batch[0])
    columns = {name: [values[name] for _, _, values in batches] for name in batches[0][2]}
    pictures = [count for _, count, _ in batches]
    means = {
        name: sum(value * count for value, count in zip(column, pictures, strict=True)) / sum(pictures)
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


def to_device(samples, targets, device):
    """Batch and targets on the device, copied without waiting where memory is pinned."""
    move = {"device": device, "non_blocking": True}
    return samples.to(**move), [{name: value.to(**move) for name, value in target.items()} for target in targets]
