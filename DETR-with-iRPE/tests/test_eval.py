"""Box AP equals that of pycocotools. test_panoptic.py tests that metrics do not depend on the number of ranks."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import main
from conftest import finish, launcher, load_annotations, pack, parse, save_annotations, small, start, write_set
from datasets import build_dataset, eval_loader
from datasets.coco_eval import CocoEvaluator
from engine import evaluate
from fill import fill_state_dict
from models import build_model


def noisy_copies(data, seed=0):
    """Detections (image id → result of PostProcess): the objects, shifted a little, and some with another class."""
    random, found = np.random.RandomState(seed), {}
    for image in data["images"]:
        rows = []
        for a in data["annotations"]:
            if a["image_id"] == image["id"]:
                box = np.array(a["bbox"]) * random.uniform(0.9, 1.1, 4)
                label = a["category_id"] if random.rand() < 0.8 else 3
                rows.append([box[0], box[1], box[0] + box[2], box[1] + box[3], random.rand(), label])
        rows = torch.tensor(rows, dtype=torch.float64).reshape(-1, 6)
        found[image["id"]] = {"boxes": rows[:, :4], "scores": rows[:, 4], "labels": rows[:, 5].long()}
    return found


def direct(path, found):
    """The twelve metrics of pycocotools, from a list of results in COCO's format."""
    results = [
        {
            "image_id": image_id,
            "category_id": int(label),
            "score": float(score),
            "bbox": [box[0].item(), box[1].item(), (box[2] - box[0]).item(), (box[3] - box[1]).item()],
        }
        for image_id, r in found.items()
        for box, score, label in zip(*r.values(), strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(path)
        measured = COCOeval(truth, truth.loadRes(results), "bbox")
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    return measured.stats


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("larger"), count=30, splits=("val",))


def test_evaluator_equals_pycocotools_on_noisy_copies(larger):
    found = noisy_copies(load_annotations(larger, "val"))
    found[17] = {name: values[:0] for name, values in found[17].items()}  # no detections in this image
    assert not len(found[27]["scores"])  # and no objects in this one
    evaluator = CocoEvaluator(build_dataset("val", parse(*small(larger))).ground_truth())
    for image_id in reversed(found):
        evaluator.update({image_id: found[image_id]})
    expected = direct(larger / "annotations" / "instances_val2017.json", found)
    assert 0.2 < expected[0] < 0.9
    np.testing.assert_allclose(evaluator.summarize().stats, expected, rtol=1e-12)


def test_a_model_without_detections_has_an_ap_of_zero(larger):
    evaluator = CocoEvaluator(build_dataset("val", parse(*small(larger))).ground_truth())
    empty = {"boxes": torch.empty(0, 4), "scores": torch.empty(0), "labels": torch.empty(0, dtype=torch.long)}
    evaluator.update({image["id"]: empty for image in load_annotations(larger, "val")["images"]})
    assert evaluator.summarize().stats[0] == 0


def test_a_data_set_without_objects_has_an_ap_of_minus_one(tmp_path):
    root = write_set(tmp_path / "set", count=2, splits=("val",))
    data = load_annotations(root, "val")
    found = noisy_copies(data)
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps({**data, "annotations": []}))
    evaluator = CocoEvaluator(build_dataset("val", parse(*small(root))).ground_truth())
    evaluator.update(found)
    assert set(evaluator.summarize().stats) == {-1.0}


@pytest.mark.parametrize("new_id", [lambda number: number, lambda number: 7])
def test_objects_count_also_where_their_ids_begin_at_0_or_are_all_the_same(tmp_path, new_id):
    root = write_set(tmp_path / "set", count=6, splits=("val",))
    data = load_annotations(root, "val")
    data["annotations"] = [{**a, "id": new_id(number), "iscrowd": 0} for number, a in enumerate(data["annotations"])]
    save_annotations(root, "val", data)
    evaluator = CocoEvaluator(build_dataset("val", parse(*small(root))).ground_truth())
    for image in data["images"]:
        objects = [a for a in data["annotations"] if a["image_id"] == image["id"]]
        boxes = torch.tensor([a["bbox"] for a in objects], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        evaluator.update(
            {
                image["id"]: {
                    "boxes": boxes,
                    "scores": torch.ones(len(objects)),
                    "labels": torch.tensor([a["category_id"] for a in objects]),
                }
            }
        )
    assert evaluator.summarize().stats[0] == pytest.approx(1)


def oracle(args):
    """The result of `evaluate` for a model that recognizes images by their pixels and returns noisy copies of their
    objects, so that the metrics are far from 0 and 1."""
    dataset = build_dataset("val", args)
    _, criterion, postprocessors = build_model(args)
    found = noisy_copies(load_annotations(args.coco_path, "val"))
    images = [image for image, _ in dataset]

    class Oracle(torch.nn.Module):
        def forward(self, samples):
            logits, boxes = torch.zeros(len(samples.tensors), 5, 6), torch.full((len(samples.tensors), 5, 4), 0.5)
            logits[..., 5] = 9.0
            for i, image in enumerate(samples.tensors):
                index = next(
                    j
                    for j, known in enumerate(images)
                    if known.shape <= image.shape and torch.equal(known, image[:, : known.shape[1], : known.shape[2]])
                )
                size, result = dataset[index][1]["orig_size"], found[dataset.images[index]["id"]]
                corners = result["boxes"] / torch.tensor([size[1], size[0], size[1], size[0]])
                for n, (box, score, label) in enumerate(zip(corners, result["scores"], result["labels"], strict=True)):
                    boxes[i, n] = torch.cat([(box[:2] + box[2:]) / 2, box[2:] - box[:2]])
                    logits[i, n, label] = 9.0 + score
            return {"pred_logits": logits, "pred_boxes": boxes}

    return evaluate(
        Oracle(), criterion, postprocessors, eval_loader(dataset, args), dataset.ground_truth(), torch.device("cpu")
    )[0]


def test_metrics_do_not_depend_on_the_batch_size(larger):
    one, few, many = (
        oracle(parse(*small(larger, "--eval", "--num_classes", 5, "--eval_batch_size", size))) for size in (1, 2, 20)
    )
    assert 0.2 < one["coco_eval_bbox"][0] < 0.9
    assert one["coco_eval_bbox"] == few["coco_eval_bbox"] == many["coco_eval_bbox"]


@pytest.fixture(scope="module")
def filled(tmp_path_factory, larger):
    """A checkpoint in the released format, for the model of `small`."""
    model, _, _ = build_model(parse(*small(larger, "--num_classes", 5, "--eval")))
    path = tmp_path_factory.mktemp("filled") / "filled.pth"
    torch.save({"model": fill_state_dict(model.state_dict())}, path)
    return path


def report(text):
    """The lines of a program's output that contain metrics."""
    return [line for line in text.splitlines() if line.startswith(("Averaged stats:", " Average "))]


def test_the_released_command_gives_the_same_metrics_from_folder_and_zip_on_one_or_two_ranks(
    larger, filled, tmp_path, capsys
):
    (tmp_path / "annotations").symlink_to(larger / "annotations")
    pack(tmp_path, "val", larger / "val2017")
    flags = ["--eval", "--resume", filled, "--output_dir", tmp_path / "out"]
    process = start(*launcher(2, "--use_env", "main.py", *small(tmp_path, *flags)))
    main.main(parse(*small(larger, "--eval", "--resume", filled)))
    alone = report(capsys.readouterr().out)
    status, out, err = finish(process)
    assert status == 0, err
    assert len(alone) == 13 and report(out) == alone
    assert alone[0].split()[2] == "loss:" and "loss_giou_0:" in alone[0] and "class_error:" in alone[0]
    arrays = torch.load(tmp_path / "out" / "eval.pth", weights_only=True)
    assert arrays["precision"].shape == (10, 101, 3, 4, 3)


def test_with_batch_size_1_results_do_not_depend_on_other_images(larger, filled, capsys):
    for flags in (("--eval_batch_size", 1), ("--batch_size", 1)):
        main.main(parse(*small(larger, "--eval", "--resume", filled, *flags)))
    first, second = np.array_split(report(capsys.readouterr().out), 2)
    assert list(first) == list(second)
