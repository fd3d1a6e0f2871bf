"""reproduce.py end to end, against scores that conftest.py computes from the models' outputs."""
import hashlib
import json
import os
import shutil
import signal

import pytest
import reproduce
import torch
from PIL import Image

from conftest import DETR, SMALL, TINY, finish, start

FLAGS = ["--deit_args=--num_workers 0", "--detr_args=--num_workers 0 --short_side 64"]


def write_table(path, top1, average_precision):
    """The table of three rows, whose last one has no file."""
    url, aps = "https://example.org/", {name: 0.5 for name in ("ap50", "ap75", "aps", "apm", "apl")}
    path.write_text(json.dumps({
        "deit": [{"name": TINY, "file": "tiny.pth", "url": url + "tiny.pth", "params_m": 5.76, "macs_m": 1284,
                  "top1": top1, "top5": 92.0},
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
    assert rows[TINY]["difference"] == pytest.approx(-0.09) and rows[DETR]["difference"] == pytest.approx(5)


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
    assert "n00/0.png cannot be read" in rows[TINY]["error"] and "measured" not in rows[TINY]
    assert "truncated or damaged" in rows[SMALL]["error"]
    assert rows[DETR]["date"] == results(root / "out")[DETR]["date"]
    assert "n00/0.png cannot be read" in (tmp_path / "out" / "results.md").read_text()


def test_verify_catches_a_wrong_shape_a_missing_key_and_a_truncated_file(walk, imagenet, tmp_path):
    weights = imagenet[1]
    table = "blocks.3.attn.rpe_k.lookup_table_weight"
    torch.save({"model": {**weights, table: weights[table][..., :-1]}}, tmp_path / "shape.pth")
    torch.save({"model": {key: value for key, value in weights.items() if key != "norm.bias"}}, tmp_path / "key.pth")
    (tmp_path / "cut.pth").write_bytes((walk[2] / "tiny.pth").read_bytes()[:-5000])
    (tmp_path / "table.json").write_text(json.dumps({"deit": [
        {"name": TINY, "file": f"{name}.pth", "url": "https://example.org/"} for name in ("shape", "key", "cut")]}))
    status, out, _ = finish(start("--checkpoints", tmp_path, "--table", tmp_path / "table.json", "--verify"))
    shape, key, cut = out.splitlines()
    assert status == 1
    assert "fail: " in shape and f"1 of another shape ({table} is (1, 64, 49) instead of (1, 64, 50))" in shape
    assert "fail: " in key and "1 missing (norm.bias)" in key
    assert "fail: " in cut and "truncated or damaged" in cut


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
])
def test_a_mistake_is_said_in_one_sentence_before_anything_is_written(flags, said, tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(reproduce.ROOT)
        status = reproduce.main(["--checkpoints", str(tmp_path), "--output_dir", str(out), *flags])
    err = capsys.readouterr().err
    assert status == 2 and said in err and err.count("\n") == 1 and not out.exists()


@pytest.mark.parametrize(("lines", "expected"), [
    (["Traceback (most recent call last):", "[rank1]: ValueError: this", "x.ChildFailedError: ", "====="],
     "ValueError: this"),
    (["error: --device cuda needs a GPU", "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:"],
     "--device cuda needs a GPU"),
    (["E1122 12:00:00 1 api.py:984] failed (exitcode: -9) local_rank: 0 (pid: 12)"],
     "a process was ended by signal 9, perhaps for lack of memory"),
    (["a warning"], ""),
])
def test_the_error_of_an_evaluation_is_told_from_the_launchers_report(lines, expected):
    assert reproduce.last_error(lines) == expected


@pytest.mark.parametrize(("statuses", "expected"), [
    (["pass", "pass"], 0), (["pass", "fail", "missing"], 1), (["pass", "missing"], 3), (["no data", "pass"], 3)])
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
    assert reproduce.judge(row, {"top1": 81.3})["status"] == "pass"  # 0.0999999… or 0.1000000…1 in binary
    assert reproduce.judge(row, {"top1": 81.1})["status"] == "pass"
    assert reproduce.judge(row, {"top1": 81.302})["status"] == "fail"
    assert reproduce.judge({"codebase": "detr", "ap": 0.41}, {"ap": 0.408})["status"] == "pass"
    assert reproduce.judge({"codebase": "detr", "ap": 0.41}, {"ap": 0.4079})["status"] == "fail"
