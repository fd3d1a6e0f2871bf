"""Errors that a user can read, files that are whole, logs, and processes that find each other."""

import argparse
import collections
import errno
import json
import math
import os
import pathlib
import random
import re
import resource
import signal
import urllib.error

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import main
import runtime
from conftest import PROJECT, finish, launcher, start, start_processes
from runtime import UserError, load_checkpoint


def fails_with(function, *args):
    """The sentence of the UserError that the call raises."""
    with pytest.raises(UserError) as caught:
        function(*args)
    sentence = str(caught.value)
    assert sentence and "\n" not in sentence and "Traceback" not in sentence
    return sentence


# Checkpoints are read without running code


class Intruder:
    def __reduce__(self):
        return os.system, ("touch intruded",)


class Unknown:
    pass


def saved(tmp_path, obj, **options):
    torch.save(obj, tmp_path / "c.pth", **options)
    return tmp_path / "c.pth"


@pytest.mark.parametrize("zipped", [True, False])
def test_command_line_and_paths_in_a_checkpoint_come_back(tmp_path, zipped):
    args = argparse.Namespace(
        output_dir=pathlib.PosixPath("/a/b"), betas=[0.9, 0.95], lr=1e-3, resume=None, more=collections.OrderedDict(a=1)
    )
    path = saved(
        tmp_path, {"model": {"w": torch.arange(3.0)}, "epoch": 7, "args": args}, _use_new_zipfile_serialization=zipped
    )
    checkpoint = load_checkpoint(path)
    assert checkpoint["args"] == args and checkpoint["epoch"] == 7
    assert torch.equal(checkpoint["model"]["w"], torch.arange(3.0))


@pytest.mark.parametrize(
    ("name", "kind"),
    [(b"pathlib._local\nPosixPath", pathlib.PurePosixPath), (b"pathlib\nWindowsPath", pathlib.PureWindowsPath)],
)
def test_paths_of_another_python_or_system_come_back(tmp_path, name, kind):
    path = saved(tmp_path, {"args": pathlib.PosixPath("a/b")}, _use_new_zipfile_serialization=False)
    own = f"{pathlib.PosixPath.__module__}\nPosixPath".encode()
    assert own in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(own, name))
    assert load_checkpoint(path) == {"args": kind("a/b")}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(("obj", "named"), [(Intruder(), "posix.system"), (Unknown(), "test_runtime.Unknown")])
def test_pickle_that_needs_more_is_refused_by_name_and_not_run(tmp_path, monkeypatch, zipped, obj, named):
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path, {"model": {}, "args": obj}, _use_new_zipfile_serialization=zipped)
    assert f"it contains {named}, which could run" in fails_with(load_checkpoint, path)
    assert not os.path.exists("intruded")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_checkpoint_is_read_or_refused_in_a_sentence_that_names_it(tmp_path, zipped):
    path = saved(
        tmp_path,
        {"model": {"w": torch.arange(3.0)}, "args": argparse.Namespace(a=pathlib.PosixPath("a"))},
        _use_new_zipfile_serialization=zipped,
    )
    whole, refused = path.read_bytes(), 0
    for position in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[position] ^= 1 if position % 2 else 255
        path.write_bytes(damaged)
        try:
            load_checkpoint(path)
        except UserError as error:
            assert "c.pth" in str(error)
            refused += 1
    assert refused > len(whole) / 24
    for cut in (0, 3, 10, 100, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:cut])
        sentence = fails_with(load_checkpoint, path)
        assert "c.pth is truncated" in sentence or not zipped and "c.pth is refused" in sentence


def test_a_single_bit_that_has_changed_in_the_weights_is_noticed(tmp_path):
    path = saved(tmp_path, {"model": {"w": torch.arange(300.0)}})
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(300.0).numpy().tobytes()) + 700] ^= 1
    path.write_bytes(content)
    assert "c.pth is truncated, damaged" in fails_with(load_checkpoint, path)


def test_what_is_no_checkpoint_is_named(tmp_path):
    (tmp_path / "page.pth").write_text("<html>404</html>")
    assert "page.pth is truncated, damaged or not a PyTorch checkpoint" in fails_with(
        load_checkpoint, tmp_path / "page.pth"
    )
    assert "No such file" in fails_with(load_checkpoint, tmp_path / "none.pth")
    assert "Is a directory" in fails_with(load_checkpoint, tmp_path)
    assert "holds a list" in fails_with(load_checkpoint, saved(tmp_path, [torch.zeros(1)]))


def test_state_dict_is_found_in_both_kinds_of_files():
    weights = {"w": torch.zeros(1)}
    assert runtime.model_weights({"model": weights, "epoch": 3}, "c") == runtime.model_weights(weights, "c") == weights
    assert "keys are epoch" in fails_with(runtime.model_weights, {"epoch": 3}, "c")


def test_differences_between_state_dicts_are_counted_and_shown():
    expected = {f"layer{i}": torch.zeros(i) for i in range(9)}
    found = {**{f"layer{i}": torch.zeros(i) for i in range(3)}, "layer8": torch.zeros(2), "extra": torch.zeros(1)}
    assert runtime.key_differences(expected, expected) == ""
    assert runtime.key_differences(expected, found) == (
        "5 missing (layer3, layer4, layer5, ...), 1 unexpected (extra), "
        "1 of another shape (layer8 is (2,) instead of (8,))"
    )


# Files are whole


def save(state, path):
    with runtime.replacing(path) as file:
        torch.save(state, file)


class Interrupting:
    def __reduce__(self):
        raise KeyboardInterrupt


def test_interrupted_save_leaves_the_old_file_and_nothing_else(tmp_path):
    save({"epoch": 1}, tmp_path / "c.pth")
    with pytest.raises(KeyboardInterrupt):
        save({"w": torch.zeros(1000), "x": Interrupting()}, tmp_path / "c.pth")
    assert load_checkpoint(tmp_path / "c.pth") == {"epoch": 1} and os.listdir(tmp_path) == ["c.pth"]


def test_full_disk_is_said_and_leaves_the_old_file(tmp_path):
    save({"epoch": 1}, tmp_path / "c.pth")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, hard))
    try:
        sentence = fails_with(save, {"w": torch.zeros(100000)}, tmp_path / "c.pth")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert "c.pth cannot be written: File too large" in sentence
    assert load_checkpoint(tmp_path / "c.pth") == {"epoch": 1} and os.listdir(tmp_path) == ["c.pth"]


def test_output_directory_is_made_or_refused_at_once(tmp_path):
    runtime.prepare_output_dir(str(tmp_path / "a" / "b"))
    assert os.listdir(tmp_path / "a" / "b") == []
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nowhere"):
        assert f"output directory {place} cannot be written" in fails_with(runtime.prepare_output_dir, str(place))


# Downloads


def test_download_is_kept_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    url = saved(tmp_path, {"epoch": 3}).as_uri()
    assert load_checkpoint(url) == {"epoch": 3}
    (tmp_path / "c.pth").unlink()
    assert load_checkpoint(url) == {"epoch": 3} and (tmp_path / "cache" / "hub" / "checkpoints" / "c.pth").is_file()


def test_offline_the_address_and_the_place_for_the_file_are_said(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    sentence = fails_with(load_checkpoint, "https://host/models/w.pth")
    assert "https://host/models/w.pth" in sentence and f"put it at {tmp_path}/hub/checkpoints/w.pth" in sentence


# Errors


class Failing(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        raise UserError("image 7 is broken: see the manual")


@pytest.mark.parametrize("workers", [0, 1])
def test_sentence_survives_the_worker_process(workers):
    assert fails_with(list, DataLoader(Failing(), num_workers=workers)) == "image 7 is broken: see the manual"


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UserError("no such flower"), 1, "error: no such flower\n"),
        (UserError("said by a library\nin two lines"), 1, "error: said by a library in two lines\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_run_says_one_line_and_ends_with_a_status(capsys, error, status, said):
    def main(args):
        raise error

    with pytest.raises(SystemExit) as caught:
        runtime.run(main, argparse.Namespace())
    assert caught.value.code == status and capsys.readouterr().err == said


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, os.strerror(errno.EMFILE)),
        RuntimeError("Too many open files. Communication with the workers is no longer possible."),
        RuntimeError(
            "Caught RuntimeError in DataLoader worker process 0.\n"
            "unable to open shared memory object </torch_1> in read-write mode: Too many open files (24)"
        ),
    ],
)
def test_too_many_open_files_are_one_line_with_what_to_do(capsys, error):
    def main(args):
        raise error

    with pytest.raises(SystemExit) as caught:
        runtime.run(main, argparse.Namespace())
    said = capsys.readouterr().err
    assert caught.value.code == 1 and said.startswith("error: too many files are open: ") and said.count("\n") == 1
    assert "ulimit -n" in said and "--num_workers" in said


class EndedBySignal(Dataset):
    """A set whose loading process the system ends, as with SIGBUS where shared memory is full."""

    def __init__(self, number):
        self.number = number

    def __len__(self):
        return 1

    def __getitem__(self, i):
        os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGBUS, signal.SIGKILL])
def test_a_loading_process_ended_by_the_system_is_one_line_with_what_to_do(capsys, number):
    def main(args):
        list(DataLoader(EndedBySignal(number), num_workers=1))

    with pytest.raises(SystemExit) as caught:
        runtime.run(main, argparse.Namespace())
    said = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 1 and said.startswith("error: a loading process ended or hangs: ")
    assert "/dev/shm" in said and "--num_workers" in said


def test_full_memory_of_a_gpu_is_said_in_one_line_with_the_step(capsys):
    def main(args):
        with runtime.Job() as job:
            job.place = "epoch 3, step 7"
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    with pytest.raises(SystemExit):
        runtime.run(main, argparse.Namespace())
    said = capsys.readouterr().err
    assert said.startswith("error: the GPU's memory is full in epoch 3, step 7: ") and said.count("\n") == 1


def test_run_does_not_hide_other_errors():
    def main(args):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        runtime.run(main, argparse.Namespace())


def test_parser_says_a_mistake_in_one_line(capsys):
    parser = runtime.ArgumentParser("prog")
    parser.add_argument("--data-set", choices=["A", "B"])
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["--data-set", "C"])
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.count("\n") == 1 and "--data-set: invalid choice: 'C'" in said


# Processes


def settings(**values):
    return argparse.Namespace(**{"device": "cpu", "world_size": 1, "dist_url": "env://", **values})


def join(args):
    """Meet the other ranks as main.py does."""
    runtime.find_device(args.device, args.world_size)
    with runtime.Job(args.dist_url) as job:
        job.meet()


@pytest.fixture
def alone(monkeypatch):
    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "SLURM_PROCID",
        "SLURM_LOCALID",
        "SLURM_STEP_NUM_TASKS",
        "MASTER_ADDR",
    ):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("environment", "values", "place"),
    [
        ({}, {}, (0, 1, 0)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, {}, (5, 8, 1)),
        (
            {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4"},
            {"dist_url": "tcp://host:1"},
            (3, 4, 1),
        ),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, {}, (0, 1, 0)),
    ],
)
def test_place_among_the_processes_is_read_from_any_launcher(alone, environment, values, place):
    for name, value in environment.items():
        alone.setenv(name, value)
    args = settings(**values)
    before = dict(vars(args))
    assert runtime.find_device(args.device, args.world_size) == torch.device("cpu")
    placed = runtime.with_place(args)
    assert (placed.rank, placed.world_size) == (runtime.get_rank(), runtime.get_world_size()) == place[:2]
    assert placed.distributed == (place[1] > 1) and placed.dist_url == args.dist_url and vars(args) == before
    chosen = []
    alone.setattr(torch.cuda, "set_device", chosen.append)
    alone.setattr(torch, "empty", lambda *_, **__: None)
    assert [runtime.find_device("cuda")] == chosen == [torch.device("cuda", place[2])]


@pytest.mark.parametrize(
    ("environment", "values", "words"),
    [
        ({}, {"world_size": 2}, "torchrun --nproc_per_node=2"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}, {}, "use tcp://HOST:PORT"),
        ({}, {"device": "toaster"}, "--device toaster cannot be used"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, {"dist_url": "carrier-pigeon://x"}, "--dist_url carrier-pigeon://x"),
    ],
)
def test_launch_that_cannot_work_is_explained(alone, environment, values, words):
    for name, value in environment.items():
        alone.setenv(name, value)
    assert words in fails_with(join, settings(**values))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_suggests_the_cpu():
    assert "--device cuda cannot be used" in (said := fails_with(runtime.find_device, "cuda"))
    assert said.endswith("--device cpu")


PROGRAM = """
import argparse, os, pathlib, signal, sys, time, torch, runtime
case = sys.argv[1]
def main(args):
    rank = runtime.get_rank()
    if case == "before":
        # A rank that found the error long before the other would not wait for it before printing.
        there = [pathlib.Path(f"{sys.argv[0]}.{rank}") for rank in range(2)]
        there[rank].touch()
        while not all(path.exists() for path in there):
            time.sleep(0.01)
        raise runtime.UserError("a mistake of all")
    with runtime.Job(args.dist_url) as job:
        job.meet()
        job.connect(torch.device("cpu"))
        work(job, rank)
def work(job, rank):
    progress = runtime.Progress("here", 2, 1)
    for step in job.evaluation_steps("here", range(2)):
        progress.step(loss=torch.tensor(float("nan") if case == "nan" and step and rank else float(rank + step)))
    assert progress.averages() == {"loss": 1.0}
    if case == "alone" and rank == 1:
        raise runtime.UserError("a mistake of one")
    if case == "bug" and rank == 1:
        raise RuntimeError("a bug")
    if case == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
    with job.waiting():
        runtime.all_reduce_sum(torch.zeros(1))
url, = sys.argv[2:] or ["env://"]
runtime.run(main, argparse.Namespace(dist_url=url))
"""


@pytest.mark.parametrize(("case", "said"), [("before", "a mistake of all"), ("nan", "loss is nan at here, step 1: ")])
def test_mistake_that_all_meet_is_said_once_under_a_launcher(tmp_path, case, said):
    (tmp_path / "program.py").write_text(PROGRAM)
    status, _, err = finish(start(*launcher(2), "--use_env", tmp_path / "program.py", case, PYTHONPATH=str(PROJECT)))
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status != 0 and len(errors) == 1 and errors[0].startswith(f"error: rank 0 of 2: {said}")


def test_file_at_which_the_ranks_met_is_gone_after_the_run_so_that_the_next_one_can_meet_there(tmp_path):
    for status, _, err in map(finish, start_processes(2, "-c", PROGRAM, "none", f"file://{tmp_path}/meet")):
        assert (status, err) == (0, "")
    assert not list(tmp_path.iterdir())


REQUEUED = """
import atexit, sys, torch, runtime
atexit.register(lambda: print(torch.distributed.is_initialized()))
try:
    with runtime.Job() as job:
        job.meet()
        job.connect(torch.device("cpu"))
        raise runtime.Interrupted(12, "its first steps")
except runtime.Interrupted:
    sys.exit(3)
"""


def test_rank_that_exits_after_a_signal_as_submitit_does_leaves_the_process_group_in_order():
    """The group's threads would otherwise abort the exit."""
    results = [finish(process) for process in start_processes(2, "-c", REQUEUED)]
    assert results == [(3, "False\n", "")] * 2


def test_mistake_of_one_process_ends_all_and_is_said_by_itself():
    runs = {case: start_processes(2, "-c", PROGRAM, case) for case in ("none", "interrupt", "alone", "bug")}
    results = {case: [finish(process) for process in processes] for case, processes in runs.items()}
    assert {case: [status for status, _, _ in ends] for case, ends in results.items()} == {
        "none": [0, 0],
        "interrupt": [130, 130],
        "alone": [1, 1],
        "bug": [1, 1],
    }
    assert {err for case in ("none", "interrupt") for _, _, err in results[case]} == {""}
    for case, said in (("alone", "a mistake of one\n"), ("bug", "Traceback (most recent call last):\n")):
        (_, _, first), (_, _, second) = results[case]
        assert re.fullmatch("error: rank 0 of 2: rank 1 is lost or hangs in here, step 1: .*\n", first)
        assert second.startswith(f"error: rank 1 of 2: {said}")
    assert second.endswith("RuntimeError: a bug\n\n")


def test_seeds_give_the_same_numbers_again_and_other_numbers_for_another_epoch():
    def draw(*seed):
        main.seed_everything(*seed)
        return torch.rand(1).item(), __import__("random").random(), __import__("numpy").random.rand()

    assert draw(0, 1, 2) == draw(0, 1, 2)
    assert all(a != b for a, b in zip(draw(0, 1, 2), draw(0, 1, 3), strict=True))
    assert all(a != b for a, b in zip(draw(0, 1, 2), draw(0, 2, 2), strict=True))


# Logs


class Dice(Dataset):
    """Random numbers of the three generators that augmentations use."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()], dtype=torch.float64)


def test_random_numbers_of_loading_processes_differ_by_image_and_epoch_and_not_by_their_number():
    def draw(workers):
        sampler, rows = runtime.SeededSampler(DistributedSampler(range(8), 1, 0), seed=0), []
        for epoch in range(2):
            sampler.set_epoch(epoch)
            rows += DataLoader(runtime.SeededDataset(Dice()), 1, sampler=sampler, num_workers=workers)
        return torch.cat(rows)

    alone = draw(0)
    assert all(len(set(column.tolist())) == 16 for column in alone.T)
    assert torch.equal(alone, draw(2))


def test_a_sample_is_seeded_like_a_step_but_without_seeding_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeds the GPUs for every sample"))
    sample = runtime.SeededDataset(Dice())[5, 0, 1, 2]
    monkeypatch.undo()
    main.seed_everything(0, 1, 2)
    assert torch.equal(sample, Dice()[5])


def test_progress_says_steps_rate_and_means_in_plain_lines(capsys):
    progress = runtime.Progress("epoch 3", 24, images_per_step=8, shown=("loss", "lr"), lr=0.1)
    for value in range(24):
        progress.step(loss=torch.tensor(float(value)), other=torch.tensor(1.0))
    lines = capsys.readouterr().out.splitlines()
    assert (
        len(lines) == 2
        and "[20/24]" in lines[0]
        and re.fullmatch(r"epoch 3 \[24/24]  eta 0:00:00  [\d.]+ img/s  loss 13.5 \(11.5\)  lr 0.1 \(0.1\)", lines[1])
    )
    assert progress.averages() == {"loss": 11.5, "other": 1.0, "lr": 0.1}


def test_value_that_is_not_finite_is_said_with_its_step(capsys):
    progress = runtime.Progress("epoch 2", 50, images_per_step=1)
    sentence = fails_with(
        lambda: [progress.step(loss=torch.tensor(math.inf if step == 23 else 1.0)) for step in range(50)]
    )
    assert sentence.startswith("loss is inf at epoch 2, step 23: ")
    assert "[20/50]" in (said := capsys.readouterr().out) and "[40/50]" not in said


def test_log_has_one_object_a_line_and_tensorboard_the_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for epoch in range(2):
        log = runtime.RunLog(str(tmp_path), epoch)
        log.write(epoch, {"test_loss": 0.5 + epoch, "boxes": [1, 2], "epoch": epoch})
    assert [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()] == [
        {"test_loss": 0.5, "boxes": [1, 2], "epoch": 0},
        {"test_loss": 1.5, "boxes": [1, 2], "epoch": 1},
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("test_loss")] == [(0, 0.5), (1, 1.5)]
    runtime.RunLog("").write(0, {"test_loss": 1.0})


def test_importing_the_runtime_takes_neither_timm_nor_tensorboard():
    code = "import sys, runtime; sys.exit(any(m in sys.modules for m in ('timm', 'tensorboard')))"
    assert finish(start("-c", code))[0] == 0
