"""Pictures and boxes of a set in COCO's format, from a folder or straight from its zip."""
import contextlib
import functools
import io
import json
import os
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from torchvision import tv_tensors

from util.runtime import UserError, print_once

# Rounding lets some boxes of COCO stick out a little, and a few have no area; more than that is a mistake in the file
TOLERATED_PIXELS, TOLERATED_SHARE = 2.0, 1e-3


class CocoDetection(torch.utils.data.Dataset):
    """The pictures of one split with their boxes; crowds are left out of the targets.

    Args:
        root: folder with `annotations/instances_{split}2017.json`, and `{split}2017/` or `{split}2017.zip`.
        split: `train` or `val`.
        transforms: of (PIL picture, target), see transforms.py.
        remove_difficult: leave out objects that are marked `difficult`, as in Pascal VOC written in COCO's format.

    Items are (picture, target) with `image_id` (), `orig_size` (2,) as height and width, `boxes` and `labels`.
    Raises: UserError for files that are missing or damaged and for annotations that cannot be right.
    """

    def __init__(self, root, split, transforms, remove_difficult=False):
        self.path = Path(root, "annotations", f"instances_{split}2017.json")
        self.transforms = transforms
        data = read_annotations(self.path)
        self.categories = {category["id"]: category.get("name", str(category["id"]))
                           for category in data["categories"]}
        self.images = sorted(data["images"], key=lambda image: image["id"])
        self.objects = _group_objects(data, self.path, remove_difficult)
        self.pictures = Pictures(Path(root, f"{split}2017"))
        self.pictures.check([image["file_name"] for image in self.images])

    @property
    def num_classes(self):
        """Highest category id + 1."""
        return max(self.categories) + 1

    def ground_truth(self):
        """The annotations as pycocotools.COCO, with ids of their own: it counts the object of id 0 as never found, and
        of several objects with one id only the last."""
        coco = COCO()
        coco.dataset = read_annotations(self.path)
        for number, entry in enumerate(coco.dataset["annotations"], start=1):
            entry["id"] = number
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        picture, size = self.pictures.read(image["file_name"]), (image["height"], image["width"])
        if (picture.height, picture.width) != size:
            raise UserError(f"picture {image['file_name']} has {picture.height}×{picture.width} pixels, but "
                            f"{self.path} says {size[0]}×{size[1]}: correct the file, or its boxes would be misplaced")
        boxes, labels = self.objects.get(image["id"], (np.empty((0, 4), np.float32), np.empty(0, np.int64)))
        target = {"image_id": torch.tensor(image["id"]), "orig_size": torch.tensor(size),
                  "boxes": tv_tensors.BoundingBoxes(torch.from_numpy(boxes), format="XYXY", canvas_size=size),
                  "labels": torch.from_numpy(labels)}
        return self.transforms(picture, target)


# ---------------------------------------------------------------------------------------------------------------------
# Annotations

def read_annotations(path):
    """The annotation file as a dict whose pictures, categories and objects fit together.

    Raises: UserError that names the file and what is wrong in it.
    """
    try:
        data = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"annotations {path} cannot be read ({error.strerror}): --coco_path must be the folder that "
                        "holds annotations/") from error
    except ValueError as error:
        raise UserError(f"annotations {path} are not JSON, perhaps truncated: {error}") from error
    required = {"images": ("id", "file_name", "height", "width"), "categories": ("id",),
                "annotations": ("image_id", "category_id", "bbox")}
    for part, fields in required.items():
        if not isinstance(data, dict) or not isinstance(data.get(part), list):
            raise UserError(f"annotations {path} have no list of {part}: this is not COCO's instance format")
        for number, entry in enumerate(data[part]):
            for field in fields:
                if not isinstance(entry, dict) or field not in entry:
                    raise UserError(f"annotations {path}: entry {number} of {part} has no {field}")
    if not data["images"] or not data["categories"]:
        raise UserError(f"annotations {path} have no {'categories' if data['images'] else 'images'}")
    _check_references(data, path)
    for number, entry in enumerate(data["annotations"], start=1):
        entry.pop("segmentation", None)  # the most of the file, and of memory
        entry.setdefault("id", number)
        entry.setdefault("iscrowd", 0)
        entry.setdefault("area", entry["bbox"][2] * entry["bbox"][3])
    return data


def _check_references(data, path):
    for part in ("images", "categories"):
        for entry in data[part]:
            if not isinstance(entry["id"], int) or entry["id"] < 0:
                raise UserError(f"annotations {path}: the id {entry['id']!r} in {part} must be a whole number, at "
                                "least 0")
    for part, field, kind in (("images", "file_name", str), ("annotations", "image_id", (int, float)),
                              ("annotations", "category_id", (int, float))):
        for number, entry in enumerate(data[part]):
            if not isinstance(entry[field], kind):
                raise UserError(f"annotations {path}: {field} of entry {number} of {part} is {entry[field]!r}; it must "
                                f"be a {'text' if kind is str else 'whole number'}")
    images, categories = ({entry["id"] for entry in data[part]} for part in ("images", "categories"))
    if len(images) < len(data["images"]):
        raise UserError(f"annotations {path}: two pictures have the same id")
    for entry in data["annotations"]:
        name = f"annotations {path}: object {entry.get('id', entry['bbox'])}"
        if entry["image_id"] not in images:
            raise UserError(f"{name} is in picture {entry['image_id']}, which is not among the images")
        if entry["category_id"] not in categories:
            raise UserError(f"{name} is of category {entry['category_id']}, which is not among the categories")
        box = entry["bbox"]
        if not (isinstance(box, list) and len(box) == 4 and all(isinstance(x, (int, float)) for x in box)):
            raise UserError(f"{name} has the box {box}; it must be four numbers: x, y, width, height")


def check_categories(dataset, num_classes):
    """Raise UserError if the classes 0 ... num_classes − 1 do not cover the set's categories."""
    if dataset.num_classes > num_classes:
        raise UserError(f"category id {max(dataset.categories)} ({dataset.categories[max(dataset.categories)]}) in "
                        f"{dataset.path} is beyond --num_classes {num_classes}: it must be at least "
                        f"{dataset.num_classes}, the highest category id + 1")


def _group_objects(data, path, remove_difficult):
    """Picture id → boxes (n, 4) as corners inside the picture, float32, and category ids (n,)."""
    entries = [entry for entry in data["annotations"]
               if not entry["iscrowd"] and not (remove_difficult and entry.get("difficult"))]
    if not entries:
        return {}
    sizes = {image["id"]: (image["width"], image["height"]) * 2 for image in data["images"]}
    boxes = np.array([entry["bbox"] for entry in entries], dtype=np.float64)
    boxes[:, 2:] += boxes[:, :2]
    limits = np.array([sizes[entry["image_id"]] for entry in entries], dtype=np.float64)
    clipped = np.clip(boxes, 0, limits)
    empty = ~(clipped[:, 2:] > clipped[:, :2]).all(1)
    outside = ~(np.abs(clipped - boxes) <= TOLERATED_PIXELS).all(1)
    _judge_boxes(entries, empty, outside, path)
    objects = {}
    for entry, box, is_empty in zip(entries, clipped.astype(np.float32), empty, strict=True):
        if not is_empty:
            objects.setdefault(entry["image_id"], []).append((box, entry["category_id"]))
    return {image_id: (np.stack([box for box, _ in found]), np.array([label for _, label in found], dtype=np.int64))
            for image_id, found in objects.items()}


def _judge_boxes(entries, empty, outside, path):
    bad = np.flatnonzero(empty | outside)
    if not len(bad):
        return
    first = entries[bad[0]]
    problem = "reaches out of the picture" if outside[bad[0]] else "has no area"
    sentence = (f"annotations {path}: the box {first['bbox']} (x, y, width, height) of object {first['id']} in picture "
                f"{first['image_id']} {problem}")
    if len(bad) > TOLERATED_SHARE * len(entries):
        raise UserError(f"{sentence}, and {len(bad)} of {len(entries)} boxes are like that: correct the file")
    print_once(f"note: {sentence}; {len(bad)} such boxes are clipped, or left out if nothing is left of them")


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

@functools.lru_cache(maxsize=8)
def _open_zip(path, pid):
    # a file handle that forked workers share has one position for all: every process opens its own
    return zipfile.ZipFile(path)


def read_picture(source, name):
    """PIL picture, RGB, of a path or file object. Raises UserError with its `name` if it cannot be read."""
    try:
        with Image.open(source) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{name} cannot be read, perhaps truncated: {error}") from error


class Pictures:
    """The pictures in a folder or, where it lacks them, in the zip of the same name beside it."""

    def __init__(self, folder):
        self.folder, self.archive = folder, folder.with_name(folder.name + ".zip")
        if not folder.is_dir() and not self.archive.is_file():
            raise UserError(f"there is neither a folder {folder} nor {self.archive}: --coco_path must hold one of them")

    def check(self, names):
        """Raise UserError if one is missing, or the zip is damaged."""
        unpacked = set(os.listdir(self.folder)) if self.folder.is_dir() else set()
        packed = set(self._zip().namelist()) if self.archive.is_file() else set()
        missing = [name for name in names if name not in unpacked and f"{self.folder.name}/{name}" not in packed
                   and not (self.folder / name).is_file()]
        if missing:
            raise UserError(f"picture {missing[0]} is neither in {self.folder} nor in {self.archive} "
                            f"({len(missing)} of {len(names)} are missing)")

    def read(self, name):
        """PIL picture, RGB. Raises UserError that names it if it cannot be read."""
        path = self.folder / name
        if path.is_file():
            return read_picture(path, f"picture {path}")
        return read_picture(self._unpack(name), f"picture {name} in {self.archive}")

    def _unpack(self, name):
        try:
            return io.BytesIO(self._zip().read(f"{self.folder.name}/{name}"))
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, OSError, RuntimeError) as error:
            raise UserError(f"picture {name} in {self.archive} cannot be unpacked: {error}") from error

    def _zip(self):
        try:
            return _open_zip(self.archive, os.getpid())
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"{self.archive} is no readable zip, perhaps truncated ({error}): fetch it again") \
                from error
