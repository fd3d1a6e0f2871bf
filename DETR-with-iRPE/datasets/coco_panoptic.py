"""COCO's panoptic format: maps of segments in PNGs, things and stuff."""
from pathlib import Path

import numpy as np
import torch
from torchvision.ops import masks_to_boxes

from util.runtime import UserError

from .coco import CocoSet, Pictures, check_fields, read_annotations


class CocoPanoptic(CocoSet):
    """Segments of things and stuff; crowds are among the targets, as in the released models' training.

    Args:
        root: folder of the pictures, and of `annotations/instances_{split}2017.json` if boxes and masks of instances
            are to be measured too.
        panoptic_root: folder with `annotations/panoptic_{split}2017.json`, and `panoptic_{split}2017/` or its zip.
        The others as CocoSet's.
    Raises: UserError for files that are missing or damaged and for annotations that cannot be right.
    """

    def __init__(self, root, panoptic_root, split, transforms, masks=False):
        path = Path(panoptic_root, "annotations", f"panoptic_{split}2017.json")
        data = read_annotations(path, "--coco_panoptic_path", categories={"id": int, "isthing": int},
                                annotations={"image_id": int, "file_name": str, "segments_info": list})
        super().__init__(path, data, root, split, transforms, masks)
        self.is_thing_map = {category["id"]: bool(category["isthing"]) for category in data["categories"]}
        self.files, self.segments = {}, {}
        for annotation in data["annotations"]:
            self.files[annotation["image_id"]] = annotation["file_name"]
            self.segments[annotation["image_id"]] = self._segments(annotation)
        ids = {image["id"] for image in self.images}
        if other := ids ^ set(self.files):
            raise UserError(f"annotations {path}: picture {min(other)} is only among the "
                            f"{'images' if min(other) in ids else 'annotations'}; each must have one annotation")
        self.maps = Pictures(Path(panoptic_root, f"panoptic_{split}2017"))
        self.maps.check(list(self.files.values()))

    def _segments(self, annotation):
        """(n, 3): id, category and whether it is a crowd."""
        name = f"annotations {self.path}: segments_info of {annotation['file_name']}"
        segments = annotation["segments_info"]
        check_fields(segments, {"id": int, "category_id": int}, name)
        for segment in segments:
            if segment["category_id"] not in self.categories:
                raise UserError(f"{name} has category {segment['category_id']}, which is not among the categories")
        rows = [(segment["id"], segment["category_id"], bool(segment.get("iscrowd"))) for segment in segments]
        return np.array(rows, dtype=np.int64).reshape(-1, 3)

    def ground_truth(self):
        """The instances in these pictures as pycocotools.COCO; None if there is no file of instances."""
        return super().ground_truth() if self.instances.is_file() else None

    def read_map(self, image):
        """Ids (H, W), int64, of the segments in a picture; 0 is void, unless a segment has that id."""
        name, size = self.files[image["id"]], (image["height"], image["width"])
        ids = to_ids(self.maps.read(name, size, self.path))
        unknown = ids[~np.isin(ids, [0, *self.segments[image["id"]][:, 0]])]
        if len(unknown):
            raise UserError(f"{self.maps.folder / name} has pixels of segment {unknown[0]}, which is not in the "
                            f"segments_info of {self.path}: the two are not of the same set")
        return ids

    def read_objects(self, image):
        """(boxes (n, 4) as corners around the pixels of every segment, labels (n,), masks (n, H, W) as uint8)"""
        ids, categories, _ = self.segments[image["id"]].T
        masks = torch.from_numpy(self.read_map(image) == ids[:, None, None])
        seen = masks.flatten(1).any(1)
        masks = masks[seen]
        # its corners are pixels, ours are their outer edges, as COCO's
        boxes = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])
        return boxes, torch.from_numpy(categories)[seen], masks.view(torch.uint8)


def to_ids(picture):
    """The ids (H, W), int64, that the colours of a PIL picture stand for: R + 256·G + 65536·B."""
    return np.asarray(picture.convert("RGB")) @ np.array([1, 256, 256 ** 2])
