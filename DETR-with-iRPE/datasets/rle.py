"""COCO's ways to write a mask, all read as one."""

import contextlib

from pycocotools import mask as rle_tools

from util.runtime import UserError

from .fields import is_number


def to_rle(segmentation, height, width, name):
    """Polygons, uncompressed or compressed RLE of an image → compressed RLE, {"size": [h, w], "counts": bytes}.

    Raises: UserError with the name for anything else; pycocotools has no check of its own, and breaks.
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
        # the memory that drawing takes grows with the length of the lines
        if not all(is_number(x) and -1e5 < x < 1e5 for x in polygon):
            raise UserError(f"{name} has the polygon {polygon}; coordinates must be pixels in the image")
    return rle_tools.merge(rle_tools.frPyObjects(segmentation, height, width))


def _check_rle(rle, height, width, name):
    if rle.get("size") != [height, width]:
        raise UserError(
            f"{name} has RLE of the size {rle.get('size')}, but its image is {[height, width]}: height, width"
        )
    pixels = height * width
    try:
        if isinstance(rle.get("counts"), list):
            rle = rle_tools.frPyObjects(rle, height, width)
        rle_tools.decode(rle)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{name} has RLE that cannot be decoded ({error}): its counts must add up to {pixels}, the "
            "pixels of its image"
        ) from error
    # counts that end early leave pixels as memory was, without an error; those that do not are too many for one less
    with contextlib.suppress(ValueError):
        rle_tools.decode({**rle, "size": [pixels - 1, 1]})
        raise UserError(f"{name} has RLE whose counts end early: they must add up to {pixels}, the pixels of its image")
    return rle
