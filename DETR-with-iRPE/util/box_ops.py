"""Box geometry: torchvision's functions under the names that DETR's users know."""

import torch
from torchvision.ops import box_convert, box_iou, generalized_box_iou

__all__ = ["box_cxcywh_to_xyxy", "box_iou", "box_xyxy_to_cxcywh", "generalized_box_iou"]


def box_cxcywh_to_xyxy(boxes: torch.Tensor) -> torch.Tensor:
    """Convert boxes (..., 4) from (centre x, centre y, width, height) to corners (x1, y1, x2, y2)."""
    return box_convert(boxes, "cxcywh", "xyxy")


def box_xyxy_to_cxcywh(boxes: torch.Tensor) -> torch.Tensor:
    """Convert boxes (..., 4) from corners (x1, y1, x2, y2) to (centre x, centre y, width, height)."""
    return box_convert(boxes, "xyxy", "cxcywh")
