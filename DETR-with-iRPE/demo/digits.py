"""Write a set in COCO's format of real handwritten digits on a canvas: scikit-learn's 1,797 digits, boxes known.

    python demo/digits.py FOLDER [--train 4000] [--val 100] [--canvas 64] [--most 2]

Digits of the training pictures never appear in the held-out ones. Each keeps its own aspect, cut to its ink.
"""
import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

HELD_OUT = 0.2  # share of the digits that only validation pictures use


def write_digits(folder, train=4000, val=100, canvas=64, most=2, seed=0):
    """Write `folder`/{train,val}2017 and `folder`/annotations.

    Args:
        train, val: pictures of each split.
        canvas: side of a picture in pixels.
        most: digits in a picture, one up to this many.
    """
    random = np.random.RandomState(seed)
    digits = load_digits()
    order = random.permutation(len(digits.images))
    held_out = round(HELD_OUT * len(order))
    for split, count, ids in (("train", train, order[held_out:]), ("val", val, order[:held_out])):
        pictures = Path(folder, f"{split}2017")
        pictures.mkdir(parents=True, exist_ok=True)
        data = {"images": [], "annotations": [], "categories": [{"id": i, "name": str(i)} for i in range(10)]}
        for number in range(count):
            name = f"{number:06}.png"
            picture, objects = _compose(digits, ids, canvas, most, random)
            picture.save(pictures / name)
            data["images"].append({"id": number, "file_name": name, "height": canvas, "width": canvas})
            for label, (x, y, width, height) in objects:
                data["annotations"].append({"id": len(data["annotations"]) + 1, "image_id": number, "iscrowd": 0,
                                            "category_id": label, "bbox": [x, y, width, height],
                                            "area": width * height})
        annotations = Path(folder, "annotations", f"instances_{split}2017.json")
        annotations.parent.mkdir(exist_ok=True)
        annotations.write_text(json.dumps(data))


def _compose(digits, ids, canvas, most, random):
    """A grey-level picture and its objects [(digit, (x, y, width, height))], which do not overlap."""
    pixels, objects = np.zeros((canvas, canvas), dtype=np.uint8), []
    for i in random.choice(ids, size=random.randint(1, most + 1), replace=False):
        ink = _enlarge(digits.images[i], canvas * random.uniform(0.35, 0.55))
        height, width = ink.shape
        for _ in range(50):
            y, x = (random.randint(0, canvas - side + 1) for side in ink.shape)
            region = pixels[max(y - 2, 0):y + height + 2, max(x - 2, 0):x + width + 2]
            if not region.any():
                pixels[y:y + height, x:x + width] = ink
                objects.append((int(digits.target[i]), (x, y, width, height)))
                break
    return Image.fromarray(pixels).convert("RGB"), objects


def _enlarge(digit, height):
    """An 8×8 digit of levels 0 to 16 → cut to its ink, `height` pixels high, levels 0 to 255."""
    rows, columns = np.flatnonzero(digit.any(1)), np.flatnonzero(digit.any(0))
    ink = Image.fromarray((digit[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1] * 255 / 16).astype(np.uint8))
    scale = height / ink.height
    return np.asarray(ink.resize((max(1, round(ink.width * scale)), round(height)), Image.Resampling.BICUBIC))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    for name, default in (("train", 4000), ("val", 100), ("canvas", 64), ("most", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    write_digits(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
