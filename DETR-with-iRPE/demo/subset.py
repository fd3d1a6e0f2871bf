"""Copy some pictures of a set in COCO's format, each into both splits: a set to overfit, for proof that all is wired.

    python demo/subset.py COCO_PATH FOLDER --images 4 [--most 4]
"""
import argparse
import json
import shutil
from pathlib import Path


def copy_subset(coco_path, folder, images=4, most=4):
    """Write the first `images` training pictures with one to `most` objects, none of them a crowd or tiny."""
    data = json.loads(Path(coco_path, "annotations", "instances_train2017.json").read_bytes())
    objects = {}
    for entry in data["annotations"]:
        objects.setdefault(entry["image_id"], []).append(entry)
    chosen = [image for image in sorted(data["images"], key=lambda image: image["id"])
              if 1 <= len(objects.get(image["id"], [])) <= most
              and all(not entry["iscrowd"] and entry["area"] > 32 ** 2 for entry in objects[image["id"]])][:images]
    subset = {"images": chosen, "categories": data["categories"],
              "annotations": [entry for image in chosen for entry in objects[image["id"]]]}
    for split in ("train2017", "val2017"):
        for part in (split, "annotations"):
            Path(folder, part).mkdir(parents=True, exist_ok=True)
        Path(folder, "annotations", f"instances_{split}.json").write_text(json.dumps(subset))
        for image in chosen:
            shutil.copyfile(Path(coco_path, "train2017", image["file_name"]), Path(folder, split, image["file_name"]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("coco_path")
    parser.add_argument("folder")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--most", type=int, default=4)
    copy_subset(**vars(parser.parse_args()))
