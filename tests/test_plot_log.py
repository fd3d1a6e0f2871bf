"""tools/plot_log.py on synthetic logs of both codebases."""

import json
import runpy
import sys
from pathlib import Path
from unittest import mock

import drawing
import plot_log
import pytest

from conftest import ROOT

OFFICIAL = ROOT.parent / "shared" / "data" / "official-logs"


def deit(scores, loss=2.0):
    return [
        {
            "train_lr": 1e-3 / (epoch + 1),
            "train_loss": loss,
            "test_loss": loss / 2,
            "test_acc1": score,
            "test_acc5": 99.0,
            "epoch": epoch,
            "n_parameters": 5,
        }
        for epoch, score in enumerate(scores)
    ]


def detr(scores):
    """Rows of epochs, of which those with a score were evaluated."""
    return [
        {"train_lr": 1e-4, "train_loss": 9.0, "train_loss_bbox": 0.1, "epoch": epoch}
        | ({} if score is None else {"test_loss": 8.0, "test_coco_eval_bbox": [score, *[0.5] * 11]})
        for epoch, score in enumerate(scores)
    ]


@pytest.fixture(autouse=True)
def in_a_fresh_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def verdicts(capsys, *flags):
    """The printed lines after the one that names the figure, which is not drawn."""
    with mock.patch.multiple(plot_log, draw=mock.DEFAULT, save=mock.DEFAULT):
        plot_log.main(plot_log.build_parser().parse_args([str(flag) for flag in flags]))
    return capsys.readouterr().out.splitlines()[1:]


def test_the_first_epoch_beyond_the_margin_is_printed(capsys):
    logs = write("paper.txt", deit([10, 20, 30, 40, 50, 60])), write("run.txt", deit([10.9, 19, 31.5, 40, 47, 60.5]))
    (line,) = verdicts(capsys, *logs)
    assert line == (
        "run.txt first differs from the reference's top-1 by more than 1 at epoch 2 (31.50, not 30.00), does so at "
        "2 of 6 common epochs, last at 4, and differs by +0.50 at the last one, 5"
    )
    (line,) = verdicts(capsys, *logs, "--margin", 3)
    assert line == (
        "run.txt is within 3 of the reference's top-1 at all 6 common epochs; the largest difference is -3.00, at "
        "epoch 4"
    )


def test_ap_of_detr_is_compared_in_points_at_the_epochs_that_both_evaluated(capsys):
    logs = write("a.txt", detr([0.1, 0.2, 0.3, 0.4, 0.5])), write("b.txt", detr([None, 0.205, None, 0.42]))
    (line,) = verdicts(capsys, *logs)
    assert line == (
        "b.txt first differs from the reference's AP by more than 1 at epoch 3 (42.00, not 40.00), does so at "
        "1 of 2 common epochs, last at 3, and differs by +2.00 at the last one, 3"
    )
    assert plot_log.read_log("b.txt")["train_loss"] == {0: 9, 1: 9, 2: 9, 3: 9}


def test_logs_without_a_common_epoch_are_reported_and_nan_is_outside_the_margin(capsys):
    logs = (
        write("a.txt", deit([1, 2, 3])),
        write("later.txt", deit(range(9))[7:]),
        write("nan.txt", deit([1, float("nan"), 3])),
    )
    later, nan = verdicts(capsys, *logs)
    assert later == "later.txt has no epoch with top-1 in common with the reference"
    assert nan.startswith("nan.txt first differs from the reference's top-1 by more than 1 at epoch 1 (nan, not 2.00)")


def test_the_program_writes_a_figure_or_exits_with_status_1_and_one_sentence(capsys, monkeypatch):
    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["plot_log.py", *flags])
        runpy.run_path(plot_log.__file__, run_name="__main__")

    run(write("a.txt", deit([1, 2, 3])), write("b.txt", deit([2, 3, 4])), "--output", "new/curves.png")
    assert Path("new/curves.png").read_bytes().startswith(b"\x89PNG") and "b.txt is within" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="^1$"):
        run("none.txt")
    assert capsys.readouterr() == (
        "",
        "error: log none.txt cannot be read: [Errno 2] No such file or directory: 'none.txt'\n",
    )


def test_the_figure_shows_every_column_and_the_difference():
    logs = {
        name: plot_log.read_log(write(name, deit(scores, loss)))
        for name, scores, loss in (("a", [1, 2, 3, 4], 3.0), ("_b", [2, 4, 6], 5.0))
    }
    figure = plot_log.draw(logs, "top-1", 0.5)
    drawn = [[(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines] for axes in figure.axes]
    assert drawn[0] == [
        ([0, 1, 2, 3], [3.0] * 4),
        ([0, 1, 2, 3], [1.5] * 4),
        ([0, 1, 2], [5.0] * 3),
        ([0, 1, 2], [2.5] * 3),
    ]
    assert drawn[1] == [([0, 1, 2, 3], [1, 2, 3, 4]), ([0, 1, 2], [2, 4, 6])]
    assert drawn[2][1] == ([0, 1, 2], [1e-3, 5e-4, 1e-3 / 3])
    assert ([0, 1, 2], [1, 2, 3]) in drawn[3]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["reference: a", "run: _b"]
    assert len(plot_log.draw({"a": logs["a"]}, "top-1", 0.5).axes) == 3


def test_a_run_equal_to_the_reference_is_visible_and_all_runs_look_different():
    log = plot_log.read_log(write("log.txt", deit([1, 2, 3])))
    reference, *runs = plot_log.draw(dict.fromkeys(range(13), log), "top-1", 1).axes[1].lines
    assert all(reference.get_linewidth() > 2 * run.get_linewidth() for run in runs)
    assert len({(run.get_color(), run.get_linestyle()) for run in runs}) == 12


def test_the_last_line_of_a_repeated_epoch_counts():
    rows = deit([1, 2, 3, 4, 5])
    resumed = [{**row, "test_acc1": 10 * row["test_acc1"]} for row in rows[2:4]]
    score = plot_log.read_log(write("log.txt", rows + resumed))["top-1"]
    assert score == {0: 1, 1: 2, 2: 30, 3: 40, 4: 5}


def test_a_truncated_last_line_is_skipped_with_a_note(capsys):
    path = Path(write("log.txt", deit([1, 2, 3])))
    path.write_text(path.read_text()[:-40])
    assert plot_log.read_log(path)["top-1"] == {0: 1, 1: 2}
    assert capsys.readouterr().err == "note: line 3 of log.txt, the last one, is truncated and skipped\n"


WHOLE = "".join(json.dumps(row) + "\n" for row in deit([1, 2]))


@pytest.mark.parametrize(
    "content, words",
    [
        ("", "log.txt has no epoch with"),
        ("hello\n", "line 1 of log.txt is not a log entry"),
        (WHOLE[:20], "line 1 of"),
        (WHOLE[:-60] + "\n" + WHOLE, "line 2 of"),
        ("[1, 2]\n", "line 1 of"),
        ("5\n", "line 1"),
        ('{"test_acc1": 1}\n', "line 1 of"),
        ('{"epoch": 4, "test_acc1": "high"}\n', "line 1 of"),
        ('{"epoch": 4, "test_coco_eval_bbox": []}\n', "line 1 of"),
        ('{"epoch": 0, "loss": 1}\n', "DeiT's test_acc1 or"),
        (b"\xff\xfe\x00\x80", "log.txt cannot be read"),
    ],
)
def test_a_file_that_is_no_log_is_refused(content, words):
    Path("log.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(drawing.runtime.UserError, match=words):
        plot_log.read_log("log.txt")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["detr.txt"], "deit.txt is a log of top-1 and detr.txt is not"),
        (["--margin", "-1"], "--margin"),
        (["--margin", "nan"], "--margin"),
        (["--output", "x.pdf"], "but x.pdf does not end in .png"),
        (["--output", "deit.txt/x.png"], "x.png cannot be written"),
    ],
)
def test_mistakes_raise_a_user_error_and_write_no_figure(flags, words):
    write("deit.txt", deit([1]))
    write("detr.txt", detr([0.1]))
    with pytest.raises(drawing.runtime.UserError, match=words):
        plot_log.main(plot_log.build_parser().parse_args(["deit.txt", *flags]))
    assert not list(Path().glob("*.png"))


def test_without_matplotlib_the_error_names_the_package_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(drawing.runtime.UserError, match="pip install matplotlib"):
        drawing.new_figure(1, 1)


@pytest.mark.skipif(not OFFICIAL.is_dir(), reason="needs the released logs in ../shared")
def test_all_300_epochs_of_the_released_logs_are_read(capsys):
    logs = sorted(OFFICIAL.glob("*.txt"))
    lines = verdicts(capsys, *logs)
    assert len(lines) == len(logs) - 1 and all("of 300 common epochs" in line for line in lines)
    assert plot_log.read_log(OFFICIAL / "deit_small_patch16_224_ctx_product_50_shared_qkv.txt")["top-1"][
        299
    ] == pytest.approx(81.202, abs=1e-4)
