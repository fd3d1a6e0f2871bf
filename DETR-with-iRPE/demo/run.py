"""Train a small DETR with iRPE on pictures of real digits, then a mask head on top of it; evaluate both before and
after, and draw what they find.

    python demo/run.py --output_dir DIR      (some 12 minutes on two cores)

Training is main.py with ordinary flags, which are shown; digits.py writes the set to DIR/digits.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

from digits import write_digits
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import main
import visualize
from util import runtime

# No weights to start from and little time: a small transformer (with norms first it learns from the first step on), a
# backbone that keeps 16 pixels a token, and pictures as they are, since a mirrored digit is another shape. Boxes are
# easy here and classes are not, so boxes weigh a fifth of what they do on COCO: at full weight (and half the backbone's
# rate) classes were still at chance after 500 steps, where this setting had three of four right.
MODEL = [
    "--backbone",
    "resnet18",
    "--no_pretrained_backbone",
    "--last_stride",
    "1",
    "--short_side",
    "64",
    "--hidden_dim",
    "128",
    "--nheads",
    "4",
    "--enc_layers",
    "2",
    "--dec_layers",
    "2",
    "--dim_feedforward",
    "256",
    "--num_queries",
    "5",
    "--pre_norm",
    "--dropout",
    "0",
    "--enc_rpe2d",
    "rpe-2.0-product-ctx-1-k",
    "--bbox_loss_coef",
    "1",
    "--giou_loss_coef",
    "0.4",
    "--num_classes",
    "11",
]
TRAINING = ["--batch_size", "16", "--no_augmentation"]


def shown(program, *flags):
    """The flags as strings; the command line that they make is printed."""
    argv = [str(flag) for flag in flags]
    print(f"$ python {shlex.join([program, *argv])}", flush=True)
    return argv


def detr(*flags):
    """What main.py returns: with --eval what it measured."""
    return main.main(main.get_args_parser().parse_args(shown("main.py", *flags)))


def draw_curves(log, before, picture):
    """Draw loss and AP of the boxes over the epochs of log.txt, from what was measured before the first one."""
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
    for axes, label in ((left, "loss"), (right, "on held-out pictures")):
        axes.set(xlabel="epoch", ylabel=label, ylim=(0, None))
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)


def run(args):
    out = Path(args.output_dir).resolve()
    write_digits(out / "digits", args.train, args.val)
    for folder in (out, out / "masks"):
        (folder / "log.txt").unlink(missing_ok=True)  # of an earlier demo
    common = [
        *MODEL,
        "--dataset_file",
        "coco_panoptic",
        "--coco_path",
        out / "digits",
        "--coco_panoptic_path",
        out / "digits",
        "--num_classes",
        11,
        "--device",
        "cpu",
        "--num_workers",
        0,
        "--eval_batch_size",
        16,
    ]
    before = detr(*common, "--eval")
    detr(
        *common,
        *TRAINING,
        "--lr",
        5e-4,
        "--lr_backbone",
        1e-3,
        "--output_dir",
        out,
        "--epochs",
        args.epochs,
        "--lr_drop",
        max(1, args.epochs - 2),
        "--eval_every",
        args.eval_every,
    )
    draw_curves(out / "log.txt", before, out / "curves.png")
    common += ["--masks", "--frozen_weights", out / "checkpoint.pth"]
    trained = out / "masks" / "checkpoint.pth"
    without_head = detr(*common, "--eval")
    detr(
        *common,
        *TRAINING,
        "--lr",
        1e-3,
        "--output_dir",
        out / "masks",
        "--epochs",
        args.mask_epochs,
        "--lr_drop",
        max(1, args.mask_epochs - 1),
        "--eval_every",
        args.mask_epochs,
    )
    after = detr(*common, "--eval", "--resume", trained)
    argv = shown(
        "visualize.py",
        "--resume",
        trained,
        "--device",
        "cpu",
        "--output_dir",
        out / "pictures",
        "--image",
        *sorted((out / "digits" / "val2017").iterdir())[:6],
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
    print(f"curves in {out / 'curves.png'}, what was found in {out / 'pictures'}")


if __name__ == "__main__":
    parser = runtime.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--epochs", type=int, default=7, help="of the detector")
    parser.add_argument("--mask_epochs", type=int, default=4, help="of the mask head")
    parser.add_argument("--eval_every", type=int, default=1, metavar="EPOCHS")
    parser.add_argument("--train", type=int, default=4000, help="training pictures")
    parser.add_argument("--val", type=int, default=100, help="held-out pictures")
    runtime.run(run, parser.parse_args())
