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
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import train_together
from decoded_images import Batches, DecodedImages, build_loader, check_memory
from stacks import Stack, StackedModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from train_together import Group, Training, check_folders_differ, check_same_flags, flag, main, runtime

import engine
from checkpoint import check_classes, load_weights
from datasets import build_dataset
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

    def _train_epochs(self, stacks: list[Stack], batches: Batches, validation: tuple[Tensor, Tensor]) -> None:
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

    def _train_epoch(self, stacks: list[Stack], batches: Batches, epoch: int) -> None:
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
