"""Panoptic quality as Kirillov et al. (Panoptic Segmentation, CVPR 2019) define it, with COCO's void and crowds."""

import io
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from util.runtime import UserError, gather_on_main, print_once, writing

from .coco_panoptic import to_ids

VOID = -1  # for pixels of no segment; their id may be one of the other map's


class PanopticEvaluator:
    """Collects maps of segments, each image's once, writes them as COCO wants them, and measures them.

    Args:
        dataset: CocoPanoptic of all images to count.
        output_dir: where `panoptic_eval/*.png` and `panoptic_eval/predictions.json` go; nothing is written without it.
            What cannot be written there is noted at the end, and changes no number.
    """

    def __init__(self, dataset, output_dir=""):
        self.dataset, self.images = dataset, {image["id"]: image for image in dataset.images}
        self.folder = Path(output_dir, "panoptic_eval") if output_dir else None
        self.found = []
        self.failure = None  # the first write that failed; none is tried after it

    def update(self, predictions):
        """Add maps: image id → dict whose `panoptic` has PostProcessPanoptic's `png_string` and `segments_info`."""
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

    def summarize(self):
        """Gather all processes' segments once; the main process measures them, writes predictions.json and prints.

        Returns: on the main process `PQ_all`, `PQ_th` (things) and `PQ_st` (stuff), each with `pq`, `sq` and `rq` as
            shares, the means over the `n` categories that occur, and `PQ_categories`, category id → the same; {} on the
            others. Equal for any number of processes.
        """
        gathered = gather_on_main((self.found, self.failure))
        if gathered is None:
            return {}
        found = sorted((row for rows, _ in gathered for row in rows), key=lambda row: row[0]["image_id"])
        self.failure = next((failure for _, failure in gathered if failure), None)
        self._write("predictions.json", json.dumps({"annotations": [row for row, _ in found]}).encode())
        if self.failure:
            print_once(f"note: {self.failure}: {self.folder} is incomplete, the numbers are not")
        ious = {}
        for category, iou in (pair for _, pairs in found for pair in pairs):
            ious.setdefault(category, []).append(iou)
        each = {category: quality(ious[category]) for category in sorted(self.dataset.categories) if category in ious}
        things, stuff = (
            [values for category, values in each.items() if self.dataset.is_thing_map[category] == thing]
            for thing in (True, False)
        )
        stats = {"PQ_all": _mean([*things, *stuff]), "PQ_th": _mean(things), "PQ_st": _mean(stuff)}
        for name, values in zip(("All", "Things", "Stuff"), stats.values(), strict=True):
            print(_line(name, values) + f"  of {values['n']} categories")
        for category, values in each.items():
            print(_line(self.dataset.categories[category], values))
        return {**stats, "PQ_categories": each}

    def _write(self, name, content):
        if self.folder is None or self.failure:
            return
        try:
            with writing(self.folder / name):
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / name).write_bytes(content)
        except UserError as error:
            self.failure = str(error)


def compare(truth, true_segments, found, found_segments):
    """Match the segments of one image where their IoU, without the pixels of void, is above a half.

    Args:
        truth, found: ids (H, W), at least 0 and below 2²⁴.
        true_segments, found_segments: lists of (id, category, whether it is a crowd); other ids are void.
    Returns: list of (category, IoU) of every match, and of (category, 0) for every segment without one, but for crowds,
        and for found ones of which more than half lies on void or on crowds of their category.
    """
    true_kind, found_kind = ({segment: kind for segment, *kind in rows} for rows in (true_segments, found_segments))
    truth = np.where(np.isin(truth, list(true_kind)), truth, VOID)
    pairs, pixels = np.unique((truth.astype(np.int64) << 24) + found, return_counts=True)
    overlaps = [(int(pair >> 24), int(pair & 0xFFFFFF), int(n)) for pair, n in zip(pairs, pixels, strict=True)]
    true_area, found_area, void, crowded = Counter(), Counter(), Counter(), Counter()
    for t, f, n in overlaps:
        true_area[t] += n
        found_area[f] += n
        if t == VOID:
            void[f] += n
        elif f in found_kind and true_kind[t] == [found_kind[f][0], 1]:
            crowded[f] += n
    matches = []
    for t, f, n in overlaps:
        union = true_area[t] + found_area[f] - n - void[f]
        if f in found_kind and true_kind.get(t) == found_kind[f] and n > union / 2:
            matches.append((found_kind.pop(f)[0], n / union))
            true_kind.pop(t)
    missed = [(category, 0) for category, crowd in true_kind.values() if not crowd]
    wrong = [(category, 0) for f, (category, _) in found_kind.items() if void[f] + crowded[f] <= found_area[f] / 2]
    return matches + missed + wrong


def quality(ious):
    """PQ, SQ and RQ (equations 1 and 2) of one category, from the IoU of every match and 0 for what has none."""
    total, matched = math.fsum(ious), sum(iou > 0 for iou in ious)
    halves = matched + (len(ious) - matched) / 2
    return {"pq": total / halves, "sq": total / max(matched, 1), "rq": matched / halves}


def _mean(values):
    means = {key: math.fsum(value[key] for value in values) / max(len(values), 1) for key in ("pq", "sq", "rq")}
    return {**means, "n": len(values)}


def _line(name, values):
    return f"{name:24}" + "".join(f"  {key.upper()} {100 * values[key]:5.1f}" for key in ("pq", "sq", "rq"))
