"""reproduce.py end to end, against scores that conftest.py computes from the models' outputs."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys

import pytest
import reproduce
import torch
from PIL import Image

from conftest import DETR, PATIENCE, ROOT, SMALL, TINY, finish, signal_at_start, start, wait_until

ROW = {
    "name": TINY,
    "file": "tiny.pth",
    "url": "https://example.org/tiny.pth",
    "params_m": 5.76,
    "macs_m": 1284,
    "top1": 80.0,
    "top5": 92.0,
}
FOREVER = "while not pathlib.Path('over').exists():\n    time.sleep(0.05)\n"  # the end of the test
FLAGS = ["--deit_args=--num_workers 0", "--detr_args=--num_workers 0 --short_side 64"]


def write_table(path, top1, average_precision):
    """The table of three rows."""
    url, aps = "https://example.org/", {name: 0.5 for name in ("ap50", "ap75", "aps", "apm", "apl")}
    path.write_text(
        json.dumps(
            {
                "deit": [
                    {**ROW, "top1": top1},
                    {
                        "name": SMALL,
                        "file": "small.pth",
                        "url": url + "small.pth",
                        "params_m": 22.09,
                        "macs_m": 4659,
                        "top1": 80.9,
                        "top5": 95.4,
                    },
                ],
                "detr": [
                    {
                        "name": DETR,
                        "enc_rpe2d": "rpe-2.0-product-ctx-1-k",
                        "file": "detr.pth",
                        "url": url + "detr.pth",
                        "ap": average_precision,
                        **aps,
                    }
                ],
            }
        )
    )
    return path


def results(out):
    return json.loads((out / "results.json").read_text())["rows"]


def run(capsys, *flags):
    """(exit status, standard output, standard error) of reproduce.py in this process."""
    capsys.readouterr()
    try:
        status = reproduce.main(["--device", "cpu", *map(str, flags)])
    except SystemExit as stopped:  # argparse's
        status = stopped.code
    return status, *capsys.readouterr()


# ---------------------------------------------------------------------------------------------------------------------
# With the models themselves


@pytest.fixture(scope="module")
def walk(imagenet, coco, tmp_path_factory):
    """A run that was interrupted in its last row and then resumed: its folder, flags, and the outputs of the two runs.

    The second row's file is damaged, and missing when the run resumes. The paper's top-1 is set close to the
    true one, its AP far from it.
    """
    root = tmp_path_factory.mktemp("walk")
    checkpoints = root / "checkpoints"
    checkpoints.mkdir()
    torch.save({"model": imagenet[1], "epoch": 299}, checkpoints / "tiny.pth")
    (checkpoints / "small.pth").write_bytes((checkpoints / "tiny.pth").read_bytes()[:-5000])
    torch.save({"model": coco[1]}, checkpoints / "detr.pth")
    table = write_table(root / "table.json", imagenet[2]["top1"] + 0.09, coco[2]["ap"] - 0.05)
    data = ["--imagenet", imagenet[0], "--coco", coco[0], "--output_dir", root / "out", *FLAGS]
    flags = [*data, "--checkpoints", checkpoints, "--table", table]
    signalled = (
        "import sys; sys.path[:0] = ['tools', 'tests']; import conftest, reproduce; "
        f"conftest.signal_at_start('--coco_path', {signal.SIGTERM:d}); sys.exit(reproduce.main(sys.argv[1:]))"
    )
    stopped = finish(start(*flags, program=("-c", signalled))), results(root / "out")
    (checkpoints / "small.pth").unlink()
    return root, data, checkpoints, stopped, finish(start(*flags))


def test_an_interrupted_run_keeps_its_results_and_continues_after_a_damaged_file(walk):
    (status, _, err), rows = walk[3]
    assert status == 130 and err.splitlines()[-1].startswith("interrupted") and "tools/reproduce.py" not in err
    assert rows.keys() == {TINY, SMALL} and [row["status"] for row in rows.values()] == ["pass", "error"]
    assert "small.pth" in rows[SMALL]["why"] and "damaged" in rows[SMALL]["why"]


def test_a_resumed_run_measures_the_true_scores(walk, imagenet, coco):
    (status, out, err), rows = walk[4], results(walk[0] / "out")
    assert status == 1, err
    assert rows[TINY]["date"] == walk[3][1][TINY]["date"] and "kept:" in out and "$ cd DeiT" not in out
    assert rows[TINY]["measured"] == pytest.approx(imagenet[2], abs=1e-9)
    assert rows[DETR]["measured"] == pytest.approx(coco[2], abs=1e-9)
    assert {name: row["status"] for name, row in rows.items()} == {TINY: "pass", SMALL: "missing", DETR: "fail"}
    assert "difference -0.090, tolerance ±0.1" in out and "difference +5.000, tolerance ±0.2" in out


def test_reports_show_how_each_number_was_measured(walk, imagenet):
    root, _, checkpoints = walk[:3]
    text = (root / "out" / "results.md").read_text()
    row = results(root / "out")[TINY]
    for expected in (
        "small.pth, which https://example.org/small.pth provides",
        torch.__version__,
        row["device"],
        "cd DeiT-with-iRPE && python -m torch.distributed.run --standalone --nproc_per_node 1 main.py",
        hashlib.sha256((checkpoints / "tiny.pth").read_bytes()).hexdigest(),
        row["date"],
        f"| {TINY} | {imagenet[2]['top1']:.2f} ({imagenet[2]['top1'] + 0.09:g}) |",
    ):
        assert expected in text, expected
    lines = [line for line in text.splitlines() if line.startswith("| deit") or line.startswith("| detr")]
    assert [line.rsplit("|")[-2].strip() for line in lines] == ["**pass**", "**missing**", "**fail**"]
    assert "| -0.09 | 5.76 (5.76) | 1276 (1284) |" in lines[0] and "80.9" in lines[1]
    with Image.open(root / "out" / "results.png") as figure:
        assert min(figure.size) > 200


def test_incomplete_and_passed_runs_differ_in_status_and_nothing_is_measured_again(
    walk, imagenet, coco, tmp_path, capsys
):
    root, data, checkpoints = walk[:3]
    table = write_table(tmp_path / "table.json", imagenet[2]["top1"], coco[2]["ap"] + 0.0019)
    flags = [*data, "--checkpoints", checkpoints, "--table", table]
    for only, expected in (([], 3), (["--only", TINY, "detr*"], 0)):
        status, out, err = run(capsys, *flags, *only)
        assert status == expected, err
        assert out.count("kept:") == 2 and "$ " not in out and "difference -0.190, tolerance ±0.2" in out


def test_verify_passes_intact_files_and_counts(walk, capsys):
    status, out, _ = run(capsys, "--checkpoints", walk[2], "--table", walk[0] / "table.json", "--verify")
    tiny, small, detr = out.splitlines()
    assert status == 3
    assert f"{TINY}: pass: 5.76 M parameters, 1276 M MACs (paper: 5.76 M, 1284 M)" in tiny
    assert "missing: small.pth, which https://example.org/small.pth provides" in small
    assert f"{DETR}: pass: 41." in detr


def test_verify_catches_a_wrong_shape_a_missing_key_and_a_damaged_file(imagenet, tmp_path, capsys):
    weights, table = imagenet[1], "blocks.3.attn.rpe_k.lookup_table_weight"
    torch.save({"model": {**weights, table: weights[table][..., :-1]}}, tmp_path / "shape.pth")
    torch.save({"model": {key: value for key, value in weights.items() if key != "norm.bias"}}, tmp_path / "key.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "key.pth").read_bytes()[:-5000])
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "table.json").write_text(
        json.dumps({"deit": [{**ROW, "file": f"{name}.pth"} for name in ("shape", "key", "cut", "folder")]})
    )
    status, out, _ = run(capsys, "--checkpoints", tmp_path, "--verify", "--table", tmp_path / "table.json")
    shape, key, cut, folder = out.splitlines()
    assert status == 1
    assert "fail: " in shape and f"1 of another shape ({table} is (1, 64, 49) instead of (1, 64, 50))" in shape
    assert "fail: " in key and "1 missing (norm.bias)" in key
    assert "fail: " in cut and "damaged" in cut
    assert "fail: " in folder and "folder.pth cannot be read: Is a directory" in folder


# ---------------------------------------------------------------------------------------------------------------------
# Without an evaluation


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no data set: give --imagenet DIR and --coco DIR"),
        (["--only", "deit_huge"], "--only deit_huge names no row; rows are deit_tiny"),
        (["--imagenet", "tests"], "--imagenet tests has no val and no val.tar"),
        (["--coco", "tests"], "--coco tests has no annotations/instances_val2017.json"),
        (["--checkpoints", "nowhere"], "--checkpoints nowhere is not a folder"),
        (["--nproc", "0"], "--nproc 0 must be at least 1"),
        (["--table", "nowhere.json"], "--table nowhere.json cannot be read"),
        (["--device", "gpu"], "invalid choice: 'gpu'"),
        (["--nproc", "many"], "invalid int value: 'many'; --help"),
    ],
)
def test_a_mistake_is_reported_in_one_sentence_before_anything_is_written(
    flags, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(reproduce.ROOT)
    status, _, err = run(capsys, "--checkpoints", tmp_path, "--output_dir", tmp_path / "out", *flags)
    assert status == 2 and message in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"deit": 5}', '{"deit": [7]}', '{"deit": [{"name": "x"}]}', json.dumps({"detr": [ROW]})]
)
def test_a_table_in_another_format_is_refused(content, tmp_path):
    (tmp_path / "table.json").write_text(content)
    with pytest.raises(reproduce.UserError, match="table.json"):
        reproduce.read_table(tmp_path / "table.json")


def test_a_coco_folder_without_images_is_refused_before_anything_is_written(tmp_path, capsys):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").touch()
    status, _, err = run(capsys, "--checkpoints", tmp_path, "--output_dir", tmp_path / "out", "--coco", tmp_path)
    assert status == 2 and "no val2017 and no val2017.zip" in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (
            "Traceback (most recent call last):\n[rank1]: ValueError: this\nx.ChildFailedError: \n=====",
            "ValueError: this",
        ),
        (
            "error: rank 0 of 2: another rank is lost: gloo\nerror: rank 1 of 2: 7.png cannot be read\n",
            "rank 1 of 2: 7.png cannot be read",
        ),
        ("error: rank 1 of 2: Traceback (most recent call last):\n  File\nKeyError: 7\n", "KeyError: 7"),
        (
            "error: rank 0 of 2: another rank is lost: gloo\nx.y.ChildFailedError:",
            "rank 0 of 2: another rank is lost: gloo",
        ),
        (
            "a.b.errors.ChildFailedError: \n  exitcode  : -9 (pid: 12)\n"
            "  traceback : Signal 9 (SIGKILL) received by PID 12\n",
            "Signal 9 (SIGKILL)",
        ),
        ("a warning", ""),
    ],
)
def test_the_original_error_is_found_in_the_output_of_an_evaluation(output, expected):
    assert reproduce.error_in(output) == expected


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        (["pass", "pass"], 0),
        (["pass", "fail", "missing"], 1),
        (["pass", "missing"], 3),
        (["no data", "pass"], 3),
        (["error", "pass"], 3),
        (["error", "fail"], 1),
    ],
)
def test_the_exit_status_distinguishes_passed_failed_and_incomplete(statuses, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(reproduce, "read_table", lambda _: [{"name": status, "file": status} for status in statuses])
    monkeypatch.setattr(reproduce, "verify", lambda row, _: (row["name"], ""))
    assert reproduce.main(["--checkpoints", str(tmp_path), "--verify"]) == expected


def test_a_tar_is_read_where_imagenet_is_not_unpacked_and_flags_are_handed_on(tmp_path):
    (tmp_path / "val.tar").touch()
    args = reproduce.parse_args(
        ["--checkpoints", "c", "--imagenet", str(tmp_path), "--deit_args=--batch-size 256", "--nproc", "8"]
    )
    (row,) = reproduce.select(reproduce.read_table(args.table), [TINY])
    command = reproduce.command_of(row, args, tmp_path / row["file"])
    assert "--load-tar" in command and command[command.index("--batch-size") + 1] == "256"
    assert command[command.index("--nproc_per_node") + 1] == "8"
    (tmp_path / "val").mkdir()
    assert "--load-tar" not in reproduce.command_of(row, args, tmp_path / row["file"])


def test_a_changed_file_of_the_data_set_changes_the_fingerprint(tmp_path):
    (tmp_path / "val" / "n01").mkdir(parents=True)
    image = tmp_path / "val" / "n01" / "1.png"
    seen = {reproduce.fingerprint([tmp_path / "val"])}
    for content, second in ((b"a", 1), (b"ab", 1), (b"ab", 2)):
        image.write_bytes(content)
        os.utime(image, (second, second))
        seen.add(reproduce.fingerprint([tmp_path / "val"]))
    assert len(seen) == 4 and reproduce.fingerprint([tmp_path / "val"]) in seen


def test_a_difference_at_the_bound_passes():
    def status(codebase, metric, paper, measured):
        row = {"codebase": codebase, **dict.fromkeys(reproduce.CODEBASES[codebase].metrics, 0), metric: paper}
        return reproduce.judge(row, {metric: measured})["status"]

    assert status("deit", "top1", 81.2, 81.3) == "pass"  # 0.0999999… or 0.1000000…1 in binary
    assert status("deit", "top1", 81.2, 81.1) == "pass"
    assert status("deit", "top1", 81.2, 81.302) == "fail"
    assert status("detr", "ap", 0.41, 0.408) == "pass"
    assert status("detr", "ap", 0.41, 0.4079) == "fail"


# ---------------------------------------------------------------------------------------------------------------------
# With an evaluation that only writes its eval.json


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A folder with data, a checkpoint and a table of one row, whose model and evaluation are replaced."""
    for folder in ("val", "checkpoints", "out"):
        (tmp_path / folder).mkdir()
    (tmp_path / "out" / TINY).mkdir()
    (tmp_path / "checkpoints" / "tiny.pth").write_bytes(b"weights")
    (tmp_path / "table.json").write_text(json.dumps({"deit": [ROW]}))
    monkeypatch.setattr(reproduce, "model_on_meta", lambda row: None)
    monkeypatch.setattr(reproduce, "count", lambda *_: {"params": 5, "macs": 6})
    monkeypatch.setattr(reproduce, "command_of", lambda row, args, path: ["python", str(args.checkpoints / "code.py")])
    evaluation(tmp_path, {"acc1": 80.05, "acc5": 92})
    yield tmp_path
    (tmp_path / "over").touch()


def evaluation(root, stats, after=""):
    """Make the next evaluation write these to eval.json, and then do what `after` says, in the folder `root`."""
    (root / "checkpoints" / "code.py").write_text(
        "import json, os, pathlib, signal, sys, time\n"
        f"os.chdir({str(root)!r})\n"
        f"pathlib.Path('out', {TINY!r}, 'eval.json').write_text({json.dumps(stats)!r})\n" + after
    )


def flags_of(root):
    return [
        "--imagenet",
        root,
        "--checkpoints",
        root / "checkpoints",
        "--table",
        root / "table.json",
        "--output_dir",
        root / "out",
    ]


@contextlib.contextmanager
def drive(root, change=lambda: None):
    """A run in a process of its own, which calls `change` first and writes to the file `err`."""

    def body():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # to which nohup has made the tests deaf
        change()
        with open(root / "err", "w") as sys.stderr, open(os.devnull, "w") as sys.stdout:
            sys.exit(reproduce.main(["--device", "cpu", *map(str, flags_of(root))]))

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    try:
        yield process
        process.join(PATIENCE)
    finally:
        process.kill()


def test_results_are_kept_until_something_changes_and_after_an_error(stub, capsys):
    assert run(capsys, *flags_of(stub))[0] == 0
    good = results(stub / "out")[TINY]
    evaluation(stub, {}, "sys.exit('error: no luck')")
    (stub / "val" / "new.png").touch()
    assert run(capsys, *flags_of(stub))[0] == 3
    row = results(stub / "out")[TINY]
    assert (row["status"], row["why"]) == ("error", "no luck")
    assert row["measured"] == good["measured"] and row["depends"] == good["depends"]
    assert "no luck" in (stub / "out" / "results.md").read_text()
    (stub / "val" / "new.png").unlink()
    assert run(capsys, *flags_of(stub))[0] == 0 and results(stub / "out")[TINY] == good
    evaluation(stub, {"acc1": 79, "acc5": 92})
    (stub / "checkpoints" / "tiny.pth").write_bytes(b"weightS")
    status, out, _ = run(capsys, *flags_of(stub))
    assert status == 1 and "fail: top1 79.000, paper 80.0, difference -1.000, tolerance ±0.1" in out


def test_an_evaluation_without_a_result_is_an_error_even_if_there_is_an_earlier_result(stub, capsys):
    (stub / "checkpoints" / "code.py").write_text("")
    (stub / "out" / TINY / "eval.json").write_text('{"acc1": 80, "acc5": 92}')
    status, out, _ = run(capsys, *flags_of(stub))
    assert status == 3 and "error: the evaluation ended with status 0 and no result" in out


def test_a_missing_library_is_named_and_nothing_is_measured(stub, monkeypatch, capsys):
    def absent(*_, **__):
        raise ModuleNotFoundError("the models of DeiT-with-iRPE need timm, which is not installed")

    monkeypatch.undo()
    monkeypatch.setattr(torch.hub, "load", absent)
    status, out, _ = run(capsys, *flags_of(stub))
    assert status == 3 and "need timm, which is not installed" in out and "$ " not in out
    status, _, err = run(capsys, *flags_of(stub), "--verify")
    assert status == 2 and "need timm, which is not installed" in err


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_results_json_is_named_and_left_alone(stub, content, capsys):
    path = stub / "out" / "results.json"
    path.write_text(content)
    status, _, err = run(capsys, *flags_of(stub))
    assert status == 2 and err.startswith(f"error: {path} of an earlier run cannot be read") and err.count("\n") == 1
    assert path.read_text() == content


def test_a_folder_that_cannot_be_written_is_reported_before_the_first_evaluation(stub, monkeypatch, capsys):
    (stub / "out" / "results.md").mkdir()
    monkeypatch.setattr(reproduce, "evaluate", None)
    status, _, err = run(capsys, *flags_of(stub))
    assert status == 2 and "cannot be written" in err


def test_only_one_run_may_use_an_output_folder_even_while_the_evaluation_of_a_killed_run_continues(stub, capsys):
    evaluation(
        stub, {}, "pathlib.Path('pid.tmp').write_text(str(os.getpid())); os.rename('pid.tmp', 'pid')\n" + FOREVER
    )
    with drive(stub) as process:
        wait_until((stub / "pid").exists)
        for killed in (False, True):
            if killed:
                process.kill()
                process.join()
            status, _, err = run(capsys, *flags_of(stub))
            assert status == 2 and "is using --output_dir" in err
    os.kill(int((stub / "pid").read_text()), signal.SIGKILL)
    evaluation(stub, {"acc1": 80, "acc5": 92})
    wait_until(lambda: run(capsys, *flags_of(stub))[0] == 0)  # when the killed process has gone


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_single_and_repeated_signals_end_the_evaluation_without_a_traceback(stub, number):
    evaluation(
        stub,
        {},
        "def end(*_):\n    pathlib.Path('ending').touch()\n"
        "    while not pathlib.Path('repeated').exists():\n        time.sleep(0.01)\n"
        "    pathlib.Path('ended').touch()\n    sys.exit()\n\n"
        "signal.signal(signal.SIGTERM, end)\npathlib.Path('started').touch()\n" + FOREVER,
    )
    with drive(stub) as process:
        wait_until((stub / "started").exists)
        os.kill(process.pid, number)
        wait_until((stub / "ending").exists)
        for _ in range(3):
            os.kill(process.pid, number)
        (stub / "repeated").touch()
    err = (stub / "err").read_text()
    assert process.exitcode == 130 and (stub / "ended").exists()
    assert err.startswith("interrupted; ") and err.count("\n") == 1


def test_a_signal_while_an_evaluation_starts_does_not_leave_it_behind(stub):
    evaluation(stub, {}, FOREVER)
    with drive(stub, lambda: signal_at_start("code.py", signal.SIGTERM)) as process:
        pass
    assert process.exitcode == 130 and (stub / "err").read_text().startswith("interrupted; ")
    reproduce.lock(stub / "out").close()


def test_a_second_signal_is_ignored_while_the_first_one_ends_the_run(monkeypatch):
    for number in reproduce.STOPPING:
        monkeypatch.setattr(reproduce, "STOPPING", (number,))
        before = signal.signal(number, reproduce.stop)
        try:
            with pytest.raises(KeyboardInterrupt), reproduce.signals_deferred():
                signal.raise_signal(number)
                signal.raise_signal(number)
            signal.raise_signal(number)
        finally:
            signal.signal(number, before)


def test_a_closed_pipe_ends_the_run_quietly(stub, monkeypatch, capsys):
    with start("--checkpoints", stub, "--verify") as process:
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 130

    def closed(*_):
        raise BrokenPipeError

    monkeypatch.setattr(reproduce, "evaluate", closed)
    with open(stub / "said", "w") as said, contextlib.redirect_stdout(said):
        assert reproduce.main(["--device", "cpu", *map(str, flags_of(stub))]) == 130
    assert capsys.readouterr().err == ""


def test_a_system_that_lacks_a_signal_of_the_tools_is_refused(tmp_path):
    program = (
        "import signal, sys\n"
        "del signal.SIGHUP\n"
        "sys.modules['fcntl'] = None\n"  # as on Windows, where this cannot be imported either
        "sys.path.insert(0, 'tools')\n"
        "import ablate, reproduce\n"
        "sys.argv[0] = 'TOOL.py'\n"
        "print(ablate.main(['--data-path', sys.argv[1], '--output_dir', sys.argv[1]]),\n"
        "      reproduce.main(['--checkpoints', sys.argv[1], '--output_dir', sys.argv[1]]))\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "2 2\n")
    for line in ended.stderr.splitlines():
        assert line.startswith("error: TOOL.py needs the signals SIGINT and SIGTERM and SIGHUP, and ")
    assert ended.stderr.count(" lacks SIGHUP: use Linux") == 2 and not any(tmp_path.iterdir())
