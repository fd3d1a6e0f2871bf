"""COCO's ways to write a mask, all read as one."""
from pycocotools import mask as rle_tools

from util.runtime import UserError


def to_rle(segmentation, height, width, name):
    """Polygons, uncompressed or compressed RLE of a picture → compressed RLE, {"size": [h, w], "counts": bytes}.

    Raises: UserError with the name for anything else; pycocotools has no check of its own, and breaks.
    """
    if isinstance(segmentation, dict):
        return _check_rle(segmentation, height, width, name)
    if not (isinstance(segmentation, list) and segmentation):
        raise UserError(f"{name} has the segmentation {segmentation!r}; --masks needs polygons or RLE of every object")
    for polygon in segmentation:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise UserError(f"{name} has the polygon {polygon}; it must be three points or more, as x, y, x, y, ...")
        # the memory that drawing takes grows with the length of the lines
        if not all(isinstance(x, (int, float)) and -1e5 < x < 1e5 for x in polygon):
            raise UserError(f"{name} has the polygon {polygon}; coordinates must be pixels in the picture")
    return rle_tools.merge(rle_tools.frPyObjects(segmentation, height, width))


def _check_rle(rle, height, width, name):
    if rle.get("size") != [height, width]:
        raise UserError(f"{name} has RLE of the size {rle.get('size')}, but its picture is {[height, width]}: "
                        "height, width")
    counts = rle.get("counts")
    try:
        if isinstance(counts, list):
            if min(counts, default=0) < 0 or sum(counts) != height * width:
                raise ValueError(f"the counts must add up to {height * width}")
            rle = rle_tools.frPyObjects(rle, height, width)
        rle_tools.decode(rle)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{name} has RLE that cannot be decoded: {error}") from error
    return rle
