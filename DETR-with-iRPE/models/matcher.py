"""One-to-one matching of predictions and objects (DETR, Eq. 1)."""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from util.box_ops import box_cxcywh_to_xyxy, generalized_box_iou


class HungarianMatcher(nn.Module):
    """The cheapest assignment under cost_class · (−probability) + cost_bbox · L1 + cost_giou · (−GIoU).

    Boxes are normalised (cx, cy, w, h); targets are dicts with `labels` (n,) and `boxes` (n, 4).
    """

    def __init__(self, cost_class=1.0, cost_bbox=1.0, cost_giou=1.0):
        super().__init__()
        self.cost_class, self.cost_bbox, self.cost_giou = cost_class, cost_bbox, cost_giou

    def forward(self, outputs, targets):
        """Match one set of predictions.

        Args:
            outputs: dict with `pred_logits` (B, Q, K + 1) and `pred_boxes` (B, Q, 4).
        Returns: for each picture (queries, objects), two int64 tensors of length min(Q, n), queries ascending.
        """
        _, picture, query, obj = self.match_layers(outputs["pred_logits"][None], outputs["pred_boxes"][None], targets)
        starts = np.cumsum([0] + [len(t["labels"]) for t in targets])
        return [(query[picture == i], obj[picture == i] - int(starts[i])) for i in range(len(targets))]

    @torch.no_grad()
    def match_layers(self, logits, boxes, targets):
        """Match the predictions of several decoder layers at once, with one copy from the device.

        Args:
            logits, boxes: (layers, B, Q, K + 1) and (layers, B, Q, 4).
        Returns: int64 tensor (4, N) on the CPU, sorted by layer and picture: layer, picture, query, and object
            counted over the whole batch. Each layer has the same number of matches.
        """
        sizes = [len(t["labels"]) for t in targets]
        # A loss that is not finite is reported by the training loop, on all processes at once, so it has to get there
        cost = np.nan_to_num(self._cost(logits, boxes, targets).cpu().numpy(), nan=1e9, posinf=1e9, neginf=-1e9)
        starts = np.cumsum([0] + sizes)
        columns = [np.empty((4, 0), dtype=np.int64)]
        for layer, picture in np.ndindex(cost.shape[:2]):
            query, obj = linear_sum_assignment(cost[layer, picture, :, starts[picture] : starts[picture + 1]])
            columns.append(
                np.stack([np.full_like(query, layer), np.full_like(query, picture), query, obj + starts[picture]])
            )
        return torch.from_numpy(np.concatenate(columns, axis=1))

    def _cost(self, logits, boxes, targets):
        """(layers, B, Q, all objects of the batch)"""
        labels, wanted = (torch.cat([t[name] for t in targets]) for name in ("labels", "boxes"))
        probability = logits.float().softmax(-1).flatten(0, 2)
        boxes = boxes.float()
        flat = boxes.flatten(0, 2)
        cost = self.cost_bbox * torch.cdist(flat, wanted, p=1) - self.cost_class * probability[:, labels]
        cost -= self.cost_giou * generalized_box_iou(box_cxcywh_to_xyxy(flat), box_cxcywh_to_xyxy(wanted))
        return cost.view(*boxes.shape[:3], len(labels))
