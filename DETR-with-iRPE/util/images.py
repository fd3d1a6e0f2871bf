"""Read image files as 8-bit RGB, and tell users about images that need their attention.

Both codebases contain the same copy of this file.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch.utils.data import Dataset

if __package__:  # in DETR, this file is in the package `util`; in DeiT, it is next to main.py
    from .runtime import UserError
else:
    from runtime import UserError

# Pillow's modes with more than 8 bits per channel, and what their pixels are.
DEEP_MODES = {
    "I;16": "16-bit integers",
    "I;16B": "16-bit integers",
    "I;16L": "16-bit integers",
    "I;16N": "16-bit integers",
    "I": "32-bit integers",
    "F": "floating-point numbers",
}
# Pillow opens 16-bit greyscale of these formats in mode I (PNG only in older versions), always scaled to 0 … 65535.
FORMATS_OF_16_BIT_I = ("PNG", "PPM")
BITS_PER_SAMPLE = 258  # tag of a TIFF file
MAX_ASPECT = 100  # longest to shortest side of an image to enlarge; a single row of 5000 pixels would need gigabytes
EXIF_ORIENTED, DARK = 1, 2  # the flags that `oddities` returns
NOTES = {
    EXIF_ORIENTED: "have an EXIF tag that tells viewers to rotate or mirror them; it is ignored, as in torchvision, "
    "timm and COCO's tools: rotate the files if that is wrong",
    DARK: "have more than 8 bits per channel and only values so low that they are black once scaled to 8 bits: save "
    "them with 8 bits per channel, or stretch their values",
}


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an open image (its first frame) to 8-bit RGB, with the pixels in the order in which they are stored.

    Pillow converts images with 8 bits per channel and drops transparency. Greyscale images with more bits keep their
    highest 8 bits, so that 65535 becomes 255, exactly as Pillow itself reads 16-bit colour images.

    Raises: ValueError that states the mode if its range of values is unknown or Pillow cannot convert it; any error
        that Pillow raises for damaged files.
    """
    image.load()
    mode = image.mode
    if mode in DEEP_MODES:
        image = Image.fromarray((np.asarray(image) >> (_bits(image) - 8)).astype(np.uint8))
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"Pillow cannot convert its mode {mode} to RGB ({error})") from error


def _bits(image: Image.Image) -> int:
    """Bits per channel of a greyscale image in one of DEEP_MODES."""
    if image.mode.startswith("I;16"):
        return image.tag_v2.get(BITS_PER_SAMPLE, (16,))[0] if image.format == "TIFF" else 16
    if image.mode == "I" and image.format in FORMATS_OF_16_BIT_I:
        return 16
    raise ValueError(
        f"its mode is {image.mode}, {DEEP_MODES[image.mode]} of an unknown range: save it with 8 or 16 bits per channel"
    )


def oddities(image: Image.Image) -> int:
    """The flags of NOTES that apply to an image, combined with `|`; `to_rgb` must have accepted the image."""
    odd = EXIF_ORIENTED if orientation(image) != 1 else 0
    if image.mode in DEEP_MODES and 0 < np.asarray(image).max() < 2 ** (_bits(image) - 8):
        odd |= DARK
    return odd


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an open image, from 1 (as stored) to 8; 1 if it is missing or unreadable."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "Corrupt EXIF data"
            value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises many types for damaged EXIF data, which does not affect the pixels
        return 1
    return value if value in range(1, 9) else 1


def describe(error: Exception) -> str:
    """A short description of an error that occurred while an image was read or transformed."""
    if isinstance(error, UnidentifiedImageError):
        return "it is in no format that Pillow knows"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, (ValueError, Image.DecompressionBombError)):
        return str(error)
    return f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def naming(name: str, action: str = "read") -> Iterator[None]:
    """Convert any error inside the block to a ``UserError`` that names the image.

    Args:
        name: of the image, usually its path.
        action: what the block does to the image, as a past participle.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # decoders and transforms raise many types, and no message says which image it was
        raise UserError(f"image {name} cannot be {action}: {describe(error)}") from error


class Oddities:
    """Records which images of a data set are odd. Loader workers write it and the training process reads it.

    It learns only from images that are loaded anyway: reading the headers of all of COCO or ImageNet beforehand would
    take minutes on a network disk.
    """

    def __init__(self, count: int) -> None:
        self._bits = torch.zeros(count, dtype=torch.uint8).share_memory_()
        self._told = False

    def add(self, index: int, bits: int) -> None:
        """Record the flags of an image (see `oddities`)."""
        if bits:
            self._bits[index] = bits

    def tell(self, name: Callable[[int], str], gather: Callable[[Any], list[Any]]) -> list[str]:
        """One sentence for each kind of oddity that any rank has found; later calls return no sentence.

        Args:
            name: returns the name of the image with an index.
            gather: collects one value from every rank, so all ranks must call this method.
        """
        if self._told:
            return []
        self._told = True
        found = {
            index: bits
            for odd in gather({i: self._bits[i].item() for i in self._bits.nonzero()[:, 0].tolist()})
            for index, bits in odd.items()
        }
        sentences = []
        for bit, words in NOTES.items():
            if indices := sorted(index for index, bits in found.items() if bits & bit):
                sentences.append(f"note: {len(indices)} of the images read so far, such as {name(indices[0])}, {words}")
        return sentences


def notes_on(dataset: Dataset, gather: Callable[[Any], list[Any]]) -> list[str]:
    """The sentences of `Oddities.tell` after the first pass over a data set; none if it does not record oddities.

    The sentences use the data set's `place(index)` if it has that method, otherwise its `name(index)`.
    """
    dataset = getattr(dataset, "dataset", dataset)  # a SeededDataset wraps the data set
    odd = getattr(dataset, "oddities", None)
    return odd.tell(getattr(dataset, "place", dataset.name), gather) if odd else []


def resized_size(height: int, width: int, short_side: int, max_size: int | None = None) -> tuple[int, int]:
    """(height, width) after scaling the short side to ``short_side``, or to less if the long side exceeds ``max_size``.

    This is torchvision's rule, except that no side becomes shorter than one pixel.
    """
    short, long = sorted((height, width))
    new_short, new_long = short_side, int(short_side * long / short)
    if max_size is not None and new_long > max_size:
        new_short, new_long = max(1, int(max_size * new_short / new_long)), max_size
    return (new_long, new_short) if height > width else (new_short, new_long)


def without_ends(image: Image.Image) -> Image.Image:
    """Crop an image longer than MAX_ASPECT times its short side to its middle; return other images unchanged."""
    longest = MAX_ASPECT * min(image.size)
    width, height = (min(side, longest) for side in image.size)
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
