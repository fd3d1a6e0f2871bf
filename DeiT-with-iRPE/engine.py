"""The two loops: one training epoch, and evaluation over a whole data set."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader

from images import notes_on
from runtime import (
    Interrupted,
    Job,
    Progress,
    Run,
    UserError,
    all_reduce_sum,
    gather,
    get_rank,
    print_once,
    read_batches,
    seed_everything,
    step_optimizer,
)


def train_one_epoch(
    model: nn.Module,
    criterion: nn.Module,
    run: Run,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    loss_scaler: torch.amp.GradScaler,
    max_norm: float | None = None,
    model_ema: ModelEmaV3 | None = None,
    mixup_fn: Callable | None = None,
    amp_dtype: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Train ``run.epoch`` from its current step to the end of the epoch.

    Args:
        criterion: loss of (images, outputs, targets), as ``losses.DistillationLoss``.
        run: provides the loader, saves checkpoints and receives stop signals.
        loss_scaler: scales the loss of float16; a disabled one leaves it alone.
        max_norm: bound on the norm of the gradient; None for no bound.
        mixup_fn: maps (images, class ids) to mixed images and soft targets.
    Returns: means of loss and lr over all steps and ranks.
    Raises:
        Interrupted: after a signal, once the step it came in is saved.
        UserError: on all ranks if the loss on any rank is not finite, or the gradients overflow at every loss scale.
    """
    model.train()
    job, epoch = run.job, run.epoch
    progress = start_progress(run, optimizer)
    with job.training_steps():
        for step, (images, targets) in enumerate(read_batches(run.loader), run.first_step):
            job.place = f"epoch {epoch}, step {step}"
            seed_step(run, step)
            images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            if mixup_fn is not None:
                images, targets = mixup_fn(images, targets)
            loss = train_step(model, criterion, images, targets, optimizer, loss_scaler, max_norm, model_ema, amp_dtype)
            progress.step(loss=loss)

            signal_number = run.agreed_signal(progress.done)
            if signal_number or run.save_is_due(progress.done):
                run.save(progress.done, progress.read())
            if signal_number:
                raise Interrupted(signal_number, job.place)
    print_notes(run.loader, job)
    return progress.averages()


def start_progress(run: Run, optimizer: torch.optim.Optimizer, header: str = "") -> Progress:
    """The progress of ``run.epoch``, continued from ``run.first_step``. Its lines begin with ``header``."""
    lr = optimizer.param_groups[0]["lr"]
    return Progress(
        f"{header}epoch {run.epoch}",
        len(run.loader),
        run.images_per_step,
        first_step=run.first_step,
        values=run.values,
        group=run.job.training_group,
        describe_step=functools.partial(run.describe_step, lr=lr),
        lr=lr,
    )


def seed_step(run: Run, step: int) -> None:
    """Seed a training step, so that its random numbers depend on its position in training only.

    A resumed run therefore draws the same numbers.
    """
    # The last number starts at 1: NumPy pads the seeds of an image, (seed, epoch, position), with 0, and no step may
    # share the random numbers of an image.
    seed_everything(run.args.seed, run.epoch, step, 1 + get_rank())


def train_step(
    model: nn.Module,
    criterion: nn.Module,
    images: torch.Tensor,
    targets: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    loss_scaler: torch.amp.GradScaler,
    max_norm: float | None = None,
    model_ema: ModelEmaV3 | None = None,
    amp_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """One step of the optimizer on a batch; returns its loss. For the arguments, see ``train_one_epoch``.

    Args:
        images: (B, 3, H, W).
        targets: class ids (B,), or the probabilities (B, classes) that mixing gives.
    """
    with torch.autocast(images.device.type, amp_dtype, enabled=amp_dtype != torch.float32):
        loss = criterion(images, _to_float(model(images)), targets)
    optimizer.zero_grad()
    loss_scaler.scale(loss).backward()
    if max_norm is not None:
        loss_scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    step_optimizer(loss_scaler, optimizer)
    if model_ema is not None:
        model_ema.update(model)
    return loss


@torch.no_grad()
def evaluate(
    data_loader: DataLoader,
    model: nn.Module,
    device: torch.device,
    amp_dtype: torch.dtype = torch.float32,
    job: Job | None = None,
) -> dict[str, float]:
    """Cross-entropy, top-1 and top-5 accuracy (%) over every image of the set, counted once.

    If the loader's sampler is a ``ShardSampler`` over several ranks, their sums are added up; any other loader must
    give all images. With fewer than five classes, acc5 is 100.
    Args:
        job: this process's part in a job of several ranks; by default there are no others.
    Returns: dict with loss, acc1, acc5, equal on all ranks.
    Raises:
        Interrupted: after a signal that asks training to stop.
        UserError: when the loss is not finite or there are no images.
    """
    model.eval()
    job = job or Job()
    shards = getattr(data_loader.sampler, "num_replicas", 1)
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    progress = Progress("Test", len(data_loader), data_loader.batch_size * shards)
    for images, targets in job.evaluation_steps("Test", data_loader):
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        torch._dynamo.maybe_mark_dynamic(images, 0)  # a compiled model is not compiled again for the last batch
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype != torch.float32):
            logits = model(images)
        sums += batch_sums(logits.double(), targets)
        progress.step()
        job.stop_if_signalled()
    if shards > 1:
        with job.waiting():
            all_reduce_sum(sums)
    print_notes(data_loader, job)
    stats = summarize(sums, amp_dtype)
    print_once(f"* Acc@1 {stats['acc1']:.3f} Acc@5 {stats['acc5']:.3f} loss {stats['loss']:.3f}")
    return stats


def summarize(sums: torch.Tensor, amp_dtype: torch.dtype) -> dict[str, float]:
    """Means over the images of an evaluation: loss, acc1, acc5.

    Args:
        sums: what `batch_sums` returns, added up over all batches.
        amp_dtype: named in the error.
    Raises: UserError if the loss is not finite or there are no images.
    """
    loss, correct1, correct5, images = sums.tolist()
    if not images:
        raise UserError("there are no images to evaluate on")
    stats = {"loss": loss / images, "acc1": 100 * correct1 / images, "acc5": 100 * correct5 / images}
    if not torch.isfinite(sums).all():
        raise UserError(
            f"the loss of the evaluation is {stats['loss']}: the weights or --amp-dtype {amp_dtype} give "
            "outputs that are not finite"
        )
    return stats


def print_notes(data_loader: DataLoader, job: Job) -> None:
    """After the first pass over a loader, print what the user should know of its images. All ranks call this."""
    with job.waiting():
        notes = notes_on(data_loader.dataset, gather)
    for note in notes:
        print_once(note)


def batch_sums(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[cross-entropy, right at first guess, right within five, images] summed over logits (B, K), targets (B,)."""
    guesses = logits.topk(min(5, logits.shape[1])).indices  # (B, 5)
    hits = (guesses == targets[:, None]).double()
    images = torch.full((), len(targets), dtype=torch.float64, device=logits.device)
    return torch.stack([F.cross_entropy(logits, targets, reduction="sum"), hits[:, 0].sum(), hits.sum(), images])


def _to_float(outputs: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor | tuple[torch.Tensor, ...]:
    return tuple(map(_to_float, outputs)) if isinstance(outputs, tuple) else outputs.float()
