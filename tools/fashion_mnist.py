"""Write Fashion-MNIST as class folders that DeiT's main.py reads with --data-set FOLDER.

    python tools/fashion_mnist.py --source /usr/share/datasets/fashion-mnist --output_dir outputs/fashion

OUT/tune/train holds 55,000 of the 60,000 training pictures and OUT/tune/val the other 5,000, 500 of a class, on which
a recipe may be chosen; OUT/test/val holds the 10,000 held-out ones. Nothing is downloaded: the four .gz files come
with Debian's package dataset-fashion-mnist, or from the data set's own page.
"""
import argparse
import gzip
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import FashionMNIST

sys.path.append(str(Path(__file__).resolve().parent.parent / "DeiT-with-iRPE"))
import runtime

CLASSES = [name.replace("/", "-or-").replace(" ", "-") for name in FashionMNIST.classes]
SIDE, KEPT_ASIDE, SEED = 28, 500, 0  # pixels; pictures of a class; of which these are


def read(source, name, header):
    """Bytes of a file after its header, as uint8. Raises: UserError if it cannot be read."""
    try:
        return np.frombuffer(gzip.decompress((source / name).read_bytes()), np.uint8, offset=header)
    except (OSError, EOFError, ValueError) as error:
        raise runtime.UserError(f"{source / name} cannot be read ({error}): put the data set's four .gz files, of "
                                "Debian's package dataset-fashion-mnist, into --source") from error


def write(pictures, numbers, folder):
    with runtime.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for number in numbers:
            Image.fromarray(pictures[number]).save(folder / f"{number:05}.png")


def main(args):
    random = np.random.default_rng(SEED)
    for prefix, kept_aside, place in (("train", KEPT_ASIDE, "tune/train"), ("t10k", 0, "test/val")):
        pictures = read(args.source, f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, SIDE, SIDE)
        labels = read(args.source, f"{prefix}-labels-idx1-ubyte.gz", 8)
        for label, name in enumerate(CLASSES):
            numbers = random.permutation(np.flatnonzero(labels == label))
            write(pictures, numbers[kept_aside:], args.output_dir / place / name)
            if kept_aside:
                write(pictures, numbers[:kept_aside], args.output_dir / "tune/val" / name)
        print(f"{len(labels)} pictures of {prefix} are in {args.output_dir}", flush=True)


if __name__ == "__main__":
    parser = runtime.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, metavar="DIR", default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--output_dir", type=Path, metavar="OUT", default=Path("outputs", "fashion"))
    runtime.run(main, parser.parse_args())
