"""Panoptic quality as Kirillov et al. (Panoptic Segmentation, CVPR 2019) define it, with COCO's void and crowds."""

import io
import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from util.runtime import UserError, gather_on_main, print_once, writing

from .coco_panoptic import CocoPanoptic, to_ids

VOID = -1  # replaces the id of pixels that belong to no true segment
ID_RANGE = 2**24  # ids are three bytes, see `to_ids`


class PanopticEvaluator:
    """Collects panoptic maps, writes them in COCO's format and computes their panoptic quality.

    Args:
        dataset: the data set of all images to evaluate.
        output_dir: write `panoptic_eval/*.png` and `panoptic_eval/predictions.json` here; empty to write nothing. If
            writing fails, `summarize` prints a note, but the metrics are still complete.
    """

    def __init__(self, dataset: CocoPanoptic, output_dir: str | os.PathLike = "") -> None:
        self.dataset = dataset
        self.images = {image["id"]: image for image in dataset.images}
        self.folder = Path(output_dir, "panoptic_eval") if output_dir else None
        self.found = []
        self.failure = None  # the error message of the first write that failed; nothing is written after it

    def update(self, predictions: dict[int, dict[str, Any]]) -> None:
        """Add the maps of images, each image once.

        Args:
            predictions: image id → dict whose item `panoptic` is a result of `PostProcessPanoptic`.
        """
        for image_id, result in predictions.items():
            png, segments = result["panoptic"]["png_string"], result["panoptic"]["segments_info"]
            name = f"{image_id:012}.png"
            self._write(name, png)
            ious = compare(
                self.dataset.read_map(self.images[image_id]),
                self.dataset.segments[image_id].tolist(),
                to_ids(Image.open(io.BytesIO(png))),
                [(s["id"], s["category_id"], 0) for s in segments],
            )
            self.found.append(({"image_id": image_id, "file_name": name, "segments_info": segments}, ious))

    def summarize(self) -> dict[str, dict]:
        """Gather the segments of all ranks. Rank 0 computes and prints the metrics and writes predictions.json.

        The metrics do not depend on the number of ranks.

        Returns: on rank 0, `PQ_all`, `PQ_th` (things) and `PQ_st` (stuff), each a dict with `pq`, `sq` and `rq` from 0
            to 1 as means over the `n` categories that occur, and `PQ_categories`, which has such a dict for each
            category id; {} on other ranks.
        """
        gathered = gather_on_main((self.found, self.failure))
        if gathered is None:
            return {}
        found = sorted((row for rows, _ in gathered for row in rows), key=lambda row: row[0]["image_id"])
        self.failure = next((failure for _, failure in gathered if failure), None)
        self._write("predictions.json", json.dumps({"annotations": [row for row, _ in found]}).encode())
        if self.failure:
            print_once(f"note: {self.failure}: {self.folder} is incomplete, but the metrics are complete")
        ious = {}
        for _, pairs in found:
            for category, iou in pairs:
                ious.setdefault(category, []).append(iou)
        each = {category: quality(ious[category]) for category in sorted(self.dataset.categories) if category in ious}
        things = [values for category, values in each.items() if self.dataset.is_thing_map[category]]
        stuff = [values for category, values in each.items() if not self.dataset.is_thing_map[category]]
        stats = {"PQ_all": _mean([*things, *stuff]), "PQ_th": _mean(things), "PQ_st": _mean(stuff)}
        for name, values in zip(("All", "Things", "Stuff"), stats.values(), strict=True):
            print(_line(name, values) + f"  of {values['n']} categories")
        for category, values in each.items():
            print(_line(self.dataset.categories[category], values))
        return {**stats, "PQ_categories": each}

    def _write(self, name: str, content: bytes) -> None:
        """Write a file of the folder, unless a write has failed before."""
        if self.folder is None or self.failure:
            return
        try:
            with writing(self.folder / name):
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / name).write_bytes(content)
        except UserError as error:
            self.failure = str(error)


def compare(
    truth: np.ndarray,
    true_segments: list[tuple[int, int, int]],
    found: np.ndarray,
    found_segments: list[tuple[int, int, int]],
) -> list[tuple[int, float]]:
    """Match the true and the found segments of one image.

    Two segments of the same category match if their IoU exceeds one half, where the union excludes void pixels.

    Args:
        truth, found: segment ids (H, W), from 0 to 2²⁴ − 1.
        true_segments, found_segments: (id, category, crowd) of each segment, where `crowd` is 0 or 1, and 0 for found
            segments. Ids that are not listed are void.
    Returns: (category, IoU) for every match, and (category, 0) for every segment without a match. Unmatched crowds do
        not count, nor do unmatched found segments that lie mostly on void or on crowds of their category.
    """
    true_category = {segment: category for segment, category, crowd in true_segments if not crowd}
    crowd_category = {segment: category for segment, category, crowd in true_segments if crowd}
    found_category = {segment: category for segment, category, _ in found_segments}
    # Pixels of segments that are not listed become void.
    truth = np.where(np.isin(truth, [*true_category, *crowd_category]), truth, VOID)
    overlaps = _count_overlaps(truth, found)

    true_area, found_area = Counter(), Counter()
    for true_id, found_id, pixels in overlaps:
        true_area[true_id] += pixels
        found_area[found_id] += pixels
    void = Counter({found_id: pixels for true_id, found_id, pixels in overlaps if true_id == VOID})
    on_crowds = _count_pixels_on_crowds(overlaps, crowd_category, found_category)

    results = []
    for true_id, found_id, pixels in overlaps:
        if found_id not in found_category or true_category.get(true_id) != found_category[found_id]:
            continue
        union = true_area[true_id] + found_area[found_id] - pixels - void[found_id]
        if pixels > union / 2:
            # No other segment can match either of the two.
            del true_category[true_id]
            results.append((found_category.pop(found_id), pixels / union))
    results += [(category, 0) for category in true_category.values()]
    for found_id, category in found_category.items():
        if void[found_id] + on_crowds[found_id] <= found_area[found_id] / 2:
            results.append((category, 0))
    return results


def _count_overlaps(truth: np.ndarray, found: np.ndarray) -> list[tuple[int, int, int]]:
    """Count the common pixels of all pairs of segments: (true id, found id, pixels), for pairs with common pixels."""
    pair_of_pixel = truth.astype(np.int64) * ID_RANGE + found  # pack both ids into a single number
    pairs, pixels = np.unique(pair_of_pixel, return_counts=True)
    true_ids, found_ids = np.divmod(pairs, ID_RANGE)  # unpack the ids
    return list(zip(true_ids.tolist(), found_ids.tolist(), pixels.tolist(), strict=True))


def _count_pixels_on_crowds(
    overlaps: list[tuple[int, int, int]], crowd_category: dict[int, int], found_category: dict[int, int]
) -> Counter:
    """The pixels of each found segment that lie on crowds of its category, by its id."""
    on_crowds = Counter()
    for true_id, found_id, pixels in overlaps:
        if true_id in crowd_category and crowd_category[true_id] == found_category.get(found_id):
            on_crowds[found_id] += pixels
    return on_crowds


def quality(ious: list[float]) -> dict[str, float]:
    """Panoptic, segmentation and recognition quality (equations 1 and 2) of one category.

    Args:
        ious: as `compare` returns them: the IoU of every match, and 0 for every segment without a match.
    """
    total = math.fsum(ious)
    matched = sum(iou > 0 for iou in ious)
    denominator = matched + (len(ious) - matched) / 2
    return {"pq": total / denominator, "sq": total / max(matched, 1), "rq": matched / denominator}


def _mean(values: list[dict[str, float]]) -> dict[str, float]:
    """The mean qualities over categories, and the number `n` of categories."""
    means = {key: math.fsum(value[key] for value in values) / max(len(values), 1) for key in ("pq", "sq", "rq")}
    return {**means, "n": len(values)}


def _line(name: str, values: dict[str, float]) -> str:
    """A row of the printed table."""
    return f"{name:24}" + "".join(f"  {key.upper()} {100 * values[key]:5.1f}" for key in ("pq", "sq", "rq"))
