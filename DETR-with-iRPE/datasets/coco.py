"""Data sets in COCO's format, with images from a folder or directly from its zip."""

import contextlib
import functools
import io
import json
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO
from torchvision import tv_tensors

from util.images import Oddities, naming, oddities, orientation, to_rgb
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
    Kind,
    check_entries,
    optional,
    read_column,
)
from .rle import to_rle

# Because of rounding, some of COCO's boxes exceed the image by up to 2 pixels. A file is rejected if more than one box
# in a thousand exceeds it by more.
TOLERATED_PIXELS = 2.0
TOLERATED_SHARE = 1e-3
# A note is printed if more than 5 % of the areas in a file do not fit the box. The mask of a thin object, for example a
# rope, may cover as little as a thousandth of its box.
TOLERATED_AREAS = 0.05
MIN_AREA = 1e-3
MAX_DETECTIONS = 100  # COCO's metrics count this many detections of a category in an image
# Part of a file → field → kind. All of COCO's files have these fields.
PARTS = {
    "images": {"id": ID, "file_name": FILE_NAME, "height": SIDE, "width": SIDE},
    "categories": {"id": ID, "name": optional(TEXT)},
}
# The fields of instance annotations.
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
    """The images of a split. A subclass provides their objects in `read_objects` and `object_counts`.

    Items are (image, target), as `transforms` returns them. The target it receives has `image_id` (), `orig_size` (2,)
    as height and width, `boxes` (n, 4), `labels` (n,) and, with `masks`, `masks` (n, H, W).

    Args:
        path: the annotation file, for messages.
        data: the content of this file.
        root: folder with `{split}2017/` or `{split}2017.zip` and `annotations/instances_{split}2017.json`.
        split: `train` or `val`.
        transforms: maps (PIL image, target) to (image, target), see transforms.py.
        masks: whether targets have masks.
    """

    def __init__(
        self, path: Path, data: dict, root: str | os.PathLike, split: str, transforms: Callable, masks: bool
    ) -> None:
        self.path = path
        self.transforms = transforms
        self.masks = masks
        self.instances = Path(root, "annotations", f"instances_{split}2017.json")
        self.categories = {
            category["id"]: str(category["id"] if category["name"] is None else category["name"])
            for category in data["categories"]
        }
        self.images = sorted(data["images"], key=lambda image: image["id"])
        self.image_files = ImageFiles(Path(root, f"{split}2017"))
        self.image_files.check([image["file_name"] for image in self.images])
        self.oddities = Oddities(len(self.images))

    @property
    def num_classes(self) -> int:
        """Highest category id + 1."""
        return max(self.categories) + 1

    def read_objects(self, image: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The objects of an image, given its entry in the annotations.

        Returns: boxes (n, 4) as corners in pixels, labels (n,), and masks (n, H, W), uint8 of 0 and 1, or None.
        """
        raise NotImplementedError

    def object_counts(self) -> dict[int, int]:
        """The number of objects of each image that has objects, by image id."""
        raise NotImplementedError

    def ground_truth(self) -> COCO | None:
        """The instances of these images, for pycocotools.

        Objects get new ids, because pycocotools treats an object with id 0 as never detected, and counts only the last
        of several objects with the same id.

        Raises: UserError if the file of instances lacks one of the images.
        """
        coco = COCO()
        ours = {image["id"] for image in self.images}
        coco.dataset = read_instances(self.instances, self.masks)
        coco.dataset["images"] = [image for image in coco.dataset["images"] if image["id"] in ours]
        if len(coco.dataset["images"]) < len(ours):
            lost = min(ours - {image["id"] for image in coco.dataset["images"]})
            raise UserError(
                f"image {lost} of {self.path} is not in {self.instances}: both must describe the same split"
            )
        for number, entry in enumerate(coco.dataset["annotations"], start=1):
            entry["id"] = number
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """File name of an image."""
        return self.images[index]["file_name"]

    def place(self, index: int) -> str:
        """Path of an image, for messages. The image may be in the zip file instead."""
        return str(self.image_files.folder / self.name(index))

    def __getitem__(self, index: int) -> tuple[Any, dict]:
        entry = self.images[index]
        size = (entry["height"], entry["width"])
        image, odd = self.image_files.read(entry["file_name"], size, self.path, _to_rgb_with_oddities)
        self.oddities.add(index, odd)
        with naming(f"{entry['file_name']} of {self.path}", "transformed"):
            boxes, labels, masks = self.read_objects(entry)
            target = {
                "image_id": torch.tensor(entry["id"]),
                "orig_size": torch.tensor(size),
                "labels": labels,
                "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            }
            if self.masks:
                target["masks"] = tv_tensors.Mask(masks)
            return self.transforms(image, target)


class CocoDetection(CocoSet):
    """Instances, without crowds.

    Args:
        root, split, transforms, masks: as for `CocoSet`.
        remove_difficult: remove objects that are marked `difficult`, as in Pascal VOC converted to COCO's format.
    Raises: UserError for files that are missing or damaged, and for invalid annotations.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        split: str,
        transforms: Callable,
        remove_difficult: bool = False,
        masks: bool = False,
    ) -> None:
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
        self.rows = {}  # image id → indices of its objects in boxes, labels and rles
        for row, entry in enumerate(entries):
            self.rows.setdefault(entry["image_id"], []).append(row)

    def read_objects(self, image: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """See `CocoSet.read_objects`; boxes are clipped to the image."""
        rows = self.rows.get(image["id"], [])
        masks = None
        if self.masks:
            size = (image["height"], image["width"])
            rles = [{"size": size, "counts": self.rles[row]} for row in rows]
            masks = torch.from_numpy(rle_tools.decode(rles) if rles else np.empty((*size, 0), np.uint8))
            masks = masks.permute(2, 0, 1)
        return self.boxes[rows], self.labels[rows], masks

    def object_counts(self) -> dict[int, int]:
        """The number of objects of each image that has objects, by image id."""
        return {image_id: len(rows) for image_id, rows in self.rows.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Annotations


def read_annotations(path: Path, flag: str, fields: Mapping[str, Mapping[str, Kind]]) -> dict[str, list[dict]]:
    """Read a file of annotations and check its fields.

    Args:
        path: the JSON file.
        flag: the command line's flag for the folder of the file, for messages.
        fields: part of the file → field → kind, in addition to the fields in PARTS.
    Returns: the content of the file, with the values of the fields as `Kind.read` returns them.
    Raises: UserError that names the file and, where a field is invalid, the entry and the field.
    """
    data = _read_json(path, flag)
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


def _read_json(path: Path, flag: str) -> dict:
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"annotations {path} cannot be read ({error.strerror}): {flag} must be the folder that holds annotations/"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"annotations {path} are not JSON, perhaps truncated: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"annotations {path} have no list of images: this is not COCO's format")
    return data


def _entry_name(path: Path, part: str, entries: list[dict], number: int) -> str:
    """The name of an entry in messages."""
    entry = entries[number]
    return f"annotations {path}: {part}: entry {number}" + (f" (id {entry['id']!r})" if entry.get("id") else "")


def _note_shared_files(images: list[dict], path: Path) -> None:
    """Print a note if several images have the same file."""
    name, count = Counter(image["file_name"] for image in images).most_common(1)[0]
    if count > 1:
        print_once(
            f"note: annotations {path}: {count} of the images have the same file, {name}: each entry "
            "has only its own objects, so the objects of the other entries count as background"
        )


def read_instances(path: Path, masks: bool = False) -> dict[str, list[dict]]:
    """Read COCO's instances, and check that images, categories and objects fit together.

    Args:
        path: the JSON file.
        masks: convert the objects' `segmentation` to compressed RLE instead of removing it.
    Returns: the content of the file. Every object has `id`, `iscrowd` (0 or 1) and `area`.
    Raises: UserError that names the file and what is wrong in it.
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
        segmentation = entry.pop("segmentation", None)  # uses most of the memory, and is only needed for masks
        if masks:
            image = images[entry["image_id"]]
            entry["segmentation"] = to_rle(segmentation, image["height"], image["width"], _object_name(path, entry))
    return data


def _object_name(path: Path, entry: dict) -> str:
    return f"annotations {path}: object {entry['id']}"


def _check_known(entries: list[dict], field: str, known: Collection[int], path: Path, relation: str, part: str) -> None:
    """Raise UserError for the first entry whose field is not among the known ids."""
    for unknown in {entry[field] for entry in entries}.difference(known):
        entry = next(entry for entry in entries if entry[field] == unknown)
        raise UserError(f"{_object_name(path, entry)} {relation} {unknown}, which is not among the {part}")


def check_categories(dataset: CocoSet, num_classes: int) -> None:
    """Raise UserError unless the classes 0 ... num_classes − 1 cover all categories of the data set."""
    highest = max(dataset.categories)
    if highest >= num_classes:
        raise UserError(
            f"category id {highest} ({dataset.categories[highest]}) in {dataset.path} is beyond "
            f"--num_classes {num_classes}: it must be at least {highest + 1}, the highest category id + 1"
        )


def check_same_categories(ours: Mapping[int, str], path: Any, theirs: Mapping[int, str], other_path: Any) -> None:
    """Raise UserError if a category id that two files share has different names in them.

    A category whose name is its id counts as unnamed and matches any name. Case and surrounding spaces are ignored.

    Args:
        ours, theirs: category id → name.
        path, other_path: the files, for the message.
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


def _bare(name: str) -> str:
    return name.strip().casefold()


def check_same_sets(train_set: CocoSet, val_set: CocoSet) -> None:
    """Raise UserError if a category id has different meanings in two data sets.

    Print a note if the validation set has categories that the training set lacks.
    """
    check_same_categories(train_set.categories, train_set.path, val_set.categories, val_set.path)
    train_things = getattr(train_set, "is_thing_map", {})
    val_things = getattr(val_set, "is_thing_map", {})
    shared = sorted(train_things.keys() & val_things.keys())
    if differing := [number for number in shared if train_things[number] != val_things[number]]:
        raise UserError(
            f"categories {', '.join(map(str, differing))} are things in one of {train_set.path} "
            f"and {val_set.path} and stuff in the other: correct isthing in one of them"
        )
    if new := sorted(val_set.categories.keys() - train_set.categories.keys()):
        print_once(
            f"note: {len(new)} categories of {val_set.path} are not in {train_set.path}, such as {new[0]} "
            f"({val_set.categories[new[0]]}): they cannot be learned"
        )


def note_objects(dataset: CocoSet, num_queries: int, is_train: bool) -> None:
    """Print a note if a data set has no objects, and one if an image has more objects than DETR can detect.

    Args:
        dataset: the data set.
        num_queries: the largest number of objects that the model can detect in an image.
        is_train: whether the data set is the training set.
    """
    counts = dataset.object_counts()
    if not counts:
        consequence = "training on it learns to find nothing" if is_train else "its AP is -1"
        print_once(
            f"note: {dataset.path} has no object that counts (crowds and boxes without area do not): {consequence}"
        )
    full = [image for image in dataset.images if counts.get(image["id"], 0) > num_queries]
    if full:
        most = max(full, key=lambda image: counts[image["id"]])
        consequence = "is not learned" if is_train else "cannot be found"
        print_once(
            f"note: {len(full)} of {len(dataset)} images of {dataset.path} have more objects than the "
            f"{num_queries} of --num_queries, such as {most['file_name']} with {counts[most['id']]}: the rest "
            f"{consequence}"
        )


def note_misleading_metrics(ground_truth: COCO, path: Path) -> None:
    """Print a note for annotations that make COCO's metrics misleading.

    Args:
        ground_truth: the result of `CocoSet.ground_truth`.
        path: the annotation file, for the notes.
    """
    entries = ground_truth.dataset["annotations"]
    odd = [entry for entry in entries if not _is_area_in_box(entry)]
    if len(odd) > TOLERATED_AREAS * len(entries):
        first = odd[0]
        print_once(
            f"note: annotations {path}: the area of {len(odd)} of {len(entries)} objects does not fit the box, "
            f"such as {first['area']} for {first['bbox']} (x, y, width, height) in image {first['image_id']}: "
            "COCO's metrics for small, medium and large objects use the area; leave it out to use the boxes' areas"
        )
    counts = Counter((entry["image_id"], entry["category_id"]) for entry in entries if not entry["iscrowd"])
    full = {image_id: count for (image_id, _), count in counts.items() if count > MAX_DETECTIONS}
    if full:
        name = ground_truth.imgs[max(full, key=full.get)]["file_name"]
        print_once(
            f"note: {len(full)} images of {path} have more than {MAX_DETECTIONS} objects of one category, such "
            f"as {name}: COCO's metrics use only the {MAX_DETECTIONS} most confident detections per image and "
            "category, so they cannot reach 1"
        )


def _is_area_in_box(entry: dict) -> bool:
    """Whether a mask inside the object's box can have the object's area."""
    width, height = (max(0, side) for side in entry["bbox"][2:])
    # Masks consist of whole pixels, and may therefore be larger than a small box.
    return MIN_AREA * width * height <= entry["area"] <= (width + 2) * (height + 2)


def note_category_ids(dataset: CocoSet) -> None:
    """Print a note if the category ids are so large that most classes have no category."""
    if dataset.num_classes > 1000 + 10 * len(dataset.categories):
        highest = max(dataset.categories)
        print_once(
            f"note: {dataset.path} has {len(dataset.categories)} categories, but ids up to {highest} "
            f"({dataset.categories[highest]}), and the class head has an output for every id: number them from "
            "1 to save memory and time"
        )


def _clip_boxes(entries: list[dict], images: Mapping[int, dict], path: Path) -> tuple[list[dict], torch.Tensor]:
    """Clip the boxes of annotations to their images, and remove entries whose box has no area there.

    Args:
        entries: annotations with `bbox` (x, y, width, height).
        images: image id → entry.
        path: the annotation file, for messages.
    Returns: the remaining entries, and their boxes (n, 4) as corners in pixels, float32.
    Raises: UserError if too many boxes reach out of their image, or all boxes have no area.
    """
    boxes = np.array([entry["bbox"] for entry in entries], dtype=np.float64).reshape(-1, 4)
    if len(boxes) and (0 <= boxes).all() and (boxes <= 1).all():
        print_once(
            f"note: annotations {path}: all {len(boxes)} boxes lie within 0 ... 1, as if they were relative to the "
            "image, and are used as pixels: multiply x and width by the image's width, y and height by its height"
        )
    sizes = []
    for entry in entries:
        image = images[entry["image_id"]]
        sizes.append((image["width"], image["height"], image["width"], image["height"]))
    boxes[:, 2:] += boxes[:, :2]
    clipped = np.clip(boxes, 0, np.array(sizes, dtype=np.float64).reshape(-1, 4))
    outside = ~(np.abs(clipped - boxes) <= TOLERATED_PIXELS).all(1)
    empty = ~(clipped[:, 2:] > clipped[:, :2]).all(1)
    many_outside = outside.sum() > TOLERATED_SHARE * len(boxes)
    _judge_boxes(entries, path, outside, "extends beyond the image", "clipped", many_outside)
    _judge_boxes(entries, path, empty, "has no area", "left out", empty.all())
    return [entries[row] for row in np.flatnonzero(~empty)], torch.from_numpy(clipped[~empty].astype(np.float32))


def _judge_boxes(entries: list[dict], path: Path, bad: np.ndarray, problem: str, cure: str, fatal: bool) -> None:
    """Report the boxes where `bad` (n,) is true: raise UserError if `fatal`, otherwise print a note."""
    if not bad.any():
        return
    first = entries[bad.argmax()]
    sentence = (
        f"annotations {path}: the box {first['bbox']} (x, y, width, height) of object {first['id']} in image "
        f"{first['image_id']} {problem}; this applies to {bad.sum()} of {len(bad)} boxes"
    )
    if fatal:
        raise UserError(f"{sentence}: correct the file")
    print_once(f"note: {sentence}, which are {cure}")


# ---------------------------------------------------------------------------------------------------------------------
# Images


def _to_rgb_with_oddities(image: Image.Image) -> tuple[Image.Image, int]:
    """The RGB version of an open image, and its `oddities`."""
    return to_rgb(image), oddities(image)


def read_image(source: Path | BinaryIO, name: str, read: Callable[[Image.Image], Any] = to_rgb) -> Any:
    """Open an image and return the result of `read`.

    Args:
        source: path or file object.
        name: of the image, for messages.
        read: takes the open PIL image.
    Raises: UserError that names the image if it cannot be opened or `read` fails.
    """
    with naming(name), Image.open(source) as image:
        return read(image)


@functools.lru_cache(maxsize=8)
def _open_zip(path: Path, pid: int) -> zipfile.ZipFile:
    # Forked workers would share the position of a common file handle. The process id is therefore part of the cache
    # key, so that every process opens the zip file itself.
    return zipfile.ZipFile(path)


class ImageFiles:
    """Image files in a folder or, if the folder lacks them, in the zip file of the same name next to it.

    Args:
        folder: path of the folder. The zip file contains the folder.
    Raises: UserError if neither exists.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.archive = folder.with_name(folder.name + ".zip")
        if not folder.is_dir() and not self.archive.is_file():
            raise UserError(f"there is neither a folder {folder} nor {self.archive}: one of them must be there")

    def check(self, names: Sequence[str]) -> None:
        """Raise UserError if one of the files is missing or the zip file is damaged."""
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

    def read(self, name: str, size: tuple[int, int], annotations: Path, read: Callable[[Image.Image], Any]) -> Any:
        """Open an image, check its size and return the result of `read`.

        Args:
            name: the file's path in the folder.
            size: height and width according to the annotations.
            annotations: the annotation file, for messages.
            read: takes the open PIL image.
        Raises: UserError that names the image if it has another size, cannot be opened or `read` fails.
        """
        path = self.folder / name

        def read_checked(image: Image.Image) -> Any:
            if (image.height, image.width) != size:
                turned = ""
                if orientation(image) > 4 and size == image.size:
                    turned = "; its EXIF orientation turns it, but COCO's boxes are those of the stored pixels"
                raise UserError(
                    f"image {name} has {image.height}×{image.width} pixels, but {annotations} says "
                    f"{size[0]}×{size[1]}{turned}: correct the file, or its objects would be misplaced"
                )
            return read(image)

        if path.is_file():
            return read_image(path, str(path), read_checked)
        return read_image(self._unpack(name), f"{name} in {self.archive}", read_checked)

    def _unpack(self, name: str) -> io.BytesIO:
        """The content of a file in the zip file."""
        try:
            return io.BytesIO(self._zip().read(f"{self.folder.name}/{name}"))
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, OSError, RuntimeError) as error:
            raise UserError(f"image {name} in {self.archive} cannot be unpacked: {error}") from error

    def _zip(self) -> zipfile.ZipFile:
        try:
            return _open_zip(self.archive, os.getpid())
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(
                f"{self.archive} is not a readable zip file, perhaps truncated ({error}): fetch it again"
            ) from error
