"""reproduce.py end to end, against scores that conftest.py computes from the models' outputs."""
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import reproduce
import torch
from PIL import Image

from conftest import DETR, SMALL, TINY, finish, start

ROW = {"name": TINY, "file": "tiny.pth", "url": "https://example.org/tiny.pth", "params_m": 5.76, "macs_m": 1284,
       "top1": 80.0, "top5": 92.0}
FLAGS = ["--deit_args=--num_workers 0", "--detr_args=--num_workers 0 --short_side 64"]


def write_table(path, top1, average_precision):
    """The table of three rows, whose last one has no file."""
    url, aps = "https://example.org/", {name: 0.5 for name in ("ap50", "ap75", "aps", "apm", "apl")}
    path.write_text(json.dumps({
        "deit": [{**ROW, "top1": top1},
                 {"name": SMALL, "file": "small.pth", "url": url + "small.pth", "params_m": 22.09, "macs_m": 4659,
                  "top1": 80.9, "top5": 95.4}],
        "detr": [{"name": DETR, "enc_rpe2d": "rpe-2.0-product-ctx-1-k", "file": "detr.pth", "url": url + "detr.pth",
                  "ap": average_precision, **aps}]}))
    return path


def results(out):
    return json.loads((out / "results.json").read_text())["rows"]


@pytest.fixture(scope="module")
def walk(imagenet, coco, tmp_path_factory):
    """A walk that was stopped in its last row and then went on: its folder, flags, and what the two runs said.

    The paper's top-1 is set a little beside the true one, its AP far off.
    """
    root = tmp_path_factory.mktemp("walk")
    checkpoints = root / "checkpoints"
    checkpoints.mkdir()
    torch.save({"model": imagenet[1], "epoch": 299}, checkpoints / "tiny.pth")
    torch.save({"model": coco[1]}, checkpoints / "detr.pth")
    table = write_table(root / "table.json", imagenet[2]["top1"] + 0.09, coco[2]["ap"] - 0.05)
    data = ["--imagenet", imagenet[0], "--coco", coco[0], "--output_dir", root / "out", *FLAGS]
    flags = [*data, "--checkpoints", checkpoints, "--table", table]
    first = start(*flags)
    for line in first.stdout:
        if line.startswith("$ cd DETR"):
            first.send_signal(signal.SIGTERM)
            break
    stopped = finish(first), results(root / "out")
    return root, data, checkpoints, stopped, finish(start(*flags, "--nproc", 2))


def test_a_stopped_walk_has_kept_what_it_finished(walk):
    (status, _, err), rows = walk[3]
    assert status == 130 and "interrupted" in err and "Traceback" not in err
    assert rows.keys() == {TINY, SMALL} and rows[TINY]["status"] == "pass"


def test_the_walk_goes_on_and_measures_what_is_true(walk, imagenet, coco):
    (status, out, err), rows = walk[4], results(walk[0] / "out")
    assert status == 1, err
    assert rows[TINY]["date"] == walk[3][1][TINY]["date"] and "kept:" in out and "$ cd DeiT" not in out
    assert rows[TINY]["measured"] == pytest.approx(imagenet[2], abs=1e-9)
    assert rows[DETR]["measured"] == pytest.approx(coco[2], abs=1e-9)
    assert {name: row["status"] for name, row in rows.items()} == {TINY: "pass", SMALL: "missing", DETR: "fail"}
    assert "difference -0.090 of ±0.1" in out and "difference +5.000 of ±0.2" in out


def test_reports_say_how_each_number_was_measured(walk, imagenet):
    root, _, checkpoints = walk[:3]
    text = (root / "out" / "results.md").read_text()
    row = results(root / "out")[TINY]
    for expected in ("`small.pth`: <https://example.org/small.pth>", f"torch {torch.__version__}",
                     "cd DeiT-with-iRPE && python -m torch.distributed.run --standalone --nproc_per_node 1 main.py",
                     hashlib.sha256((checkpoints / "tiny.pth").read_bytes()).hexdigest(), row["device"], row["date"],
                     f"| {TINY} | {imagenet[2]['top1']:.2f} ({imagenet[2]['top1'] + 0.09:.1f}) |"):
        assert expected in text, expected
    lines = [line for line in text.splitlines() if line.startswith("| deit") or line.startswith("| detr")]
    assert [line.rsplit("|")[-2].strip() for line in lines] == ["**pass**", "**missing**", "**fail**"]
    assert "| 5.76 (5.76) | " in lines[0] and "80.9" in lines[1]
    with Image.open(root / "out" / "results.png") as picture:
        assert min(picture.size) > 200


def test_pass_incomplete_and_all_passed_are_told_apart_and_nothing_is_measured_again(walk, imagenet, coco, tmp_path):
    root, data, checkpoints = walk[:3]
    table = write_table(tmp_path / "table.json", imagenet[2]["top1"], coco[2]["ap"] + 0.0019)
    flags = [*data, "--checkpoints", checkpoints, "--table", table]
    for only, expected in (([], 3), (["--only", TINY, "detr*"], 0)):
        status, out, err = finish(start(*flags, *only))
        assert status == expected, err
        assert out.count("kept:") == 2 and "$ " not in out


def test_another_file_or_other_data_is_measured_again_and_a_crash_does_not_stop_the_walk(walk, imagenet, tmp_path):
    root, data, checkpoints = walk[:3]
    shutil.copytree(root / "out", tmp_path / "out")
    shutil.copytree(imagenet[0], tmp_path / "imagenet")
    (tmp_path / "imagenet" / "val" / "n00" / "0.png").write_bytes(b"no picture")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "tiny.pth").symlink_to(checkpoints / "tiny.pth")
    (tmp_path / "checkpoints" / "small.pth").write_bytes((checkpoints / "tiny.pth").read_bytes()[:10000])
    (tmp_path / "checkpoints" / "detr.pth").symlink_to(checkpoints / "detr.pth")
    status, out, err = finish(start(*data, "--checkpoints", tmp_path / "checkpoints", "--table", root / "table.json",
                                    "--output_dir", tmp_path / "out", "--imagenet", tmp_path / "imagenet"))
    rows = results(tmp_path / "out")
    assert status == 1 and out.count("kept:") == 1, err
    assert "n00/0.png cannot be read" in rows[TINY]["error"] and rows[TINY]["status"] == "error"
    assert rows[TINY]["measured"] == results(root / "out")[TINY]["measured"]
    assert "truncated or damaged" in rows[SMALL]["error"]
    assert rows[DETR]["date"] == results(root / "out")[DETR]["date"]
    assert "n00/0.png cannot be read" in (tmp_path / "out" / "results.md").read_text()


def test_verify_catches_a_wrong_shape_a_missing_key_and_a_truncated_file(walk, imagenet, tmp_path, capsys):
    weights = imagenet[1]
    table = "blocks.3.attn.rpe_k.lookup_table_weight"
    torch.save({"model": {**weights, table: weights[table][..., :-1]}}, tmp_path / "shape.pth")
    torch.save({"model": {key: value for key, value in weights.items() if key != "norm.bias"}}, tmp_path / "key.pth")
    (tmp_path / "cut.pth").write_bytes((walk[2] / "tiny.pth").read_bytes()[:-5000])
    (tmp_path / "folder.pth").mkdir()
    rows = [{**ROW, "codebase": "deit", "file": f"{name}.pth"} for name in ("shape", "key", "cut", "folder")]
    status = reproduce.verify(reproduce.parse_args(["--checkpoints", str(tmp_path)]), rows)
    shape, key, cut, folder = capsys.readouterr().out.splitlines()
    assert status == 1
    assert "fail: " in shape and f"1 of another shape ({table} is (1, 64, 49) instead of (1, 64, 50))" in shape
    assert "fail: " in key and "1 missing (norm.bias)" in key
    assert "fail: " in cut and "truncated or damaged" in cut
    assert "error: " in folder and "folder.pth is not a file" in folder


def test_verify_passes_whole_files_and_counts(walk):
    root, _, checkpoints = walk[:3]
    flags = ["--checkpoints", checkpoints, "--table", root / "table.json", "--verify"]
    status, out, err = finish(start(*flags))
    tiny, small, detr = out.splitlines()
    assert status == 3, err
    assert f"{TINY}: pass: 5.76 M parameters, 12" in tiny and "(paper: 5.76 M, 1284 M)" in tiny
    assert "missing: small.pth, to be had from https://example.org/small.pth" in small
    assert f"{DETR}: pass: 41." in detr


@pytest.mark.parametrize(("flags", "said"), [
    ([], "no data to measure on: say --imagenet DIR and --coco DIR"),
    (["--only", "deit_huge"], "--only deit_huge names no row; rows are deit_tiny"),
    (["--imagenet", "tests"], "--imagenet tests has neither val/ nor val.tar"),
    (["--coco", "tests"], "--coco tests has no annotations/instances_val2017.json"),
    (["--checkpoints", "nowhere"], "--checkpoints nowhere is not a folder"),
    (["--nproc", "0"], "--nproc 0 must be at least 1"),
    (["--table", "nowhere.json"], "--table nowhere.json cannot be read"),
    (["--device", "gpu"], "invalid choice: 'gpu'"),
    (["--nproc", "many"], "invalid int value: 'many'; --help"),
])
def test_a_mistake_is_said_in_one_sentence_before_anything_is_written(flags, said, tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(reproduce.ROOT)
        try:
            status = reproduce.main(["--checkpoints", str(tmp_path), "--output_dir", str(out), *flags])
        except SystemExit as stopped:
            status = stopped.code
    err = capsys.readouterr().err
    assert status == 2 and said in err and err.count("\n") == 1 and not out.exists()


@pytest.mark.parametrize(("lines", "expected"), [
    (["Traceback (most recent call last):", "[rank1]: ValueError: this", "x.ChildFailedError: ", "====="],
     "ValueError: this"),
    (["error: --device cuda needs a GPU", "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:"],
     "--device cuda needs a GPU"),
    (["E1122 12:00:00 1 api.py:984] failed (exitcode: -9) local_rank: 0 (pid: 12)"],
     "a process was ended by signal 9, perhaps for lack of memory"),
    (["  exitcode  : 7 (pid: 12)", "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:"],
     "a process ended with status 7 and said nothing"),
    (["a warning"], ""),
])
def test_the_error_of_an_evaluation_is_told_from_the_launchers_report(lines, expected):
    assert reproduce.last_error(lines) == expected


@pytest.mark.parametrize(("statuses", "expected"), [
    (["pass", "pass"], 0), (["pass", "fail", "missing"], 1), (["pass", "missing"], 3), (["no data", "pass"], 3),
    (["error", "pass"], 3), (["error", "fail"], 1)])
def test_exit_status_tells_passed_failed_and_incomplete_apart(statuses, expected):
    assert reproduce.exit_status([{"status": status} for status in statuses]) == expected


def test_a_tar_is_read_where_imagenet_is_not_unpacked(tmp_path):
    (tmp_path / "val.tar").touch()
    args = reproduce.parse_args(["--checkpoints", "c", "--imagenet", str(tmp_path), "--deit_args=--batch-size 256"])
    row, = reproduce.select(reproduce.read_table(args.table), [TINY])
    command = reproduce.command_of(row, args, tmp_path / row["file"])
    assert "--load-tar" in command and command[command.index("--batch-size") + 1] == "256"
    (tmp_path / "val").mkdir()
    assert "--load-tar" not in reproduce.command_of(row, args, tmp_path / row["file"])


def test_a_file_that_changes_in_the_data_is_noticed(tmp_path):
    (tmp_path / "val" / "n01").mkdir(parents=True)
    picture = tmp_path / "val" / "n01" / "1.png"
    seen = set()
    for content in (None, b"a", b"ab"):
        if content:
            picture.write_bytes(content)
        seen.add(reproduce.fingerprint([tmp_path / "val", tmp_path / "val.zip"]))
    os.utime(picture, (1, 1))
    seen.add(reproduce.fingerprint([tmp_path / "val", tmp_path / "val.zip"]))
    assert len(seen) == 4 and reproduce.fingerprint([tmp_path / "val"]) in seen


def test_a_difference_at_the_bound_passes():
    row = {"codebase": "deit", "top1": 81.2}
    assert reproduce.judge(row, {"top1": 81.3}) == "pass"  # 0.0999999… or 0.1000000…1 in binary
    assert reproduce.judge(row, {"top1": 81.1}) == "pass"
    assert reproduce.judge(row, {"top1": 81.302}) == "fail"
    assert reproduce.judge({"codebase": "detr", "ap": 0.41}, {"ap": 0.408}) == "pass"
    assert reproduce.judge({"codebase": "detr", "ap": 0.41}, {"ap": 0.4079}) == "fail"


@pytest.mark.parametrize("codebase", ["deit", "detr"])
def test_a_data_set_that_is_not_whole_is_noticed_before_anything_is_written(codebase, tmp_path, capsys):
    (tmp_path / "val").touch()
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").touch()
    flag, said = {"deit": ("--imagenet", "neither val/ nor val.tar"),
                  "detr": ("--coco", "neither val2017/ nor val2017.zip")}[codebase]
    status = reproduce.main(["--checkpoints", str(tmp_path), "--output_dir", str(tmp_path / "out"), flag,
                             str(tmp_path)])
    assert status == 2 and said in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [
    "[]", "3", "{", '{"deit": 5}', '{"deit": [{}]}', '{"deit": [7]}', '{"deit": [{"name": "x"}]}', "{}", '{"deit": []}',
    json.dumps({"deit": [{**ROW, "top1": None}]}), json.dumps({"deit": [{**ROW, "top1": float("nan")}]}),
    json.dumps({"deit": [{**ROW, "macs_m": "1"}]}), json.dumps({"deit": [ROW, ROW]}), "[" * 100000,
    json.dumps({"deit": [{**ROW, "name": "../x"}]}), json.dumps({"detr": [ROW]})])
def test_a_table_of_another_form_is_refused_in_a_sentence(content, tmp_path):
    (tmp_path / "table.json").write_text(content)
    with pytest.raises(reproduce.Mistake, match="table.json"):
        reproduce.read_table(tmp_path / "table.json")


# ---------------------------------------------------------------------------------------------------------------------
# With an evaluation that only writes its eval.json

DRIVER = """
import json, signal, sys, time, reproduce
reproduce.ask = lambda codebase, function, *rest: {"params": 5, "macs": 6, "torch_build": "2"}
reproduce.command_of = lambda row, args, path: ["python", "-c", open(args.checkpoints / "code.py").read()]
if __name__ == "__main__":
    sys.exit(reproduce.main())
"""
WRITES = "import pathlib; pathlib.Path({path!r}).write_text({text!r})"


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A folder with data, a checkpoint, a table of one row, a program driver.py, and what runs either in process."""
    for folder in ("val", "checkpoints", "out"):
        (tmp_path / folder).mkdir()
    (tmp_path / "out" / TINY).mkdir()
    (tmp_path / "checkpoints" / "tiny.pth").write_bytes(b"weights")
    (tmp_path / "table.json").write_text(json.dumps({"deit": [ROW]}))
    (tmp_path / "driver.py").write_text(DRIVER)
    monkeypatch.setattr(reproduce, "ask", lambda *_: {"params": 5, "macs": 6, "torch_build": "2"})
    monkeypatch.setattr(reproduce, "command_of", lambda row, args, path: [
        "python", "-c", (args.checkpoints / "code.py").read_text()])
    evaluation(tmp_path, '{"acc1": 80.05, "acc5": 92}')
    return tmp_path


def evaluation(root, text, after=""):
    """Make the next evaluation write this eval.json, and then do what `after` says."""
    path = str(root / "out" / TINY / "eval.json")
    (root / "checkpoints" / "code.py").write_text(WRITES.format(path=path, text=text) + "\n" + after)


def flags_of(root, *more):
    return [str(flag) for flag in ("--imagenet", root, "--checkpoints", root / "checkpoints", "--table",
                                   root / "table.json", "--output_dir", root / "out", "--device", "cpu", *more)]


def drive(root):
    env = {**os.environ, "PYTHONPATH": str(reproduce.ROOT)}
    return subprocess.Popen([sys.executable, root / "driver.py", *flags_of(root)], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("content", [
    "", "garbage", '{"x": 1}', "[]", "null", '{"acc1": "abc", "acc5": 1}', '{"acc1": NaN, "acc5": 1}', '{"acc1": 1}',
    '{"acc1": 1e999, "acc5": 1}', '{"acc1": true, "acc5": 1}', "[" * 100000])
def test_an_eval_json_without_the_numbers_is_an_error_of_its_row(stub, content, capsys):
    evaluation(stub, content)
    assert reproduce.main(flags_of(stub)) == 3
    row = results(stub / "out")[TINY]
    assert row["status"] == "error" and "eval.json holds no result" in row["error"] and "measured" not in row
    assert "error: " in capsys.readouterr().out


@pytest.mark.parametrize(("values", "whole"), [([0.1] * 12, True), ([0.1] * 5, False), ([0.1] * 5 + [None], False),
                                               ({"ap": 1}, False), ("123456", False)])
def test_detrs_result_needs_all_six_numbers(tmp_path, values, whole):
    (tmp_path / "eval.json").write_text(json.dumps({"coco_eval_bbox": values}))
    assert (reproduce.read_metrics("detr", tmp_path / "eval.json") is not None) == whole


def test_an_error_keeps_the_measurement_before_and_exits_incomplete(stub):
    assert reproduce.main(flags_of(stub)) == 0
    good = results(stub / "out")[TINY]
    evaluation(stub, "", "import sys; sys.exit('error: no luck')")
    (stub / "val" / "new.png").touch()
    assert reproduce.main(flags_of(stub)) == 3
    row = results(stub / "out")[TINY]
    assert row["status"] == "error" and row["error"] == "no luck"
    assert row["measured"] == good["measured"] and row["depends"] == good["depends"]
    assert "error: no luck" in (stub / "out" / "results.md").read_text()
    (stub / "val" / "new.png").unlink()
    assert reproduce.main(flags_of(stub)) == 0 and results(stub / "out")[TINY] == good


def test_measured_beyond_the_bound_exits_failed(stub):
    evaluation(stub, '{"acc1": 79, "acc5": 92}')
    assert reproduce.main(flags_of(stub)) == 1


@pytest.mark.parametrize("content", [
    "{", "[]", '{"rows": []}', '{"rows": null}', '{"rows": {"NAME": []}}', '{"rows": {"NAME": 5}}',
    '{"rows": {"NAME": {"status": "pass"}}}', '{"rows": {"NAME": {"status": "error", "measured": {}}}}',
    '{"rows": {"NAME": {"status": "error", "measured": {"top1": NaN, "top5": 1}}}}',
    '{"rows": {"NAME": {"status": "error", "depends": 5}}}'])
def test_a_damaged_results_json_is_named_and_left_alone(stub, content, capsys):
    path = stub / "out" / "results.json"
    path.write_text(content.replace("NAME", TINY))
    assert reproduce.main(flags_of(stub)) == 2
    err = capsys.readouterr().err
    assert err == f"error: {path} of an earlier run is damaged: move it away\n"
    assert path.read_text() == content.replace("NAME", TINY)


def test_reports_compute_the_difference_from_what_was_measured(stub, capsys):
    assert reproduce.main(flags_of(stub)) == 0
    path = stub / "out" / "results.json"
    path.write_text(path.read_text().replace("80.05", "80.08"))
    assert reproduce.main(flags_of(stub)) == 0
    assert "difference +0.080" in capsys.readouterr().out and "| +0.08 |" in (stub / "out" / "results.md").read_text()


def test_a_folder_that_cannot_be_written_is_known_before_the_first_evaluation(stub, monkeypatch, capsys):
    (stub / "out" / "results.md").mkdir()
    monkeypatch.setattr(reproduce, "evaluate", None)
    assert reproduce.main(flags_of(stub)) == 2
    assert "cannot be written" in capsys.readouterr().err


def wait_for(path):
    while not path.exists():
        time.sleep(0.02)


SLEEPS = "import pathlib, time; pathlib.Path({path!r}).touch(); time.sleep(60)"


def test_an_output_folder_is_one_runs_alone_also_while_a_killed_runs_evaluation_goes_on(stub, capsys):
    evaluation(stub, "{}", f"import os; pathlib.Path({str(stub / 'pid')!r}).write_text(str(os.getpid()))\n"
               + SLEEPS.format(path=str(stub / "started")))
    with drive(stub) as run:
        wait_for(stub / "started")
        for killed in (False, True):
            if killed:
                run.kill()
                run.wait()
            assert reproduce.main(flags_of(stub)) == 2
            assert "is using --output_dir" in capsys.readouterr().err
        os.kill(int((stub / "pid").read_text()), signal.SIGKILL)
    evaluation(stub, '{"acc1": 80, "acc5": 92}')
    for _ in range(100):  # until the killed process has gone
        if (status := reproduce.main(flags_of(stub))) != 2:
            break
        time.sleep(0.05)
    assert status == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_also_repeated_end_the_evaluation_without_a_traceback(stub, number):
    ending = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({path!r}).touch(), " \
             "__import__('time').sleep(0.5), sys.exit()))\n".format(path=str(stub / "ending"))
    evaluation(stub, "{}", ending + SLEEPS.format(path=str(stub / "started")))
    with drive(stub) as run:
        wait_for(stub / "started")
        run.send_signal(number)
        wait_for(stub / "ending")
        for _ in range(3):
            run.send_signal(number)
        out, err = run.communicate(timeout=60)
    assert run.returncode == 130 and err.startswith("interrupted; what was finished") and err.count("\n") == 1


def test_a_launcher_that_does_not_end_is_killed(monkeypatch):
    monkeypatch.setattr(reproduce, "GRACE", 0.2)
    monkeypatch.setattr(reproduce, "ignore_signals", lambda: None)
    with subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
                           "print(flush=True); time.sleep(60)"], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        reproduce.end(process)
    assert process.returncode == -signal.SIGKILL


def test_a_closed_pipe_ends_the_run_quietly(stub):
    evaluation(stub, '{"acc1": 80, "acc5": 92}', f"import time\nwhile not pathlib.Path({str(stub / 'closed')!r})"
               ".exists(): time.sleep(0.02)")
    with drive(stub) as run:
        run.stdout.readline()
        run.stdout.close()
        (stub / "closed").touch()
        assert run.stderr.read() == "" and run.wait() == 130


def explode(kind):
    if kind == "import":
        import no_such_module  # noqa: F401
    sys.exit("a sentence")


@pytest.mark.parametrize(("kind", "said"), [("import", "ModuleNotFoundError: No module named 'no_such_module'"),
                                            ("exit", "SystemExit: a sentence")])
def test_whatever_ends_the_look_at_a_file_is_an_error_and_not_a_traceback(kind, said):
    assert reproduce.ask("test", explode, kind) == {"error": said}


def test_a_missing_library_is_named_beforehand_also_to_verify(stub, monkeypatch, capsys):
    found = reproduce.importlib.util.find_spec
    monkeypatch.setattr(reproduce.importlib.util, "find_spec", lambda name: None if name == "timm" else found(name))
    for more in ([], ["--verify"]):
        assert reproduce.main(flags_of(stub, *more)) == 2
        assert capsys.readouterr().err == "error: timm must be installed first: python -m pip install timm\n"
