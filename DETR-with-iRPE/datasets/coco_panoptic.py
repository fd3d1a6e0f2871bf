"""COCO's panoptic format: maps of segments in PNGs, things and stuff."""

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torchvision.ops import masks_to_boxes

from util.runtime import UserError

from .coco import CocoSet, Pictures, check_same_categories, read_annotations
from .fields import AREA, BOX, FILE_NAME, FLAG, ID, LIST, check_entries, optional, read_column

FIELDS = {
    "categories": {"isthing": FLAG},
    "annotations": {"image_id": ID, "file_name": FILE_NAME, "segments_info": LIST},
}
SEGMENT_FIELDS = {
    "id": ID,
    "category_id": ID,
    "iscrowd": optional(FLAG, 0),
    "area": optional(AREA),
    "bbox": optional(BOX),
}
MAP_MODES = ("RGB", "RGBA", "P")  # Pillow's of PNGs whose colours are three times 8 bits


class CocoPanoptic(CocoSet):
    """Segments of things and stuff; crowds are among the targets, as in the released models' training.

    Args:
        root: folder of the images, and of `annotations/instances_{split}2017.json` if boxes and masks of instances
            are to be measured too.
        panoptic_root: folder with `annotations/panoptic_{split}2017.json`, and `panoptic_{split}2017/` or its zip.
        The others as CocoSet's.
    Raises: UserError for files that are missing or damaged and for annotations that cannot be right.
    """

    def __init__(self, root, panoptic_root, split, transforms, masks=False):
        path = Path(panoptic_root, "annotations", f"panoptic_{split}2017.json")
        data = read_annotations(path, "--coco_panoptic_path", FIELDS)
        super().__init__(path, data, root, split, transforms, masks)
        self.is_thing_map = {category["id"]: bool(category["isthing"]) for category in data["categories"]}
        self.files = {entry["image_id"]: entry["file_name"] for entry in data["annotations"]}
        ids = {image["id"] for image in self.images}
        if other := ids ^ set(self.files):
            raise UserError(
                f"annotations {path}: image {min(other)} is only among the "
                f"{'images' if min(other) in ids else 'annotations'}; each must have one annotation"
            )
        if len(self.files) < len(data["annotations"]):
            twice = Counter(entry["image_id"] for entry in data["annotations"]).most_common(1)[0][0]
            raise UserError(f"annotations {path}: image {twice} has several annotations; each must have one")
        self.segments = self._read_segments(data["annotations"])
        self.maps = Pictures(Path(panoptic_root, f"panoptic_{split}2017"))
        self.maps.check(list(self.files.values()))

    def _read_segments(self, annotations):
        """Image id → (n, 3): id, category and whether it is a crowd."""
        segments, files = [], []
        for annotation in annotations:
            segments += annotation["segments_info"]
            files += [annotation["file_name"]] * len(annotation["segments_info"])
        check_entries(segments, self.path, "segments_info")
        columns = [
            read_column(segments, field, kind, lambda number: self._segment_name(files, segments, number))
            for field, kind in SEGMENT_FIELDS.items()
        ]
        for number, category in enumerate(columns[1]):
            if category not in self.categories:
                raise UserError(
                    f"{self._segment_name(files, segments, number)} has category {category}, which is not "
                    "among the categories"
                )
        rows = np.array(columns[:3], dtype=np.int64).reshape(3, -1).T
        limits = np.cumsum([0, *(len(annotation["segments_info"]) for annotation in annotations)])
        found = {
            annotation["image_id"]: rows[first:end]
            for annotation, first, end in zip(annotations, limits, limits[1:], strict=False)
        }
        for image_id, of_image in found.items():
            if len(np.unique(of_image[:, 0])) < len(of_image):
                raise UserError(
                    f"annotations {self.path}: two segments in the segments_info of {self.files[image_id]} "
                    "have the same id"
                )
        return found

    def _segment_name(self, files, segments, number):
        place = number - files.index(files[number])
        given = segments[number].get("id")
        return f"annotations {self.path}: segments_info of {files[number]}: segment {place}" + (
            f" (id {given!r})" if given else ""
        )

    def object_counts(self):
        """How many segments each image has that has any, by the image's id."""
        return {image_id: len(segments) for image_id, segments in self.segments.items() if len(segments)}

    def ground_truth(self):
        """The instances in these images as pycocotools.COCO; None if there is no file of instances."""
        if not self.instances.is_file():
            return None
        coco = super().ground_truth()
        names = {number: category["name"] for number, category in coco.cats.items() if category["name"] is not None}
        check_same_categories(self.categories, self.path, names, self.instances)
        return coco

    def read_map(self, image):
        """Ids (H, W), int64, of the segments in an image; 0 is void, unless a segment has that id."""
        name, size = self.files[image["id"]], (image["height"], image["width"])
        ids = self.maps.read(name, size, self.path, read_ids)
        unknown = ids[~np.isin(ids, [0, *self.segments[image["id"]][:, 0]])]
        if len(unknown):
            raise UserError(
                f"{self.maps.folder / name} has pixels of segment {unknown[0]}, which is not in the "
                f"segments_info of {self.path}: the two are not of the same set"
            )
        return ids

    def read_objects(self, image):
        """(boxes (n, 4) as corners around the pixels of every segment, labels (n,), masks (n, H, W) as uint8)"""
        ids, categories, _ = self.segments[image["id"]].T
        masks = torch.from_numpy(self.read_map(image) == ids[:, None, None])
        seen = masks.flatten(1).any(1)
        if len(seen) and not seen.any():
            raise UserError(
                f"{self.maps.folder / self.files[image['id']]} has no pixel of any of the {len(seen)} "
                f"segments that {self.path} says are in it: the two are not of the same set"
            )
        masks = masks[seen]
        # its corners are pixels, ours are their outer edges, as COCO's
        boxes = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])
        return boxes, torch.from_numpy(categories)[seen], masks.view(torch.uint8)


def read_ids(image):
    """`to_ids` of an open PIL image. Raises ValueError for one that cannot be a map of COCO's panoptic format."""
    if image.mode not in MAP_MODES:
        raise ValueError(
            f"its mode is {image.mode}, but the ids of segments are colours: maps are PNGs in RGB with 8 "
            "bits per channel"
        )
    return to_ids(image)


def to_ids(image):
    """The ids (H, W), int64, that the colours of a PIL image stand for: R + 256·G + 65536·B."""
    return np.asarray(image.convert("RGB")) @ np.array([1, 256, 256**2])
