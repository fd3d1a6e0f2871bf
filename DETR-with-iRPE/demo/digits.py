"""Write a synthetic data set in COCO's format: scikit-learn's 1,797 handwritten digits on images of empty paper.

    python demo/digits.py FOLDER [--train 4000] [--val 100]

The training and the validation images show different digits. Digits vary in size and keep their aspect ratio. FOLDER
contains boxes, masks and panoptic maps, in which the paper is stuff: pass it as --coco_path and as
--coco_panoptic_path.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from sklearn.datasets import load_digits
from sklearn.utils import Bunch

HELD_OUT = 0.2  # share of the digits that only the validation images show
CANVAS = 64  # side of an image in pixels
MOST = 2  # largest number of digits in an image
INK = 96  # least grey level of a digit's mask; interpolation adds fainter pixels around it
GAP = 2  # pixels between digits
DIGITS = [{"id": i, "name": str(i), "isthing": 1} for i in range(10)]
PAPER = {"id": 10, "name": "paper", "isthing": 0}


def write_digits(folder: str | Path, train: int = 4000, val: int = 100, seed: int = 0) -> None:
    """Write `train` training and `val` validation images with their annotations into `folder`."""
    random = np.random.RandomState(seed)
    digits = load_digits()
    order = random.permutation(len(digits.images))
    held_out = round(HELD_OUT * len(order))
    _write_split(Path(folder), "train2017", train, digits, order[held_out:], random)
    _write_split(Path(folder), "val2017", val, digits, order[:held_out], random)


def _write_split(
    folder: Path, split: str, count: int, digits: Bunch, ids: np.ndarray, random: np.random.RandomState
) -> None:
    """Write the `count` images of a split, which show the digits with these ids, and their annotations."""
    for part in (split, f"panoptic_{split}", "annotations"):
        Path(folder, part).mkdir(parents=True, exist_ok=True)
    images = []
    objects = []  # annotations of the instances
    maps = []  # annotations of the panoptic maps
    for number in range(count):
        name = f"{number:06}.png"
        pixels, segments, labels = _compose(digits, ids, random)
        Image.fromarray(pixels).convert("RGB").save(Path(folder, split, name))
        # The colour of a segment encodes its id as red + 256·green + 65536·blue, and all ids here are less than 256.
        colours = np.pad(segments[..., None], ((0, 0), (0, 0), (0, 2)))
        Image.fromarray(colours).save(Path(folder, f"panoptic_{split}", name))
        images.append({"id": number, "file_name": name, "height": CANVAS, "width": CANVAS})
        segments_info = []
        first_id = len(objects)
        for segment_id, label in labels.items():
            shape = _describe(segments == segment_id)
            info = {"area": shape["area"], "bbox": shape["bbox"], "iscrowd": 0}
            segments_info.append({**info, "id": segment_id, "category_id": label})
            if label != PAPER["id"]:
                objects.append({**shape, "image_id": number, "id": first_id + segment_id, "category_id": label})
        maps.append({"image_id": number, "file_name": name, "segments_info": segments_info})
    for kind, annotations, categories in (("instances", objects, DIGITS), ("panoptic", maps, [*DIGITS, PAPER])):
        Path(folder, "annotations", f"{kind}_{split}.json").write_text(
            json.dumps({"images": images, "annotations": annotations, "categories": categories})
        )


def _compose(
    digits: Bunch, ids: np.ndarray, random: np.random.RandomState
) -> tuple[np.ndarray, np.ndarray, dict[int, int]]:
    """Place random digits without overlap.

    Returns: the grey levels of an image (H, W), the segment ids of its pixels (H, W), and segment id → category, where
        the paper is last.
    """
    pixels = np.zeros((CANVAS, CANVAS), dtype=np.uint8)
    segments = np.zeros_like(pixels)
    labels = {}
    for i in random.choice(ids, size=random.randint(1, MOST + 1), replace=False):
        ink = _enlarge(digits.images[i], CANVAS * random.uniform(0.35, 0.55))
        height, width = ink.shape
        for _ in range(50):
            y, x = (random.randint(0, CANVAS - side + 1) for side in ink.shape)
            region = pixels[max(y - GAP, 0) : y + height + GAP, max(x - GAP, 0) : x + width + GAP]
            if not region.any():
                pixels[y : y + height, x : x + width] = ink
                number = len(labels) + 1
                labels[number] = int(digits.target[i])
                segments[y : y + height, x : x + width][ink >= INK] = number
                break
    paper = len(labels) + 1
    segments[segments == 0] = paper
    return pixels, segments, {**labels, paper: PAPER["id"]}


def _enlarge(digit: np.ndarray, height: float) -> np.ndarray:
    """Crop an 8×8 digit with grey levels 0 to 16 to its ink, and scale it to `height` pixels and levels 0 to 255."""
    rows, columns = np.flatnonzero(digit.any(1)), np.flatnonzero(digit.any(0))
    ink = Image.fromarray((digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] * 255 / 16).astype(np.uint8))
    scale = height / ink.height
    return np.asarray(ink.resize((max(1, round(ink.width * scale)), round(height)), Image.Resampling.BICUBIC))


def _describe(mask: np.ndarray) -> dict:
    """The fields of COCO's annotations that a mask (H, W) determines."""
    rle = coco_mask.encode(np.asfortranarray(mask))
    return {
        "segmentation": {**rle, "counts": rle["counts"].decode()},
        "area": int(coco_mask.area(rle)),
        "bbox": coco_mask.toBbox(rle).tolist(),
        "iscrowd": 0,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--train", type=int, default=4000, help="number of training images")
    parser.add_argument("--val", type=int, default=100, help="number of validation images")
    write_digits(**vars(parser.parse_args()))
