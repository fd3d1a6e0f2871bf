"""One-to-one matching of predictions and objects (DETR, Eq. 1)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from util.box_ops import box_cxcywh_to_xyxy, generalized_box_iou


class Matches(NamedTuple):
    """Pairs of a prediction and an object, sorted by layer and image. Every layer has the same number of pairs.

    Each field is an int64 tensor (N,). Pair i matches the prediction `[layer[i], image[i], query[i]]` with the object
    `object[i]`, which is an index into the concatenated objects of all images of the batch.
    """

    layer: torch.Tensor
    image: torch.Tensor
    query: torch.Tensor
    object: torch.Tensor

    def of_last_layer(self, num_layers: int) -> "Matches":
        """The pairs of the last of `num_layers` layers."""
        return Matches(*(field.view(num_layers, -1)[-1] for field in self))

    def to(self, device: torch.device) -> "Matches":
        """Copy all fields to a device in a single transfer."""
        return Matches(*torch.stack(self).to(device, non_blocking=True))


class HungarianMatcher(nn.Module):
    """Finds the assignment that minimises cost_class · (−probability) + cost_bbox · L1 + cost_giou · (−GIoU).

    Boxes are normalised (cx, cy, w, h). Targets are dicts with `labels` (n,) and `boxes` (n, 4), one for each image.

    Args:
        cost_class, cost_bbox, cost_giou: weights of the three costs.
    """

    def __init__(self, cost_class: float = 1.0, cost_bbox: float = 1.0, cost_giou: float = 1.0) -> None:
        super().__init__()
        self.cost_class = cost_class
        self.cost_bbox = cost_bbox
        self.cost_giou = cost_giou

    def forward(
        self, outputs: dict[str, torch.Tensor], targets: Sequence[dict[str, torch.Tensor]]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Match the predictions of one decoder layer.

        Args:
            outputs: dict with `pred_logits` (B, Q, K + 1) and `pred_boxes` (B, Q, 4).
            targets: see the class.
        Returns: for each image (queries, objects), two int64 tensors of length min(Q, n) with ascending queries.
        """
        matches = self.match_layers(outputs["pred_logits"][None], outputs["pred_boxes"][None], targets)
        first_object = np.cumsum([0] + [len(t["labels"]) for t in targets])
        pairs = []
        for image in range(len(targets)):
            in_image = matches.image == image
            pairs.append((matches.query[in_image], matches.object[in_image] - int(first_object[image])))
        return pairs

    @torch.no_grad()
    def match_layers(
        self, logits: torch.Tensor, boxes: torch.Tensor, targets: Sequence[dict[str, torch.Tensor]]
    ) -> Matches:
        """Match the predictions of several decoder layers at once, with a single copy from device to host.

        Args:
            logits: (layers, B, Q, K + 1).
            boxes: (layers, B, Q, 4).
            targets: see the class.
        Returns: the matches, on the CPU.
        """
        # SciPy rejects costs that are not finite. Replace them, because the training loop reports a loss that is not
        # finite on all ranks at once.
        cost = np.nan_to_num(self._cost(logits, boxes, targets).cpu().numpy(), nan=1e9, posinf=1e9, neginf=-1e9)
        first_object = np.cumsum([0] + [len(t["labels"]) for t in targets])
        columns = [np.empty((4, 0), dtype=np.int64)]
        for layer, image in np.ndindex(cost.shape[:2]):
            objects = slice(first_object[image], first_object[image + 1])
            query, matched = linear_sum_assignment(cost[layer, image, :, objects])
            columns.append(
                np.stack([np.full_like(query, layer), np.full_like(query, image), query, matched + first_object[image]])
            )
        return Matches(*torch.from_numpy(np.concatenate(columns, axis=1)))

    def _cost(
        self, logits: torch.Tensor, boxes: torch.Tensor, targets: Sequence[dict[str, torch.Tensor]]
    ) -> torch.Tensor:
        """The cost of every prediction and every object of the batch: (layers, B, Q, objects)."""
        labels = torch.cat([t["labels"] for t in targets])
        true_boxes = torch.cat([t["boxes"] for t in targets])
        probability = logits.float().softmax(-1).flatten(0, 2)
        boxes = boxes.float()
        flat = boxes.flatten(0, 2)
        cost = self.cost_bbox * torch.cdist(flat, true_boxes, p=1) - self.cost_class * probability[:, labels]
        cost -= self.cost_giou * generalized_box_iou(box_cxcywh_to_xyxy(flat), box_cxcywh_to_xyxy(true_boxes))
        return cost.view(*boxes.shape[:3], len(labels))
