"""COCO's twelve numbers for boxes, through pycocotools."""
import contextlib
import io

import numpy as np
import torch.distributed as dist
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from util.runtime import get_world_size, is_main_process


class CocoEvaluator:
    """Collects detections, each picture's once, and measures them against the ground truth.

    Args:
        ground_truth: pycocotools.COCO of all pictures to count, with or without objects.
    """

    def __init__(self, ground_truth):
        self.ground_truth = ground_truth
        self.rows = []

    def update(self, predictions):
        """Add detections: picture id → dict of `boxes` (n, 4) as corners in pixels, `scores`, `labels` (n,)."""
        for image_id, found in predictions.items():
            boxes, scores, labels = (found[name].double().cpu().numpy() for name in ("boxes", "scores", "labels"))
            corner, size = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
            self.rows.append(np.column_stack([np.full_like(scores, image_id), corner, size, scores, labels]))

    def summarize(self):
        """Gather all processes' detections once; the main process measures them and prints the table.

        Returns: COCOeval with `stats` (the twelve numbers) and `eval` on the main process, None on the others.
        """
        gathered = gather_on_main(self.rows)
        if gathered is None:
            return None
        # the order that rows came in must not matter to ties of scores
        rows = sorted((row for rows in gathered for row in rows if len(row)), key=lambda row: row[0, 0])
        with contextlib.redirect_stdout(io.StringIO()):
            measured = COCOeval(self.ground_truth, self._detections(rows), "bbox")
            measured.evaluate()
            measured.accumulate()
        measured.summarize()
        return measured

    def _detections(self, rows):
        if rows:
            return self.ground_truth.loadRes(np.concatenate(rows))
        nothing = COCO()  # loadRes wants at least one
        nothing.dataset = {**self.ground_truth.dataset, "annotations": []}
        nothing.createIndex()
        return nothing


def gather_on_main(value):
    """List of every process's value on the main process, None on the others."""
    if not dist.is_initialized():
        return [value]
    gathered = [None] * get_world_size() if is_main_process() else None
    dist.gather_object(value, gathered)
    return gathered
