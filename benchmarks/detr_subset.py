"""Make a data set of a few images of COCO, to overfit a model: both splits contain the same images.

python benchmarks/detr_subset.py COCO_PATH FOLDER [--images 4] [--most 4] [--repeat 25]
"""

import argparse
import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

SMALL = 32**2  # pixels: COCO calls objects up to this area small


def copy_subset(coco_path: str | Path, folder: str | Path, images: int = 4, most: int = 4, repeat: int = 25) -> None:
    """Copy the first `images` training images with one to `most` objects, none of them a crowd or small.

    The training split contains each image `repeat` times, with different ids, so that an epoch has several steps.
    """
    data = json.loads(Path(coco_path, "annotations", "instances_train2017.json").read_bytes())
    objects = defaultdict(list)
    for entry in data["annotations"]:
        objects[entry["image_id"]].append(entry)
    by_id = sorted(data["images"], key=lambda image: image["id"])
    chosen = [image for image in by_id if is_suitable(objects[image["id"]], most)][:images]
    for split, times in (("train2017", repeat), ("val2017", 1)):
        subset = {"categories": data["categories"], **repeated(chosen, objects, times)}
        for part in (split, "annotations"):
            Path(folder, part).mkdir(parents=True, exist_ok=True)
        Path(folder, "annotations", f"instances_{split}.json").write_text(json.dumps(subset))
        for image in chosen:
            shutil.copyfile(Path(coco_path, "train2017", image["file_name"]), Path(folder, split, image["file_name"]))


def is_suitable(objects: list[dict[str, Any]], most: int) -> bool:
    """Whether an image has one to `most` objects, none of them a crowd or small."""
    return 1 <= len(objects) <= most and all(not entry["iscrowd"] and entry["area"] > SMALL for entry in objects)


def repeated(
    images: list[dict[str, Any]], objects: dict[int, list[dict[str, Any]]], times: int
) -> dict[str, list[dict[str, Any]]]:
    """The entries of a COCO file that contains each image and its objects `times` times, with new ids."""
    new_images, annotations = [], []
    for image in images:
        for copy in range(times):
            new_id = image["id"] * times + copy
            new_images.append({**image, "id": new_id})
            for entry in objects[image["id"]]:
                annotations.append({**entry, "image_id": new_id, "id": len(annotations) + 1})
    return {"images": new_images, "annotations": annotations}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("coco_path", help="folder with COCO's annotations/ and train2017/")
    parser.add_argument("folder", help="folder of the new data set")
    parser.add_argument("--images", type=int, default=4, help="number of images (default: 4)")
    parser.add_argument("--most", type=int, default=4, help="largest number of objects in an image (default: 4)")
    parser.add_argument("--repeat", type=int, default=25, help="copies of an image in the training split (default: 25)")
    copy_subset(**vars(parser.parse_args()))
