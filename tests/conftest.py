"""Small data sets and checkpoints of the real architectures, with known scores, for the tests of reproduce.py."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

torch.set_num_threads(1)  # on a busy machine, several threads make small models slower
# A shell starts background jobs with SIGINT ignored, and the programs that the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
pytest.register_assert_rewrite("trainings")

PATIENCE = 1200  # seconds after which a process counts as hanging; long enough for a busy machine
TINY, SMALL = (f"deit_{size}_patch16_224_ctx_product_50_shared_k" for size in ("tiny", "small"))
DETR = "detr_resnet50_rpe_20_product_ctx_1_k"
CLASSES, PER_CLASS = 8, 3
HEIGHT, WIDTH = 64, 96  # of the images for detection: the smallest whose map has several tokens
METRICS = ("ap", "ap50", "ap75", "aps", "apm", "apl")


def start(*flags, program=("tools/reproduce.py",)):
    """Start reproduce.py on the CPU with one thread; its output is captured."""
    return subprocess.Popen(
        [sys.executable, *program, "--device", "cpu", *map(str, flags)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process):
    """(exit status, standard output, standard error)"""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.terminate()
    return process.returncode, out, err


def signal_at_start(word, number):
    """From now on, when this process has started a command that contains the word, it sends itself a signal before
    subprocess.Popen returns."""

    class Signalled(subprocess.Popen):
        def __init__(self, command, *args, **options):
            super().__init__(command, *args, **options)
            if any(word in str(part) for part in command):
                os.kill(os.getpid(), number)

    subprocess.Popen = Signalled


def wait_until(condition):
    """Wait for a state that another process brings about."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def normalized(image):
    """PIL image → (3, H, W), normalized as in both codebases' evaluation, without resizing."""
    pixels = np.asarray(image, np.float32) / 255
    return torch.from_numpy(((pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).transpose(2, 0, 1)).float()


def load_model(codebase, name):
    torch.manual_seed(3)
    return torch.hub.load(str(ROOT / codebase), name, source="local").eval()


@pytest.fixture(scope="session")
def imagenet(tmp_path_factory):
    """(data path, DeiT-tiny that classifies some of the images correctly, its top-1 and top-5 in percent)"""
    root, random = tmp_path_factory.mktemp("imagenet"), np.random.RandomState(0)
    images, targets = [], torch.arange(CLASSES).repeat_interleave(PER_CLASS)
    for number, target in enumerate(targets.tolist()):
        # of the size after the resize to 256, so that only the crop must be done here
        colour = [25 * target, 180 - 20 * target, 60 * (target % 3)] + random.randint(0, 20, 3)
        image = Image.fromarray((colour + random.randint(0, 55, (256, 256, 3))).astype(np.uint8))
        folder = root / "val" / f"n{target:02}"
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number}.png")
        images.append(normalized(image)[:, 16:240, 16:240])
    model = load_model("DeiT-with-iRPE", TINY)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lookup_table" in name:
                parameter.normal_(std=0.2)
        features = torch.cat([model.forward_head(model.forward_features(x[None]), pre_logits=True) for x in images])
        mean = features.mean(0)
        model.head.weight.zero_()
        for number in range(CLASSES):  # some images are classified as the neighbouring class, some are far off
            seen, scale = [(number, 1.0), (number - 1, 1.1), (number, 1.0), (number, -1.0)][number % 4]
            model.head.weight[number] = scale * (features[targets == seen % CLASSES].mean(0) - mean)
            model.head.bias[number] = -model.head.weight[number] @ mean
        logits = torch.cat([model(x[None]) for x in images])
    two_best = logits.topk(2).values
    assert (two_best[:, 0] - two_best[:, 1]).min() > 1e-3  # rounding must not change which is the best
    higher = (logits > logits.gather(1, targets[:, None])).sum(1)
    top1, top5 = (100 * (higher < k).double().mean().item() for k in (1, 5))
    assert 20 < top1 < top5 < 100
    return root, model.state_dict(), {"top1": top1, "top5": top5}


def detect(model, image, image_id):
    """Detections in one image, in the format of COCO's results."""
    with torch.no_grad():
        found = model(normalized(image)[None])
    scores, labels = found["pred_logits"][0].softmax(-1)[:, :-1].max(-1)
    x, y, w, h = (found["pred_boxes"][0] * torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])).double().unbind(-1)
    boxes = torch.stack([x - w / 2, y - h / 2, w, h], 1)
    return [
        {"image_id": image_id, "category_id": label, "score": score, "bbox": box}
        for label, score, box in zip(labels.tolist(), scores.tolist(), boxes.tolist(), strict=True)
    ]


def annotate(detections, random):
    """Ground truth near the best detections, so that some of them are correct, more or less precisely."""
    objects = []
    for detection in sorted(detections, key=lambda found: -found["score"])[:6]:
        x, y, w, h = np.array(detection["bbox"]) + random.uniform(-0.1, 0.1, 4) * np.tile(detection["bbox"][2:], 2)
        left, top = np.clip([x, y], 0, [WIDTH - 4, HEIGHT - 4])
        right, bottom = np.clip([x + w, y + h], [left + 3, top + 3], [WIDTH, HEIGHT])
        wrong = random.rand() < 0.3
        objects.append(
            {
                "category_id": 1 + detection["category_id"] % 89 if wrong else detection["category_id"],
                "bbox": [left, top, right - left, bottom - top],
                "area": (right - left) * (bottom - top),
                "image_id": detection["image_id"],
                "iscrowd": 0,
            }
        )
    return objects


@pytest.fixture(scope="session")
def coco(tmp_path_factory):
    """(data path, DETR-R50 with iRPE, its six AP as pycocotools computes them from its detections)"""
    root, random = tmp_path_factory.mktemp("coco"), np.random.RandomState(1)
    model = load_model("DETR-with-iRPE", DETR)
    with torch.no_grad():  # else all queries predict the same
        model.class_embed.weight.mul_(8)
        model.bbox_embed.layers[-1].weight.mul_(8)
    (root / "val2017").mkdir()
    (root / "annotations").mkdir()
    data = {"images": [], "annotations": [], "categories": [{"id": number} for number in range(91)]}
    detections = []
    for image_id in range(1, 6):
        image = Image.fromarray(random.randint(0, 255, (HEIGHT, WIDTH, 3)).astype(np.uint8))
        image.save(root / "val2017" / f"{image_id}.png")
        data["images"].append({"id": image_id, "file_name": f"{image_id}.png", "height": HEIGHT, "width": WIDTH})
        found = detect(model, image, image_id)
        data["annotations"] += annotate(found, random)
        detections += found
    for number, entry in enumerate(data["annotations"], start=1):
        entry["id"] = number
    path = root / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps(data))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(path)
        measured = COCOeval(truth, truth.loadRes(detections), "bbox")
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    assert 0.1 < measured.stats[0] < measured.stats[1] < 0.9
    return root, model.state_dict(), dict(zip(METRICS, measured.stats[:6].tolist(), strict=True))
