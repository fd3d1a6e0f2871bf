"""COCO's twelve numbers for boxes or masks, through pycocotools."""

import contextlib
import io

import numpy as np
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from util.runtime import gather_on_main


class CocoEvaluator:
    """Collects detections, each image's once, and measures them against the ground truth.

    Args:
        ground_truth: pycocotools.COCO of all images to count, with or without objects.
        iou_type: whether `boxes` ("bbox") or `masks` ("segm") are compared.
    """

    def __init__(self, ground_truth, iou_type="bbox"):
        self.ground_truth, self.iou_type = ground_truth, iou_type
        self.found = []

    def update(self, predictions):
        """Add detections: image id → dict of `scores`, `labels` (n,), and `boxes` (n, 4) as corners in pixels or
        `masks` (n, 1, H, W), uint8."""
        for image_id, found in predictions.items():
            if self.iou_type == "segm":  # dense masks of a whole set would not fit in memory
                shapes = rle_tools.encode(np.asfortranarray(found["masks"][:, 0].permute(1, 2, 0).cpu().numpy()))
            else:
                boxes = found["boxes"].double().cpu().numpy()
                shapes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).tolist()
            self.found.append((image_id, found["labels"].tolist(), found["scores"].double().tolist(), shapes))

    def summarize(self):
        """Gather all processes' detections once; the main process measures them and prints the table.

        Returns: COCOeval with `stats` (the twelve numbers) and `eval` on the main process, None on the others.
        """
        gathered = gather_on_main(self.found)
        if gathered is None:
            return None
        found = [image for images in gathered for image in images]
        with contextlib.redirect_stdout(io.StringIO()):  # COCOeval takes images in the order of their ids
            measured = COCOeval(self.ground_truth, self._results(found), self.iou_type)
            measured.evaluate()
            measured.accumulate()
        print({"bbox": "Boxes", "segm": "Masks"}[self.iou_type])
        measured.summarize()
        return measured

    def _results(self, found):
        field = {"bbox": "bbox", "segm": "segmentation"}[self.iou_type]
        results = [
            {"image_id": image_id, "category_id": label, "score": score, field: shape}
            for image_id, *columns in found
            for label, score, shape in zip(*columns, strict=True)
        ]
        if results:
            return self.ground_truth.loadRes(results)
        nothing = COCO()  # loadRes wants at least one
        nothing.dataset = {**self.ground_truth.dataset, "annotations": []}
        nothing.createIndex()
        return nothing
