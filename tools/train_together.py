"""Run several commands of DeiT's main.py in one process, which loads every batch once for all of them.

    cd DeiT-with-iRPE && python ../tools/train_together.py COMMANDS

COMMANDS is a text file with one command per line, such as `python main.py --model ... --output_dir OUT`. The trainings
run side by side, step by step; then the commands with --eval follow. Training commands may differ only in flags of the
model and the optimizer (MAY_DIFFER lists them), --output_dir and --resume, so that they share all batches; the same
holds for evaluations. Each model computes what it would compute alone, with the same random numbers; on a CPU, its
results are bit-identical. Small models gain most, since loading images and starting up is much of their time.

If a run fails, the others continue, and its error is printed with its --output_dir. After SIGTERM, SIGUSR1 or SIGUSR2
all trainings save. With --resume auto in the commands, running this program again with the same file continues them.

Exit status: 0 all runs succeeded; 1 some failed, or the commands cannot be run together; 2 a line has wrong flags; 75
interrupted by a signal that asks training to stop; 130 interrupted by Ctrl-C.
"""

import argparse
import contextlib
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Set
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
from runtime import Interrupted, Job, Progress, UserError, print_once
from runtime.errors import explanation

# The flags in which trainings on the same batches may differ.
MODEL_FLAGS = ("model", "rpe", "model_kwargs", "drop", "drop_path", "pretrained", "finetune")
OPTIMIZER_FLAGS = ("opt", "opt_eps", "opt_betas", "momentum", "weight_decay", "lr", "clip_grad", "model_ema_decay")
MAY_DIFFER = {*MODEL_FLAGS, *OPTIMIZER_FLAGS, "output_dir", "resume"}
# Batches of an evaluation are kept for the next model as long as they need less memory than this.
MAX_KEPT_BYTES = 2**30


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
        try:
            words = shlex.split(line)
        except ValueError as error:
            raise UserError(f"{path} has a line that cannot be read ({error}): {line!r}") from error
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


def check_commands(trainings: list[argparse.Namespace], evaluations: list[argparse.Namespace]) -> None:
    """Raise ``UserError`` if the commands cannot share a process or their batches."""
    check_same_flags([*trainings, *evaluations], MAY_DIFFER, {"eval", "data_path"})
    for part in (trainings, evaluations):
        check_same_flags(part, MAY_DIFFER)
        check_folders_differ(part)


def check_folders_differ(commands: list[argparse.Namespace]) -> None:
    """Raise ``UserError`` if two commands write to the same folder."""
    folders = [folder_of(command) for command in commands]
    if repeated := [folder for folder in folders if folders.count(folder) > 1]:
        raise UserError(f"two commands write to --output_dir {repeated[0]}: give each run a folder of its own")


def check_same_flags(
    commands: list[argparse.Namespace], may_differ: Set[str], between_parts: Set[str] = frozenset()
) -> None:
    """Raise ``UserError`` if the commands differ in a flag that is in neither of the sets.

    Args:
        between_parts: flags in which trainings and evaluations may differ, besides ``may_differ``.
    """
    for other in commands[1:]:
        for name, second in vars(other).items():
            first = getattr(commands[0], name)
            if name not in may_differ | between_parts | {"command"} and first != second:
                allowed = ", ".join(sorted(map(flag, may_differ)))
                raise UserError(
                    f"{flag(name)} is {first} in {commands[0].output_dir} and {second} in {other.output_dir}: runs "
                    f"that share their batches may differ only in {allowed}; run this one separately"
                )


def flag(name: str) -> str:
    """The flag of an argument's name."""
    return "--" + (name if name == "output_dir" else name.replace("_", "-"))


def folder_of(command: argparse.Namespace) -> str:
    """The output directory of a command, in one spelling."""
    return os.path.realpath(command.output_dir)


class KeptBatches:
    """A loader for evaluation whose batches are kept after the first pass, if they fit into ``MAX_KEPT_BYTES``."""

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
            if size <= MAX_KEPT_BYTES:
                batches.append(batch)
            else:
                batches.clear()
            yield batch
        if size <= MAX_KEPT_BYTES:
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
        """Train on a batch; skip it if the run has already done this step."""
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

    def saves_after(self, step: int, signalled: bool) -> bool:
        """Whether to save after this step, if a signal came or the save is due."""
        return step >= self.run.first_step and (signalled or self.run.save_is_due(step + 1))

    def save(self) -> None:
        """Save within the epoch."""
        self.run.save(self.progress.done, self.progress.read())


def start(command: argparse.Namespace, job: Job, device: torch.device, loader: DataLoader, nb_classes: int) -> Training:
    """A training in its first state, or as its checkpoint left it."""
    runtime.seed_everything(command.seed)
    checkpoint = runtime.checkpoint_to_resume(command.resume, command.output_dir)
    settings = main.run_settings(command, checkpoint)
    del settings.command
    parts = main.start_run(settings, job, device, checkpoint, bool(command.resume), loader, nb_classes)
    training = Training(*parts, main.build_mixup(settings, nb_classes))
    training.run.command = command.command
    return training


class Group:
    """The runs of a process: trainings side by side, then evaluations.

    Attributes:
        failures: the first error of each failed run, by `folder_of` its command.
    """

    def __init__(self, job: Job, device: torch.device) -> None:
        self.job, self.device = job, device
        self.failures: dict[str, str] = {}

    @contextlib.contextmanager
    def _attempt(self, command: argparse.Namespace) -> Iterator[None]:
        """A context for the work of one run, whose errors do not end the others."""
        try:
            yield
        except Interrupted:
            raise
        except Exception as error:  # a full GPU, for example, or an optimizer that overflows
            sentence = str(error) if isinstance(error, UserError) else explanation(error, self.job.place)
            details = "" if sentence else f"\n{traceback.format_exc()}"
            sentence = sentence or f"{type(error).__name__}: {error}"
            self.failures.setdefault(folder_of(command), sentence)
            with contextlib.suppress(OSError):  # a full disk behind the output does not end the other runs
                print(f"error: {command.output_dir}: {sentence}{details}", file=sys.stderr, flush=True)

    def train(self, commands: list[argparse.Namespace]) -> None:
        """Train all models up to their last epoch."""
        loader, nb_classes = main.build_train_loader(commands[0], self.device)
        val_loader = KeptBatches(main.build_val_loader(commands[0], self.device)[0])
        trainings = []
        for command in commands:
            with self._attempt(command):
                trainings.append(start(command, self.job, self.device, loader, nb_classes))
        with contextlib.ExitStack() as stack:
            for training in trainings:
                training.run.__enter__()
                stack.push(self._leave(training))
            if trainings:
                self._train_epochs(trainings, loader, val_loader)

    def _leave(self, training: Training) -> Callable[..., None]:
        """The end of the run's context. It raises an error if the last save failed, which concerns this run only."""

        def leave(*error: Any) -> None:
            with self._attempt(training.run.args):
                training.run.__exit__(*error)

        return leave

    def _train_epochs(self, trainings: list[Training], loader: DataLoader, val_loader: KeptBatches) -> None:
        """Train all epochs. A run that was interrupted later than the others waits until they have caught up."""
        epochs = [(training, training.run.epoch, training.run.epochs()) for training in trainings]
        for epoch in range(min(first for _, first, _ in epochs), trainings[0].run.args.epochs):
            active = []
            for training, first_epoch, own_epochs in epochs:
                if first_epoch <= epoch and not self._has_failed(training.run.args):
                    next(own_epochs)
                    active.append(training)
            if active:
                self._train_epoch(active, loader)
            for training in self._remaining(active):
                with self._attempt(training.run.args):
                    self._end_epoch(training, val_loader)

    def _has_failed(self, command: argparse.Namespace) -> bool:
        return folder_of(command) in self.failures

    def _remaining(self, trainings: list[Training]) -> list[Training]:
        return [training for training in trainings if not self._has_failed(training.run.args)]

    def _train_epoch(self, trainings: list[Training], loader: DataLoader) -> None:
        """Train one epoch, in which the runs may begin at different steps."""
        first_step = min(training.run.first_step for training in trainings)
        loader.sampler.set_epoch(trainings[0].run.epoch, first_step * trainings[0].run.images_per_step)
        for training in trainings:
            training.start_epoch()
        with self.job.training_steps():
            for step, (images, targets) in enumerate(runtime.read_batches(loader), first_step):
                self.job.place = f"epoch {trainings[0].run.epoch}, step {step}"
                images, targets = images.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)
                for training in self._remaining(trainings):
                    with self._attempt(training.run.args):
                        training.step(step, images, targets)
                signals = list(self.job.received_signals)
                for training in self._remaining(trainings):
                    if training.saves_after(step, bool(signals)):
                        with self._attempt(training.run.args):
                            training.save()
                if signals:
                    raise Interrupted(signals[0], self.job.place)
                if not self._remaining(trainings):
                    break
        engine.print_notes(loader, self.job)

    def _end_epoch(self, training: Training, val_loader: KeptBatches) -> None:
        """Evaluate, save and log."""
        print_once(f"{training.output_dir} epoch {training.run.epoch}")
        dtype = main.amp_dtype(training.run.args, self.device)
        test = engine.evaluate(val_loader, training.state.model, self.device, dtype, self.job)
        main.end_epoch(training.run, training.state, training.progress.averages(), test)

    def evaluate(self, commands: list[argparse.Namespace]) -> None:
        """Execute the evaluations of those runs that have not failed."""
        loader, nb_classes = main.build_val_loader(commands[0], self.device)
        kept = KeptBatches(loader)
        for command in commands:
            if self._has_failed(command):
                continue
            with self._attempt(command):
                print_once(f"{command.output_dir} evaluation")
                runtime.seed_everything(command.seed)
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
    check_commands(trainings, evaluations)
    execute(commands, Group)


def execute(commands: list[argparse.Namespace], kind: type[Group]) -> None:
    """Train and evaluate the commands, which have been checked, as a group of this kind.

    Raises: UserError if there are several ranks, or if some of the runs failed.
    """
    trainings = [command for command in commands if not command.eval]
    evaluations = [command for command in commands if command.eval]
    runtime.need_signals("training", *runtime.STOPPING)
    first = commands[0]
    if runtime.get_world_size() > 1:
        program = Path(sys.argv[0]).name
        raise UserError(f"{program} runs on one rank, not on {runtime.get_world_size()}: start it without a launcher")
    device = runtime.find_device(first.device, first.world_size)
    if first.compile:
        runtime.check_compiler(device)
        # All models share one function, VisionTransformer.forward, which is compiled for every variant, once to train
        # and once to evaluate.
        torch._dynamo.config.recompile_limit = 8 * len(commands)
    torch.backends.cudnn.benchmark = True
    with Job(first.dist_url, runtime.step_timeout(first)) as job, contextlib.ExitStack() as locks:
        # A lock belongs to the process, so a second one on the same folder would end the first.
        for folder in dict.fromkeys(map(folder_of, commands)):
            runtime.prepare_output_dir(folder)
            locks.enter_context(runtime.output_lock(folder))
        group = kind(job, device)
        if trainings:
            group.train(trainings)
        if evaluations:
            group.evaluate(evaluations)
    if group.failures:
        raise UserError(f"{len(group.failures)} of the runs failed; see the errors above: {', '.join(group.failures)}")


if __name__ == "__main__":
    parser = runtime.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", type=Path, metavar="COMMANDS", help="file with a command of main.py per line")
    runtime.run(run, parser.parse_args())
