"""Box geometry: torchvision's, under the names that DETR's users know."""

from torchvision.ops import box_convert, box_iou, generalized_box_iou

__all__ = ["box_cxcywh_to_xyxy", "box_iou", "box_xyxy_to_cxcywh", "generalized_box_iou"]


def box_cxcywh_to_xyxy(boxes):
    """Boxes (..., 4) as centre, width, height → as corners."""
    return box_convert(boxes, "cxcywh", "xyxy")


def box_xyxy_to_cxcywh(boxes):
    """Boxes (..., 4) as corners → as centre, width, height."""
    return box_convert(boxes, "xyxy", "cxcywh")
