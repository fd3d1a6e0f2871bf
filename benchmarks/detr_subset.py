"""Make a data set of a few images of COCO, to overfit a model: both splits contain the same images.

python benchmarks/detr_subset.py COCO_PATH FOLDER [--images 4] [--most 4] [--repeat 25]
"""

import argparse
import json
import shutil
from pathlib import Path


def copy_subset(coco_path: str | Path, folder: str | Path, images: int = 4, most: int = 4, repeat: int = 25) -> None:
    """Copy the first `images` training images with one to `most` objects, none of them a crowd or small (32² pixels).

    The training split contains each image `repeat` times, with different ids, so that an epoch has several steps.
    """
    data = json.loads(Path(coco_path, "annotations", "instances_train2017.json").read_bytes())
    objects = {}
    for entry in data["annotations"]:
        objects.setdefault(entry["image_id"], []).append(entry)
    chosen = [
        image
        for image in sorted(data["images"], key=lambda image: image["id"])
        if 1 <= len(objects.get(image["id"], [])) <= most
        and all(not entry["iscrowd"] and entry["area"] > 32**2 for entry in objects[image["id"]])
    ][:images]
    for split, times in (("train2017", repeat), ("val2017", 1)):
        copies = [(image, image["id"] * times + copy) for image in chosen for copy in range(times)]
        subset = {
            "images": [{**image, "id": new_id} for image, new_id in copies],
            "categories": data["categories"],
            "annotations": [
                {**entry, "image_id": new_id, "id": number}
                for number, (entry, new_id) in enumerate(
                    ((entry, new_id) for image, new_id in copies for entry in objects[image["id"]]), start=1
                )
            ],
        }
        for part in (split, "annotations"):
            Path(folder, part).mkdir(parents=True, exist_ok=True)
        Path(folder, "annotations", f"instances_{split}.json").write_text(json.dumps(subset))
        for image in chosen:
            shutil.copyfile(Path(coco_path, "train2017", image["file_name"]), Path(folder, split, image["file_name"]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("coco_path", help="folder with COCO's annotations/ and train2017/")
    parser.add_argument("folder", help="folder of the new data set")
    parser.add_argument("--images", type=int, default=4, help="number of images (default: 4)")
    parser.add_argument("--most", type=int, default=4, help="largest number of objects in an image (default: 4)")
    parser.add_argument("--repeat", type=int, default=25, help="copies of an image in the training split (default: 25)")
    copy_subset(**vars(parser.parse_args()))
