"""Run several commands of DeiT's main.py in one process, which loads every batch once for all of them.

    cd DeiT-with-iRPE && python ../tools/train_together.py COMMANDS

COMMANDS is a text file with one command per line, such as `python main.py --model ... --output_dir OUT`. The trainings
run side by side, step by step, so they must have the same flags for data, augmentation and seed. Then the commands with
--eval follow. Each model computes what it would compute alone, with the same random numbers, and the results and files
are the same to the bit. Small models gain most, since loading images and starting up is much of their time.

If a run fails, the others continue, and its error is printed with its --output_dir. After a signal, all trainings save;
with --resume auto in the commands, the same command continues them.

Exit status: 0 all runs succeeded; 1 some failed, or the commands cannot be run together; 75 interrupted by a signal
that asks training to stop; 130 interrupted by Ctrl-C.
"""

import argparse
import contextlib
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "DeiT-with-iRPE"))
import engine
import main
import runtime
from checkpoint import TrainingState
from losses import DistillationLoss
from runtime import Interrupted, Job, Progress, UserError

# The flags in which trainings on the same batches may differ.
MODEL_FLAGS = ("model", "rpe", "model_kwargs", "drop", "drop_path", "pretrained", "finetune")
OPTIMIZER_FLAGS = ("opt", "opt_eps", "opt_betas", "momentum", "weight_decay", "lr", "clip_grad", "model_ema_decay")
MAY_DIFFER = {*MODEL_FLAGS, *OPTIMIZER_FLAGS, "output_dir", "resume"}
# Batches of an evaluation are kept for the next model as long as they need less memory than this.
MOST_KEPT_BYTES = 2**30


def read_commands(path: Path) -> list[argparse.Namespace]:
    """The flags of each command in the file; ``command`` is the command itself.

    Raises: UserError for a file that cannot be read, or a line that is not a command of main.py.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"the commands in {path} cannot be read: {error}") from error
    parser = runtime.ArgumentParser(parents=[main.get_args_parser()])
    commands = []
    for line in lines:
        words = shlex.split(line)
        if words[:2] != ["python", "main.py"]:
            raise UserError(
                f"{path} has the line {line!r}: each line must be a command that begins with python main.py"
            )
        flags = parser.parse_args(words[2:])
        main.check_args(flags)
        if not flags.output_dir:
            raise UserError(f"{path} has a command without --output_dir: {line!r}")
        flags.command = words[1:]
        commands.append(flags)
    if not commands:
        raise UserError(f"{path} contains no command")
    return commands


def check_same_batches(commands: list[argparse.Namespace]) -> None:
    """Raise ``UserError`` if the commands differ in a flag that all runs of a process must share."""
    for other in commands[1:]:
        pairs = {name: (getattr(commands[0], name), getattr(other, name)) for name in vars(other)}
        for name, (first, second) in pairs.items():
            if name not in MAY_DIFFER | {"command"} and first != second:
                raise UserError(
                    f"--{name} is {first} in {commands[0].output_dir} and {second} in {other.output_dir}: runs that "
                    f"share their batches may differ only in {', '.join(sorted(MAY_DIFFER))}; run this one separately"
                )


class KeptBatches:
    """A loader for evaluation whose batches are kept after the first pass, if they fit into ``MOST_KEPT_BYTES``."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader
        self.dataset, self.sampler, self.batch_size = loader.dataset, loader.sampler, loader.batch_size
        self._kept: list[Any] | None = None

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        if self._kept is not None:
            yield from self._kept
            return
        batches, size = [], 0
        for batch in runtime.read_batches(self.loader):
            size += sum(tensor.nbytes for tensor in batch)
            if size <= MOST_KEPT_BYTES:
                batches.append(batch)
            yield batch
        if size <= MOST_KEPT_BYTES:
            self._kept = batches


@dataclass
class Training:
    """One of the models that are trained side by side."""

    run: runtime.Run
    state: TrainingState
    criterion: DistillationLoss
    mixup: Mixup | None
    progress: Progress | None = None  # of the current epoch

    @property
    def output_dir(self) -> str:
        """Where the run writes, which also names it in messages."""
        return self.run.args.output_dir

    def start_epoch(self) -> None:
        """Prepare the model for the steps of ``run.epoch``."""
        self.state.model.train()
        self.progress = engine.start_progress(self.run, self.state.optimizer, f"{self.output_dir} ")

    def step(self, step: int, images: torch.Tensor, targets: torch.Tensor) -> None:
        """Train on a batch, unless the run did this step before it was interrupted."""
        if step < self.run.first_step:
            return
        engine.seed_step(self.run, step)
        if self.mixup:
            images, targets = self.mixup(images.clone(), targets)  # mixes in place
        state, args = self.state, self.run.args
        loss = engine.train_step(
            state.model,
            self.criterion,
            images,
            targets,
            state.optimizer,
            state.loss_scaler,
            args.clip_grad,
            state.model_ema,
            main.amp_dtype(args, images.device),
        )
        self.progress.step(loss=loss)

    def save(self) -> None:
        """Save within the epoch."""
        self.run.save(self.progress.done, self.progress.read())


class Group:
    """The runs of a process: trainings side by side, then evaluations.

    Attributes:
        failures: the error of each failed run, by its output directory.
    """

    def __init__(self, job: Job, device: torch.device) -> None:
        self.job, self.device = job, device
        self.failures: dict[str, str] = {}

    @contextlib.contextmanager
    def _attempt(self, output_dir: str) -> Iterator[None]:
        """A context for the work of one run, whose errors do not end the others."""
        try:
            yield
        except UserError as error:
            self.failures[output_dir] = str(error)
            print(f"error: {output_dir}: {error}", file=sys.stderr, flush=True)

    def train(self, commands: list[argparse.Namespace]) -> None:
        """Train all models up to their last epoch."""
        loader, nb_classes = main.build_train_loader(commands[0], self.device)
        val_loader = KeptBatches(main.build_val_loader(commands[0], self.device)[0])
        trainings = []
        for command in commands:
            with self._attempt(command.output_dir):
                trainings.append(self._start(command, loader, nb_classes))
        with contextlib.ExitStack() as stack:
            for training in trainings:
                stack.enter_context(training.run)
            if trainings:
                self._train_epochs(trainings, loader, val_loader)

    def _train_epochs(self, trainings: list[Training], loader: DataLoader, val_loader: KeptBatches) -> None:
        """Train all epochs. A run that was interrupted later than the others waits until they have caught up."""
        epochs = [(training, training.run.epoch, training.run.epochs()) for training in trainings]
        for epoch in range(min(first for _, first, _ in epochs), trainings[0].run.args.epochs):
            active = []
            for training, first_epoch, own_epochs in epochs:
                if first_epoch <= epoch and training.output_dir not in self.failures:
                    next(own_epochs)
                    active.append(training)
            self._train_epoch(active, loader)
            for training in self._remaining(active):
                with self._attempt(training.output_dir):
                    self._end_epoch(training, val_loader)

    def _start(self, command: argparse.Namespace, loader: DataLoader, nb_classes: int) -> Training:
        """A training in its first state, or as its checkpoint left it."""
        runtime.seed_everything(command.seed)
        checkpoint = runtime.checkpoint_to_resume(command.resume, command.output_dir)
        settings = main.run_settings(command, checkpoint)
        del settings.command
        parts = main.start_run(settings, self.job, self.device, checkpoint, bool(command.resume), loader, nb_classes)
        training = Training(*parts, main.build_mixup(settings, nb_classes))
        training.run.command = command.command
        return training

    def _remaining(self, trainings: list[Training]) -> list[Training]:
        return [training for training in trainings if training.output_dir not in self.failures]

    def _train_epoch(self, trainings: list[Training], loader: DataLoader) -> None:
        """Train one epoch, in which the runs may begin at different steps."""
        if not trainings:
            return
        first_step = min(training.run.first_step for training in trainings)
        loader.sampler.set_epoch(trainings[0].run.epoch, first_step * trainings[0].run.images_per_step)
        for training in trainings:
            training.start_epoch()
        with self.job.training_steps():
            for step, (images, targets) in enumerate(runtime.read_batches(loader), first_step):
                self.job.place = f"epoch {trainings[0].run.epoch}, step {step}"
                images, targets = images.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)
                for training in self._remaining(trainings):
                    with self._attempt(training.output_dir):
                        training.step(step, images, targets)
                        if training.run.save_is_due(step + 1) and step >= training.run.first_step:
                            training.save()
                if self.job.received_signals:
                    self._save_all(self._remaining(trainings), step)
                    raise Interrupted(self.job.received_signals[0], self.job.place)
        engine.print_notes(loader, self.job)

    def _save_all(self, trainings: list[Training], step: int) -> None:
        for training in trainings:
            if step >= training.run.first_step:
                with self._attempt(training.output_dir):
                    training.save()

    def _end_epoch(self, training: Training, val_loader: KeptBatches) -> None:
        """Evaluate, save and log."""
        print(f"{training.output_dir} epoch {training.run.epoch}", flush=True)
        dtype = main.amp_dtype(training.run.args, self.device)
        test = engine.evaluate(val_loader, training.state.model, self.device, dtype, self.job)
        main.end_epoch(training.run, training.state, training.progress.averages(), test)

    def evaluate(self, commands: list[argparse.Namespace]) -> None:
        """Execute the evaluations of those runs that have not failed."""
        loader, nb_classes = main.build_val_loader(commands[0], self.device)
        kept = KeptBatches(loader)
        for command in commands:
            if command.output_dir in self.failures:
                continue
            with self._attempt(command.output_dir):
                print(f"{command.output_dir} evaluation", flush=True)
                checkpoint = runtime.checkpoint_to_resume(command.resume, command.output_dir, needed=True)
                settings = main.run_settings(command, checkpoint)
                main.evaluate_only(settings, self.job, self.device, checkpoint, kept, nb_classes)


def run(args: argparse.Namespace) -> None:
    """Run the commands of the file.

    Raises: UserError if they cannot be run together, or if some of them failed.
    """
    commands = [runtime.with_place(command) for command in read_commands(args.commands)]
    trainings = [command for command in commands if not command.eval]
    evaluations = [command for command in commands if command.eval]
    check_same_batches(trainings)
    check_same_batches(evaluations)
    runtime.need_signals("training", *runtime.STOPPING)
    first = commands[0]
    if first.world_size > 1:
        raise UserError(f"train_together.py runs on one rank, not on {first.world_size}: start it without a launcher")
    device = runtime.find_device(first.device, first.world_size)
    if first.compile:
        runtime.check_compiler(device)
        # All models share one function, VisionTransformer.forward, of which every variant is compiled to train and to
        # evaluate.
        torch._dynamo.config.recompile_limit = 8 * len(commands)
    torch.backends.cudnn.benchmark = True
    with Job(first.dist_url, runtime.step_timeout(first)) as job, contextlib.ExitStack() as locks:
        for folder in dict.fromkeys(command.output_dir for command in commands):
            runtime.prepare_output_dir(folder)
            locks.enter_context(runtime.output_lock(folder))
        group = Group(job, device)
        if trainings:
            group.train(trainings)
        if evaluations:
            group.evaluate(evaluations)
    if group.failures:
        raise UserError(f"{len(group.failures)} of the runs failed: {', '.join(group.failures)}")


if __name__ == "__main__":
    parser = runtime.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", type=Path, metavar="COMMANDS", help="file with a command of main.py per line")
    runtime.run(run, parser.parse_args())
