"""Runs that are stopped at any moment and resumed: nothing is lost, printed twice or drawn again."""

import argparse
import copy
import errno
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import sys

import pytest
import torch
from torch.utils.data import DataLoader

import engine
import main
import runtime
from conftest import altered, finish, free_port, parse, small, start, start_processes, write_images
from runtime import Interrupted, UserError, load_checkpoint
from test_train import same

FLAGS = ["--model", "test_vit", "--epochs", 2, "--batch-size", 4, "--drop", 0.1, "--lr", 0.05, "--warmup-epochs", 0]
STEPS = 6  # of an epoch: 24 images


def run(image_root, out, *flags):
    return main.main(parse(*small(image_root, *FLAGS, "--output_dir", out, *flags)))


def state(out):
    return {key: value for key, value in load_checkpoint(out / "checkpoint.pth").items() if key != "args"}


def rows(out):
    return [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(image_root, tmp_path_factory):
    """Output of a run that never stopped."""
    out = tmp_path_factory.mktemp("straight")
    run(image_root, out)
    return out


@pytest.fixture
def stop_at(monkeypatch):
    """Sends this process a signal in that step, counted over the epochs, or in the evaluation of that epoch."""

    def patch(number, step=None, evaluation=None):
        agreed_signal, evaluate, asked = runtime.Run.agreed_signal, main.evaluate, []

        def stepped(self, steps):
            if self.epoch * STEPS + steps == step:
                os.kill(os.getpid(), number)
            return agreed_signal(self, steps)

        def evaluated(*args):
            asked.append(1)
            if len(asked) == evaluation:
                os.kill(os.getpid(), number)
            return evaluate(*args)

        monkeypatch.setattr(runtime.Run, "agreed_signal", stepped)
        monkeypatch.setattr(main, "evaluate", evaluated)
        return monkeypatch

    return patch


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGTERM, {"step": 1}),
        (signal.SIGUSR1, {"step": 4}),
        (signal.SIGTERM, {"step": STEPS}),
        (signal.SIGUSR2, {"step": 9}),
        (signal.SIGTERM, {"evaluation": 1}),
        (signal.SIGTERM, {"evaluation": 2}),
    ],
    ids=str,
)
def test_signal_ends_training_after_the_step_and_it_goes_on_to_the_bit(
    image_root, straight, tmp_path, stop_at, number, moment
):
    handler = signal.getsignal(number)
    patch = stop_at(number, **moment)
    with pytest.raises(Interrupted, match=number.name):
        run(image_root, tmp_path, "--resume", "auto")
    assert signal.getsignal(number) == handler
    steps = moment.get("step") or STEPS * moment["evaluation"]
    progress = load_checkpoint(tmp_path / "checkpoint.pth")["progress"]
    assert progress["images"] == 4 * ((steps - 1) % STEPS + 1)
    patch.undo()
    run(image_root, tmp_path, "--resume", "auto", "--num_workers", 2)  # whoever loads an image draws the same
    assert same(state(tmp_path), state(straight)) and rows(tmp_path) == rows(straight)


def test_images_that_were_seen_are_not_loaded_again(image_root, tmp_path, stop_at, monkeypatch):
    stop_at(signal.SIGTERM, step=4)
    with pytest.raises(Interrupted):
        run(image_root, tmp_path, "--epochs", 1)
    monkeypatch.undo()
    seen, get = [], runtime.SeededDataset.__getitem__
    monkeypatch.setattr(runtime.SeededDataset, "__getitem__", lambda self, key: seen.append(key[1:]) or get(self, key))
    run(image_root, tmp_path, "--epochs", 1, "--resume", "auto")
    assert seen == [(0, 0, place) for place in range(16, 24)]


def test_state_within_an_epoch_is_saved_every_so_many_steps(image_root, tmp_path, monkeypatch):
    saved, save = [], torch.save
    monkeypatch.setattr(
        "torch.save",
        lambda state, file: (
            saved.append((state["epoch"], state.get("progress", {}).get("images"))),
            save(state, file),
        ),
    )
    run(image_root, tmp_path, "--save-every", 4)
    assert saved == [(epoch, images) for epoch in (0, 1) for images in (16, 24, None)]


# What a run starts from


def test_auto_starts_anew_without_a_checkpoint_and_goes_on_with_one(image_root, straight, tmp_path, capsys):
    for epochs in (1, 2, 2):
        run(image_root, tmp_path, "--resume", "auto", "--epochs", epochs, "--warmup-epochs", 0, "--sched", "step")
    assert [row["epoch"] for row in rows(tmp_path)] == [0, 1] and "nothing to train" in capsys.readouterr().out
    with pytest.raises(UserError, match="--output_dir"):
        run(image_root, "", "--resume", "auto")


@pytest.mark.parametrize("flags", [[], ["--eval"]], ids=["train", "eval"])
def test_auto_reads_the_checkpoint_once_and_leaves_the_flags_as_they_are(
    image_root, trained, tmp_path, monkeypatch, flags
):
    shutil.copy(trained, tmp_path / "checkpoint.pth")
    read, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda path, **options: read.append(str(path)) or load(path, **options))
    args = parse(*small(image_root, "--output_dir", tmp_path, "--resume", "auto", *flags))
    before = copy.deepcopy(vars(args))
    main.main(args)
    assert read == [str(tmp_path / "checkpoint.pth")] and vars(args) == before


def test_damaged_checkpoint_is_named_and_the_one_before_it_taken(image_root, straight, tmp_path, capsys):
    run(image_root, tmp_path)
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(path.read_bytes()[:-100])
    run(image_root, tmp_path, "--resume", "auto")
    assert f"note: checkpoint {path} is truncated" in capsys.readouterr().out
    assert same(state(tmp_path), state(straight)) and rows(tmp_path) == rows(straight)
    path.unlink()  # as at one moment of a save on a disk without hard links
    assert runtime.newest_checkpoint(str(tmp_path)).path == str(tmp_path / "checkpoint.previous.pth")
    for name in ("checkpoint.pth", "checkpoint.previous.pth"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint in .* is intact"):
        run(image_root, tmp_path, "--resume", "auto")


def test_log_goes_on_without_lines_of_later_epochs_and_without_a_cut_one(tmp_path):
    lines = ['{"epoch": 0, "x": 1}\n', '{"epoch": 1, "x": 2}\n', '{"epoch": 1, "x": 3}\n', '{"epoch"']
    (tmp_path / "log.txt").write_text("".join(lines))
    runtime.RunLog(str(tmp_path), 1).write(1, {"epoch": 1, "x": 4})
    assert rows(tmp_path) == [{"epoch": 0, "x": 1}, {"epoch": 1, "x": 4}]
    (tmp_path / "log.txt").write_text("".join(lines))
    runtime.RunLog(str(tmp_path)).write(0, {"epoch": 0, "x": 5})  # another run in the same folder
    assert [row["x"] for row in rows(tmp_path)] == [1, 2, 3, 5]


def test_tensorboard_hides_what_a_killed_run_left_of_later_epochs(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = runtime.RunLog(str(tmp_path))
    for epoch in range(3):
        log.write(epoch, {"epoch": epoch, "loss": 1.0})
    log = runtime.RunLog(str(tmp_path), 1)
    for epoch in (1, 2):
        log.write(epoch, {"epoch": epoch, "loss": 2.0})
    written = (tmp_path / "log.txt").stat()
    log.write(2)  # in the middle of an epoch there is nothing new
    assert (tmp_path / "log.txt").stat() == written
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 1.0), (1, 2.0), (2, 2.0)]


@pytest.mark.parametrize("broken", ["always", "once"])
def test_tensorboard_that_cannot_be_written_costs_no_more_than_that(
    image_root, straight, tmp_path, capsys, monkeypatch, broken
):
    (tmp_path / "tensorboard").touch()  # a file where the folder should be
    if broken == "once":
        write = runtime.RunLog._write_scalars
        monkeypatch.setattr(
            runtime.RunLog,
            "_write_scalars",
            lambda log: (
                write(log) if len(log.lines) == 1 else ((tmp_path / "tensorboard").unlink(missing_ok=True), write(log))
            ),
        )
    run(image_root, tmp_path)
    said = capsys.readouterr().out
    assert said.count(f"note: {tmp_path}/tensorboard cannot be written: ") >= 1
    assert same(state(tmp_path), state(straight)) and rows(tmp_path) == rows(straight)
    if broken == "once":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        assert [event.step for event in events.Scalars("train_loss")] == [0, 1]


# What can go wrong


def full_disk(monkeypatch, fails):
    """Replacing a file fails while `fails` gives True for its name."""
    sync = os.fsync

    def fsync(number):
        if fails(os.readlink(f"/proc/self/fd/{number}")):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(number)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("file", ["checkpoint.pth", "log.txt"])
def test_full_disk_costs_no_more_than_the_saves_that_fail(image_root, straight, tmp_path, monkeypatch, capsys, file):
    failed = []
    full_disk(monkeypatch, lambda name: file in name and len(failed) < 2 and not failed.append(name))
    run(image_root, tmp_path)
    said = capsys.readouterr().out
    assert said.count(f"note: {tmp_path}/{file} cannot be written: No space left on device: training continues") == 2
    assert same(state(tmp_path), state(straight)) and rows(tmp_path) == rows(straight)


def test_last_state_that_cannot_be_saved_is_a_failure_and_the_last_good_one_stays(image_root, tmp_path, monkeypatch):
    saved = []
    full_disk(monkeypatch, lambda name: "checkpoint.pth" in name and (saved.append(1) or len(saved) > 2))
    with pytest.raises(UserError, match=r"checkpoint.pth cannot be written: No space left"):
        run(image_root, tmp_path)
    assert load_checkpoint(tmp_path / "checkpoint.pth")["epoch"] == 0


def test_loss_that_is_not_finite_is_written_down_with_its_images_and_can_be_replayed(tmp_path, monkeypatch):
    write_images(tmp_path / "data" / "train")
    write_images(tmp_path / "data" / "val", count=1)
    monkeypatch.setattr(sys, "argv", ["main.py", "--lr", "a b"])
    flags = ["--lr", 1e30, "--warmup-lr", 1e30, "--save-every", 1]
    for attempt in ([], ["--resume", "auto"]):
        with pytest.raises(UserError, match=r"loss is nan .*python main.py --lr 'a b' --resume auto$"):
            run(tmp_path / "data", tmp_path, *flags, *attempt)
        noted = json.loads((tmp_path / "nonfinite.json").read_text())
        assert (noted["epoch"], noted["lr"], len(noted["images"])) == (0, pytest.approx(1e30 * 4 / 512), 1)
        assert noted["step"] * 4 == load_checkpoint(tmp_path / "checkpoint.pth")["progress"]["images"]
        sampler = runtime.SeededSampler(main.RASampler(range(24)), 0)
        keys = list(sampler)[4 * noted["step"] :][:4]
        dataset = main.build_dataset(True, parse(*small(tmp_path / "data")))[0]
        assert noted["images"] == [[dataset.samples[index][0] for index, *_ in keys]]


def processes(image_root, out, *flags, world_size=2):
    return start_processes(world_size, "main.py", *small(image_root, *FLAGS, "--output_dir", out, *flags))


@pytest.mark.parametrize("rank", [0, 1])
def test_signal_to_one_of_two_processes_ends_both_after_its_step(image_root, tmp_path, rank):
    signalled = (
        "agreed_signal = runtime.Run.agreed_signal\n"
        "def signalled(self, steps):\n"
        f"    if steps == 2 and runtime.get_rank() == {rank}:\n"
        f"        os.kill(os.getpid(), {signal.SIGTERM:d})\n"
        "    return agreed_signal(self, steps)\n"
        "runtime.Run.agreed_signal = signalled\n"
    )
    flags = small(image_root, *FLAGS, "--batch-size", 2, "--output_dir", tmp_path)
    results = [finish(process) for process in start_processes(2, *altered(signalled), *flags)]
    assert [result[0] for result in results] == [75, 75] and results[1][2] == results[0][2] == ""
    assert "stopped by SIGTERM in epoch 0, step 1: --resume auto continues" in results[0][1]
    assert load_checkpoint(tmp_path / "checkpoint.pth")["progress"]["images"] == 8


def test_main_process_may_write_for_longer_than_a_step_may_take(image_root, tmp_path):
    slow = (
        "import checkpoint\n"
        "save, saves = checkpoint.TrainingState.save, []\n"
        "def slow(*args):\n"
        "    saves.append(1)\n"
        "    time.sleep(8 if len(saves) == 1 else 0)\n"
        "    save(*args)\n"
        "checkpoint.TrainingState.save = slow\n"
    )
    flags = small(image_root, *FLAGS, "--epochs", 1, "--save-every", 2, "--step-timeout", 6, "--output_dir", tmp_path)
    results = [finish(process) for process in start_processes(2, *altered(slow), *flags)]
    assert [result[0] for result in results] == [0, 0], results


# One job in an output directory

LOCKING = """
import sys, time, runtime
with runtime.output_lock(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(10 ** 6)
"""


def test_second_job_in_an_output_directory_is_refused_until_the_first_one_is_killed(image_root, tmp_path, capsys):
    first = start("-c", LOCKING, tmp_path)
    assert first.stdout.readline() == "locked\n"
    try:
        for flags in ((), ("--eval",), ("--resume", "auto")):
            with pytest.raises(UserError) as refused:
                run(image_root, tmp_path, *flags)
            place = f"--output_dir {tmp_path} is in use by process {first.pid} on {socket.gethostname()}"
            assert re.match(
                rf"{place}, since 20\d\d-.*: choose another one, or stop that job first$", str(refused.value)
            )
        assert os.listdir(tmp_path) == [".lock"]
    finally:
        first.kill()
        finish(first)
    run(image_root, tmp_path, "--epochs", 1)
    run(image_root, tmp_path, "--epochs", 1, "--eval")  # a job that has ended in order leaves nothing behind either
    assert load_checkpoint(tmp_path / "checkpoint.pth")["epoch"] == 0


def test_loading_process_that_outlives_a_killed_job_does_not_keep_its_lock(tmp_path):
    forked = LOCKING.replace('print("locked"', "import os; child = os.fork()\n    if child: print(child")
    first = start("-c", forked, tmp_path)
    child = int(first.stdout.readline())
    try:
        first.kill()
        first.wait()
        with runtime.output_lock(str(tmp_path)):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_disk_without_locks_is_noted(tmp_path, monkeypatch, capsys):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    with runtime.output_lock(str(tmp_path)):
        assert "is on a disk without locks ([Errno 37] No locks available)" in capsys.readouterr().out


# Ranks that hang

STOP = "os.kill(os.getpid(), signal.SIGSTOP)"
SLEEP = "time.sleep(10 ** 6)"


# Before its first step a rank hangs when the other one has got as far: they could not tell it from one that never came.
MEET = "jobs[0]._store.set(f'there {rank}', ''); jobs[0]._store.wait([f'there {1 - rank}'])"
KEEP_JOB = """
meet, jobs = runtime.Job.meet, []
def kept(job):
    jobs.append(job)
    meet(job)
runtime.Job.meet = kept
"""


def at_call(owner, name, call, action, both="pass"):
    """Code that does `action` on the bad rank in the given call of a function, after what both do then; the first call
    is 1."""
    return (
        f"{KEEP_JOB}original, calls = {owner}.{name}, []\n"
        f"def changed(*args, **kwargs):\n"
        f"    calls.append(1)\n"
        f"    if len(calls) == {call}:\n"
        f"        {both}\n"
        f"        if bad:\n"
        f"            {action}\n"
        f"    return original(*args, **kwargs)\n"
        f"{owner}.{name} = changed\n"
    )


# phase -> (code that hangs in it, the rank that does, where the other one is when it notices)
HANGING = {
    "before_the_first_step": (at_call("main", "build_model", 1, STOP, MEET), 1, "its first steps"),
    "before_the_first_step_on_the_main_rank": (at_call("main", "build_model", 1, STOP, MEET), 0, "its first steps"),
    "training": (at_call("engine", "step_optimizer", 3, STOP), 1, "epoch 0, step [12]"),
    "training_asleep": (at_call("engine", "step_optimizer", 3, SLEEP), 0, "epoch 0, step [12]"),
    "evaluation": (at_call("engine", "batch_sums", 2, STOP), 1, "Test, step"),
    "evaluation_on_the_main_rank": (at_call("engine", "batch_sums", 2, STOP), 0, "Test, step"),
    "evaluation_asleep": (at_call("engine", "batch_sums", 2, SLEEP), 1, "Test, step"),
    "saving": (at_call("torch", "save", 1, STOP), 0, "the save after epoch 0, step 5"),
    "between_epochs": (at_call("runtime.RunLog", "write", 2, STOP), 1, "the save after Test, step"),
}


@pytest.fixture(scope="module")
def ends(image_root, tmp_path_factory):
    """Job -> rank -> (exit status, standard error), of a pair of ranks for each phase, all at the same time."""
    folder, jobs = tmp_path_factory.mktemp("hanging"), {}
    for name, (change, bad_rank, _) in HANGING.items():
        ending = [0, 1] if name == "evaluation_asleep" else [1 - bad_rank]
        jobs[name] = {"change": change, "bad_rank": bad_rank, "ranks": [0, 1], "ending": ending}
    jobs["never_starts"] = {"change": "runtime.job.STARTUP_SECONDS = 1", "bad_rank": 1, "ranks": [0], "ending": [0]}
    for name, job in jobs.items():
        flags = small(image_root, *FLAGS, "--batch-size", 2, "--step-timeout", 8, "--output_dir", folder / name)
        job.update(port=free_port(), flags=list(map(str, flags)))
    (folder / "jobs.json").write_text(json.dumps(jobs))
    status, _, said = finish(start("tests/forked_ranks.py", folder / "jobs.json", folder / "results.json"))
    assert status == 0, said
    return json.loads((folder / "results.json").read_text())


def program_lines(stderr):
    """The lines that the program itself printed.

    On a busy machine c10d also logs, in C++, that it waited a minute for a rank.
    """
    return [line for line in stderr.splitlines() if not re.match(r"\[[WE]\d{4} ", line)]


@pytest.mark.parametrize("phase", HANGING)
def test_rank_that_hangs_in_any_phase_ends_the_other_and_is_named(ends, phase):
    _, bad_rank, where = HANGING[phase]
    status, said = ends[phase][str(1 - bad_rank)]
    assert status == 1, said
    expected = f"error: rank {1 - bad_rank} of 2: rank {bad_rank} is lost or hangs in {where}"
    (line,) = program_lines(said)
    assert re.match(expected, line), said


def test_rank_whose_main_thread_hangs_in_an_evaluation_ends_itself_and_says_where(ends):
    status, said = ends["evaluation_asleep"]["1"]
    assert status == 1
    assert re.fullmatch(r"error: rank 1 of 2: this rank hangs in Test, step 1, at .*\(changed\)\n", said)


def test_rank_that_never_starts_ends_the_others(ends):
    status, said = ends["never_starts"]["0"]
    assert status == 1 and "check that all 2 ranks have started" in said and said.count("\n") == 1, said


def test_loading_process_that_is_killed_ends_the_run_with_a_sentence(image_root):
    killed = (
        "import torch\n"
        "def killed(self, index):\n"
        "    worker = torch.utils.data.get_worker_info()\n"
        "    in_training = isinstance(worker.dataset, runtime.SeededDataset)\n"
        "    loaded.append(in_training == {in_training})\n"
        "    if sum(loaded) == 10:\n"
        f"        os.kill(os.getpid(), {signal.SIGKILL:d})\n"
        "    return get(self, index)\n"
        "arguments = runtime.ArgumentParser(parents=[main.get_args_parser()]).parse_args()\n"
        "folder, loaded = type(main.build_dataset(True, arguments)[0]), []\n"
        "get, folder.__getitem__ = folder.__getitem__, killed\n"
    )
    flags = small(image_root, *FLAGS, "--num_workers", 1)
    runs = {
        place: start(*altered(killed.format(in_training=place == "epoch 0, step [0-5]")), *flags)
        for place in ("epoch 0, step [0-5]", "Test, step [0-5]")
    }
    for place, process in runs.items():
        status, _, said = finish(process)
        expected = f"error: a loading process ended or hangs in {place}: DataLoader worker "
        assert status == 1 and re.match(expected, said) and said.count("\n") == 1, said


def test_two_launchers_that_meet_train_as_one(image_root, tmp_path):
    """As on two machines."""
    port = free_port()
    pair = [
        start(
            "-m",
            "torch.distributed.run",
            "--nnodes=2",
            "--nproc_per_node=1",
            f"--node_rank={node}",
            f"--master_port={port}",
            "--master_addr=localhost",
            "main.py",
            *small(image_root, *FLAGS, "--output_dir", tmp_path / "two"),
        )
        for node in range(2)
    ]
    plain = processes(image_root, tmp_path / "one")
    results = [finish(process) for process in pair]
    assert [result[0] for result in results] == [0, 0], results
    assert results[0][1].count("* Acc@1") == 2 and "* Acc@1" not in results[1][1]
    assert [finish(process)[0] for process in plain] == [0, 0]
    assert same(state(tmp_path / "two"), state(tmp_path / "one"))


# What other processes, signals and disks do to a run


def test_signal_to_the_whole_group_spares_the_loading_processes(image_root, tmp_path):
    """As torchrun and SLURM send it."""
    signalled = (
        "os.setsid()\n"
        "agreed_signal = runtime.Run.agreed_signal\n"
        "def signalled(self, steps):\n"
        "    if self.epoch == 0 and steps == 3:\n"  # when all loading processes have started
        "        os.system('kill -TERM 0')\n"  # not by itself: a parent's signal ends them in order
        "        while not self.job.received_signals:\n"
        "            time.sleep(0.01)\n"
        # Training goes on for longer than what is loaded in advance lasts, which takes processes that live.
        "        self.job.received_signals.clear()\n"
        "    return agreed_signal(self, steps)\n"
        "runtime.Run.agreed_signal = signalled\n"
    )
    flags = small(image_root, *FLAGS, "--batch-size", 2, "--epochs", 1, "--num_workers", 2)
    status, out, err = finish(start(*altered(signalled), *flags))
    assert status == 0 and "epoch 0 [12/12]" in out and err == "", (out, err)


def test_processes_that_would_go_on_from_different_places_do_not_train(image_root, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "0")
    pair = start_processes(
        2,
        *altered("sys.argv[-1] += str(runtime.get_rank())"),
        *small(image_root, *FLAGS, "--epochs", 3, "--resume", "auto", "--output_dir", f"{tmp_path}/"),
    )
    results = [finish(process) for process in pair]
    assert [status for status, _, _ in results] == [1, 1]
    assert "resume from different places (epoch, images), [(2, None), (0, None)]" in results[0][2], results
    assert not (tmp_path / "1" / "checkpoint.pth").exists() and same(state(tmp_path / "0"), state(straight))


def test_signal_to_all_in_the_evaluation_ends_all_alike_though_some_have_finished_theirs(image_root, tmp_path):
    signalled = (
        "import engine, pathlib\n"
        "note = pathlib.Path(sys.argv[-1], 'waits')\n"
        "steps, add_up = runtime.Job.evaluation_steps, engine.all_reduce_sum\n"
        "def signalled(self, header, loader):\n"
        "    for batch in steps(self, header, loader):\n"
        "        if runtime.get_rank() == 1:\n"
        "            while not note.exists():\n"
        "                time.sleep(0.01)\n"
        f"            os.kill(int(note.read_text()), {signal.SIGTERM:d})\n"
        f"            os.kill(os.getpid(), {signal.SIGTERM:d})\n"
        "        yield batch\n"
        "def waits(sums):\n"
        "    if runtime.get_rank() == 0:\n"
        "        note.with_suffix('.tmp').write_text(str(os.getpid()))\n"
        "        note.with_suffix('.tmp').rename(note)\n"
        "    return add_up(sums)\n"
        "runtime.Job.evaluation_steps, engine.all_reduce_sum = signalled, waits\n"
    )
    pair = start_processes(2, *altered(signalled), *small(image_root, *FLAGS, "--output_dir", tmp_path))
    results = [finish(process) for process in pair]
    assert [result[0] for result in results] == [75, 75] and "stopped by SIGTERM in Test" in results[0][1], results
    assert load_checkpoint(tmp_path / "checkpoint.pth")["progress"]["images"] == 24


def test_failed_write_after_a_damaged_checkpoint_leaves_the_good_one(image_root, straight, tmp_path, monkeypatch):
    run(image_root, tmp_path)
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(path.read_bytes()[:-100])
    with monkeypatch.context() as patch:
        full_disk(patch, lambda name: "checkpoint.pth" in name)
        with pytest.raises(UserError, match="checkpoint.pth cannot be written"):
            run(image_root, tmp_path, "--resume", "auto", "--epochs", 3)
    run(image_root, tmp_path, "--resume", "auto")
    assert same(state(tmp_path), state(straight))


@pytest.mark.parametrize("links", [True, False], ids=["links", "no_links"])
def test_two_checkpoints_are_whole_at_every_moment_also_after_a_failed_write(tmp_path, monkeypatch, links):
    def save(epoch):
        with runtime.replacing(tmp_path / "c.pth", keep_previous=True) as file:
            torch.save({"epoch": epoch}, file)

    def link(path, previous):
        raise OSError(errno.ENOTSUP, "no hard links")

    def replace(source, target, replace=os.replace):
        assert source.suffix == ".tmp" or not links, "for a moment there is no checkpoint"
        replace(source, target)

    monkeypatch.setattr(os, "link", os.link if links else link)
    monkeypatch.setattr(os, "replace", replace)
    save(0)
    save(1)
    with open(tmp_path / "c.pth", "rb") as reader:
        save(2)
        assert torch.load(reader) == {"epoch": 1}
    full_disk(monkeypatch, lambda name: True)
    with pytest.raises(UserError, match="No space left"):
        save(3)
    assert [load_checkpoint(tmp_path / name)["epoch"] for name in ("c.pth", "c.previous.pth")] == [2, 1]


def test_output_directory_that_goes_away_ends_nothing_before_the_last_save(image_root, tmp_path, monkeypatch, capsys):
    evaluate, out = main.evaluate, tmp_path / "out"

    def evaluated(*args):
        shutil.rmtree(out, ignore_errors=True)
        out.touch()
        return evaluate(*args)

    monkeypatch.setattr(main, "evaluate", evaluated)
    with pytest.raises(UserError, match="out/.* cannot be written: Not a directory"):
        run(image_root, out)
    said = capsys.readouterr().out
    assert said.count("note: ") == 3 and said.count("Max accuracy") == 2


def test_mistake_at_the_time_of_a_signal_is_reported_though_its_sentence_says_timeout():
    flags = argparse.Namespace(output_dir="", save_every=0, epochs=1)
    loader = DataLoader(range(4), 2)
    with (
        pytest.raises(UserError, match="loss is nan"),
        runtime.Run(flags, runtime.Job(), runtime.RunLog(""), None, loader) as run,
    ):
        run.job.received_signals.append(signal.SIGTERM)
        raise UserError("loss is nan; to replay it: python main.py --step-timeout 6")


def test_signal_is_no_success_where_the_save_before_it_failed(image_root, tmp_path, monkeypatch, stop_at):
    stop_at(signal.SIGTERM, evaluation=1)
    full_disk(monkeypatch, lambda name: "checkpoint.pth" in name)
    with pytest.raises(UserError, match="checkpoint.pth cannot be written"):
        run(image_root, tmp_path)


def test_output_that_nobody_can_take_does_not_end_training(image_root, straight, tmp_path):
    full = altered("sys.stdout = open('/dev/full', 'w')")
    _, _, said = finish(start(*full, *small(image_root, *FLAGS, "--output_dir", tmp_path)))
    assert same(state(tmp_path), state(straight)), said


def test_weights_that_are_not_finite_never_replace_good_ones(image_root, straight, tmp_path, monkeypatch, capsys):
    for bad, flags, words in (
        (4, ["--save-every", 2], "loss is nan at epoch 0, step 4: .* --resume auto$"),
        (STEPS, [], "the loss of the evaluation is nan"),
    ):
        steps, step, out = [], engine.step_optimizer, tmp_path / str(bad)

        def spoiled(scaler, optimizer, bad=bad, steps=steps, step=step):
            steps.append(1)
            if len(steps) == bad:
                optimizer.param_groups[0]["params"][0].grad.fill_(float("nan"))
            step(scaler, optimizer)

        with monkeypatch.context() as patch:
            patch.setattr(engine, "step_optimizer", spoiled)
            with pytest.raises(UserError, match=words):
                run(image_root, out, *flags)
        assert "note: the weights are not finite" in capsys.readouterr().out
        run(image_root, out, "--resume", "auto", *flags)
        assert same(state(out), state(straight))


def test_evaluation_of_a_checkpoint_that_is_not_there_is_refused(image_root, tmp_path):
    with pytest.raises(
        UserError, match=f"--resume auto finds no checkpoint in --output_dir {tmp_path}: give the folder"
    ):
        run(image_root, tmp_path, "--eval", "--resume", "auto")
