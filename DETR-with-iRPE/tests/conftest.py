"""Small data sets in COCO's format, command lines and processes for the tests."""

import argparse
import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

torch.set_num_threads(1)  # on a busy machine, threads of small models spend their time waiting for each other
PROJECT = Path(__file__).resolve().parent.parent
COCO_SAMPLE = PROJECT.parent.parent / "shared" / "data" / "coco-sample"
sys.path[:0] = [str(PROJECT), str(PROJECT / "demo")]

PATIENCE = 1200  # seconds until a test kills a process; long enough for a busy machine
CATEGORIES = [{"id": 1, "name": "ant"}, {"id": 3, "name": "bee"}, {"id": 4, "name": "cat"}]


def random_boxes(random, count, width, height):
    """Random boxes (count, 4) inside an image, as (x, y, width, height), with an area greater than 0."""
    x, y = random.uniform(0, 0.7 * width, count), random.uniform(0, 0.7 * height, count)
    return np.stack([x, y, random.uniform(2, width - x), random.uniform(2, height - y)], axis=1).round(2)


def write_set(root, count=6, seed=0, splits=("train", "val")):
    """Write random images of different sizes with up to three objects. The second image is grey, the third has no
    objects, and the fourth may have crowds."""
    random = np.random.RandomState(seed)
    for split in splits:
        folder = Path(root, f"{split}2017")
        folder.mkdir(parents=True)
        data = {"images": [], "annotations": [], "categories": CATEGORIES}
        for number in range(count):
            width, height = (int(side) for side in random.randint(40, 90, 2))
            image = Image.fromarray(random.randint(0, 255, (height, width, 3)).astype(np.uint8))
            name = f"{number:04}.png"
            (image.convert("L") if number == 1 else image).save(folder / name)
            data["images"].append({"id": 10 * number + 7, "file_name": name, "width": width, "height": height})
            for box in random_boxes(random, 0 if number == 2 else random.randint(1, 4), width, height):
                x, y, w, h = box
                data["annotations"].append(
                    {
                        "id": len(data["annotations"]) + 1,
                        "image_id": 10 * number + 7,
                        "bbox": box.tolist(),
                        "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                        "category_id": int(random.choice([1, 3, 4])),
                        "area": float(box[2] * box[3]),
                        "iscrowd": int(number == 3 and random.rand() < 0.3),
                    }
                )
        save_annotations(root, split, data)
    return root


def save_annotations(root, split, data):
    path = Path(root, "annotations", f"instances_{split}2017.json")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(data))


def write_panoptic(root, folder, split="val", seed=0):
    """Write panoptic annotations for a data set: its instances, of which later ones cover earlier ones and some are
    crowds, one category of stuff on part of the other pixels, and void."""
    random, folder, truth = np.random.RandomState(seed), Path(folder), COCO()
    truth.dataset = load_annotations(root, split)
    truth.createIndex()
    maps = folder / f"panoptic_{split}2017"
    maps.mkdir(parents=True)
    categories = [{**category, "isthing": 1} for category in truth.dataset["categories"]]
    data = {
        "images": truth.dataset["images"],
        "annotations": [],
        "categories": [*categories, {"id": 200, "name": "sky", "isthing": 0}],
    }
    for image in data["images"]:
        ids = np.zeros((image["height"], image["width"]), np.int64)
        ids[: image["height"] // 2] = sky = random.randint(1, 256**3)
        segments = [{"id": sky, "category_id": 200, "iscrowd": 0}]
        for entry in truth.imgToAnns[image["id"]]:
            segments.append(
                {
                    "id": random.randint(1, 256**3),
                    "category_id": entry["category_id"],
                    "iscrowd": max(entry["iscrowd"], int(random.rand() < 0.2)),
                }
            )
            ids[truth.annToMask(entry) > 0] = segments[-1]["id"]
        segments = [{**segment, "area": int((ids == segment["id"]).sum())} for segment in segments]
        save_ids(maps / f"{image['id']}.png", ids)
        data["annotations"].append(
            {
                "image_id": image["id"],
                "file_name": f"{image['id']}.png",
                "segments_info": [segment for segment in segments if segment["area"]],
            }
        )
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / f"panoptic_{split}2017.json").write_text(json.dumps(data))
    return folder


def save_ids(path, ids):
    """Write segment ids (H, W) as a PNG file in COCO's panoptic format."""
    Image.fromarray(np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=-1).astype(np.uint8)).save(path)


def load_annotations(root, split):
    return json.loads(Path(root, "annotations", f"instances_{split}2017.json").read_text())


def pack(root, split, folder=None):
    """Write `root`/{split}2017.zip with the images of a folder."""
    folder = folder or Path(root, f"{split}2017")
    with zipfile.ZipFile(Path(root, f"{split}2017.zip"), "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, f"{split}2017/{file.name}")


@pytest.fixture(scope="session")
def coco(tmp_path_factory):
    """A data set that tests must not change."""
    return write_set(tmp_path_factory.mktemp("coco"))


def parse(*flags):
    """Parse flags of main.py."""
    from main import get_args_parser

    return argparse.ArgumentParser(parents=[get_args_parser()]).parse_args([str(flag) for flag in flags])


def small(coco_path, *flags):
    """Flags for a run of a second or two on the CPU."""
    return [
        "--device",
        "cpu",
        "--coco_path",
        coco_path,
        "--backbone",
        "resnet18",
        "--no_pretrained_backbone",
        "--short_side",
        64,
        "--hidden_dim",
        16,
        "--nheads",
        2,
        "--enc_layers",
        1,
        "--dec_layers",
        2,
        "--dim_feedforward",
        16,
        "--num_queries",
        5,
        "--batch_size",
        2,
        "--num_workers",
        0,
        "--epochs",
        1,
        "--enc_rpe2d",
        "rpe-2.0-product-ctx-1-k",
        *flags,
    ]


def start(*command, **environment):
    """Start Python with one thread in the project's folder, and capture its output.

    The note about a missing rpe_ops extension is suppressed, since these tests do not depend on it.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore:the extension rpe_ops", **environment}
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=PROJECT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def free_port():
    """A free port below the range from which Linux assigns ports to outgoing connections, so that it stays free."""
    while True:
        port = 10000 + secrets.randbelow(22000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("", port))
            return port


def launcher(world_size, *command):
    """The beginning of a command line with torch.distributed.launch; released commands also have --use_env."""
    return [
        "-m",
        "torch.distributed.launch",
        f"--nproc_per_node={world_size}",
        f"--master_port={free_port()}",
        *command,
    ]


def finish(process):
    """Wait for a process: (exit status, standard output, standard error)."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.terminate()
    return process.returncode, out, err
