"""Write Fashion-MNIST as class folders that DeiT's main.py reads with --data-set FOLDER.

    python tools/fashion_mnist.py --source /usr/share/datasets/fashion-mnist --output_dir outputs/fashion

OUT/tune/train contains 1,300 (or --train-images) of the 6,000 training images of each class, and OUT/tune/val contains
200 others of each class, for choosing a recipe. OUT/test/val contains the 10,000 test images. Images to evaluate get a
black border of 2 pixels, because main.py with --input-size 28 resizes images to 32 pixels when it evaluates, and crops
2 pixels from each side. With --min-crop 1, training then sees images as large as evaluation does.
Nothing is downloaded: the four .gz files come with Debian's package dataset-fashion-mnist, or from the data set's page.
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
SIDE, BORDER = 28, 2  # pixels
CLASS_IMAGES = 6000  # training images of each class
TRAIN, VAL, TEST = 1300, 200, 1000  # images of each class in the three folders
SEED = 0  # selects the images


def read(source: Path, name: str, header: int, *shape: int) -> np.ndarray:
    """Read the data of a .gz file after a header of `header` bytes, uint8 (N, *shape).

    Raises: UserError if the file cannot be read.
    """
    try:
        values = np.frombuffer(gzip.decompress((source / name).read_bytes()), np.uint8, offset=header)
        return values.reshape(-1, *shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise runtime.UserError(
            f"{source / name} cannot be read ({error}): --source must hold the data set's four .gz files, for example "
            "those of Debian's package dataset-fashion-mnist"
        ) from error


def write(images: np.ndarray, numbers: np.ndarray, folder: Path) -> None:
    """Write the images with these indices in `images` (N, H, W) to a folder, as INDEX.png."""
    with runtime.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for number in numbers:
            Image.fromarray(images[number]).save(folder / f"{number:05}.png")


def main(args: argparse.Namespace) -> None:
    """Write the three folders."""
    if not 1 <= args.train_images <= CLASS_IMAGES - VAL:
        raise runtime.UserError(
            f"--train-images {args.train_images} must be from 1 to {CLASS_IMAGES - VAL}: the data set has "
            f"{CLASS_IMAGES} training images of each class, of which {VAL} are for choosing a recipe"
        )
    random = np.random.default_rng(SEED)
    for prefix, parts in (("train", {"tune/val": VAL, "tune/train": args.train_images}), ("t10k", {"test/val": TEST})):
        images = read(args.source, f"{prefix}-images-idx3-ubyte.gz", 16, SIDE, SIDE)
        bordered = np.pad(images, ((0, 0), (BORDER, BORDER), (BORDER, BORDER)))
        labels = read(args.source, f"{prefix}-labels-idx1-ubyte.gz", 8)
        if len(labels) != len(images):
            raise runtime.UserError(
                f"--source {args.source} has {len(images)} images and {len(labels)} labels in the files "
                f"{prefix}-*.gz: download them again"
            )
        for label, name in enumerate(CLASSES):
            numbers = random.permutation(np.flatnonzero(labels == label))
            for part, count in parts.items():
                written = images if part == "tune/train" else bordered
                write(written, numbers[:count], args.output_dir / part / name)
                numbers = numbers[count:]


if __name__ == "__main__":
    parser = runtime.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, metavar="DIR", default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--output_dir", type=Path, metavar="OUT", default=Path("outputs", "fashion"))
    parser.add_argument("--train-images", type=int, metavar="N", default=TRAIN, help="images of each class to train on")
    runtime.run(main, parser.parse_args())
