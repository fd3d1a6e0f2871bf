"""Pictures and objects of a set in COCO's format, from a folder or straight from its zip."""
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
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO
from torchvision import tv_tensors

from util.runtime import UserError, print_once

from .rle import to_rle

# Rounding lets some boxes of COCO stick out a little; more than that, in more than a few, is a mistake in the file
TOLERATED_PIXELS, TOLERATED_SHARE = 2.0, 1e-3
KINDS = {int: "a whole number, at least 0", float: "a number", str: "a text", list: "a list"}


class CocoSet(torch.utils.data.Dataset):
    """The pictures of a split; a subclass knows what is in them and says it in `read_objects`.

    Args:
        path: annotations, for messages.
        data: their content.
        root: folder with `{split}2017/` or `{split}2017.zip` and `annotations/instances_{split}2017.json`.
        split: `train` or `val`.
        transforms: of (PIL picture, target), see transforms.py.
        masks: whether targets have masks.

    Items are (picture, target) with `image_id` (), `orig_size` (2,) as height and width, `boxes`, `labels` and, with
    masks, `masks` (n, H, W).
    """

    def __init__(self, path, data, root, split, transforms, masks):
        self.path, self.transforms, self.masks = path, transforms, masks
        self.instances = Path(root, "annotations", f"instances_{split}2017.json")
        self.categories = {category["id"]: str(category.get("name", category["id"]))
                           for category in data["categories"]}
        self.images = sorted(data["images"], key=lambda image: image["id"])
        self.pictures = Pictures(Path(root, f"{split}2017"))
        self.pictures.check([image["file_name"] for image in self.images])

    @property
    def num_classes(self):
        """Highest category id + 1."""
        return max(self.categories) + 1

    def ground_truth(self):
        """The instances in these pictures as pycocotools.COCO, with ids of their own: it counts the object of id 0 as
        never found, and of several objects with one id only the last."""
        coco, ours = COCO(), {image["id"] for image in self.images}
        coco.dataset = read_instances(self.instances, self.masks)
        coco.dataset["images"] = [image for image in coco.dataset["images"] if image["id"] in ours]
        if len(coco.dataset["images"]) < len(ours):
            lost = min(ours - {image["id"] for image in coco.dataset["images"]})
            raise UserError(f"picture {lost} of {self.path} is not in {self.instances}: both must be of the same set")
        for number, entry in enumerate(coco.dataset["annotations"], start=1):
            entry["id"] = number
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco

    def __len__(self):
        return len(self.images)

    def name(self, index):
        """File name of a picture."""
        return self.images[index]["file_name"]

    def __getitem__(self, index):
        image = self.images[index]
        size = (image["height"], image["width"])
        picture = self.pictures.read(image["file_name"], size, self.path)
        boxes, labels, masks = self.read_objects(image)
        target = {"image_id": torch.tensor(image["id"]), "orig_size": torch.tensor(size), "labels": labels,
                  "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size)}
        if self.masks:
            target["masks"] = tv_tensors.Mask(masks)
        return self.transforms(picture, target)


class CocoDetection(CocoSet):
    """Instances; crowds are left out of the targets.

    Args:
        remove_difficult: leave out objects that are marked `difficult`, as in Pascal VOC written in COCO's format.
        The others as CocoSet's.
    Raises: UserError for files that are missing or damaged and for annotations that cannot be right.
    """

    def __init__(self, root, split, transforms, remove_difficult=False, masks=False):
        path = Path(root, "annotations", f"instances_{split}2017.json")
        data = read_instances(path, masks)
        super().__init__(path, data, root, split, transforms, masks)
        entries = [entry for entry in data["annotations"]
                   if not entry["iscrowd"] and not (remove_difficult and entry.get("difficult"))]
        entries, boxes = _clip_boxes(entries, {image["id"]: image for image in self.images}, path)
        self.boxes = boxes
        self.labels = torch.tensor([int(entry["category_id"]) for entry in entries], dtype=torch.int64)
        self.rles = [entry["segmentation"]["counts"] for entry in entries] if masks else None
        self.rows = {}  # picture id → its objects' places in the three
        for row, entry in enumerate(entries):
            self.rows.setdefault(entry["image_id"], []).append(row)

    def read_objects(self, image):
        """(boxes (n, 4) as corners inside the picture, labels (n,), masks (n, H, W) as uint8 of 0 and 1, or None)"""
        rows, size, masks = self.rows.get(image["id"], []), (image["height"], image["width"]), None
        if self.masks:
            rles = [{"size": size, "counts": self.rles[row]} for row in rows]
            masks = torch.from_numpy(rle_tools.decode(rles) if rles else np.empty((*size, 0), np.uint8))
            masks = masks.permute(2, 0, 1)
        return self.boxes[rows], self.labels[rows], masks


# ---------------------------------------------------------------------------------------------------------------------
# Annotations

def read_annotations(path, flag, **fields):
    """A file of annotations as a dict whose lists have what is asked for.

    Args:
        flag: of the command line, by which the user named its folder.
        fields: of `annotations` and `categories`, field → type, one of KINDS.
    Raises: UserError that names the file and what is wrong in it.
    """
    try:
        data = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"annotations {path} cannot be read ({error.strerror}): {flag} must be the folder that "
                        "holds annotations/") from error
    except ValueError as error:
        raise UserError(f"annotations {path} are not JSON, perhaps truncated: {error}") from error
    fields = {"images": {"id": int, "file_name": str, "height": int, "width": int}, **fields}
    for part, wanted in fields.items():
        if not isinstance(data, dict) or not isinstance(data.get(part), list):
            raise UserError(f"annotations {path} have no list of {part}: this is not COCO's format")
        if not data[part] and part != "annotations":
            raise UserError(f"annotations {path} have no {part}")
        check_fields(data[part], wanted, f"annotations {path}: {part}")
    if len({image["id"] for image in data["images"]}) < len(data["images"]):
        raise UserError(f"annotations {path}: two pictures have the same id")
    return data


def check_fields(entries, fields, name):
    """Raise UserError with the name unless every entry has the fields (name → type, one of KINDS)."""
    for number, entry in enumerate(entries):
        for field, kind in fields.items():
            value = entry.get(field) if isinstance(entry, dict) else None
            right = isinstance(value, (int, float) if kind is float else kind)
            if not right or kind is int and value < 0:
                raise UserError(f"{name}: {field} of entry {number} is {value!r}; it must be {KINDS[kind]}")


def read_instances(path, masks=False):
    """COCO's instances as a dict whose pictures, categories and objects fit together.

    Every object has `id`, `iscrowd` and `area`, and its `segmentation` as compressed RLE with masks, else none.
    Raises: UserError that names the file and what is wrong in it.
    """
    data = read_annotations(path, "--coco_path", categories={"id": int},
                            annotations={"image_id": float, "category_id": float, "bbox": list})
    images = {image["id"]: image for image in data["images"]}
    categories = {category["id"] for category in data["categories"]}
    for number, entry in enumerate(data["annotations"], start=1):
        entry.setdefault("id", number)
        entry.setdefault("iscrowd", 0)
        name, box = f"annotations {path}: object {entry['id']}", entry["bbox"]
        if entry["image_id"] not in images:
            raise UserError(f"{name} is in picture {entry['image_id']}, which is not among the images")
        if entry["category_id"] not in categories:
            raise UserError(f"{name} is of category {entry['category_id']}, which is not among the categories")
        if not (len(box) == 4 and all(isinstance(x, (int, float)) for x in box)):
            raise UserError(f"{name} has the box {box}; it must be four numbers: x, y, width, height")
        entry.setdefault("area", box[2] * box[3])
        image, segmentation = images[entry["image_id"]], entry.pop("segmentation", None)  # the most of file and memory
        if masks:
            entry["segmentation"] = to_rle(segmentation, image["height"], image["width"], name)
    return data


def check_categories(dataset, num_classes):
    """Raise UserError if the classes 0 ... num_classes − 1 do not cover the set's categories."""
    highest = max(dataset.categories)
    if highest >= num_classes:
        raise UserError(f"category id {highest} ({dataset.categories[highest]}) in {dataset.path} is beyond "
                        f"--num_classes {num_classes}: it must be at least {highest + 1}, the highest category id + 1")


def _clip_boxes(entries, images, path):
    """(those of the entries whose box has an area in its picture, these boxes (n, 4) as corners in it, float32)"""
    sizes = [(images[entry["image_id"]]["width"], images[entry["image_id"]]["height"]) * 2 for entry in entries]
    boxes = np.array([entry["bbox"] for entry in entries], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    clipped = np.clip(boxes, 0, np.array(sizes, dtype=np.float64).reshape(-1, 4))
    outside = ~(np.abs(clipped - boxes) <= TOLERATED_PIXELS).all(1)
    empty = ~(clipped[:, 2:] > clipped[:, :2]).all(1)
    many_outside = outside.sum() > TOLERATED_SHARE * len(boxes)
    _judge_boxes(entries, path, outside, "reaches out of the picture", "clipped", many_outside)
    _judge_boxes(entries, path, empty, "has no area", "left out", empty.all())
    return [entries[row] for row in np.flatnonzero(~empty)], torch.from_numpy(clipped[~empty].astype(np.float32))


def _judge_boxes(entries, path, bad, problem, cure, fatal):
    if not bad.any():
        return
    first = entries[bad.argmax()]
    sentence = (f"annotations {path}: the box {first['bbox']} (x, y, width, height) of object {first['id']} in picture "
                f"{first['image_id']} {problem}; of {len(bad)} boxes {bad.sum()} are like that")
    if fatal:
        raise UserError(f"{sentence}: correct the file")
    print_once(f"note: {sentence}, and {cure}")


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
            raise UserError(f"there is neither a folder {folder} nor {self.archive}: one of them must be there")

    def check(self, names):
        """Raise UserError if one is missing, or the zip is damaged."""
        unpacked = set(os.listdir(self.folder)) if self.folder.is_dir() else set()
        packed = set(self._zip().namelist()) if self.archive.is_file() else set()
        missing = [name for name in names if name not in unpacked and f"{self.folder.name}/{name}" not in packed
                   and not (self.folder / name).is_file()]
        if missing:
            raise UserError(f"picture {missing[0]} is neither in {self.folder} nor in {self.archive} "
                            f"({len(missing)} of {len(names)} are missing)")

    def read(self, name, size, annotations):
        """PIL picture, RGB. Raises UserError that names it if it cannot be read or has not the size (height, width)
        that the annotations say."""
        path = self.folder / name
        if path.is_file():
            picture = read_picture(path, f"picture {path}")
        else:
            picture = read_picture(self._unpack(name), f"picture {name} in {self.archive}")
        if (picture.height, picture.width) != size:
            raise UserError(f"picture {name} has {picture.height}×{picture.width} pixels, but {annotations} says "
                            f"{size[0]}×{size[1]}: correct the file, or its objects would be misplaced")
        return picture

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
