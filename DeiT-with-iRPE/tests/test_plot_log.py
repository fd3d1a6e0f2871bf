"""plot_log.py on made logs of both codebases, which share it."""
import json
import sys
from pathlib import Path

import pytest

import drawing
import plot_log
from conftest import PROJECT
from runtime import UserError

OFFICIAL = PROJECT.parent.parent / "shared" / "data" / "official-logs"


def deit(scores, loss=2.0):
    return [{"train_lr": 1e-3 / (epoch + 1), "train_loss": loss, "test_loss": loss / 2, "test_acc1": score,
             "test_acc5": 99.0, "epoch": epoch, "n_parameters": 5} for epoch, score in enumerate(scores)]


def detr(scores):
    """Rows of epochs, of which those with a score were evaluated."""
    return [{"train_lr": 1e-4, "train_loss": 9.0, "train_loss_bbox": 0.1, "epoch": epoch}
            | ({} if score is None else {"test_loss": 8.0, "test_coco_eval_bbox": [score, *[0.5] * 11]})
            for epoch, score in enumerate(scores)]


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def plot(capsys, *flags):
    """Lines that are printed after that of the picture."""
    plot_log.main(plot_log.parser().parse_args([str(flag) for flag in flags]))
    return capsys.readouterr().out.splitlines()[1:]


def test_a_run_leaves_the_first_log_at_the_first_epoch_beyond_the_margin(tmp_path, capsys):
    paper = write(tmp_path / "paper.txt", deit([10, 20, 30, 40, 50]))
    run = write(tmp_path / "run" / "log.txt", deit([10.9, 19, 31.5, 40, 47]))
    output = tmp_path / "new" / "curves.png"
    line, = plot(capsys, paper, run, "--output", output)
    assert line == ("run: leaves paper by more than 1 point of top-1 at epoch 2 (31.50, not 30.00) and is outside at 2 "
                    "of 5 epochs, last at 4; at the end, epoch 4, it is -3.00")
    line, = plot(capsys, run, "--reference", paper, "--margin", 3, "--output", output)
    assert line == ("run: within 3 points of top-1 of paper at all 5 epochs of both; the largest difference is -3.00, "
                    "at epoch 4")
    assert output.read_bytes().startswith(b"\x89PNG")


def test_the_figure_shows_every_column_and_the_difference(tmp_path):
    logs = [plot_log.read_log(write(tmp_path / f"{name}.txt", deit(scores, loss)))
            for name, scores, loss in (("a", [1, 2, 3, 4], 3.0), ("b", [2, 4, 6], 5.0))]
    panels = plot_log.draw(logs, logs[0], 0.5).axes
    drawn = [[(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines] for axes in panels]
    assert drawn[0] == [([0, 1, 2, 3], [3.0] * 4), ([0, 1, 2, 3], [1.5] * 4), ([0, 1, 2], [5.0] * 3),
                        ([0, 1, 2], [2.5] * 3)]
    assert drawn[1] == [([0, 1, 2, 3], [1, 2, 3, 4]), ([0, 1, 2], [2, 4, 6])]
    assert drawn[2][1] == ([0, 1, 2], [1e-3, 5e-4, 1e-3 / 3])
    assert ([0, 1, 2], [1, 2, 3]) in drawn[3]
    assert len({line.get_color() for line in panels[1].lines}) == 2
    assert len(plot_log.draw(logs[:1], logs[0], 0.5).axes) == 3


def test_of_a_repeated_epoch_the_last_line_counts(tmp_path):
    rows = deit([1, 2, 3, 4, 5])
    resumed = [{**row, "test_acc1": 10 * row["test_acc1"]} for row in rows[2:4]]
    log = plot_log.read_log(write(tmp_path / "log.txt", rows + resumed))
    assert log.columns["score"] == {0: 1, 1: 2, 2: 30, 3: 40, 4: 5} and list(log.columns["score"]) == [0, 1, 2, 3, 4]


def test_logs_of_other_lengths_are_compared_where_both_have_an_epoch(tmp_path, capsys):
    long = write(tmp_path / "long.txt", deit([1, 2, 3, 4, 5, 6]))
    short = write(tmp_path / "short.txt", deit([1, 2, 3]))
    later = write(tmp_path / "later.txt", deit(range(9))[7:])
    lines = plot(capsys, long, short, later, "--output", tmp_path / "x.png")
    assert "within 1 point of top-1 of long at all 3 epochs" in lines[0] and "no epoch" in lines[1]


def test_a_score_that_is_not_a_number_is_outside(tmp_path, capsys):
    logs = [write(tmp_path / f"{name}.txt", deit(scores)) for name, scores in (
        ("a", [1, 2, 3]), ("b", [1, float("nan"), 3]))]
    assert "leaves a by more than 1 point of top-1 at epoch 1" in plot(capsys, *logs, "--output", tmp_path / "x.png")[0]


def test_detrs_ap_is_compared_in_points_where_it_was_measured(tmp_path, capsys):
    logs = [write(tmp_path / f"{name}.txt", detr(scores)) for name, scores in (
        ("a", [0.1, 0.2, 0.3, 0.4]), ("b", [None, 0.205, None, 0.42]))]
    line, = plot(capsys, *logs, "--output", tmp_path / "x.png")
    assert line == ("b: leaves a by more than 1 point of AP at epoch 3 (42.00, not 40.00) and is outside at 1 of 2 "
                    "epochs, last at 3; at the end, epoch 3, it is +2.00")
    assert plot_log.read_log(logs[1]).columns["train_loss"] == {0: 9, 1: 9, 2: 9, 3: 9}


def test_a_cut_off_last_line_is_left_out_and_named(tmp_path, capsys):
    path = Path(write(tmp_path / "log.txt", deit([1, 2, 3])))
    path.write_text(path.read_text()[:-40])
    log = plot_log.read_log(path)
    assert log.columns["score"] == {0: 1, 1: 2}
    assert capsys.readouterr().err == f"note: line 3 of {path}, the last one, is cut off and left out\n"


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path, capsys):
    logs = [write(tmp_path / folder / "run.txt", deit([score])) for folder, score in (("a", 1), ("b", 2))]
    assert plot(capsys, *logs, logs[0], "--output", tmp_path / "x.png")[0].startswith(f"{logs[1]}: within")


def test_a_byte_order_mark_is_no_part_of_a_log(tmp_path):
    path = Path(write(tmp_path / "log.txt", deit([1, 2])))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert plot_log.read_log(path).columns["score"] == {0: 1, 1: 2}


def test_one_epoch_in_common_is_said_as_one(tmp_path, capsys):
    logs = [write(tmp_path / f"{name}.txt", deit([1])) for name in "ab"]
    assert "of a at the one epoch of both" in plot(capsys, *logs, "--output", tmp_path / "x.png")[0]


def test_epochs_that_are_not_finite_are_marked(tmp_path):
    log = plot_log.read_log(write(tmp_path / "a.txt", deit([1, float("nan"), 3, float("inf")])))
    marks, = [line for line in plot_log.draw([log], log, 1).axes[1].lines if line.get_marker() == "x"]
    assert list(marks.get_xdata()) == [1, 3]


def test_a_run_equal_to_the_reference_is_seen_and_no_two_runs_look_alike(tmp_path):
    logs = [plot_log.read_log(write(tmp_path / f"{number}.txt", deit([1, 2, 3]))) for number in range(13)]
    reference, *runs = plot_log.draw(logs, logs[0], 1).axes[1].lines
    assert all(reference.get_zorder() < run.get_zorder() and reference.get_linewidth() > 2 * run.get_linewidth()
               for run in runs)
    assert len({(run.get_color(), run.get_linestyle()) for run in runs}) == 12


def test_any_file_name_can_stand_in_the_legend(tmp_path):
    logs = [plot_log.read_log(write(tmp_path / name, deit([score]))) for name, score in (
        ("_a.txt", 1), ("$x_{$.txt", 2), ("c.txt", 3))]
    figure = plot_log.draw(logs, logs[0], 1)
    drawing.save(figure, tmp_path / "x.png")
    shown = [text.get_text().strip().replace("\\", "") for text in figure.legends[0].get_texts()]
    assert shown == ["_a (reference)", "$x_{$", "c"]


WHOLE = "".join(json.dumps(row) + "\n" for row in deit([1, 2]))


@pytest.mark.parametrize("content, words", [
    ("", "log.txt is empty"), ("\n\n", "empty"), ("hello\n", "line 1 of .*log.txt is not a JSON object"),
    (WHOLE[:20], "line 1 of"), (WHOLE[:-60] + "\n" + WHOLE, "line 2 of .*log.txt is not a JSON object"),
    ("[1, 2]\n", "line 1 of .* has no epoch"), ('{"epoch": -1}\n', "no epoch"), ('{"epoch": "3"}\n', "no epoch"),
    ('{"epoch": 0, "loss": 1}\n', "no log of DeiT or DETR"), ('{"epoch": 4, "test_acc1": "high"}\n', "epoch 4.*'high'"),
    ('{"epoch": 4, "test_acc1": true}\n', "epoch 4.*True"), ('{"epoch": 4, "test_acc1": "5"}\n', "epoch 4.*'5'"),
    ('{"epoch": 4, "test_acc1": %s}\n' % ("9" * 400), "epoch 4.*not a number"),
    ('{"epoch": 4, "test_acc1": -1e308}\n', "epoch 4.*not a number"), ("[" * 100000, "line 1 of"),
    ('{"epoch": %s, "test_acc1": 1}\n' % ("9" * 400), "no epoch"),
    ('{"epoch": 4, "test_coco_eval_bbox": []}\n', r"epoch 4.*\[\]"), (b"\xff\xfe\x00\x80", "no text")])
def test_what_is_no_log_is_refused_in_a_sentence(tmp_path, content, words):
    path = tmp_path / "log.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=words):
        plot_log.read_log(path)


@pytest.mark.parametrize("flags, words", [
    (["detr.txt"], "deit.txt is a log of DeiT and .*detr.txt is not"), (["none.txt"], "none.txt cannot be read"),
    (["deit.txt", "--margin", "-1"], "--margin"), (["deit.txt", "--margin", "nan"], "--margin"),
    (["deit.txt", "--output", "x.pdf"], "x.pdf must be a .png"),
    (["deit.txt", "--output", "deit.txt/x.png"], "x.png cannot be written")])
def test_mistakes_are_one_sentence_and_draw_nothing(tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "deit.txt", deit([1]))
    write(tmp_path / "detr.txt", detr([0.1]))
    with pytest.raises(UserError, match=words):
        plot_log.main(plot_log.parser().parse_args(["deit.txt", *flags]))
    assert not list(tmp_path.glob("*.png"))


def test_without_matplotlib_a_sentence_says_what_to_install(tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    path = write(tmp_path / "log.txt", deit([1]))
    with pytest.raises(UserError, match="pip install matplotlib"):
        plot_log.main(plot_log.parser().parse_args([path]))


@pytest.mark.parametrize("name", ["plot_log.py", "drawing.py"])
def test_both_codebases_share_the_same_bytes(name):
    other = PROJECT.parent / "DETR-with-iRPE" / name
    if not other.is_file():
        pytest.skip("DETR's folder is not beside this one")
    assert (PROJECT / name).read_bytes() == other.read_bytes()


@pytest.mark.skipif(not OFFICIAL.is_dir(), reason="the released logs are not here")
def test_the_released_logs_are_read_whole(tmp_path, capsys):
    logs = sorted(OFFICIAL.glob("*.txt"))
    lines = plot(capsys, *logs, "--output", tmp_path / "x.png")
    assert len(lines) == len(logs) - 1 and all("of 300 epochs" in line for line in lines)
    assert (tmp_path / "x.png").stat().st_size > 10_000
    assert plot_log.read_log(OFFICIAL / "deit_small_patch16_224_ctx_product_50_shared_qkv.txt").columns["score"][299] \
        == pytest.approx(81.202, abs=1e-4)


