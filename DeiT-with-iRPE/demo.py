"""Train DeiT-tiny with iRPE on real handwritten digits, evaluate the checkpoint, and draw the curves.

    python demo.py --output_dir DIR      (about 5 minutes on 2 cores)

The 1,797 digits of 8×8 pixels come with scikit-learn. They are written to DIR/digits as class folders, which main.py
reads like any other data set. Every fifth image is held out for validation.
"""

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

MODEL = "deit_tiny_patch16_224_ctx_product_50_shared_k"
PLOT_LOG = Path(__file__).resolve().parent.parent / "tools" / "plot_log.py"
LAST_LINE = re.compile(r"\* Acc@1 (\S+) Acc@5 (\S+) loss (\S+)")


def write_digits(folder: Path) -> None:
    """Write train/ and val/ with ten class folders of PNG files each."""
    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = Path(folder, "train" if number % 5 else "val", str(label), f"{number:04}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).astype("uint8")).save(path)


def run_main(flags: list[str]) -> tuple[str, ...]:
    """Run main.py with the flags and print its output; returns its last top-1, top-5 and loss as printed."""
    command = [sys.executable, "main.py", *flags]
    print(f"$ {shlex.join(['python', *command[1:]])}", flush=True)
    with subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True) as process:
        results = None
        for line in process.stdout:
            print(line, end="", flush=True)
            results = LAST_LINE.search(line) or results
    if process.returncode or not results:
        sys.exit(process.returncode or "main.py printed no result")
    return results.groups()


def main(args: argparse.Namespace) -> None:
    """Train, evaluate and draw; exits with an error if the results disagree or are below `args.least_top1`."""
    out = Path(args.output_dir).resolve()
    write_digits(out / "digits")
    (out / "log.txt").unlink(missing_ok=True)  # left by an earlier demo
    common = [
        "--model",
        MODEL,
        "--data-set",
        "FOLDER",
        "--data-path",
        str(out / "digits"),
        "--input-size",
        "48",
        "--batch-size",
        "32",
        "--device",
        "cpu",
        "--num_workers",
        "0",
    ]
    trained = run_main(
        [
            *common,
            "--output_dir",
            str(out),
            "--epochs",
            str(args.epochs),
            "--lr",
            "1e-2",
            "--warmup-epochs",
            "2",
            "--clip-grad",
            "1",
            "--drop-path",
            "0",
            "--hflip",
            "0",
            "--min-crop",
            "0.8",
            "--color-jitter",
            "0",
            "--aa",
            "none",
            "--no-repeated-aug",
            "--mixup",
            "0",
            "--cutmix",
            "0",
            "--reprob",
            "0",
            "--no-model-ema",
        ]
    )
    evaluated = run_main([*common, "--eval", "--resume", str(out / "checkpoint.pth")])
    subprocess.run([sys.executable, PLOT_LOG, out / "log.txt", "--output", out / "curve.png"], check=True)
    print(f"top-1 {trained[0]} % after training, {evaluated[0]} % from the checkpoint; curves in {out / 'curve.png'}")
    if trained != evaluated:
        sys.exit("error: the evaluation of the checkpoint differs from what training printed")
    if float(evaluated[0]) < args.least_top1:
        sys.exit(f"error: top-1 {evaluated[0]} % is below {args.least_top1} %")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="../outputs/demo")
    parser.add_argument("--epochs", type=int, default=36)
    parser.add_argument("--least-top1", type=float, default=93.0, help="fail below this accuracy (%%)")
    main(parser.parse_args())
