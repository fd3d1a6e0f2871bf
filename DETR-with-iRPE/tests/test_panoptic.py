"""Panoptic data sets, mask AP and panoptic quality. The metrics equal those of pycocotools and of an independent
implementation, and do not depend on the number of ranks."""

import contextlib
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

import main
from conftest import (
    COCO_SAMPLE,
    finish,
    launcher,
    load_annotations,
    pack,
    parse,
    save_annotations,
    save_ids,
    small,
    start,
    write_panoptic,
    write_set,
)
from datasets import build_dataset, eval_loader
from datasets.coco_eval import CocoEvaluator
from datasets.coco_panoptic import to_ids
from datasets.panoptic_eval import PanopticEvaluator, compare, quality
from engine import evaluate
from models import build_model
from util import runtime
from util.runtime import UserError


def flags_of(root, *flags):
    """Flags of a run on the panoptic data set in root/panoptic, with the images in root."""
    return small(root, "--masks", "--dataset_file", "coco_panoptic", "--coco_panoptic_path", f"{root}/panoptic", *flags)


def read(root, split="val"):
    return build_dataset(split, parse(*flags_of(root)))


def annotations(root):
    return root / "panoptic" / "annotations" / "panoptic_val2017.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A panoptic data set with crowds and void, which tests must not change."""
    root = write_set(tmp_path_factory.mktemp("made"), count=12)
    for split in ("train", "val"):
        write_panoptic(root, root / "panoptic", split)
    return root


@pytest.fixture
def own(tmp_path):
    """A panoptic data set that a test may change."""
    root = write_set(tmp_path / "set", count=3, splits=("val",))
    write_panoptic(root, root / "panoptic")
    return root


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def test_targets_are_the_segments_with_boxes_around_their_pixels(made):
    dataset = read(made)
    dataset.transforms = lambda *pair: pair
    found = {target["image_id"].item(): target for _, target in dataset}
    assert len(found) == 12
    for annotation in json.loads(annotations(made).read_text())["annotations"]:
        target = found[annotation["image_id"]]
        ids = to_ids(Image.open(made / "panoptic" / "panoptic_val2017" / annotation["file_name"]))
        segments = annotation["segments_info"]
        assert target["labels"].tolist() == [segment["category_id"] for segment in segments]
        for segment, box, mask in zip(segments, target["boxes"].tolist(), target["masks"], strict=True):
            assert np.array_equal(mask, ids == segment["id"])
            rows, columns = np.nonzero(ids == segment["id"])
            assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_maps_in_a_zip_and_without_masks_give_the_same_boxes(made, tmp_path):
    for name in ("val2017", "annotations"):
        (tmp_path / name).symlink_to(made / name)
    shutil.copytree(made / "panoptic" / "annotations", tmp_path / "panoptic" / "annotations")
    pack(tmp_path / "panoptic", "panoptic_val", made / "panoptic" / "panoptic_val2017")
    bare = build_dataset("val", parse(*(flag for flag in flags_of(tmp_path) if flag != "--masks")))
    for (_, target), (_, expected) in zip(bare, read(made), strict=True):
        assert torch.equal(target["boxes"], expected["boxes"]) and "masks" not in target
        assert expected["masks"].dtype == torch.bool and len(expected["masks"]) == len(expected["labels"])


def test_a_segment_without_pixels_is_not_an_object(own):
    data = json.loads(annotations(own).read_text())
    data["annotations"][0]["segments_info"].append({"id": 5, "category_id": 1})
    annotations(own).write_text(json.dumps(data))
    target = read(own)[0][1]
    assert len(target["labels"]) == len(target["masks"]) == len(data["annotations"][0]["segments_info"]) - 1


@pytest.mark.parametrize(("iscrowd", "crowd"), [(None, 0), (False, 0), (True, 1)])
def test_iscrowd_of_a_segment_may_be_null_false_or_true(own, iscrowd, crowd):
    data = json.loads(annotations(own).read_text())
    data["annotations"][0]["segments_info"][0]["iscrowd"] = iscrowd
    annotations(own).write_text(json.dumps(data))
    assert read(own).segments[7][0, 2] == crowd


def test_the_annotations_determine_which_categories_are_things(made, monkeypatch):
    seen = []
    monkeypatch.setattr(main, "evaluate", lambda model, criterion, post, *rest: seen.append(post) or ({}, None))
    main.main(parse(*flags_of(made, "--eval")))
    assert seen[0]["panoptic"].is_thing_map == {1: True, 3: True, 4: True, 200: False}


# ---------------------------------------------------------------------------------------------------------------------
# Errors: each is a UserError whose message names what is wrong


def refused(root, *words):
    with pytest.raises(UserError) as caught:
        list(read(root))
    assert all(str(word) in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_error_names_missing_maps_and_annotations(own):
    folder = own / "panoptic" / "panoptic_val2017"
    (folder / "17.png").unlink()
    refused(own, "17.png", folder, "1 of 3")
    shutil.rmtree(folder)
    refused(own, folder, folder.with_suffix(".zip"))
    shutil.rmtree(own / "panoptic")
    refused(own, annotations(own), "--coco_panoptic_path")


def test_error_names_a_map_with_pixels_of_an_unknown_segment(own):
    path = own / "panoptic" / "panoptic_val2017" / "7.png"
    ids = to_ids(Image.open(path))
    ids[0, 0] = 4711
    save_ids(path, ids)
    refused(own, path, "segment 4711")


def test_error_names_a_map_of_another_size_than_its_image(own):
    Image.new("RGB", (33, 44)).save(own / "panoptic" / "panoptic_val2017" / "7.png")
    refused(own, "7.png", "44×33")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data["annotations"][1].update(image_id=99), ["image 17", "images"]),
        (lambda data: data["annotations"][2].update(image_id=2), ["image 2 ", "annotations"]),
        (lambda data: data["annotations"].pop(), ["image 27", "images"]),
        (lambda data: data["images"][0].update(file_name="other.png"), ["other.png", "1 of 3"]),
        (lambda data: data["annotations"][0]["segments_info"][0].update(category_id=99), ["7.png", "category 99"]),
        (lambda data: data["annotations"][0]["segments_info"][0].update(id="a"), ["7.png", "'a'"]),
        (lambda data: data["categories"][0].pop("isthing"), ["categories", "isthing"]),
    ],
)
def test_inconsistent_annotations_are_rejected(own, change, words):
    data = json.loads(annotations(own).read_text())
    change(data)
    annotations(own).write_text(json.dumps(data))
    refused(own, annotations(own) if "1 of 3" not in words else own, *words)


def test_instances_are_evaluated_only_on_the_images_of_the_panoptic_data_set(own):
    data = json.loads(annotations(own).read_text())
    data["images"], data["annotations"] = data["images"][1:], data["annotations"][1:]
    annotations(own).write_text(json.dumps(data))
    assert read(own).ground_truth().getImgIds() == [17, 27]


def test_instances_of_another_data_set_are_rejected(own):
    data = load_annotations(own, "val")
    data["images"] = data["images"][1:]
    data["annotations"] = [entry for entry in data["annotations"] if entry["image_id"] != 7]
    save_annotations(own, "val", data)
    with pytest.raises(UserError, match=r"image 7 of .*panoptic_val2017.json is not in .*instances_val2017.json"):
        read(own).ground_truth()


# ---------------------------------------------------------------------------------------------------------------------
# Mask AP


def noisy_masks(root, seed=0):
    """Detections (image id → result of PostProcessSegm): the objects' masks, shifted, and some with another class."""
    random, truth = np.random.RandomState(seed), COCO(root / "annotations" / "instances_val2017.json")
    found = {}
    for image in truth.imgs.values():
        entries = truth.imgToAnns[image["id"]]
        masks = [np.roll(truth.annToMask(entry), random.randint(0, 4, 2), (0, 1)) for entry in entries]
        masks = np.array(masks, np.uint8).reshape(-1, 1, image["height"], image["width"])
        labels = [entry["category_id"] if random.rand() < 0.8 else 3 for entry in entries]
        found[image["id"]] = {
            "masks": torch.from_numpy(masks),
            "labels": torch.tensor(labels, dtype=torch.long),
            "scores": torch.from_numpy(random.rand(len(entries)).round(1)),
        }
    return found


def test_mask_ap_equals_pycocotools_in_any_order_of_the_images(made):
    found, path = noisy_masks(made), made / "annotations" / "instances_val2017.json"
    results = [
        {
            "image_id": image_id,
            "category_id": int(label),
            "score": float(score),
            "segmentation": rle_tools.encode(np.asfortranarray(mask[0].numpy())),
        }
        for image_id, r in found.items()
        for mask, label, score in zip(*r.values(), strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(path)
        expected = COCOeval(truth, truth.loadRes(results), "segm")
        expected.evaluate()
        expected.accumulate()
        expected.summarize()
    evaluator = CocoEvaluator(build_dataset("val", parse(*small(made, "--masks"))).ground_truth(), "segm")
    for image_id in reversed(found):
        evaluator.update({image_id: found[image_id]})
    assert 0.2 < expected.stats[0] < 0.9
    assert evaluator.summarize().stats.tolist() == expected.stats.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Panoptic quality

ROW = np.arange(20)[None]  # the column of each pixel of a row


def segments(*limits):
    """The ids of a row of 20 pixels, from (id, first pixel, one past the last pixel) of each segment; 0 elsewhere."""
    return sum(((ROW >= first) & (ROW < end)) * number for number, first, end in limits)


@pytest.mark.parametrize(
    ("truth", "true_segments", "found", "found_segments", "expected"),
    [
        # an IoU of one half is not a match: one missed and one wrong segment
        (segments((1, 0, 8)), [(1, 5, 0)], segments((1, 0, 4)), [(1, 5, 0)], [(5, 0), (5, 0)]),
        (segments((1, 0, 8)), [(1, 5, 0)], segments((9, 0, 6)), [(9, 5, 0)], [(5, 0.75)]),
        # the union excludes void: 6 of 8, not 6 of 12
        (
            segments((1, 0, 8), (2, 12, 20)),
            [(1, 5, 0), (2, 6, 0)],
            segments((9, 2, 12)),
            [(9, 5, 0)],
            [(5, 0.75), (6, 0)],
        ),
        # a found segment is not wrong if more than half of it is void; with exactly half it is
        (segments((1, 0, 8)), [(1, 5, 0)], segments((9, 5, 12)), [(9, 7, 0)], [(5, 0)]),
        (segments((1, 0, 8)), [(1, 5, 0)], segments((9, 4, 12)), [(9, 7, 0)], [(5, 0), (7, 0)]),
        # a crowd is never matched or missed, and found segments of its category are not wrong
        (segments((1, 0, 20)), [(1, 5, 1)], segments((0, 0, 0)), [], []),
        (segments((1, 0, 20)), [(1, 5, 1)], segments((9, 0, 20)), [(9, 5, 0)], []),
        (segments((1, 0, 20)), [(1, 5, 1)], segments((9, 0, 20)), [(9, 6, 0)], [(6, 0)]),
        (segments((1, 0, 20)), [(1, 5, 1)], segments((8, 0, 9), (9, 9, 20)), [(8, 5, 0), (9, 5, 0)], []),
        # void and crowd together make up more than half
        (segments((1, 0, 4), (2, 4, 8)), [(1, 5, 1), (2, 6, 0)], segments((9, 1, 11)), [(9, 5, 0)], [(6, 0)]),
        # a wrong category, and a true segment without pixels
        (segments((1, 0, 20)), [(1, 5, 0), (3, 8, 0)], segments((9, 0, 20)), [(9, 6, 0)], [(5, 0), (6, 0), (8, 0)]),
        # a segment may have the id 0, in both maps or in the found map only
        (segments((1, 0, 10)), [(1, 5, 0)], segments((1, 10, 20)), [(0, 5, 0), (1, 5, 0)], [(5, 1.0)]),
    ],
)
def test_matching_follows_the_rules_for_void_and_crowds(truth, true_segments, found, found_segments, expected):
    assert sorted(compare(truth, true_segments, found, found_segments)) == expected


def test_quality_equals_equations_1_and_2():
    found = quality([0.6, 0.8, 0, 0, 0])  # two matches, three segments without a match
    assert found == pytest.approx({"pq": 1.4 / 3.5, "sq": 0.7, "rq": 2 / 3.5})
    assert quality([0, 0]) == {"pq": 0, "sq": 0, "rq": 0}


def perturbed(dataset, seed=0):
    """Image id → result of PostProcessPanoptic: the true map, shifted, with additional segments, holes and changed
    classes."""
    random, found = np.random.RandomState(seed), {}
    for image in dataset.images:
        ids = np.roll(dataset.read_map(image), random.randint(0, 4, 2), (0, 1))
        height, width = (random.randint(0, size // 2) for size in ids.shape)
        ids[height : height + 12, width : width + 12] = 1
        ids[-3:] = 0
        kinds = {segment: category for segment, category, _ in dataset.segments[image["id"]].tolist()}
        categories = [*dataset.categories]
        segments = [
            {
                "id": int(segment),
                "isthing": True,
                "area": 1,
                "category_id": kinds[segment]
                if segment in kinds and random.rand() < 0.85
                else int(random.choice(categories)),
            }
            for segment in np.unique(ids)
            if segment
        ]
        file = io.BytesIO()
        Image.fromarray(np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=-1).astype(np.uint8)).save(file, "PNG")
        found[image["id"]] = {"panoptic": {"png_string": file.getvalue(), "segments_info": segments}}
    return found


def test_quality_equals_another_implementation_on_the_written_files(made, tmp_path, capsys):
    panoptic = pytest.importorskip("hotcoco.panoptic", reason="pip install hotcoco")
    dataset = read(made)
    found, evaluator = perturbed(dataset), PanopticEvaluator(dataset, tmp_path)
    for image_id in reversed(found):
        evaluator.update({image_id: found[image_id]})
    stats = evaluator.summarize()
    folder = tmp_path / "panoptic_eval"
    expected = panoptic.pq_compute(
        str(annotations(made)),
        str(folder / "predictions.json"),
        str(made / "panoptic" / "panoptic_val2017"),
        str(folder),
    )
    for name, theirs in (("PQ_all", "All"), ("PQ_th", "Things"), ("PQ_st", "Stuff")):
        assert stats[name] == pytest.approx(expected[theirs], rel=1e-12)
    assert 0.2 < stats["PQ_th"]["pq"] < 0.9 and stats["PQ_all"]["n"] == 4
    for category, values in stats["PQ_categories"].items():
        theirs = expected["per_class"]
        theirs = theirs.get(category) or theirs[str(category)]
        assert values == pytest.approx({key: theirs[key] for key in values}, rel=1e-12)
    assert f"PQ  {100 * stats['PQ_st']['pq']:.1f}" in capsys.readouterr().out.replace("   ", "  ")


def test_failed_writes_do_not_change_the_metrics(made, tmp_path, capsys):
    dataset = read(made)
    expected, stopped = PanopticEvaluator(dataset), PanopticEvaluator(dataset, tmp_path)
    (tmp_path / "panoptic_eval").touch()  # a file in place of the folder
    for evaluator in (expected, stopped):
        evaluator.update(perturbed(dataset))
    capsys.readouterr()
    assert stopped.summarize() == expected.summarize()
    said = capsys.readouterr().out
    assert said.count(f"note: {tmp_path}/panoptic_eval/") == 1 and "is incomplete, but the metrics are complete" in said


def test_without_an_output_directory_nothing_is_written(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluator = PanopticEvaluator(read(made))
    evaluator.update(perturbed(read(made)))
    assert evaluator.summarize()["PQ_all"]["n"] == 4 and not any(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs


class Oracle(nn.Module):
    """A model that recognizes images by their pixels and returns their objects, shifted and some with another class, so
    that the metrics are far from 0 and 1."""

    def __init__(self, dataset, queries, num_classes):
        super().__init__()
        self.known, self.queries, self.num_classes = list(dataset), queries, num_classes

    def forward(self, samples):
        height, width = samples.tensors.shape[-2:]
        logits = torch.zeros(len(samples.tensors), self.queries, self.num_classes + 1)
        logits[..., -1] = 9.0
        boxes = torch.full((*logits.shape[:2], 4), 0.5)
        masks = torch.full((*logits.shape[:2], height // 4, width // 4), -9.0)
        for i, image in enumerate(samples.tensors):
            number, target = next(
                (n, target)
                for n, (known, target) in enumerate(self.known)
                if (known.shape <= image.shape and torch.equal(known, image[:, : known.shape[1], : known.shape[2]]))
            )
            random = np.random.RandomState(number)
            for n in range(min(len(target["labels"]), self.queries)):
                mask = torch.zeros(1, 1, height, width)
                mask[0, 0, : target["masks"].shape[1], : target["masks"].shape[2]] = target["masks"][n]
                mask = F.interpolate(mask.roll(random.randint(0, 4), -1), masks.shape[2:], mode="area")[0, 0]
                masks[i, n], boxes[i, n] = 18 * mask - 9, target["boxes"][n] * random.uniform(0.9, 1.1)
                wrong = random.rand() < 0.2
                logits[i, n, target["labels"][random.randint(n + 1) if wrong else n]] = 14.0 + random.rand()
        return {"pred_logits": logits, "pred_boxes": boxes, "pred_masks": masks}


def _oracle(args):
    """Run in a process of its own: the result of `evaluate` for the oracle on each data set of a list of paths."""
    device, results = runtime.find_device(args.device), []
    with runtime.Job(args.dist_url) as job:
        job.meet()
        job.connect(device)
        for root in args.coco_path.split(os.pathsep):
            results.append(_oracle_on(root, args, job, device))
    return results


def _oracle_on(root, args, job, device):
    args.coco_path, args.coco_panoptic_path = root, os.path.join(root, "panoptic")
    dataset = build_dataset("val", args)
    _, criterion, postprocessors = build_model(args)
    postprocessors["panoptic"].is_thing_map = dataset.is_thing_map
    stats, _ = evaluate(
        Oracle(dataset, args.num_queries, args.num_classes),
        criterion,
        postprocessors,
        eval_loader(dataset, args),
        dataset.ground_truth(),
        device,
        output_dir=os.path.join(args.output_dir, os.path.basename(root)),
        job=job,
    )
    return stats


def _save(results, folder):
    """Write to a file, since the outputs of several processes to the same pipe may interleave."""
    Path(folder, f"stats{runtime.get_rank()}.json").write_text(json.dumps(results))


def test_mask_ap_and_quality_do_not_depend_on_the_number_of_ranks(made, tmp_path):
    roots = [made]
    if COCO_SAMPLE.is_dir():
        roots.append(tmp_path / "sample")
        shutil.copytree(COCO_SAMPLE, roots[1], ignore=shutil.ignore_patterns("train2017"))
        write_panoptic(roots[1], roots[1] / "panoptic")
    script = "import test_panoptic as t; t._save(t._oracle(t.parse(*sys.argv[1:])), sys.argv[-1])"
    flags = flags_of(
        os.pathsep.join(map(str, roots)),
        "--eval",
        "--num_classes",
        250,
        "--num_queries",
        20,
        "--short_side",
        128,
        "--output_dir",
    )
    processes = [
        start(*launcher(world, "--use_env", "tests/run_code.py", script, *flags, tmp_path / f"out{world}"))
        for world in (2, 3)
    ]
    alone = json.loads(json.dumps(_oracle(parse(*flags, tmp_path / "out1"))))
    for process, world in zip(processes, (2, 3), strict=True):
        status, out, err = finish(process)
        assert status == 0, err
        assert alone == json.loads((tmp_path / f"out{world}" / "stats0.json").read_text())
        for root in roots:
            names = [f"{image['id']:012}.png" for image in read(root).images] + ["predictions.json"]
            folders = [tmp_path / name / root.name / "panoptic_eval" for name in ("out1", f"out{world}")]
            assert sorted(os.listdir(folders[0])) == sorted(os.listdir(folders[1])) == sorted(names)
            assert all((folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in names)
    for stats in alone:
        assert 0.1 < stats["coco_eval_masks"][0] < 0.9 and 0.1 < stats["PQ_th"]["pq"] < 0.9
        assert len(stats["coco_eval_bbox"]) == 12


def test_log_and_eval_json_contain_mask_ap_and_quality(made, tmp_path):
    main.main(parse(*flags_of(made, "--output_dir", tmp_path)))
    row = json.loads((tmp_path / "log.txt").read_text())
    assert len(row["test_coco_eval_masks"]) == len(row["test_coco_eval_bbox"]) == 12
    assert all(set(row[f"test_PQ_{kind}"]) == {"pq", "sq", "rq", "n"} for kind in ("all", "th", "st"))
    assert row["test_loss_mask"] > 0
    main.main(parse(*flags_of(made, "--eval", "--resume", tmp_path / "checkpoint.pth", "--output_dir", tmp_path)))
    stats = json.loads((tmp_path / "eval.json").read_text())
    assert {f"test_{name}" for name in stats} == {name for name in row if name.startswith("test_")}
    for name in ("coco_eval_masks", "coco_eval_bbox", "PQ_all", "PQ_categories"):
        assert stats[name] == row[f"test_{name}"]


def test_without_instances_only_panoptic_quality_is_evaluated_also_without_category_names(made, tmp_path):
    (tmp_path / "val2017").symlink_to(made / "val2017")
    shutil.copytree(made / "panoptic", tmp_path / "panoptic", ignore=shutil.ignore_patterns("*train*"))
    data = json.loads(annotations(tmp_path).read_text())
    for category in data["categories"]:
        category["name"] = None
    annotations(tmp_path).write_text(json.dumps(data))
    stats = main.main(parse(*flags_of(tmp_path, "--eval")))
    assert "PQ_all" in stats and "AP" not in stats and "coco_eval_masks" not in stats
