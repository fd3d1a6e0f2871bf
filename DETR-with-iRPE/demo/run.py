"""Train a small DETR with iRPE on images of handwritten digits, then a mask head on top of it. Evaluate both before and
after training, and draw their detections.

    python demo/run.py --output_dir DIR      (about 12 minutes on two cores)

The demo calls main.py and prints its flags. digits.py writes the data set to DIR/digits.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from digits import write_digits
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import main
import visualize
from util import runtime

# Training starts from random weights and takes minutes. The transformer is therefore small, and pre-norm, with which it
# learns from the first step on. Tokens of 16 × 16 pixels suffice for these images. There is no augmentation, since a
# mirrored digit is not a digit. Boxes are easier to learn here than classes, so their losses have a fifth of the
# weight that they have on COCO: with full weight (and half the backbone's learning rate), the classification accuracy
# was at chance after 500 steps, and about 75 % with this setting.
MODEL = """
    --backbone resnet18 --no_pretrained_backbone --last_stride 1 --short_side 64 --num_queries 5
    --hidden_dim 128 --nheads 4 --enc_layers 2 --dec_layers 2 --dim_feedforward 256 --pre_norm --dropout 0
    --enc_rpe2d rpe-2.0-product-ctx-1-k
    --bbox_loss_coef 1 --giou_loss_coef 0.4
""".split()
COMMON = [
    *MODEL,
    *"--dataset_file coco_panoptic --num_classes 11 --device cpu --num_workers 0 --eval_batch_size 16".split(),
]
TRAINING = "--batch_size 16 --no_augmentation".split()


def print_command(program: str, *flags: Any) -> list[str]:
    """Print the command line of a program, and return its flags as strings."""
    argv = [str(flag) for flag in flags]
    print(f"$ python {shlex.join([program, *argv])}", flush=True)
    return argv


def run_main(*flags: Any) -> dict[str, Any] | None:
    """Run main.py, and return its result: the metrics with --eval, otherwise None."""
    return main.main(main.get_args_parser().parse_args(print_command("main.py", *flags)))


def draw_curves(log: Path, before: dict[str, Any], file: Path) -> None:
    """Plot loss and box AP over the epochs.

    Args:
        log: log.txt of the training.
        before: the metrics before training.
        file: the PNG file to write.
    """
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    measured = [{"epoch": -1, **{f"test_{name}": value for name, value in before.items()}}]
    measured += [row for row in rows if "test_loss" in row]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, name, lines, label in (
        (left, "train_loss", rows, "training"),
        (left, "test_loss", measured, "held out"),
        (right, "test_AP", measured, "AP"),
        (right, "test_AP50", measured, "AP50"),
    ):
        axes.plot([row["epoch"] + 1 for row in lines], [row[name] for row in lines], label=label)
    for axes, label in ((left, "loss"), (right, "on held-out images")):
        axes.set(xlabel="epoch", ylabel=label, ylim=(0, None))
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


def run(args: argparse.Namespace) -> None:
    """Run the whole demo."""
    out = Path(args.output_dir).resolve()
    write_digits(out / "digits", args.train, args.val)
    for folder in (out, out / "masks"):
        (folder / "log.txt").unlink(missing_ok=True)  # of an earlier run
    digits = out / "digits"
    common = [*COMMON, "--coco_path", digits, "--coco_panoptic_path", digits]
    before = run_main(*common, "--eval")
    schedule = ["--epochs", args.epochs, "--lr_drop", max(1, args.epochs - 2), "--eval_every", args.eval_every]
    run_main(*common, *TRAINING, "--lr", 5e-4, "--lr_backbone", 1e-3, "--output_dir", out, *schedule)
    draw_curves(out / "log.txt", before, out / "curves.png")

    common += ["--masks", "--frozen_weights", out / "checkpoint.pth"]
    without_head = run_main(*common, "--eval")
    epochs = args.mask_epochs
    schedule = ["--epochs", epochs, "--lr_drop", max(1, epochs - 1), "--eval_every", epochs]
    run_main(*common, *TRAINING, "--lr", 1e-3, "--output_dir", out / "masks", *schedule)
    trained = out / "masks" / "checkpoint.pth"
    after = run_main(*common, "--eval", "--resume", trained)

    images = sorted((digits / "val2017").iterdir())[:6]
    drawings = out / "drawings"
    argv = print_command(
        "visualize.py", "--resume", trained, "--device", "cpu", "--output_dir", drawings, "--image", *images
    )
    visualize.main(visualize.parser().parse_args(argv), argv)
    for name, first, last in (
        ("AP of boxes", before["AP"], after["AP"]),
        ("AP50 of boxes", before["AP50"], after["AP50"]),
        ("AP of masks", without_head["coco_eval_masks"][0], after["coco_eval_masks"][0]),
        ("AP50 of masks", without_head["coco_eval_masks"][1], after["coco_eval_masks"][1]),
        ("panoptic quality", without_head["PQ_all"]["pq"], after["PQ_all"]["pq"]),
    ):
        print(f"{name} {first:.3f} before and {last:.3f} after training")
    print(f"curves in {out / 'curves.png'}, drawings in {drawings}")


if __name__ == "__main__":
    parser = runtime.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--epochs", type=int, default=7, help="number of epochs for the detector")
    parser.add_argument("--mask_epochs", type=int, default=4, help="number of epochs for the mask head")
    parser.add_argument("--eval_every", type=int, default=1, metavar="EPOCHS", help="evaluate every EPOCHS epochs")
    parser.add_argument("--train", type=int, default=4000, help="number of training images")
    parser.add_argument("--val", type=int, default=100, help="number of held-out images")
    runtime.run(run, parser.parse_args())
