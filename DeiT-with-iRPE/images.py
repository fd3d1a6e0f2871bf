"""Pixels of image files as 8-bit RGB, and what a user should know about them.

The DeiT and the DETR codebase hold the same file.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch.utils.data import Dataset

# Pillow's modes with more than 8 bits per channel, and what they hold
DEEP_MODES = {
    "I;16": "16-bit integers",
    "I;16B": "16-bit integers",
    "I;16L": "16-bit integers",
    "I;16N": "16-bit integers",
    "I": "32-bit integers",
    "F": "floating-point numbers",
}
# Formats of which Pillow opens 16-bit greyscale as I (PNG only in older versions), always scaled to 0 … 65535
FORMATS_OF_16_BIT_I = ("PNG", "PPM")
BITS_PER_SAMPLE = 258  # tag of a TIFF
MAX_ASPECT = 100  # of the sides of an image that is made larger; one row of 5000 pixels would become gigabytes
SIDEWAYS, DARK = 1, 2  # bits of what `oddities` finds
NOTES = {
    SIDEWAYS: "have an EXIF orientation other than the one they are stored in; the stored pixels are used, as by "
    "torchvision, timm and COCO's tools: rotate the files if that is wrong",
    DARK: "have more than 8 bits per channel and only values so low that they are black once scaled to 8 bits: save "
    "them with 8 bits per channel, or stretch their values",
}


def to_rgb(image: Image.Image) -> Image.Image:
    """The stored pixels of an open image (of the first frame) as 8-bit RGB.

    Pillow converts what has 8 bits per channel, without transparency. Deeper greyscale keeps its highest 8 bits, so
    that 65535 becomes 255, exactly as Pillow itself reads 16-bit colour.

    Raises: ValueError with the mode, where its range of values is unknown or Pillow cannot convert it; whatever Pillow
        raises for damaged files.
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
    """Bits per channel of greyscale in one of DEEP_MODES."""
    if image.mode.startswith("I;16"):
        return image.tag_v2.get(BITS_PER_SAMPLE, (16,))[0] if image.format == "TIFF" else 16
    if image.mode == "I" and image.format in FORMATS_OF_16_BIT_I:
        return 16
    raise ValueError(
        f"its mode is {image.mode}, {DEEP_MODES[image.mode]} of an unknown range: save it with 8 or 16 bits per channel"
    )


def oddities(image: Image.Image) -> int:
    """What of NOTES is true of an image that `to_rgb` has taken, as the sum of their bits."""
    odd = SIDEWAYS if orientation(image) != 1 else 0
    if image.mode in DEEP_MODES and 0 < np.asarray(image).max() < 2 ** (_bits(image) - 8):
        odd |= DARK
    return odd


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an open image, from 1 (as stored) to 8; 1 if it has none that can be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "Corrupt EXIF data"
            value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises many kinds for damaged EXIF data, on which the pixels do not depend
        return 1
    return value if value in range(1, 9) else 1


def describe(error: Exception) -> str:
    """What an error that came up while an image was read or transformed says, in a few words."""
    if isinstance(error, UnidentifiedImageError):
        return "it is in no format that Pillow knows"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, (ValueError, Image.DecompressionBombError)):
        return str(error)
    return f"{type(error).__name__}: {error}"


class Oddities:
    """Which images of a data set are odd; loading processes write it, the training process reads it.

    Nothing is opened for it that is not opened anyway: reading the headers of all of COCO or ImageNet first would take
    minutes on a network disk.
    """

    def __init__(self, count: int) -> None:
        self._bits = torch.zeros(count, dtype=torch.uint8).share_memory_()
        self._told = False

    def add(self, index: int, bits: int) -> None:
        """Remember the bits of an image."""
        if bits:
            self._bits[index] = bits

    def tell(self, name: Callable[[int], str], gather: Callable[[Any], list[Any]]) -> list[str]:
        """A sentence for each kind that some process has met; only the first call returns any.

        Args:
            name: of an image, by its index.
            gather: collects a value of every process, which all have to call this.
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
    """`Oddities.tell` of a data set after the first pass over it; nothing for sets that keep none.

    The set calls an image by its `name`, or by its `place` if it tells that too.
    """
    dataset = getattr(dataset, "dataset", dataset)  # as it is inside a SeededDataset
    odd = getattr(dataset, "oddities", None)
    return odd.tell(getattr(dataset, "place", dataset.name), gather) if odd else []


def resized(height: int, width: int, short_side: int, max_size: int | None = None) -> tuple[int, int]:
    """Height and width after the short side became ``short_side``, or less if the long one would exceed ``max_size``.

    torchvision's rule, but no side is less than a pixel.
    """
    short, long = sorted((height, width))
    new_short, new_long = short_side, int(short_side * long / short)
    if max_size is not None and new_long > max_size:
        new_short, new_long = max(1, int(max_size * new_short / new_long)), max_size
    return (new_long, new_short) if height > width else (new_short, new_long)


def without_ends(image: Image.Image) -> Image.Image:
    """The middle of an image that is longer than MAX_ASPECT times its short side; other images as they are."""
    longest = MAX_ASPECT * min(image.size)
    width, height = (min(side, longest) for side in image.size)
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
