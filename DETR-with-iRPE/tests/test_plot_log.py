"""plot_log.py, which DeiT's folder shares and tests, on a log of DETR from this folder."""
import json

import plot_log
from conftest import finish, start


def test_a_log_of_detr_is_drawn_and_compared(tmp_path, capsys):
    for name, aps in (("paper", [0.1, 0.2, 0.3]), ("run", [0.1, 0.19, 0.25])):
        rows = [{"train_lr": 1e-4, "train_loss": 9.0, "train_loss_bbox": 0.1, "test_loss": 8.0,
                 "test_coco_eval_bbox": [ap] * 12, "epoch": epoch} for epoch, ap in enumerate(aps)]
        (tmp_path / f"{name}.txt").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot_log.main(plot_log.parser().parse_args([str(flag) for flag in (
        tmp_path / "run.txt", "--reference", tmp_path / "paper.txt", "--margin", 2, "--output", tmp_path / "x.png")]))
    assert "run: leaves paper by more than 2 points of AP at epoch 2 (25.00, not 30.00)" in capsys.readouterr().out
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_mistake_is_one_sentence_and_the_status_tells(tmp_path):
    (tmp_path / "log.txt").write_text("no log")
    returned, out, err = finish(start("plot_log.py", tmp_path / "log.txt"))
    assert (returned, out, err.count("\n")) == (1, "", 1) and err.startswith("error: line 1 of")
