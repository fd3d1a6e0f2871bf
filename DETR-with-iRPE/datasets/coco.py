"""Images and objects of a set in COCO's format, from a folder or straight from its zip."""

import contextlib
import functools
import io
import json
import os
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO
from torchvision import tv_tensors

from util.images import Oddities, describe, oddities, orientation, to_rgb
from util.runtime import UserError, print_once

from .fields import (
    AREA,
    BOX,
    FILE_NAME,
    FLAG,
    ID,
    SEGMENTATION,
    SIDE,
    TEXT,
    check_entries,
    optional,
    read_column,
)
from .rle import to_rle

# Rounding lets some boxes of COCO stick out a little; more than that, in more than a few, is a mistake in the file
TOLERATED_PIXELS, TOLERATED_SHARE = 2.0, 1e-3
# More areas than this share that no mask in the box can have are a mistake; a mask may be thin, as of a rope
TOLERATED_AREAS, LEAST_AREA = 0.05, 1e-3
MOST_DETECTIONS = 100  # of a category in an image, that COCO's numbers count
PARTS = {
    "images": {"id": ID, "file_name": FILE_NAME, "height": SIDE, "width": SIDE},
    "categories": {"id": ID, "name": optional(TEXT)},
}  # and their fields, in all of COCO's files
INSTANCES = {
    "annotations": {
        "image_id": ID,
        "category_id": ID,
        "bbox": BOX,
        "id": optional(ID),
        "iscrowd": optional(FLAG, 0),
        "area": optional(AREA),
        "segmentation": optional(SEGMENTATION),
    }
}


class CocoSet(torch.utils.data.Dataset):
    """The images of a split; a subclass knows what is in them and says it in `read_objects` and `object_counts`.

    Args:
        path: annotations, for messages.
        data: their content.
        root: folder with `{split}2017/` or `{split}2017.zip` and `annotations/instances_{split}2017.json`.
        split: `train` or `val`.
        transforms: of (PIL image, target), see transforms.py.
        masks: whether targets have masks.

    Items are (image, target) with `image_id` (), `orig_size` (2,) as height and width, `boxes`, `labels` and, with
    masks, `masks` (n, H, W).
    """

    def __init__(self, path, data, root, split, transforms, masks):
        self.path, self.transforms, self.masks = path, transforms, masks
        self.instances = Path(root, "annotations", f"instances_{split}2017.json")
        self.categories = {
            category["id"]: str(category["id"] if category["name"] is None else category["name"])
            for category in data["categories"]
        }
        self.images = sorted(data["images"], key=lambda image: image["id"])
        self.pictures = Pictures(Path(root, f"{split}2017"))
        self.pictures.check([image["file_name"] for image in self.images])
        self.oddities = Oddities(len(self.images))

    @property
    def num_classes(self):
        """Highest category id + 1."""
        return max(self.categories) + 1

    def ground_truth(self):
        """The instances in these images as pycocotools.COCO, with ids of their own: it counts the object of id 0 as
        never found, and of several objects with one id only the last."""
        coco, ours = COCO(), {image["id"] for image in self.images}
        coco.dataset = read_instances(self.instances, self.masks)
        coco.dataset["images"] = [image for image in coco.dataset["images"] if image["id"] in ours]
        if len(coco.dataset["images"]) < len(ours):
            lost = min(ours - {image["id"] for image in coco.dataset["images"]})
            raise UserError(f"image {lost} of {self.path} is not in {self.instances}: both must be of the same set")
        for number, entry in enumerate(coco.dataset["annotations"], start=1):
            entry["id"] = number
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco

    def __len__(self):
        return len(self.images)

    def name(self, index):
        """File name of an image."""
        return self.images[index]["file_name"]

    def place(self, index):
        """Path of an image, which may be in a zip instead."""
        return str(self.pictures.folder / self.name(index))

    def __getitem__(self, index):
        image = self.images[index]
        size = (image["height"], image["width"])
        picture, odd = self.pictures.read(image["file_name"], size, self.path, read_noting)
        self.oddities.add(index, odd)
        with naming(f"image {image['file_name']} of {self.path}", "transformed"):
            boxes, labels, masks = self.read_objects(image)
            target = {
                "image_id": torch.tensor(image["id"]),
                "orig_size": torch.tensor(size),
                "labels": labels,
                "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            }
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
        entries = [
            entry
            for entry in data["annotations"]
            if not entry["iscrowd"] and not (remove_difficult and entry.get("difficult"))
        ]
        entries, boxes = _clip_boxes(entries, {image["id"]: image for image in self.images}, path)
        self.boxes = boxes
        self.labels = torch.tensor([int(entry["category_id"]) for entry in entries], dtype=torch.int64)
        self.rles = [entry["segmentation"]["counts"] for entry in entries] if masks else None
        self.rows = {}  # image id → its objects' places in the three
        for row, entry in enumerate(entries):
            self.rows.setdefault(entry["image_id"], []).append(row)

    def read_objects(self, image):
        """(boxes (n, 4) as corners inside the image, labels (n,), masks (n, H, W) as uint8 of 0 and 1, or None)"""
        rows, size, masks = self.rows.get(image["id"], []), (image["height"], image["width"]), None
        if self.masks:
            rles = [{"size": size, "counts": self.rles[row]} for row in rows]
            masks = torch.from_numpy(rle_tools.decode(rles) if rles else np.empty((*size, 0), np.uint8))
            masks = masks.permute(2, 0, 1)
        return self.boxes[rows], self.labels[rows], masks

    def object_counts(self):
        """How many objects each image has that has any, by the image's id."""
        return {image_id: len(rows) for image_id, rows in self.rows.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Annotations


def read_annotations(path, flag, fields):
    """A file of annotations as a dict whose lists have what is asked for.

    Args:
        flag: of the command line, by which the user named its folder.
        fields: of the annotations, and more of the other parts: part → field → fields.Kind.
    Raises: UserError that names the file, and the entry and the field in which something is wrong.
    """
    try:
        data = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(
            f"annotations {path} cannot be read ({error.strerror}): {flag} must be the folder that holds annotations/"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"annotations {path} are not JSON, perhaps truncated: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"annotations {path} have no list of images: this is not COCO's format")
    for part in ("images", "categories", "annotations"):
        check_entries(data.get(part), path, part)
        if not data[part] and part != "annotations":
            raise UserError(f"annotations {path} have no {part}")
        for field, kind in {**PARTS.get(part, {}), **fields.get(part, {})}.items():
            read_column(data[part], field, kind, functools.partial(_entry_name, path, part, data[part]))
    for part in ("images", "categories"):
        counts = Counter(entry["id"] for entry in data[part])
        if len(counts) < len(data[part]):
            raise UserError(f"annotations {path}: two {part} have the same id, {counts.most_common(1)[0][0]}")
    _note_shared_files(data["images"], path)
    return data


def _entry_name(path, part, entries, number):
    entry = entries[number]
    return f"annotations {path}: {part}: entry {number}" + (f" (id {entry['id']!r})" if entry.get("id") else "")


def _note_shared_files(images, path):
    name, count = Counter(image["file_name"] for image in images).most_common(1)[0]
    if count > 1:
        print_once(
            f"note: annotations {path}: {count} of the images have the same file, {name}: what one of them says "
            "of its objects the others do not know"
        )


def read_instances(path, masks=False):
    """COCO's instances as a dict whose images, categories and objects fit together.

    Every object has `id`, `iscrowd` (0 or 1) and `area`, and its `segmentation` as compressed RLE with masks, else
    none. Raises: UserError that names the file and what is wrong in it.
    """
    data = read_annotations(path, "--coco_path", INSTANCES)
    entries, images = data["annotations"], {image["id"]: image for image in data["images"]}
    _check_known(entries, "image_id", images, path, "is in image", "images")
    _check_known(
        entries,
        "category_id",
        {category["id"] for category in data["categories"]},
        path,
        "is of category",
        "categories",
    )
    if any("difficult" in entry for entry in entries):
        name = functools.partial(_entry_name, path, "annotations", entries)
        read_column(entries, "difficult", optional(FLAG, 0), name)
    for number, entry in enumerate(entries, start=1):
        if entry["id"] is None:
            entry["id"] = number
        if entry["area"] is None:
            entry["area"] = max(0, entry["bbox"][2] * entry["bbox"][3])
        segmentation = entry.pop("segmentation", None)  # the most of file and memory
        if masks:
            image = images[entry["image_id"]]
            entry["segmentation"] = to_rle(segmentation, image["height"], image["width"], _object_name(path, entry))
    return data


def _object_name(path, entry):
    return f"annotations {path}: object {entry['id']}"


def _check_known(entries, field, known, path, relation, part):
    """Raise UserError for the first entry whose field is not among the known ids."""
    for unknown in {entry[field] for entry in entries}.difference(known):
        entry = next(entry for entry in entries if entry[field] == unknown)
        raise UserError(f"{_object_name(path, entry)} {relation} {unknown}, which is not among the {part}")


def check_categories(dataset, num_classes):
    """Raise UserError if the classes 0 ... num_classes − 1 do not cover the set's categories."""
    highest = max(dataset.categories)
    if highest >= num_classes:
        raise UserError(
            f"category id {highest} ({dataset.categories[highest]}) in {dataset.path} is beyond "
            f"--num_classes {num_classes}: it must be at least {highest + 1}, the highest category id + 1"
        )


def check_same_categories(ours, path, theirs, other_path):
    """Raise UserError unless categories (id → name) of two files have the same name wherever both name an id.

    A category without a name of its own is called by its id. Upper case and spaces at the ends make no other name.
    """
    differing = [
        number
        for number in sorted(ours.keys() & theirs.keys())
        if _bare(ours[number]) != _bare(theirs[number]) and str(number) not in (ours[number], theirs[number])
    ]
    if differing:
        shown = ", ".join(f"{number} ({ours[number]} and {theirs[number]})" for number in differing[:5])
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise UserError(
            f"categories have other names in {path} than in {other_path}: {shown}{more}; an id must mean "
            "the same in both: correct one of them"
        )


def _bare(name):
    return name.strip().casefold()


def check_same_sets(train_set, val_set):
    """Raise UserError if a category's id means another one in the two sets; print a note if only one set has it."""
    check_same_categories(train_set.categories, train_set.path, val_set.categories, val_set.path)
    things = [getattr(dataset, "is_thing_map", {}) for dataset in (train_set, val_set)]
    shared = sorted(things[0].keys() & things[1].keys())
    if differing := [number for number in shared if things[0][number] != things[1][number]]:
        raise UserError(
            f"categories {', '.join(map(str, differing))} are things in one of {train_set.path} "
            f"and {val_set.path} and stuff in the other: correct isthing in one of them"
        )
    if new := sorted(val_set.categories.keys() - train_set.categories.keys()):
        print_once(
            f"note: {len(new)} categories of {val_set.path} are not in {train_set.path}, such as {new[0]} "
            f"({val_set.categories[new[0]]}): they cannot be learned"
        )


def note_objects(dataset, num_queries, learns):
    """Print a note if the set has no object, or more in an image than DETR can find.

    Args:
        dataset: CocoSet.
        learns: whether it is to be trained on.
    """
    counts = dataset.object_counts()
    if not counts:
        print_once(
            f"note: {dataset.path} has no object that counts (crowds and boxes without area do not): "
            + ("training on it learns to find nothing" if learns else "its AP is -1")
        )
    full = [image for image in dataset.images if counts.get(image["id"], 0) > num_queries]
    if full:
        most = max(full, key=lambda image: counts[image["id"]])
        print_once(
            f"note: {len(full)} of {len(dataset)} images of {dataset.path} have more objects than the "
            f"{num_queries} of --num_queries, such as {most['file_name']} with {counts[most['id']]}: the rest "
            + ("is not learned" if learns else "cannot be found")
        )


def note_measures(ground_truth, path):
    """Print a note for what makes COCO's numbers other than one may think.

    Args:
        ground_truth: pycocotools.COCO, as of `CocoSet.ground_truth`.
        path: of its file.
    """
    entries = ground_truth.dataset["annotations"]
    odd = [entry for entry in entries if not _is_area_in_box(entry)]
    if len(odd) > TOLERATED_AREAS * len(entries):
        first = odd[0]
        print_once(
            f"note: annotations {path}: the area of {len(odd)} of {len(entries)} objects does not fit the box, "
            f"such as {first['area']} for {first['bbox']} (x, y, width, height) in image {first['image_id']}: "
            "COCO's numbers for small, medium and large objects go by the area; leave it out to use the boxes'"
        )
    counts = Counter((entry["image_id"], entry["category_id"]) for entry in entries if not entry["iscrowd"])
    full = {image_id: count for (image_id, _), count in counts.items() if count > MOST_DETECTIONS}
    if full:
        name = ground_truth.imgs[max(full, key=full.get)]["file_name"]
        print_once(
            f"note: {len(full)} images of {path} have more than {MOST_DETECTIONS} objects of one category, such "
            f"as {name}: COCO's numbers take no more detections of a category in an image, and cannot reach 1"
        )


def _is_area_in_box(entry):
    """Whether an object's area may be that of a mask in its box."""
    width, height = (max(0, side) for side in entry["bbox"][2:])
    # masks are drawn to whole pixels, and so may be larger than small boxes
    return LEAST_AREA * width * height <= entry["area"] <= (width + 2) * (height + 2)


def note_category_ids(dataset):
    """Print a note if the categories' ids are so far apart that most classes have no category."""
    if dataset.num_classes > 1000 + 10 * len(dataset.categories):
        highest = max(dataset.categories)
        print_once(
            f"note: {dataset.path} has {len(dataset.categories)} categories, but ids up to {highest} "
            f"({dataset.categories[highest]}), and the class head has an output for every id: number them from "
            "1 to save memory and time"
        )


def _clip_boxes(entries, images, path):
    """(those of the entries whose box has an area in its image, these boxes (n, 4) as corners in it, float32)"""
    sizes = [(images[entry["image_id"]]["width"], images[entry["image_id"]]["height"]) * 2 for entry in entries]
    boxes = np.array([entry["bbox"] for entry in entries], dtype=np.float64).reshape(-1, 4)
    if len(boxes) and (0 <= boxes).all() and (boxes <= 1).all():
        print_once(
            f"note: annotations {path}: all {len(boxes)} boxes lie within 0 ... 1, as shares of the image do, "
            "and are taken as pixels: multiply x and width by the image's width, y and height by its height"
        )
    boxes[:, 2:] += boxes[:, :2]
    clipped = np.clip(boxes, 0, np.array(sizes, dtype=np.float64).reshape(-1, 4))
    outside = ~(np.abs(clipped - boxes) <= TOLERATED_PIXELS).all(1)
    empty = ~(clipped[:, 2:] > clipped[:, :2]).all(1)
    many_outside = outside.sum() > TOLERATED_SHARE * len(boxes)
    _judge_boxes(entries, path, outside, "reaches out of the image", "clipped", many_outside)
    _judge_boxes(entries, path, empty, "has no area", "left out", empty.all())
    return [entries[row] for row in np.flatnonzero(~empty)], torch.from_numpy(clipped[~empty].astype(np.float32))


def _judge_boxes(entries, path, bad, problem, cure, fatal):
    if not bad.any():
        return
    first = entries[bad.argmax()]
    sentence = (
        f"annotations {path}: the box {first['bbox']} (x, y, width, height) of object {first['id']} in image "
        f"{first['image_id']} {problem}; of {len(bad)} boxes {bad.sum()} are like that"
    )
    if fatal:
        raise UserError(f"{sentence}: correct the file")
    print_once(f"note: {sentence}, and {cure}")


# ---------------------------------------------------------------------------------------------------------------------
# Images


@contextlib.contextmanager
def naming(name, action="read"):
    """Where an image cannot be read (or what the action is) inside, a UserError names it and says why."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # decoders and transforms raise all kinds, and without the name none of them helps
        raise UserError(f"{name} cannot be {action}: {describe(error)}") from error


def read_noting(image):
    """RGB image of an open PIL image, and what `images.oddities` says of it."""
    return to_rgb(image), oddities(image)


def read_picture(source, name, read=to_rgb):
    """What `read` makes of the PIL image in a path or file object. Raises UserError with its `name` if it fails."""
    with naming(name), Image.open(source) as image:
        return read(image)


@functools.lru_cache(maxsize=8)
def _open_zip(path, pid):
    # a file handle that forked workers share has one position for all: every process opens its own
    return zipfile.ZipFile(path)


class Pictures:
    """The images in a folder or, where it lacks them, in the zip of the same name beside it."""

    def __init__(self, folder):
        self.folder, self.archive = folder, folder.with_name(folder.name + ".zip")
        if not folder.is_dir() and not self.archive.is_file():
            raise UserError(f"there is neither a folder {folder} nor {self.archive}: one of them must be there")

    def check(self, names):
        """Raise UserError if one is missing, or the zip is damaged."""
        unpacked = set(os.listdir(self.folder)) if self.folder.is_dir() else set()
        packed = set(self._zip().namelist()) if self.archive.is_file() else set()
        missing = [
            name
            for name in names
            if name not in unpacked
            and f"{self.folder.name}/{name}" not in packed
            and not (self.folder / name).is_file()
        ]
        if missing:
            raise UserError(
                f"image {missing[0]} is neither in {self.folder} nor in {self.archive} "
                f"({len(missing)} of {len(names)} are missing)"
            )

    def read(self, name, size, annotations, read):
        """What `read` makes of the PIL image. Raises UserError that names it if that fails, or if it has not the size
        (height, width) that the annotations say."""
        path = self.folder / name

        def read_checked(image):
            if (image.height, image.width) != size:
                turned = (
                    "; its EXIF orientation turns it, but COCO's boxes are those of the stored pixels"
                    if orientation(image) > 4 and size == image.size
                    else ""
                )
                raise UserError(
                    f"image {name} has {image.height}×{image.width} pixels, but {annotations} says "
                    f"{size[0]}×{size[1]}{turned}: correct the file, or its objects would be misplaced"
                )
            return read(image)

        if path.is_file():
            return read_picture(path, f"image {path}", read_checked)
        return read_picture(self._unpack(name), f"image {name} in {self.archive}", read_checked)

    def _unpack(self, name):
        try:
            return io.BytesIO(self._zip().read(f"{self.folder.name}/{name}"))
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, OSError, RuntimeError) as error:
            raise UserError(f"image {name} in {self.archive} cannot be unpacked: {error}") from error

    def _zip(self):
        try:
            return _open_zip(self.archive, os.getpid())
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(
                f"{self.archive} is no readable zip, perhaps truncated ({error}): fetch it again"
            ) from error
