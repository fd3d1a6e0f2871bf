"""Data sets in COCO's panoptic format: things and stuff, with segment ids as the colours of PNG files."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from torchvision.ops import masks_to_boxes

from util.runtime import UserError

from .coco import CocoSet, ImageFiles, check_same_categories, read_annotations
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
MAP_MODES = ("RGB", "RGBA", "P")  # Pillow's modes of PNG files with 8 bits per channel


class CocoPanoptic(CocoSet):
    """Segments of things and stuff. Targets include crowds, as in the training of the released models.

    Args:
        root: folder of the images. Box and mask AP also need its `annotations/instances_{split}2017.json`.
        panoptic_root: folder with `annotations/panoptic_{split}2017.json`, and `panoptic_{split}2017/` or its zip.
        split, transforms, masks: as for `CocoSet`.
    Raises: UserError for files that are missing or damaged, and for invalid annotations.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        panoptic_root: str | os.PathLike,
        split: str,
        transforms: Callable,
        masks: bool = False,
    ) -> None:
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
        self.maps = ImageFiles(Path(panoptic_root, f"panoptic_{split}2017"))
        self.maps.check(list(self.files.values()))

    def _read_segments(self, annotations: list[dict]) -> dict[int, np.ndarray]:
        """Read the `segments_info` of all images: image id → (n, 3), whose columns are id, category and crowd (0 or 1).

        Raises: UserError for invalid fields, unknown categories, and several segments of an image with the same id.
        """
        # All segments in one list, so that read_column checks each field of millions of segments at once.
        segments = []
        files = []  # the file of each segment's image
        for annotation in annotations:
            for segment in annotation["segments_info"]:
                segments.append(segment)
                files.append(annotation["file_name"])
        check_entries(segments, self.path, "segments_info")
        columns = {
            field: read_column(segments, field, kind, lambda number: self._segment_name(files, segments, number))
            for field, kind in SEGMENT_FIELDS.items()
        }
        for number, category in enumerate(columns["category_id"]):
            if category not in self.categories:
                raise UserError(
                    f"{self._segment_name(files, segments, number)} has category {category}, which is not "
                    "among the categories"
                )
        rows = np.array([columns["id"], columns["category_id"], columns["iscrowd"]], dtype=np.int64).T
        by_image = {}
        first = 0
        for annotation in annotations:
            end = first + len(annotation["segments_info"])
            in_image = by_image[annotation["image_id"]] = rows[first:end]
            if len(np.unique(in_image[:, 0])) < len(in_image):
                raise UserError(
                    f"annotations {self.path}: two segments in the segments_info of {annotation['file_name']} "
                    "have the same id"
                )
            first = end
        return by_image

    def _segment_name(self, files: list[str], segments: list[dict], number: int) -> str:
        """The name in messages of the segment with this index in the lists of all segments and their files."""
        place = number - files.index(files[number])
        given = segments[number].get("id")
        return f"annotations {self.path}: segments_info of {files[number]}: segment {place}" + (
            f" (id {given!r})" if given else ""
        )

    def object_counts(self) -> dict[int, int]:
        """The number of segments of each image that has segments, by image id."""
        return {image_id: len(segments) for image_id, segments in self.segments.items() if len(segments)}

    def ground_truth(self) -> COCO | None:
        """The instances of these images for pycocotools, or None if there is no file of instances.

        Raises: UserError if the file lacks one of the images or names categories differently.
        """
        if not self.instances.is_file():
            return None
        coco = super().ground_truth()
        names = {number: category["name"] for number, category in coco.cats.items() if category["name"] is not None}
        check_same_categories(self.categories, self.path, names, self.instances)
        return coco

    def read_map(self, image: dict) -> np.ndarray:
        """The segment ids (H, W), int64, of an image, given its entry in the annotations.

        The id 0 is void, unless a segment has that id.

        Raises: UserError for a map that cannot be read, has another size, or has ids that no segment has.
        """
        name = self.files[image["id"]]
        ids = self.maps.read(name, (image["height"], image["width"]), self.path, read_ids)
        unknown = ids[~np.isin(ids, [0, *self.segments[image["id"]][:, 0]])]
        if len(unknown):
            raise UserError(
                f"{self.maps.folder / name} has pixels of segment {unknown[0]}, which is not in the "
                f"segments_info of {self.path}: the PNG files and the JSON file are from different data sets or "
                "splits"
            )
        return ids

    def read_objects(self, image: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `CocoSet.read_objects`; segments without a pixel are removed, and boxes enclose the others' pixels."""
        ids, categories, _ = self.segments[image["id"]].T
        masks = torch.from_numpy(self.read_map(image) == ids[:, None, None])
        seen = masks.flatten(1).any(1)
        if len(seen) and not seen.any():
            raise UserError(
                f"{self.maps.folder / self.files[image['id']]} has no pixel of any of the {len(seen)} "
                f"segments that {self.path} says are in it: the PNG files and the JSON file are from different "
                "data sets or splits"
            )
        masks = masks[seen]
        # masks_to_boxes returns the indices of the outermost pixels; COCO's boxes end at their outer edges.
        boxes = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])
        return boxes, torch.from_numpy(categories)[seen], masks.view(torch.uint8)


def read_ids(image: Image.Image) -> np.ndarray:
    """`to_ids` of an open image. Raises ValueError for modes that COCO's panoptic format does not use."""
    if image.mode not in MAP_MODES:
        raise ValueError(
            f"its mode is {image.mode}, but the ids of segments are colours: maps are PNGs in RGB with 8 "
            "bits per channel"
        )
    return to_ids(image)


def to_ids(image: Image.Image) -> np.ndarray:
    """Decode the segment ids (H, W), int64, from the colours of an image: R + 256·G + 65536·B."""
    return np.asarray(image.convert("RGB")) @ np.array([1, 256, 256**2])
