"""Convert the masks of COCO's annotations, which come in three formats, to compressed RLE."""

from typing import Any

from pycocotools import mask as rle_tools

from util.runtime import UserError

from .fields import is_number

MAX_COORDINATE = 1e5  # pixels; pycocotools uses memory in proportion to the length of a polygon's edges


def to_rle(segmentation: Any, height: int, width: int, name: str) -> dict:
    """Convert a segmentation to compressed RLE.

    pycocotools may crash on invalid input, which it does not check, so this function checks everything.

    Args:
        segmentation: polygons, uncompressed RLE or compressed RLE.
        height, width: of the image in pixels.
        name: of the object, for messages.
    Returns: {"size": [height, width], "counts": bytes}.
    Raises: UserError that names the object, for any other segmentation.
    """
    if isinstance(segmentation, dict) and segmentation:
        return _check_rle(segmentation, height, width, name)
    if not (isinstance(segmentation, list) and segmentation):
        raise UserError(f"{name} has the segmentation {segmentation!r}; --masks needs polygons or RLE of every object")
    for polygon in segmentation:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise UserError(
                f"{name} has the polygon {polygon} in its segmentation, which must be a list of polygons, "
                "each of three points or more, as [[x, y, x, y, x, y, ...], ...]"
            )
        if not all(is_number(x) and abs(x) < MAX_COORDINATE for x in polygon):
            raise UserError(f"{name} has the polygon {polygon}; coordinates must be pixels in the image")
    return rle_tools.merge(rle_tools.frPyObjects(segmentation, height, width))


def _check_rle(rle: dict, height: int, width: int, name: str) -> dict:
    """Compressed RLE from compressed or uncompressed RLE, whose counts must cover the image exactly."""
    if rle.get("size") != [height, width]:
        raise UserError(
            f"{name} has RLE of size {rle.get('size')}, but its image is of size {[height, width]} (height, width)"
        )
    pixels = height * width
    counts = rle.get("counts")
    try:
        run_lengths = _whole_numbers(counts) if isinstance(counts, list) else _decompress(counts)
    except ValueError as error:
        raise UserError(
            f"{name} has RLE that cannot be decoded ({error}): its counts must add up to {pixels}, the "
            "pixels of its image"
        ) from error
    if min(run_lengths, default=0) < 0 or sum(run_lengths) != pixels:
        raise UserError(
            f"{name} has RLE whose counts add up to {sum(run_lengths)}: they must be at least 0 and add up to "
            f"{pixels}, the pixels of its image"
        )
    if isinstance(counts, list):
        return rle_tools.frPyObjects({"size": [height, width], "counts": run_lengths}, height, width)
    return {"size": [height, width], "counts": counts.encode()}


def _whole_numbers(counts: list) -> list[int]:
    """The counts of uncompressed RLE. Raises ValueError if one is not a whole number."""
    for count in counts:
        if not (is_number(count) and count == int(count)):
            raise ValueError(f"the count {count!r} is not a whole number")
    return [int(count) for count in counts]


def _decompress(counts: Any) -> list[int]:
    """The run lengths of compressed RLE.

    A number consists of one or more characters. The code of a character minus 48 has six bits: five bits of the number,
    starting with the lowest ones, and a bit that is set if more characters follow. From the fourth number on, each
    number is the difference from the run length two positions before.

    Raises: ValueError if `counts` is not such a string.
    """
    if not isinstance(counts, str):
        raise ValueError(f"its counts are {counts!r}, neither a list nor a string")
    run_lengths = []
    number = shift = 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"its counts contain the character {character!r}")
        number |= (bits & 0b011111) << shift
        shift += 5
        if bits & 0b100000:
            continue
        if bits & 0b010000:  # the sign bit of the last character
            number -= 1 << shift
        if len(run_lengths) >= 3:
            number += run_lengths[-2]
        run_lengths.append(number)
        number = shift = 0
    if shift:
        raise ValueError("its last count is incomplete")
    return run_lengths
