"""Faults on purpose: runs that are killed at random moments and go on, and damaged checkpoints and data sets.

    python tests/faults.py [--kills 40] [--damaged 200] [--seed 0] [--only DeiT-with-iRPE]

For each codebase, with one process and with two, a run of training is killed again and again and started again with the
same command line, `--resume auto` in it, until it ends; then its weights, optimizer and log must be those of a run that
never stopped, to the bit. A kill may lose no more steps than `--save-every` says, a signal none. Damaged files must be
refused in one sentence, or read. The last line is the number of failures, which is also the exit status.
"""

import argparse
import contextlib
import copy
import json
import multiprocessing
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SAVE_EVERY = 3
EPOCHS = 3
LONGEST = 600  # seconds until a run counts as hanging: far more than it takes, however busy the machine is
BATCHES = {1: 4, 2: 2}  # images a step of each process


# ---------------------------------------------------------------------------------------------------------------------
# Small data


def write_classes(root):
    """Class folders of random images, and their tars."""
    pixels = np.random.RandomState(0)
    for split, count in (("train", 12), ("val", 3)):
        for name in ("ant", "bee", "cat"):
            folder = Path(root, split, name)
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(pixels.randint(0, 255, (36, 36, 3), np.uint8)).save(folder / f"{number}.png")
        with tarfile.open(Path(root, f"{split}.tar"), "w") as tar:
            tar.add(Path(root, split), split)
    return root


def write_coco(root):
    """Random images with one or two boxes each, in COCO's format, and a zip of those of validation."""
    pixels = np.random.RandomState(0)
    Path(root, "annotations").mkdir(parents=True)
    for split, count in (("train", 36), ("val", 6)):
        Path(root, f"{split}2017").mkdir()
        images, objects = [], []
        for number in range(count):
            Image.fromarray(pixels.randint(0, 255, (48, 40, 3), np.uint8)).save(
                Path(root, f"{split}2017", f"{number}.png")
            )
            images.append({"id": number, "file_name": f"{number}.png", "height": 48, "width": 40})
            objects += [
                {
                    "id": len(objects) + k,
                    "image_id": number,
                    "category_id": 1 + k,
                    "iscrowd": 0,
                    "area": 200,
                    "bbox": [2, 3, 20, 10 + k],
                    "segmentation": [[2, 3, 22, 3, 22, 13]],
                }
                for k in range(1 + number % 2)
            ]
        Path(root, "annotations", f"instances_{split}2017.json").write_text(
            json.dumps(
                {
                    "images": images,
                    "annotations": objects,
                    "categories": [{"id": 1, "name": "ant"}, {"id": 2, "name": "bee"}],
                }
            )
        )
    with zipfile.ZipFile(Path(root, "val2017.zip"), "w") as archive:
        for file in sorted(Path(root, "val2017").iterdir()):
            archive.write(file, f"val2017/{file.name}")
    return root


def deit_flags(data, world_size=1):
    return [
        "--model",
        "test_vit",
        "--input-size",
        32,
        "--data-set",
        "FOLDER",
        "--data-path",
        data,
        "--batch-size",
        BATCHES[world_size],
        "--epochs",
        EPOCHS,
        "--lr",
        0.05,
        "--warmup-epochs",
        1,
        "--drop",
        0.1,
        "--device",
        "cpu",
        "--num_workers",
        1,
        "--save-every",
        SAVE_EVERY,
    ]


def detr_flags(data, world_size=1):
    return [
        "--coco_path",
        data,
        "--backbone",
        "resnet18",
        "--no_pretrained_backbone",
        "--lr_backbone",
        0,
        "--short_side",
        48,
        "--hidden_dim",
        16,
        "--nheads",
        2,
        "--enc_layers",
        1,
        "--dec_layers",
        1,
        "--dim_feedforward",
        16,
        "--num_queries",
        5,
        "--enc_rpe2d",
        "rpe-2.0-product-ctx-1-k",
        "--batch_size",
        BATCHES[world_size],
        "--epochs",
        EPOCHS,
        "--lr_drop",
        2,
        "--device",
        "cpu",
        "--num_workers",
        1,
        "--save_every",
        SAVE_EVERY,
    ]


CODEBASES = {"DeiT-with-iRPE": (write_classes, deit_flags), "DETR-with-iRPE": (write_coco, detr_flags)}


# ---------------------------------------------------------------------------------------------------------------------
# Kills


def train(flags, rank, world_size, port, out):
    """As main.py in a process of its own; every step that the main process has finished is noted in OUT.steps."""
    said = os.open(f"{out}.said{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.environ.update(
        MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size)
    )
    runtime, agreed_signal = program.runtime, program.runtime.Run.agreed_signal

    def noted(run, steps):
        if rank == 0:
            with open(f"{out}.steps", "a") as file:
                file.write(f"{run.epoch * len(run.loader) + steps}\n")
        return agreed_signal(run, steps)

    runtime.Run.agreed_signal = noted
    parser = runtime.ArgumentParser("main.py", parents=[program.get_args_parser()])
    sys.argv[1:] = [*map(str, flags), "--output_dir", str(out), "--resume", "auto"]
    runtime.run(program.main, parser.parse_args())


def free_port():
    """A port that stays free until it is used: it is below those that Linux gives to all programs' connections."""
    while True:
        port = 10000 + secrets.randbelow(22000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("", port))
            return port


class Victim:
    """One try of a run in `out`, its processes with outputs of their own; they are forked, which saves the imports."""

    def __init__(self, flags, out, world_size):
        self.out, self.ledger = Path(out), Path(f"{out}.steps")
        self.before = len(self.steps())
        port = free_port()
        fork = multiprocessing.get_context("fork")
        self.processes = [
            fork.Process(target=train, args=(flags, rank, world_size, port, out)) for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def steps(self):
        return self.ledger.read_text().splitlines() if self.ledger.exists() else []

    def running(self):
        return all(process.is_alive() for process in self.processes)

    def wait_for(self, condition):
        end = time.monotonic() + LONGEST
        while self.running() and not condition() and time.monotonic() < end:
            time.sleep(0.005)

    def said(self):
        files = [Path(f"{self.out}.said{rank}") for rank in range(len(self.processes))]
        return [file.read_text() if file.exists() else "" for file in files]

    def finish(self):
        """(statuses, seconds until all had ended)"""
        started = time.monotonic()
        for process in self.processes:
            process.join(max(0.1, LONGEST - (time.monotonic() - started)))
        seconds = time.monotonic() - started
        for process in self.processes:
            process.kill()
            process.join()
        return [process.exitcode for process in self.processes], seconds


def saved_steps(out, steps_per_epoch, images_per_step):
    """How many steps of the run its newest checkpoint has."""
    path = Path(out, "checkpoint.pth")
    if not path.exists():
        return 0
    checkpoint = torch.load(path, weights_only=False)  # our own
    if "progress" not in checkpoint:
        return (checkpoint["epoch"] + 1) * steps_per_epoch
    return checkpoint["epoch"] * steps_per_epoch + checkpoint["progress"]["images"] // images_per_step


def differences(first, second, where=""):
    """Where two nested containers differ."""
    if isinstance(first, torch.Tensor):
        return [] if torch.equal(first, second) else [where]
    if isinstance(first, dict):
        return (
            []
            if first.keys() != second.keys()
            else [found for key in first for found in differences(first[key], second[key], f"{where}.{key}")]
        )
    if isinstance(first, (list, tuple)):
        return [found for a, b in zip(first, second, strict=True) for found in differences(a, b, where)]
    return [] if first == second else [where]


def compare(reference, out):
    """What differs between what two runs left."""
    ends = [torch.load(Path(folder, "checkpoint.pth"), weights_only=False) for folder in (reference, out)]
    found = [] if ends[0].keys() == ends[1].keys() else ["keys"]
    found += [part for key in ends[0] if key != "args" for part in differences(ends[0][key], ends[1][key], key)]
    logs = [Path(folder, "log.txt").read_text() for folder in (reference, out)]
    return found + ["log.txt"] * (logs[0] != logs[1])


KINDS = (
    "kill -9 of all",
    "kill -9 of one",
    "SIGTERM to all",
    "SIGTERM to one",
    "SIGUSR1 to all",
    "kill -9 while saving",
    "SIGTERM in evaluation or start",
)


def strike(victim, kind, rng):
    """Wait for a random moment and end the run in this way; returns the steps that the main process had finished."""
    target = victim.before + rng.randint(1, 2 * SAVE_EVERY)
    victim.wait_for(lambda: len(victim.steps()) >= target)
    time.sleep(rng.uniform(0, 0.2))
    if "saving" in kind:
        victim.wait_for(lambda: Path(victim.out, "checkpoint.pth.tmp").exists())
    if "evaluation" in kind:
        victim.wait_for(lambda: "Test" in victim.said()[0])
    number = {"kill": signal.SIGKILL, "SIGT": signal.SIGTERM, "SIGU": signal.SIGUSR1}[kind[:4]]
    steps = len(victim.steps()) and int(victim.steps()[-1])
    targets = [rng.choice(victim.processes)] if kind.endswith("one") else victim.processes
    for process in targets:
        with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
            os.kill(process.pid, number)
    return number, steps


def kill_campaign(codebase, world_size, kills, rng, folder):
    """Kill and go on, `kills` times; returns (counts by kind, most steps lost, longest end, failures)."""
    write, flags_of = CODEBASES[codebase]
    data = folder / codebase
    if not data.exists():
        write(data)
    flags, images = flags_of(data, world_size), 4
    steps_per_epoch = 36 // images
    reference = folder / f"{codebase}_{world_size}_reference"
    whole = Victim(flags, reference, world_size)
    statuses, _ = whole.finish()
    if any(statuses):
        return {}, 0, 0, [f"the uninterrupted run ended with {statuses}: {whole.said()}"]
    counts, failures, most_lost, longest, chain = dict.fromkeys(KINDS, 0), [], 0, 0, 0
    while sum(counts.values()) < kills or chain:
        if not chain:
            out = folder / f"{codebase}_{world_size}_{sum(counts.values())}"
        chain += 1
        victim = Victim(flags, out, world_size)
        if sum(counts.values()) >= kills:
            statuses, _ = victim.finish()
        else:
            kind = KINDS[sum(counts.values()) % len(KINDS)]
            number, steps = strike(victim, kind, rng)
            statuses, seconds = victim.finish()
        if any(statuses):
            counts[kind] += 1
            longest = max(longest, seconds)
            said = "\n".join(
                said for said, status in zip(victim.said(), statuses, strict=True) if status != -signal.SIGKILL
            )  # whose loading processes may cry
            saved = saved_steps(out, steps_per_epoch, images)
            lost = steps - saved
            most_lost = max(most_lost, lost)
            stopped = number != signal.SIGKILL and 75 in statuses
            problems = [
                text
                for text, wrong in (
                    (f"{lost} steps lost", lost > (0 if stopped else SAVE_EVERY)),
                    ("a traceback", "Traceback" in said),
                    (f"{seconds:.0f} s until the end", seconds > LONGEST),
                    # a process that had done all of the training may have ended before the signal came
                    (f"statuses {statuses}", 0 in statuses and saved < EPOCHS * steps_per_epoch),
                )
                if wrong
            ]
            failures += [f"{codebase}, {world_size} processes, {kind}: {problem}\n{said}" for problem in problems]
            if failures and len(failures) > 5:
                return counts, most_lost, longest, failures
            continue
        found = compare(reference, out)
        failures += [f"{codebase}, {world_size} processes, after {chain - 1} kills: other {', '.join(found)}"] * bool(
            found
        )
        shutil.rmtree(out)
        victim.ledger.unlink()
        chain = 0
    return counts, most_lost, longest, failures


# ---------------------------------------------------------------------------------------------------------------------
# Damaged files

INTRUDED = Path(tempfile.gettempdir(), f"intruded_{os.getpid()}")
STRANGE = (None, True, -1, 0, 7, 1e99, float("nan"), "", "x", "../x", [], [1], {}, {"x": 1}, [None], [[1, 2], "y"])


class Intruder:
    """Runs a command where it is unpickled."""

    def __reduce__(self):
        return os.system, (f"touch {INTRUDED}",)


def outcome(function):
    """ "read", "refused", or what was wrong with it: `function` in a process of its own, which must not hang."""
    with tempfile.TemporaryFile("w+") as said:
        sys.stdout.flush()
        child = os.fork()
        if not child:
            signal.alarm(LONGEST)
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            status = 4
            try:
                function()
                status = 0
            except program.runtime.UserError as error:
                status = 3 if len(str(error).splitlines()) == 1 else print("several lines:", error)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(4 if status is None else status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        words = {0: "read", 3: "refused"}.get(status) or f"status {status}: {said.read()[-1500:]}"
    if INTRUDED.exists():
        INTRUDED.unlink()
        words = "foreign code was run"
    return words


def damage_bytes(content, rng):
    """The content cut, or with a few bytes changed."""
    if rng.random() < 0.3:
        return content[: rng.randrange(len(content))]
    damaged = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        damaged[rng.randrange(len(damaged))] ^= rng.randint(1, 255)
    return bytes(damaged)


def damage_value(container, rng, strange=STRANGE):
    """Replace a value somewhere in nested containers by one of another kind, or leave it out."""
    while True:
        key = rng.choice(list(container) if isinstance(container, dict) else range(len(container)))
        inner = container[key]
        if isinstance(inner, (dict, list)) and inner and rng.random() < 0.8:
            container = inner
        elif isinstance(container, dict) and rng.random() < 0.2:
            return container.pop(key)
        else:
            container[key] = rng.choice(strange)
            return inner


def damaged_checkpoints(path, count, rng, resume):
    """Outcome and kind of `resume` for damaged files of the checkpoint at `path`, which stays as it was."""
    content, original = path.read_bytes(), torch.load(path, weights_only=False)
    damaged = path.with_name("damaged.pth")
    for number in range(count):
        kind = ("bytes", "types", "code")[number % 3]
        checkpoint = copy.deepcopy(original)
        if kind == "bytes":
            damaged.write_bytes(damage_bytes(content, rng))
        else:
            damage_value(checkpoint, rng, STRANGE if kind == "types" else [Intruder()])
            torch.save(checkpoint, damaged, _use_new_zipfile_serialization=rng.random() < 0.8)

        def read(kind=kind):
            resume(str(damaged))
            if kind == "bytes":
                found = differences(original, program.runtime.load_checkpoint(str(damaged)))
                if [part for part in found if part != ".args"]:
                    raise ValueError(f"other {found} were read")

        yield f"checkpoint, {kind}", outcome(read)


def damaged_sets(files, count, rng, read):
    """Outcome and kind of `read` while one of the files is damaged."""
    for number in range(count):
        file = files[number % len(files)]
        content = file.read_bytes()
        if file.suffix == ".json" and rng.random() < 0.7:
            data = json.loads(content)
            damage_value(data, rng)
            file.write_text(json.dumps(data))
        else:
            file.write_bytes(damage_bytes(content, rng))
        yield f"set, {file.suffix[1:]}", outcome(lambda file=file: read(file))
        file.write_bytes(content)


def deit_readers(data):
    """(what reads a checkpoint as training does, files of sets, what reads the set that a file is of)"""

    def parse(*flags):
        parser = argparse.ArgumentParser(parents=[program.get_args_parser()])
        return parser.parse_args(list(map(str, [*deit_flags(data), *flags])))

    args = parse()
    args.world_size = 1
    state = program.build_state(args, program.build_model(args, 3))
    names = sorted(str(path.relative_to(data)) for path in Path(data, "train").rglob("*.png"))
    Image.open(Path(data, names[0])).save(Path(data, "train", "ant", "0.jpg"))
    for split in ("train", "val"):
        Path(data, f"{split}2018.json").write_text(
            json.dumps(
                {
                    "images": [{"id": number, "file_name": name} for number, name in enumerate(names)],
                    "annotations": [{"image_id": number, "category_id": number % 3} for number in range(len(names))],
                }
            )
        )
    Path(data, "categories.json").write_text(json.dumps([{"id": number, "name": str(number)} for number in range(3)]))
    files = [
        Path(data, name) for name in ("train.tar", "train2018.json", "categories.json", names[0], "train/ant/0.jpg")
    ]

    def read(file):
        flags = {".tar": ["--load-tar"], ".json": ["--data-set", "INAT"]}.get(file.suffix, [])
        dataset, _ = program.build_dataset(True, parse(*flags))
        for number in range(len(dataset)):
            dataset[number]

    return lambda path: state.resume(program.runtime.checkpoint_to_resume(path, ""), args), files, read


def detr_readers(data):
    """As `deit_readers`."""
    parser = argparse.ArgumentParser(parents=[program.get_args_parser()])
    folder = data / "panoptic"
    for split in ("train", "val"):
        instances = json.loads(Path(data, "annotations", f"instances_{split}2017.json").read_text())
        Path(folder, f"panoptic_{split}2017").mkdir(parents=True)
        for image in instances["images"]:
            ids = np.zeros((48, 40, 3), np.uint8)
            ids[:20, :, 0], ids[20:, :, 0] = 1, 2
            Image.fromarray(ids).save(Path(folder, f"panoptic_{split}2017", image["file_name"]))
        Path(folder, "annotations").mkdir(exist_ok=True)
        Path(folder, "annotations", f"panoptic_{split}2017.json").write_text(
            json.dumps(
                {
                    "images": instances["images"],
                    "categories": [{"id": 1, "name": "a", "isthing": 1}, {"id": 2, "name": "b", "isthing": 0}],
                    "annotations": [
                        {
                            "image_id": image["id"],
                            "file_name": image["file_name"],
                            "segments_info": [{"id": k, "category_id": k, "iscrowd": 0, "area": 800} for k in (1, 2)],
                        }
                        for image in instances["images"]
                    ],
                }
            )
        )
    for image in Path(data, "val2017").iterdir():
        image.unlink()  # read from the zip
    files = [
        data / "train2017" / "0.png",
        data / "val2017.zip",
        data / "annotations" / "instances_train2017.json",
        data / "annotations" / "instances_val2017.json",
        folder / "annotations" / "panoptic_train2017.json",
        folder / "panoptic_train2017" / "1.png",
    ]

    def parse(*flags):
        return parser.parse_args(list(map(str, [*detr_flags(data), *flags])))

    def read(file):
        panoptic = ["--dataset_file", "coco_panoptic", "--coco_panoptic_path", folder] * ("panoptic" in str(file))
        for dataset in program.build_datasets(parse("--masks", *panoptic)):
            dataset.ground_truth()
            for number in range(len(dataset)):
                dataset[number]

    args = parse("--num_classes", 3)
    model, _, _ = program.build_model(args)
    optimizer = program.build_optimizer(model, args)
    state = program.TrainingState(
        model,
        optimizer,
        torch.optim.lr_scheduler.StepLR(optimizer, args.lr_drop),
        torch.amp.GradScaler("cpu", enabled=False),
    )
    return lambda path: state.resume(program.runtime.checkpoint_to_resume(path, ""), args), files, read


def damage_campaign(codebase, count, rng, folder, checkpoint):
    """Print how many damaged files were read and refused; returns the failures."""
    data = CODEBASES[codebase][0](folder / "damaged")
    resume, files, read = (deit_readers if codebase.startswith("DeiT") else detr_readers)(data)
    failures, counts = [], {}
    for kind, words in (*damaged_checkpoints(checkpoint, count, rng, resume), *damaged_sets(files, count, rng, read)):
        label = words if words in ("read", "refused") else "failed"
        counts.setdefault(kind, dict.fromkeys(("refused", "read", "failed"), 0))[label] += 1
        failures += [f"{codebase}: {kind}: {words}"] * (label == "failed")
    for kind, results in sorted(counts.items()):
        print(
            f"{codebase}, damaged {kind}: " + ", ".join(f"{number} {label}" for label, number in results.items()),
            flush=True,
        )
    return failures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40, help="of each codebase")
    parser.add_argument("--damaged", type=int, default=200, help="checkpoints, and data sets, of each codebase")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=CODEBASES, nargs="+", default=list(CODEBASES))
    args = parser.parse_args()
    if len(args.only) > 1:
        sys.exit(
            sum(
                subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", codebase]).returncode
                for codebase in args.only
            )
        )
    enter(args.only[0])
    with tempfile.TemporaryDirectory() as folder:
        failures = campaign(args.only[0], args, Path(folder))
    print(*failures, f"{args.only[0]}: {len(failures)} failures", sep="\n", flush=True)
    sys.exit(bool(failures))


def enter(codebase):
    """Make the codebase's programs importable, and its main.py `program`."""
    global program
    os.chdir(ROOT / codebase)
    sys.path.insert(0, str(ROOT / codebase))
    sys.modules.pop("main", None)
    import main as program

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")


def campaign(codebase, args, folder):
    """All of it, for a codebase; returns the failures and prints what was counted."""
    failures = []
    for world_size in (1, 2):
        counts, lost, longest, found = kill_campaign(
            codebase, world_size, args.kills // 2, random.Random(args.seed + world_size), folder
        )
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        print(
            f"{codebase}, {world_size} process(es), saving every {SAVE_EVERY} steps: {sum(counts.values())} kills "
            f"({kinds}); at most {lost} steps lost, ended after at most {longest:.0f} s; {len(found)} failures",
            flush=True,
        )
        failures += found
    checkpoint = folder / f"{codebase}_1_reference" / "checkpoint.pth"
    return failures + damage_campaign(codebase, args.damaged, random.Random(args.seed), folder, checkpoint)


if __name__ == "__main__":
    main()
