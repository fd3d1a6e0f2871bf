"""COCO's twelve metrics for boxes or masks, computed by pycocotools."""

import contextlib
import io
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from util.runtime import gather_on_main


class CocoEvaluator:
    """Collects detections and evaluates them against the ground truth.

    Args:
        ground_truth: the objects of all images to evaluate, see `CocoSet.ground_truth`.
        iou_type: "bbox" to compare boxes, "segm" to compare masks.
    """

    def __init__(self, ground_truth: COCO, iou_type: str = "bbox") -> None:
        self.ground_truth = ground_truth
        self.iou_type = iou_type
        self.found = []

    def update(self, predictions: dict[int, dict[str, torch.Tensor]]) -> None:
        """Add the detections of images, each image once.

        Args:
            predictions: image id → dict with `scores` (n,), `labels` (n,) and either `boxes` (n, 4), corners in
                pixels, or `masks` (n, 1, H, W), uint8.
        """
        for image_id, found in predictions.items():
            if self.iou_type == "segm":  # RLE, because the uncompressed masks of a data set would not fit in memory
                regions = rle_tools.encode(np.asfortranarray(found["masks"][:, 0].permute(1, 2, 0).cpu().numpy()))
            else:
                boxes = found["boxes"].double().cpu().numpy()
                regions = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).tolist()
            self.found.append((image_id, found["labels"].tolist(), found["scores"].double().tolist(), regions))

    def summarize(self) -> COCOeval | None:
        """Gather the detections of all ranks. Rank 0 evaluates them and prints the table of metrics.

        Returns: on rank 0, the evaluation with `stats` (the twelve metrics) and `eval`; None on other ranks.
        """
        gathered = gather_on_main(self.found)
        if gathered is None:
            return None
        found = [image for images in gathered for image in images]
        # COCOeval sorts images by id, so the number of ranks does not matter. Everything it prints before the table is
        # suppressed.
        with contextlib.redirect_stdout(io.StringIO()):
            measured = COCOeval(self.ground_truth, self._results(found), self.iou_type)
            measured.evaluate()
            measured.accumulate()
        print({"bbox": "Boxes", "segm": "Masks"}[self.iou_type])
        measured.summarize()
        return measured

    def _results(self, found: list[tuple[Any, ...]]) -> COCO:
        """The detections in pycocotools' format."""
        field = {"bbox": "bbox", "segm": "segmentation"}[self.iou_type]
        results = [
            {"image_id": image_id, "category_id": label, "score": score, field: region}
            for image_id, *columns in found
            for label, score, region in zip(*columns, strict=True)
        ]
        if results:
            return self.ground_truth.loadRes(results)
        nothing = COCO()  # loadRes needs at least one detection
        nothing.dataset = {**self.ground_truth.dataset, "annotations": []}
        nothing.createIndex()
        return nothing
