"""Train a small DETR with iRPE on pictures of real digits, evaluate it before and after, and draw what it finds.

    python demo/run.py --output_dir DIR      (10 minutes on one core that others use too)

Training is main.py with ordinary flags; digits.py writes the set to DIR/digits.
"""
import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

from digits import write_digits
from matplotlib.figure import Figure

PROGRAM = Path(__file__).resolve().parent.parent
# No weights to start from and little time: a small transformer (with norms first it learns from the first step on), a
# backbone that keeps 16 pixels a token, and pictures as they are, since a mirrored digit is another shape. Boxes are
# easy here and classes are not, so boxes weigh a fifth of what they do on COCO: at full weight (and half the backbone's
# rate) classes were still at chance after 500 steps, where this setting had three of four right.
MODEL = ["--backbone", "resnet18", "--no_pretrained_backbone", "--last_stride", "1", "--short_side", "64",
         "--hidden_dim", "128", "--nheads", "4", "--enc_layers", "2", "--dec_layers", "2", "--dim_feedforward", "256",
         "--num_queries", "5", "--pre_norm", "--dropout", "0", "--enc_rpe2d", "rpe-2.0-product-ctx-1-k",
         "--bbox_loss_coef", "1", "--giou_loss_coef", "0.4"]
TRAINING = ["--lr", "5e-4", "--lr_backbone", "1e-3", "--batch_size", "16", "--no_augmentation"]
AP = re.compile(r"Average Precision .*IoU=(0.50:0.95|0.50 ).*area=\s+all.*= (\S+)")


def run_main(flags):
    """Run main.py with the flags, show what it prints, and return the last loss, AP and AP50 as strings."""
    command = [sys.executable, "main.py", *flags]
    print(f"$ {shlex.join(['python', *command[1:]])}", flush=True)
    found = {}
    with subprocess.Popen(command, cwd=PROGRAM, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            if loss := re.search(r"^Averaged stats: loss: \S+ \((\S+)\)", line):
                found["loss"] = loss[1]
            if precision := AP.search(line):
                found["AP" if ":" in precision[1] else "AP50"] = precision[2]
    if process.returncode or len(found) < 3:
        sys.exit(process.returncode or "main.py printed no result")
    return found


def draw_curves(log, before, picture):
    """Draw loss and AP over the epochs of log.txt, from what was measured before the first one."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    epochs = [row["epoch"] + 1 for row in rows]
    measured = [(row["epoch"] + 1, row) for row in rows if "test_loss" in row]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(epochs, [row["train_loss"] for row in rows], label="training")
    left.plot([0] + [epoch for epoch, _ in measured],
              [float(before["loss"])] + [row["test_loss"] for _, row in measured], label="held out")
    left.set(xlabel="epoch", ylabel="loss", ylim=(0, None))
    left.legend()
    for name, index in (("AP", 0), ("AP50", 1)):
        right.plot([0] + [epoch for epoch, _ in measured],
                   [float(before[name])] + [row["test_coco_eval_bbox"][index] for _, row in measured], label=name)
    right.set(xlabel="epoch", ylabel="on held-out pictures", ylim=(0, None))
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)


def main(args):
    out = Path(args.output_dir).resolve()
    write_digits(out / "digits", args.train, args.val)
    (out / "log.txt").unlink(missing_ok=True)  # of an earlier demo
    common = [*MODEL, "--coco_path", str(out / "digits"), "--device", "cpu", "--num_workers", "0"]
    before = run_main([*common, "--eval", "--eval_batch_size", "16"])
    run_main([*common, *TRAINING, "--output_dir", str(out), "--epochs", str(args.epochs),
              "--lr_drop", str(max(1, args.epochs - 2)), "--eval_every", str(args.eval_every)])
    after = run_main([*common, "--eval", "--eval_batch_size", "16", "--resume", str(out / "checkpoint.pth")])
    draw_curves(out / "log.txt", before, out / "curves.png")
    pictures = [str(out / "digits" / "val2017" / f"{number:06}.png") for number in range(min(6, args.val))]
    subprocess.run([sys.executable, "visualize.py", "--resume", str(out / "checkpoint.pth"), "--device", "cpu",
                    "--output_dir", str(out / "detections"), "--threshold", "0.5", "--image", *pictures],
                   cwd=PROGRAM, check=True)
    for name in before:
        print(f"{name} {before[name]} before and {after[name]} after training")
    print(f"curves in {out / 'curves.png'}, detections in {out / 'detections'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--eval_every", type=int, default=1, metavar="EPOCHS")
    parser.add_argument("--train", type=int, default=4000, help="training pictures")
    parser.add_argument("--val", type=int, default=100, help="held-out pictures")
    main(parser.parse_args())
