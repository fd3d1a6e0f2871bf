"""The two loops: one training epoch, and evaluation over a whole data set."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader

from images import notes_on
from runtime import Progress, Run, UserError, all_reduce_sum, gather, get_world_size, print_once, step_optimizer


def train_one_epoch(
    model: nn.Module,
    criterion: nn.Module,
    data_loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    epoch: int,
    loss_scaler: torch.amp.GradScaler,
    max_norm: float | None = None,
    model_ema: ModelEmaV3 | None = None,
    mixup_fn: Callable | None = None,
    amp_dtype: torch.dtype = torch.float32,
    run: Run | None = None,
) -> dict[str, float]:
    """Train over the loader once.

    Args:
        criterion: loss of (pictures, outputs, targets), as ``losses.DistillationLoss``.
        loss_scaler: scales the loss of float16; a disabled one leaves it alone.
        max_norm: bound on the norm of the gradient; None for no bound.
        mixup_fn: maps (pictures, class ids) to mixed pictures and soft targets.
        run: says at which step to begin, saves, and may end training.
    Returns: means of loss and lr over all steps and processes.
    Raises: UserError on all processes when the loss of one is not finite, or the gradients never are.
    """
    model.train()
    progress = Progress(
        f"epoch {epoch}",
        data_loader,
        data_loader.batch_size * get_world_size(),
        run=run,
        lr=optimizer.param_groups[0]["lr"],
    )
    for images, targets in progress:
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        if mixup_fn is not None:
            images, targets = mixup_fn(images, targets)
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype != torch.float32):
            loss = criterion(images, _to_float(model(images)), targets)
        optimizer.zero_grad()
        loss_scaler.scale(loss).backward()
        if max_norm is not None:
            loss_scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        step_optimizer(loss_scaler, optimizer)
        if model_ema is not None:
            model_ema.update(model)
        progress.add(loss=loss)
    print_notes(data_loader)
    return progress.averages()


@torch.no_grad()
def evaluate(
    data_loader: DataLoader, model: nn.Module, device: torch.device, amp_dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """Cross-entropy, top-1 and top-5 accuracy (%) over every picture of the set, counted once.

    The loader's sampler decides who does what: if it is a ``ShardSampler`` over several processes their sums are
    added up, else the loader is taken to give all pictures. With fewer than five classes acc5 is 100.
    Returns: dict with loss, acc1, acc5, equal on all processes.
    Raises: UserError when the loss is not finite or there are no pictures.
    """
    model.eval()
    shards = getattr(data_loader.sampler, "num_replicas", 1)
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for images, targets in Progress("Test", data_loader, data_loader.batch_size * shards):
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        torch._dynamo.maybe_mark_dynamic(images, 0)  # a compiled model is not compiled again for the last batch
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype != torch.float32):
            logits = model(images)
        sums += _batch_sums(logits.double(), targets)
    if shards > 1:
        all_reduce_sum(sums)
    print_notes(data_loader)
    loss, correct1, correct5, images = sums.tolist()
    if not images:
        raise UserError("there are no pictures to evaluate on")
    stats = {"loss": loss / images, "acc1": 100 * correct1 / images, "acc5": 100 * correct5 / images}
    if not torch.isfinite(sums).all():
        raise UserError(
            f"the loss of the evaluation is {stats['loss']}: the weights or --amp-dtype {amp_dtype} give "
            "outputs that are not finite"
        )
    print_once(f"* Acc@1 {stats['acc1']:.3f} Acc@5 {stats['acc5']:.3f} loss {stats['loss']:.3f}")
    return stats


def print_notes(data_loader: DataLoader) -> None:
    """After the first pass over a loader, print what the user should know of its images. All processes call this."""
    for note in notes_on(data_loader.dataset, gather):
        print_once(note)


def _batch_sums(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[cross-entropy, right at first guess, right within five, pictures] summed over logits (B, K), targets (B,)."""
    guesses = logits.topk(min(5, logits.shape[1])).indices  # (B, 5)
    hits = (guesses == targets[:, None]).double()
    images = torch.full((), len(targets), dtype=torch.float64, device=logits.device)
    return torch.stack([F.cross_entropy(logits, targets, reduction="sum"), hits[:, 0].sum(), hits.sum(), images])


def _to_float(outputs: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor | tuple[torch.Tensor, ...]:
    return tuple(map(_to_float, outputs)) if isinstance(outputs, tuple) else outputs.float()
