"""Train the seeds of a model in one process, as one model whose weights have a dimension for the seeds.

    cd DeiT-with-iRPE && python ../tools/train_stacked.py COMMANDS

A single small model leaves most of a GPU idle. COMMANDS is a text file with one command of DeiT's main.py per line, as
for train_together.py. Commands that differ only in --seed, --output_dir and --resume form a stack, which `torch.vmap`
computes as one model. A file may contain several stacks, which share their batches; they may differ as the commands of
train_together.py may. On a GPU, a training step of a stack is one CUDA graph, and the stacks run side by side.

Each model computes what it would compute alone, up to rounding. Running the same file again on the same machine gives
bit-identical results. The models of a stack must not depend on each other or on random numbers of the device, so
dropout, stochastic depth, mixing, random erasing, gradient clipping, moving averages, distillation, float16, --compile,
optimizers other than AdamW and some schedules are refused.

All training images are decoded once and kept in memory, and all validation images on the device. --num_workers counts
for each seed. Every run writes its log and its checkpoint after each epoch. A signal stops the program within an epoch,
without saving; with --resume auto in the commands, the same file then trains that epoch again.

Exit status: as for train_together.py.
"""

import argparse
import contextlib
import copy
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import train_together
from PIL import Image
from timm.data.transforms import MaybeToTensor
from timm.layers import DropPath, PatchDropout
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from train_together import Group, Training, check_folders_differ, check_same_flags, flag, main, runtime

import engine
from checkpoint import check_classes, load_weights
from datasets import build_dataset
from images import naming
from runtime import Interrupted, Job, Progress, UserError, print_once

# The flags in which the models of a stack may differ.
OF_A_RUN = {"seed", "output_dir", "resume", "command"}
# The values that all commands must have.
REQUIRED = {
    "opt": "adamw",
    "drop": 0.0,
    "drop_path": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "cutmix_minmax": None,
    "reprob": 0.0,
    "clip_grad": None,
    "model_ema": False,
    "distillation_type": "none",
    "compile": False,
    "lr_noise": None,
    "save_every": 0,
}
MAX_IMAGE_BYTES = 8 * 2**30
EVALUATION_IMAGES = 10_000  # images per forward pass in an evaluation, over all models of the stack
EAGER_STEPS = 3  # steps before a CUDA graph is captured, so that libraries can initialise


# Commands


def check_commands(commands: list[argparse.Namespace]) -> None:
    """Raise ``UserError`` if the commands cannot be trained in stacks that share their batches."""
    for command in commands:
        unsupported = [
            f"{flag(name)} {getattr(command, name)} (only {value})"
            for name, value in REQUIRED.items()
            if getattr(command, name) != value
        ]
        if command.amp_dtype not in ("float32", "bfloat16"):
            unsupported.append(f"--amp-dtype {command.amp_dtype} (only float32 or bfloat16)")
        if command.sched == "plateau":
            unsupported.append("--sched plateau (each run would have learning rates of its own)")
        if unsupported:
            raise UserError(
                f"train_stacked.py does not support these flags of {command.output_dir}: {', '.join(unsupported)}; "
                "train_together.py does"
            )
    may_differ = train_together.MAY_DIFFER | {"seed"}
    check_same_flags(commands, may_differ, {"eval", "data_path"})
    for part in ([c for c in commands if not c.eval], [c for c in commands if c.eval]):
        check_same_flags(part, may_differ)
        check_folders_differ(part)


def group_by_stack(commands: list[argparse.Namespace]) -> list[list[argparse.Namespace]]:
    """The commands of each stack, in the order of their first command."""
    stacks: dict[str, list[argparse.Namespace]] = {}
    for command in commands:
        key = repr({name: value for name, value in vars(command).items() if name not in OF_A_RUN})
        stacks.setdefault(key, []).append(command)
    return list(stacks.values())


# Images


class DecodedImages(Dataset):
    """A training set whose images are decoded once; its items are (augmented pixels, class).

    The pixels are uint8, (H, W, 3). `normalization` completes the transform on the model's device.

    Args:
        dataset: a training set of datasets.py. It loses its transform.
    Raises: UserError if its transform does not end with the conversion to a tensor and the normalization, or if the
        images need too much memory.
    """

    def __init__(self, dataset: Dataset) -> None:
        *augmentation, to_tensor, normalization = dataset.transform.transforms
        if not isinstance(to_tensor, MaybeToTensor) or not isinstance(normalization, transforms.Normalize):
            raise UserError(f"train_stacked.py cannot use the transform {dataset.transform}: use train_together.py")
        self.augment = transforms.Compose(augmentation)
        self._mean, self._std = normalization.mean, normalization.std
        self.classes, self.name = dataset.classes, dataset.name
        self.oddities = getattr(dataset, "oddities", None)  # for the notes on unusual images
        dataset.transform = unchanged
        self._samples = []
        size = 0
        for i in range(len(dataset)):
            image, target = dataset[i]
            size += 4 * image.width * image.height  # Pillow's RGB images have four bytes per pixel
            check_memory("training", size)
            self._samples.append((image, target))

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        image, target = self._samples[i]
        with naming(self.name(i), "transformed"):
            return np.asarray(self.augment(image)), target

    def normalization(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """The end of main.py's transform, a function of pixels: (..., H, W, 3) uint8 to (..., 3, H, W) float32."""
        # A tensor as the divisor, since a GPU divides by a Python number less exactly.
        white = torch.tensor(255.0, device=device)
        mean, std = (
            torch.as_tensor(values, dtype=torch.float32, device=device)[:, None, None]
            for values in (self._mean, self._std)
        )
        return lambda pixels: (pixels.movedim(-1, -3).float() / white - mean) / std


def unchanged(image: Image.Image) -> Image.Image:
    """The image, as the transform of a data set."""
    return image


def check_memory(split: str, size: int) -> None:
    """Raise ``UserError`` if the images of a data set need too much memory."""
    if size > MAX_IMAGE_BYTES:
        raise UserError(
            f"the decoded images of the {split} set need more than {MAX_IMAGE_BYTES / 2**30:.0f} GiB of memory: "
            "train_stacked.py is for small images; use train_together.py"
        )


def collate(samples: list[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
    """A batch of `DecodedImages`: pixels (B, H, W, 3), classes (B,).

    They are arrays, because a worker hands tensors over by file descriptors, which takes longer than copying them.
    """
    pixels, targets = zip(*samples, strict=True)
    return np.stack(pixels), np.array(targets)


def build_loader(command: argparse.Namespace, images: DecodedImages) -> DataLoader:
    """The batches of one seed, in main.py's order."""
    return DataLoader(
        runtime.SeededDataset(images),
        command.batch_size,
        sampler=main.build_train_sampler(command, images),
        drop_last=True,
        collate_fn=collate,
        num_workers=command.num_workers,
        worker_init_fn=runtime.own_group,
        persistent_workers=command.num_workers > 0,
        timeout=command.step_timeout if command.num_workers else 0,
    )


# Stacks


class Projection(nn.Linear):
    """nn.Linear for vmap, under which PyTorch's ignores autocast if it has a bias."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        return project(x, self.weight, self.bias)


class PatchProjection(nn.Conv2d):
    """A convolution whose patches do not overlap, as a matrix product, for which vmap is faster."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, D, H / patch, W / patch)."""
        height, width = self.kernel_size
        patches = x.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # (B, C, rows, height, columns, width)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)
        return project(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x·weightᵀ + bias in the type of the product."""
    product = F.linear(x, weight)
    return product if bias is None else product + bias.to(product.dtype)


def skeleton_of(model: nn.Module) -> nn.Module:
    """A copy of the model, for `functional_call` with other weights."""
    model = copy.deepcopy(model)
    for module in model.modules():
        check_not_random(module)
        if type(module) is nn.Linear:
            module.__class__ = Projection
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # PyTorch's attention does not support vmap on a CPU
    convolution = model.patch_embed.proj
    if type(convolution) is nn.Conv2d and convolution.stride == convolution.kernel_size and convolution.groups == 1:
        convolution.__class__ = PatchProjection
    return model


def check_not_random(module: nn.Module) -> None:
    """Raise ``UserError`` for a module that draws random numbers, which --model-kwargs may have asked for."""
    probabilities = {
        nn.Dropout: "p",
        DropPath: "drop_prob",
        PatchDropout: "prob",
    }
    for kind, name in probabilities.items():
        if isinstance(module, kind) and getattr(module, name, 0):
            raise UserError(
                f"the model has a {kind.__name__} of {getattr(module, name)}, and train_stacked.py does not support "
                "random numbers in a model: use train_together.py"
            )


class StackedModel:
    """Models of one architecture, computed together; S is their number.

    Attributes:
        parameters, buffers: by name, each with S in front.
    """

    def __init__(self, models: Sequence[nn.Module], dtype: torch.dtype) -> None:
        self.size = len(models)
        self.skeleton = skeleton_of(models[0])
        self.parameters, self.buffers = stack_module_state(list(models))
        self.dtype = dtype

    def _outputs(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor) -> Tensor:
        return functional_call(self.skeleton, (parameters, buffers), (images,)).float()

    def _autocast(self, device: torch.device) -> torch.autocast:
        """Mixed precision without its cache of weights, which a CUDA graph does not allow."""
        return torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False)

    def losses(self, criterion: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """The loss of each model on its batch: images (S, B, 3, H, W), targets (S, B) to (S,)."""

        def loss(parameters: dict, buffers: dict, images: Tensor, targets: Tensor) -> Tensor:
            return criterion(images, self._outputs(parameters, buffers, images), targets)

        self.skeleton.train()
        # vmap treats dropout as random even if its probability is 0.
        stacked = torch.vmap(loss, randomness="different")
        with self._autocast(images.device):
            return stacked(self.parameters, self.buffers, images, targets)

    @torch.no_grad()
    def evaluate(self, images: Tensor, targets: Tensor) -> Tensor:
        """The sums of `engine.batch_sums` over all images, which all models share: (N, 3, H, W), (N,) to (S, 4)."""

        def sums(parameters: dict, buffers: dict, images: Tensor, targets: Tensor) -> Tensor:
            return engine.batch_sums(self._outputs(parameters, buffers, images).double(), targets)

        self.skeleton.eval()
        chunk_size = max(1, EVALUATION_IMAGES // self.size)
        stacked = torch.vmap(sums, in_dims=(0, 0, None, None))
        with self._autocast(images.device):
            return sum(
                stacked(self.parameters, self.buffers, *chunk)
                for chunk in zip(images.split(chunk_size), targets.split(chunk_size), strict=True)
            )


class Stack:
    """Trainings that differ only in their seed.

    Args:
        rows: for each training, the index of its batch among those given to `step`.
    """

    def __init__(self, trainings: list[Training], rows: list[int], device: torch.device) -> None:
        self.trainings = trainings
        self.device = device
        first = trainings[0]
        self.criterion = first.criterion
        self.model = StackedModel([t.state.model for t in trainings], main.amp_dtype(first.run.args, device))
        self.rows = torch.tensor(rows, device=device)
        self.optimizer = self._stack_optimizer()
        # The stacks run side by side on the GPU, each in a stream of its own.
        self._stream = torch.cuda.Stream() if device.type == "cuda" else None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._steps = 0
        self._loss: Tensor | None = None
        self._losses: list[Tensor] = []

    def _stack_optimizer(self) -> torch.optim.Optimizer:
        """An AdamW with the hyperparameters and the state of the trainings' optimizers."""
        first = self.trainings[0].state
        names = {parameter: name for name, parameter in first.model.named_parameters()}
        groups = []
        for group in first.optimizer.param_groups:
            options = {key: value for key, value in group.items() if key != "params"}
            if self.device.type == "cuda":  # a CUDA graph reads the learning rate and the step from the GPU
                options |= {"fused": True, "capturable": True, "lr": torch.tensor(group["lr"], device=self.device)}
            groups.append({**options, "params": [self.model.parameters[names[p]] for p in group["params"]]})
        optimizer = torch.optim.AdamW(groups)
        for name, parameter in self.model.parameters.items():
            states = [self._state_of(training, name) for training in self.trainings]
            if states[0]:
                optimizer.state[parameter] = {
                    key: states[0][key].to(self.device) if key == "step" else torch.stack([s[key] for s in states])
                    for key in states[0]
                }
        return optimizer

    @staticmethod
    def _state_of(training: Training, name: str) -> dict[str, Tensor]:
        """The optimizer's state of a parameter in a training of its own."""
        return training.state.optimizer.state.get(training.state.model.get_parameter(name), {})

    @property
    def commands(self) -> list[argparse.Namespace]:
        """The flags of the trainings."""
        return [training.run.args for training in self.trainings]

    def start_epoch(self, training: Training) -> None:
        """Take over the learning rates that the schedule of a training has set.

        Args:
            training: one that has not failed: the schedules of the others have stopped.
        """
        for group, own in zip(self.optimizer.param_groups, training.state.optimizer.param_groups, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(own["lr"])
            else:
                group["lr"] = own["lr"]
        self._losses = []

    def step(self, images: Tensor, targets: Tensor) -> None:
        """Start one step of each training; on a GPU, `wait` has to follow before the next one.

        Args:
            images, targets: (seeds, B, 3, H, W) and (seeds, B), the same tensors in every step, with new content.
        """
        if self._stream is None:
            self._run(images, targets)
        else:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._run_graph(images, targets)
        self._steps += 1

    def wait(self) -> None:
        """Let what follows on the GPU wait for this step."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def _run_graph(self, images: Tensor, targets: Tensor) -> None:
        """Run a step as a CUDA graph, after a few steps without one."""
        if self._steps < EAGER_STEPS:
            self._run(images, targets)
        else:
            if self._graph is None:
                self._graph = self._capture(images, targets)
            self._graph.replay()
            self._losses.append(self._loss.clone())

    def _capture(self, images: Tensor, targets: Tensor) -> "torch.cuda.CUDAGraph":
        """Record a step as a CUDA graph, which writes its losses to `_loss`."""
        graph = torch.cuda.CUDAGraph()
        cause = None
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                try:
                    self._loss = self._compute(images, targets)
                except RuntimeError as error:  # the end of the capture would hide it behind an error of its own
                    cause = error
        except RuntimeError as error:
            raise cause or error from None
        if cause:
            raise cause
        return graph

    def release(self) -> None:
        """Free the memory of a stack whose trainings have all failed."""
        self.wait()
        self._graph, self._losses, self._loss = None, [], None
        self.model, self.optimizer = None, None
        if self._stream is not None:
            torch.cuda.empty_cache()

    def _run(self, images: Tensor, targets: Tensor) -> None:
        self._losses.append(self._compute(images, targets))

    def _compute(self, images: Tensor, targets: Tensor) -> Tensor:
        """One step of the optimizer; returns the losses."""
        self.optimizer.zero_grad()
        loss = self.model.losses(self.criterion, images[self.rows], targets[self.rows])
        loss.sum().backward()
        self.optimizer.step()
        return loss.detach()

    def mean_losses(self) -> list[float]:
        """The mean loss of each training in this epoch."""
        return torch.stack(self._losses).double().mean(0).tolist()

    @torch.no_grad()
    def unstack(self) -> None:
        """Copy the weights and the optimizer's state to the trainings, which save them."""
        for row, training in enumerate(self.trainings):
            model, optimizer = training.state.model, training.state.optimizer
            names = {parameter: name for name, parameter in model.named_parameters()}
            for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
                stacked = self.model.parameters[names[parameter]]
                parameter.copy_(stacked[row])
                optimizer.state[parameter] = {
                    key: value.cpu().clone() if key == "step" else value[row].clone()
                    for key, value in self.optimizer.state[stacked].items()
                }
            for name, buffer in model.named_buffers():
                buffer.copy_(self.model.buffers[name][row])


# The program


class StackedGroup(Group):
    """The runs of a process, in stacks."""

    def __init__(self, job: Job, device: torch.device) -> None:
        super().__init__(job, device)
        torch.backends.cudnn.benchmark = False  # it chooses algorithms by their time, which varies

    @contextlib.contextmanager
    def _attempt_all(self, commands: list[argparse.Namespace]) -> Iterator[None]:
        """A context for work on a stack, whose errors end all of its runs but not the other stacks."""
        try:
            yield
        except Interrupted:
            raise
        except Exception as error:  # as for a single run
            for command in commands:
                with self._attempt(command):
                    raise error

    def train(self, commands: list[argparse.Namespace]) -> None:
        """Train all stacks up to their last epoch."""
        dataset, nb_classes = build_dataset(True, commands[0])
        images = DecodedImages(dataset)
        loaders = {command.seed: build_loader(command, images) for command in commands}
        note_many_processes(commands[0], len(loaders))
        engine.print_notes(next(iter(loaders.values())), self.job)
        validation = self._read_images(main.build_val_loader(commands[0], self.device)[0])
        stacks = []
        for its_commands in group_by_stack(commands):
            for trainings in self._start(its_commands, loaders, nb_classes):
                rows = [list(loaders).index(training.run.args.seed) for training in trainings]
                with self._attempt_all([training.run.args for training in trainings]):
                    stacks.append(Stack(trainings, rows, self.device))
        with contextlib.ExitStack() as context:
            for training in (training for stack in stacks for training in stack.trainings):
                training.run.__enter__()
                context.push(self._leave(training))
            if stacks:
                self._train_epochs(stacks, Batches(list(loaders.values()), images, self.device), validation)

    def _start(
        self, commands: list[argparse.Namespace], loaders: dict[int, DataLoader], nb_classes: int
    ) -> list[list[Training]]:
        """The unfinished trainings of these commands, which are alike, grouped by the epoch at which they start."""
        groups: dict[int, list[Training]] = {}
        for command in commands:
            with self._attempt(command):
                training = train_together.start(command, self.job, self.device, loaders[command.seed], nb_classes)
                if training.run.epoch < command.epochs:
                    members = groups.get(training.run.epoch, [])
                    check_can_join(training, members, command)
                    groups[training.run.epoch] = [*members, training]
        return list(groups.values())

    def _read_images(self, loader: DataLoader) -> tuple[Tensor, Tensor]:
        """All images and classes of a validation set, on the model's device."""
        batches, size = [], 0
        for batch in self.job.evaluation_steps("reading images", loader):
            batches.append(batch)
            size += batch[0].nbytes
            check_memory("validation", size)
        engine.print_notes(loader, self.job)
        images, targets = (torch.cat(column).to(self.device) for column in zip(*batches, strict=True))
        return images, targets

    def _train_epochs(self, stacks: list[Stack], batches: "Batches", validation: tuple[Tensor, Tensor]) -> None:
        """Train all epochs. Runs that were interrupted later than others wait until those have caught up."""
        starts = [(stack, stack.trainings[0].run.epoch) for stack in stacks]
        epochs = {id(stack): [training.run.epochs() for training in stack.trainings] for stack in stacks}
        for epoch in range(min(start for _, start in starts), stacks[0].trainings[0].run.args.epochs):
            active = self._remaining_stacks([stack for stack, start in starts if start <= epoch])
            for stack in active:
                for its_epochs in epochs[id(stack)]:
                    next(its_epochs)
                stack.start_epoch(self._remaining(stack.trainings)[0])
            if active:
                self._train_epoch(active, batches, epoch)
                self._end_epoch(self._remaining_stacks(active), validation)

    def _remaining_stacks(self, stacks: list[Stack]) -> list[Stack]:
        """The stacks that still have a run that has not failed."""
        return [stack for stack in stacks if self._remaining(stack.trainings)]

    def _train_epoch(self, stacks: list[Stack], batches: "Batches", epoch: int) -> None:
        images_per_step = sum(len(stack.trainings) for stack in stacks) * batches.batch_size
        progress = Progress(f"{len(stacks)} stacks, epoch {epoch}", len(batches), images_per_step)
        with self.job.training_steps():
            for step, batch in enumerate(batches):
                self.job.place = f"epoch {epoch}, step {step}"
                running = self._remaining_stacks(stacks)
                for stack in running:
                    with self._attempt_all(stack.commands):
                        stack.step(*batch)
                for stack in running:
                    stack.wait()
                    if not self._remaining(stack.trainings):
                        stack.release()
                progress.step()
                self.job.stop_if_signalled()
                if not self._remaining_stacks(stacks):
                    break

    def _end_epoch(self, stacks: list[Stack], validation: tuple[Tensor, Tensor]) -> None:
        """Evaluate all stacks; then save and log each training, so that a failed evaluation does not separate them."""
        evaluated = []
        for stack in stacks:
            with self._attempt_all(stack.commands):
                evaluated.append((stack, stack.mean_losses(), stack.model.evaluate(*validation).tolist()))
        for stack, losses, all_sums in evaluated:
            with self._attempt_all(stack.commands):
                stack.unstack()
            for training, loss, sums in zip(stack.trainings, losses, all_sums, strict=True):
                if not self._has_failed(training.run.args):
                    with self._attempt(training.run.args):
                        self._save(training, loss, torch.tensor(sums, dtype=torch.float64), stack.model.dtype)
        self.job.stop_if_signalled()

    def _save(self, training: Training, loss: float, sums: Tensor, dtype: torch.dtype) -> None:
        """Save and log a training after an epoch."""
        run = training.run
        if not math.isfinite(loss):
            raise UserError(f"the mean loss is {loss} in epoch {run.epoch}: a lower --lr may help")
        test = engine.summarize(sums, dtype)
        print_once(f"{training.output_dir} epoch {run.epoch}  loss {loss:.4g}  acc1 {test['acc1']:.3f}")
        lr = training.state.optimizer.param_groups[0]["lr"]
        main.end_epoch(run, training.state, {"lr": lr, "loss": loss}, test)

    def evaluate(self, commands: list[argparse.Namespace]) -> None:
        """Execute the evaluations of those runs that have not failed, in stacks."""
        loader, nb_classes = main.build_val_loader(commands[0], self.device)
        classes = main.class_names(loader.dataset)
        images, targets = self._read_images(loader)
        for its_commands in group_by_stack([command for command in commands if not self._has_failed(command)]):
            models = {}
            for command in its_commands:
                with self._attempt(command):
                    models[command.output_dir] = self._load(command, nb_classes, classes)
            loaded = [command for command in its_commands if command.output_dir in models]
            if loaded:
                with self._attempt_all(loaded):
                    self._evaluate(loaded, list(models.values()), images, targets)

    def _evaluate(
        self, commands: list[argparse.Namespace], models: list[nn.Module], images: Tensor, targets: Tensor
    ) -> None:
        """Evaluate a stack."""
        dtype = main.amp_dtype(commands[0], self.device)
        all_sums = StackedModel(models, dtype).evaluate(images, targets)
        for command, sums in zip(commands, all_sums, strict=True):
            with self._attempt(command):
                stats = engine.summarize(sums, dtype)
                print_once(f"{command.output_dir} Acc@1 {stats['acc1']:.3f} loss {stats['loss']:.3f}")
                main.write_evaluation(command.output_dir, stats, self.job)

    def _load(self, command: argparse.Namespace, nb_classes: int, classes: list[str]) -> nn.Module:
        """The model of a checkpoint."""
        checkpoint = runtime.checkpoint_to_resume(command.resume, command.output_dir, needed=True)
        if checkpoint is None:
            raise UserError("--eval needs --resume and a checkpoint here")
        settings = main.run_settings(command, checkpoint)
        check_same_model(settings, command)
        model = main.build_model(settings, nb_classes)
        load_weights(model, checkpoint.content, checkpoint.path)
        check_classes(checkpoint.content, checkpoint.path, classes)
        return model.to(self.device)


def note_many_processes(command: argparse.Namespace, seeds: int) -> None:
    """Print a note if the loading processes of all seeds are many more than the cores."""
    processes, cores = seeds * command.num_workers, os.cpu_count() or 1
    if processes > 2 * cores:
        print_once(
            f"note: --num_workers {command.num_workers} starts {processes} loading processes, because it counts for "
            f"each of the {seeds} seeds, and this machine has {cores} cores"
        )


def check_same_model(settings: argparse.Namespace, command: argparse.Namespace) -> None:
    """Raise ``UserError`` if the checkpoint's model has flags that the command lacks."""
    for name in ("rpe", "model_kwargs"):
        if getattr(settings, name) != getattr(command, name):
            raise UserError(
                f"its checkpoint was trained with {flag(name)} {getattr(settings, name)}: give the command this flag, "
                "so that it is in a stack of such models"
            )


def check_can_join(training: Training, stack: list[Training], command: argparse.Namespace) -> None:
    """Raise ``UserError`` if a training cannot be in a stack with these, because of what its checkpoint holds."""
    check_same_model(training.run.args, command)
    if training.run.first_step:
        raise UserError(
            f"its checkpoint was saved within epoch {training.run.epoch}, but train_stacked.py resumes only from the "
            "end of an epoch; use train_together.py"
        )
    if stack and hyperparameters(training) != hyperparameters(stack[0]):
        raise UserError(
            "its checkpoint has other hyperparameters or another number of steps than that of "
            f"{stack[0].output_dir}: use train_together.py"
        )


def hyperparameters(training: Training) -> list[dict[str, Any]]:
    """What the trainings of a stack must have in common in their optimizers: options, and number of steps."""
    optimizer = training.state.optimizer
    steps = [float(optimizer.state[p]["step"]) for p in optimizer.state if "step" in optimizer.state[p]]
    return [*({k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups), {"steps": steps}]


class Batches:
    """The batches of all seeds, step by step, in tensors whose addresses stay: (seeds, B, 3, H, W), (seeds, B)."""

    def __init__(self, loaders: list[DataLoader], images: DecodedImages, device: torch.device) -> None:
        self._loaders, self._device = loaders, device
        self._normalize = images.normalization(device)
        self.batch_size = loaders[0].batch_size
        self._images: Tensor | None = None
        self._targets: Tensor | None = None

    def __len__(self) -> int:
        return len(self._loaders[0])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # All loaders start at once, before the first batch of any of them is waited for.
        for batches in zip(*[runtime.read_batches(loader) for loader in self._loaders], strict=True):
            pixels, targets = (self._to_device(np.stack(column)) for column in zip(*batches, strict=True))
            images = self._normalize(pixels)
            if self._images is None:
                self._images, self._targets = images, targets
            else:
                self._images.copy_(images)
                self._targets.copy_(targets)
            yield self._images, self._targets

    def _to_device(self, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(values)
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)


def run(args: argparse.Namespace) -> None:
    """Run the commands of the file.

    Raises: UserError if they cannot be run in stacks, or if some of them failed.
    """
    commands = [runtime.with_place(command) for command in train_together.read_commands(args.commands)]
    check_commands(commands)
    train_together.execute(commands, StackedGroup)


if __name__ == "__main__":
    parser = runtime.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", type=Path, metavar="COMMANDS", help="file with a command of main.py per line")
    # Algorithms that give bit-identical results when they are repeated. cuBLAS reads the variable when it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would fill every new tensor
    runtime.run(run, parser.parse_args())
