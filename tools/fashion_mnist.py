"""Write Fashion-MNIST as class folders that DeiT's main.py reads with --data-set FOLDER.

    python tools/fashion_mnist.py --source /usr/share/datasets/fashion-mnist --output_dir outputs/fashion

OUT/tune/train holds 13,000 of the 60,000 training pictures, as many of each class, and OUT/tune/val 2,000 others, on
which a recipe may be chosen; OUT/test/val holds the 10,000 held-out ones. Pictures of 28 pixels get a black edge of 2,
which the evaluation of main.py with --input-size 28 cuts off again. Nothing is downloaded: the four .gz files come
with Debian's package dataset-fashion-mnist, or from the data set's own page.
"""

import argparse
import gzip
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import FashionMNIST

sys.path.append(str(Path(__file__).resolve().parent.parent / "DeiT-with-iRPE"))
import runtime

CLASSES = [name.replace("/", "-or-").replace(" ", "-") for name in FashionMNIST.classes]
SIDE, EDGE, TRAIN, VAL, SEED = 28, 2, 1300, 200, 0  # pixels, twice; pictures of a class, twice; which they are


def read(source, name, header, *shape):
    """Bytes of a file after its header, as uint8 (N, *shape). Raises: UserError if it cannot be read."""
    try:
        values = np.frombuffer(gzip.decompress((source / name).read_bytes()), np.uint8, offset=header)
        return values.reshape(-1, *shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise runtime.UserError(
            f"{source / name} cannot be read ({error}): put the data set's four .gz files, of "
            "Debian's package dataset-fashion-mnist, into --source"
        ) from error


def write(pictures, numbers, folder):
    with runtime.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for number in numbers:
            Image.fromarray(pictures[number]).save(folder / f"{number:05}.png")


def main(args):
    random = np.random.default_rng(SEED)
    for prefix, parts in (("train", {"tune/val": VAL, "tune/train": TRAIN}), ("t10k", {"test/val": 1000})):
        pictures = read(args.source, f"{prefix}-images-idx3-ubyte.gz", 16, SIDE, SIDE)
        pictures = np.pad(pictures, ((0, 0), (EDGE, EDGE), (EDGE, EDGE)))
        labels = read(args.source, f"{prefix}-labels-idx1-ubyte.gz", 8)
        if len(labels) != len(pictures):
            raise runtime.UserError(
                f"--source {args.source} has {len(pictures)} pictures and {len(labels)} labels in "
                f"the files {prefix}-*.gz: fetch them again"
            )
        for label, name in enumerate(CLASSES):
            numbers = random.permutation(np.flatnonzero(labels == label))
            for part, count in parts.items():
                write(pictures, numbers[:count], args.output_dir / part / name)
                numbers = numbers[count:]


if __name__ == "__main__":
    parser = runtime.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, metavar="DIR", default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--output_dir", type=Path, metavar="OUT", default=Path("outputs", "fashion"))
    runtime.run(main, parser.parse_args())
