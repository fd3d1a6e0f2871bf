"""Write a set in COCO's format of real handwritten digits on paper: scikit-learn's 1,797 digits, boxes and masks known.

    python demo/digits.py FOLDER [--train 4000] [--val 100]

Digits of the training pictures never appear in the held-out ones. Each keeps its own aspect. FOLDER is for --coco_path
and, since the panoptic maps lie there too, for --coco_panoptic_path; in those the paper is stuff.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from sklearn.datasets import load_digits

HELD_OUT = 0.2  # share of the digits that only validation pictures use
CANVAS = 64  # side of a picture in pixels
MOST = 2  # digits in a picture, one up to this many
INK = 96  # least level of a digit's mask; fainter pixels are what smooth enlargement adds
DIGITS = [{"id": i, "name": str(i), "isthing": 1} for i in range(10)]
PAPER = {"id": 10, "name": "paper", "isthing": 0}


def write_digits(folder, train=4000, val=100, seed=0):
    """Write `train` and `val` pictures, their objects and their panoptic maps into `folder`."""
    random = np.random.RandomState(seed)
    digits = load_digits()
    order = random.permutation(len(digits.images))
    held_out = round(HELD_OUT * len(order))
    for split, count, ids in (("train2017", train, order[held_out:]), ("val2017", val, order[:held_out])):
        for part in (split, f"panoptic_{split}", "annotations"):
            Path(folder, part).mkdir(parents=True, exist_ok=True)
        images, objects, maps = [], [], []
        for number in range(count):
            name = f"{number:06}.png"
            pixels, segments, labels = _compose(digits, ids, random)
            Image.fromarray(pixels).convert("RGB").save(Path(folder, split, name))
            red = np.pad(segments[..., None], ((0, 0), (0, 0), (0, 2)))  # a segment's id is red + 256·green + ...
            Image.fromarray(red).save(Path(folder, f"panoptic_{split}", name))
            found = [{**_describe(segments == i), "id": i, "category_id": label} for i, label in labels.items()]
            images.append({"id": number, "file_name": name, "height": CANVAS, "width": CANVAS})
            objects += [{**segment, "image_id": number, "id": len(objects) + segment["id"]} for segment in found[:-1]]
            for segment in found:
                del segment["segmentation"]
            maps.append({"image_id": number, "file_name": name, "segments_info": found})
        for kind, annotations, categories in (("instances", objects, DIGITS), ("panoptic", maps, [*DIGITS, PAPER])):
            Path(folder, "annotations", f"{kind}_{split}.json").write_text(
                json.dumps({"images": images, "annotations": annotations, "categories": categories})
            )


def _compose(digits, ids, random):
    """A grey-level picture (H, W), its map of segments (H, W), and their categories by id, the paper's at the end."""
    pixels = np.zeros((CANVAS, CANVAS), dtype=np.uint8)
    segments, labels = np.zeros_like(pixels), {}
    for i in random.choice(ids, size=random.randint(1, MOST + 1), replace=False):
        ink = _enlarge(digits.images[i], CANVAS * random.uniform(0.35, 0.55))
        height, width = ink.shape
        for _ in range(50):
            y, x = (random.randint(0, CANVAS - side + 1) for side in ink.shape)
            region = pixels[max(y - 2, 0) : y + height + 2, max(x - 2, 0) : x + width + 2]
            if not region.any():
                pixels[y : y + height, x : x + width] = ink
                number = len(labels) + 1
                labels[number] = int(digits.target[i])
                segments[y : y + height, x : x + width][ink >= INK] = number
                break
    paper = len(labels) + 1
    segments[segments == 0] = paper
    return pixels, segments, {**labels, paper: PAPER["id"]}


def _enlarge(digit, height):
    """An 8×8 digit of levels 0 to 16 → cut to its ink, `height` pixels high, levels 0 to 255."""
    rows, columns = np.flatnonzero(digit.any(1)), np.flatnonzero(digit.any(0))
    ink = Image.fromarray((digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] * 255 / 16).astype(np.uint8))
    scale = height / ink.height
    return np.asarray(ink.resize((max(1, round(ink.width * scale)), round(height)), Image.Resampling.BICUBIC))


def _describe(mask):
    """What COCO's annotations say of a mask (H, W)."""
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
    parser.add_argument("--train", type=int, default=4000)
    parser.add_argument("--val", type=int, default=100)
    write_digits(**vars(parser.parse_args()))
