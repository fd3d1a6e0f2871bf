"""Fields of annotations: errors name invalid values, unusual but valid values are accepted, and notes report values
that are probably wrong."""

import contextlib
import io
import json
import math

import pytest
import torch
from pycocotools.cocoeval import COCOeval

import main
from conftest import load_annotations, parse, save_annotations, small, write_panoptic, write_set
from datasets import build_dataset
from datasets.coco import CocoDetection
from util.runtime import UserError

NAN = math.nan


@pytest.fixture
def own(tmp_path):
    """A data set with panoptic annotations, which a test may change."""
    root = write_set(tmp_path / "set", count=4)
    for split in ("train", "val"):
        write_panoptic(root, root / "panoptic", split)
    return root


def instances(root):
    return root / "annotations" / "instances_val2017.json"


def panoptic(root):
    return root / "panoptic" / "annotations" / "panoptic_val2017.json"


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def read(root, split="val", *flags):
    return build_dataset(split, parse(*small(root, *flags)))


def read_panoptic(root):
    return read(root, "val", "--dataset_file", "coco_panoptic", "--coco_panoptic_path", root / "panoptic")


def refused(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Invalid values

WRONG_IDS = [True, "7", -1, 1.5, NAN, math.inf, [7], 2**63]
WRONG_FLAGS = ["0", "1", 2, -1, 0.5, NAN, [], "false"]
WRONG_AREAS = ["4", -1, NAN, math.inf, True, [4]]
WRONG_BOXES = [
    None,
    "1, 2, 3, 4",
    4,
    [1, 2, 3],
    [1, 2, 3, 4, 5],
    [1, 2, 3, None],
    [1, 2, 3, "4"],
    [1, 2, 3, NAN],
    [1, 2, math.inf, 4],
    [1, 2, True, 4],
    [[1], 2, 3, 4],
    [1, 2, 3, 10**400],
    {"x": 1},
]
WRONG = {
    ("images", "id"): [None, *WRONG_IDS],
    ("images", "file_name"): [None, "", 3, ["a.png"]],
    ("images", "height"): [None, 0, -5, "40", 40.5, True, NAN],
    ("images", "width"): [None, 0, -5, "40", 40.5, True],
    ("categories", "id"): [None, *WRONG_IDS],
    ("categories", "name"): [3, ["ant"], True],
    ("annotations", "id"): WRONG_IDS,
    ("annotations", "image_id"): [None, *WRONG_IDS],
    ("annotations", "category_id"): [None, *WRONG_IDS],
    ("annotations", "iscrowd"): WRONG_FLAGS,
    ("annotations", "difficult"): WRONG_FLAGS,
    ("annotations", "area"): WRONG_AREAS,
    ("annotations", "bbox"): WRONG_BOXES,
    ("annotations", "segmentation"): ["1 2 3", 4, True],
}


@pytest.mark.parametrize(("part", "field"), WRONG, ids=map(".".join, WRONG))
def test_error_names_file_entry_and_value_of_a_field_of_a_wrong_type(own, part, field):
    original = load_annotations(own, "val")
    for value in WRONG[part, field]:
        entries = [dict(entry) for entry in original[part]]
        entries[1][field] = value
        save_annotations(own, "val", {**original, part: entries})
        sentence = refused(read, own)
        assert sentence.startswith(f"annotations {instances(own)}: {part}: entry 1"), (value, sentence)
        assert f": {field} is {value!r}"[:90] in sentence and "; it must be " in sentence


@pytest.mark.parametrize(("part", "field"), [("images", "width"), ("annotations", "bbox"), ("categories", "id")])
def test_error_names_a_missing_field(own, part, field):
    edit(instances(own), lambda data: data[part][1].pop(field))
    assert f"{part}: entry 1" in (sentence := refused(read, own)) and f"{field} is None" in sentence


@pytest.mark.parametrize("part", ["images", "categories", "annotations"])
@pytest.mark.parametrize("entry", [None, 3, "a", [1]])
def test_error_names_an_entry_that_is_not_an_object(own, part, entry):
    edit(instances(own), lambda data: data[part].insert(1, entry))
    assert f"{part}: entry 1 is {entry!r}; it must be an object" in refused(read, own)


def test_errors_shorten_long_values(own):
    edit(instances(own), lambda data: data["annotations"][0].update(segmentation="1 2 " * 1000))
    assert len(refused(read, own)) < 400


def test_coordinates_of_polygons_must_be_numbers(own):
    edit(instances(own), lambda data: data["annotations"][0].update(segmentation=[[1, 2, True, 4, 5, 6]]))
    assert "polygon [1, 2, True" in refused(read, own, "val", "--masks")


@pytest.mark.parametrize(
    ("part", "words"),
    [("images", "two images have the same id, 7"), ("categories", "two categories have the same id, 1")],
)
def test_error_names_a_duplicate_id(own, part, words):
    edit(instances(own), lambda data: data[part].append({**data[part][0], "name": "another"}))
    assert words in refused(read, own)


SEGMENT = {
    "id": [None, *WRONG_IDS],
    "category_id": [None, *WRONG_IDS],
    "iscrowd": WRONG_FLAGS,
    "area": WRONG_AREAS,
    "bbox": WRONG_BOXES[1:],
}


@pytest.mark.parametrize("field", SEGMENT)
def test_error_names_a_segments_field_of_a_wrong_type(own, field):
    original = json.loads(panoptic(own).read_text())
    for value in SEGMENT[field]:
        data = json.loads(json.dumps(original))
        data["annotations"][1]["segments_info"][0][field] = value
        panoptic(own).write_text(json.dumps(data))
        sentence = refused(read_panoptic, own)
        assert sentence.startswith(f"annotations {panoptic(own)}: segments_info of 17.png: segment 0"), sentence
        assert f": {field} is {value!r}"[:90] in sentence


@pytest.mark.parametrize(
    ("part", "field", "values"),
    [
        ("categories", "isthing", [None, *WRONG_FLAGS]),
        ("annotations", "image_id", [None, "7", True]),
        ("annotations", "file_name", [None, "", 3]),
        ("annotations", "segments_info", [None, {}, "a"]),
    ],
)
def test_error_names_a_panoptic_field_of_a_wrong_type(own, part, field, values):
    original = json.loads(panoptic(own).read_text())
    for value in values:
        entries = [dict(entry) for entry in original[part]]
        entries[1][field] = value
        panoptic(own).write_text(json.dumps({**original, part: entries}))
        assert f"{part}: entry 1" in (sentence := refused(read_panoptic, own)) and f"{field} is {value!r}" in sentence


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda entries: entries.append(entries[0]), "image 7 has several annotations"),
        (lambda entries: entries[0]["segments_info"].append(entries[0]["segments_info"][0]), "7.png have the same id"),
        (lambda entries: entries[0]["segments_info"].append(3), "segments_info: entry"),
    ],
)
def test_error_names_duplicate_segments_and_segments_that_are_not_objects(own, change, words):
    edit(panoptic(own), lambda data: change(data["annotations"]))
    assert words in refused(read_panoptic, own)


# ---------------------------------------------------------------------------------------------------------------------
# Unusual but valid values


def measured(dataset):
    """The metrics if the objects themselves are the detections."""
    truth = dataset.ground_truth()
    found = [
        {"image_id": entry["image_id"], "category_id": entry["category_id"], "bbox": entry["bbox"], "score": 0.9}
        for entry in truth.dataset["annotations"]
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


@pytest.mark.parametrize(
    "odd",
    [
        {"iscrowd": None, "area": None},
        {"iscrowd": False},
        {"iscrowd": 0.0},
        {"id": None},
        {"difficult": None},
        {"image_id": 7.0, "category_id": 1.0},
        {"segmentation": None},
        {"extra": "anything"},
    ],
    ids=str,
)
def test_null_false_and_whole_floats_are_accepted(own, odd):
    plain = {"id": 1, "image_id": 7, "category_id": 1, "bbox": [1, 2, 20, 30]}
    results = []
    for entry in (plain, {**plain, **odd}):
        edit(instances(own), lambda data, entry=entry: data.update(annotations=[entry]))
        dataset = CocoDetection(own, "val", lambda *pair: pair)
        target = dataset[0][1]
        assert target["boxes"].tolist() == [[1, 2, 21, 32]] and target["labels"].tolist() == [1]
        (entry,) = dataset.ground_truth().dataset["annotations"]
        assert entry["area"] == 600 and entry["iscrowd"] == 0
        results.append(measured(dataset))
    assert results[0] == results[1] and results[0][0] == pytest.approx(1)


def test_true_marks_a_crowd(own):
    edit(instances(own), lambda data: [entry.update(iscrowd=True) for entry in data["annotations"][:2]])
    crowds = [entry["iscrowd"] for entry in read(own).ground_truth().dataset["annotations"]]
    assert crowds[:2] == [1, 1] and sum(len(target["labels"]) for _, target in read(own)) == len(crowds) - 2


def test_sides_and_ids_of_images_may_be_whole_floats(own):
    def change(data):
        for image in data["images"]:
            image.update(id=float(image["id"]), width=float(image["width"]), height=float(image["height"]))

    plain = list(read(own))
    edit(instances(own), change)
    for (image, target), (expected, expected_target) in zip(read(own), plain, strict=True):
        assert torch.equal(image, expected) and target["orig_size"].dtype == torch.int64
        assert all(torch.equal(target[name], expected_target[name]) for name in expected_target)


def test_the_name_of_a_category_without_a_name_is_its_id(own):
    edit(
        instances(own),
        lambda data: data.update(categories=[{"id": 1}, {"id": 3, "name": None}, {"id": 4, "name": "cat"}]),
    )
    assert read(own).categories == {1: "1", 3: "3", 4: "cat"}


# ---------------------------------------------------------------------------------------------------------------------
# Categories of two files


def run(root, *flags):
    return main.main(parse(*small(root, *flags)))


@pytest.mark.parametrize("flags", [[], ["--masks", "--dataset_file", "coco_panoptic"]])
def test_error_names_ids_that_differ_in_meaning_between_training_and_validation(own, flags):
    path = panoptic(own) if flags else instances(own)
    edit(path, lambda data: [data["categories"][i].update(name=name) for i, name in ((0, "bee"), (1, "ant"))])
    flags = [*flags, "--coco_panoptic_path", own / "panoptic"] if flags else []
    assert "1 (ant and bee), 3 (bee and ant)" in (sentence := refused(run, own, *flags)) and str(path) in sentence
    assert "4 (" not in sentence


def test_category_names_may_differ_in_case_and_spaces(own, capsys):
    edit(instances(own), lambda data: data["categories"][0].update(name=" Ant"))
    main.build_datasets(parse(*small(own)))
    assert capsys.readouterr().out == ""


def test_error_names_things_in_training_that_are_stuff_in_validation(own):
    edit(panoptic(own), lambda data: data["categories"][1].update(isthing=0))
    assert "categories 3 are things in one of" in refused(
        run, own, "--masks", "--dataset_file", "coco_panoptic", "--coco_panoptic_path", own / "panoptic"
    )


def test_error_names_instance_categories_whose_names_differ_from_the_panoptic_ones(own):
    edit(instances(own), lambda data: data["categories"][0].update(name="asp"))
    assert "1 (ant and asp)" in refused(read_panoptic(own).ground_truth)


@pytest.mark.parametrize(("flags", "fails"), [(["--eval"], True), (["--epochs", 2], True), (["--finetune"], False)])
def test_a_checkpoint_of_other_categories_is_rejected_except_for_finetuning(own, tmp_path, flags, fails):
    run(own, "--output_dir", tmp_path)
    for split in ("train", "val"):
        data = load_annotations(own, split)
        data["categories"][0]["name"] = "asp"
        save_annotations(own, split, data)
    flags = ["--resume", tmp_path / "checkpoint.pth", *flags]
    if fails:
        assert "1 (ant and asp)" in (sentence := refused(run, own, *flags)) and "checkpoint.pth" in sentence
    else:
        run(own, *flags)


def test_categories_of_validation_alone_or_without_names_are_accepted(own, capsys):
    def change(data):
        data["categories"][0].pop("name")
        data["categories"].append({"id": 5, "name": "dog"})

    edit(instances(own), change)
    main.build_datasets(parse(*small(own)))
    (note,) = capsys.readouterr().out.splitlines()
    assert note.startswith("note: 1 categories of ") and "5 (dog): they cannot be learned" in note


# ---------------------------------------------------------------------------------------------------------------------
# Notes


def notes_of(capsys, root, *flags):
    capsys.readouterr()
    main.build_datasets(parse(*small(root, *flags)))
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]


def test_a_correct_data_set_gives_no_note(own, capsys):
    assert notes_of(capsys, own) == []
    assert notes_of(capsys, own, "--dataset_file", "coco_panoptic", "--coco_panoptic_path", own / "panoptic") == []


@pytest.mark.parametrize("crowds", [False, True])
def test_a_note_reports_a_training_set_without_objects(own, capsys, crowds):
    data = load_annotations(own, "train")
    data["annotations"] = [{**entry, "iscrowd": 1} for entry in data["annotations"]] if crowds else []
    save_annotations(own, "train", data)
    (note,) = notes_of(capsys, own)
    assert "instances_train2017.json has no object" in note and "learns to find nothing" in note
    (note,) = notes_of(capsys, own, "--num_classes", 5, "--remove_difficult")
    assert "has no object" in note


def test_a_note_reports_boxes_relative_to_the_image(own, capsys):
    def change(data):
        for entry in data["annotations"]:
            entry["bbox"] = [0.25, 0.5, 0.5, 0.5]

    edit(instances(own), change)
    (note,) = notes_of(capsys, own, "--eval")
    count = sum(not entry["iscrowd"] for entry in load_annotations(own, "val")["annotations"])
    assert f"{instances(own)}: all {count} boxes lie within 0 ... 1" in note
    edit(instances(own), lambda data: data["annotations"][0].update(bbox=[0.25, 0.5, 0.5, 1.5]))
    assert notes_of(capsys, own, "--eval") == []


@pytest.mark.parametrize("flags", [[], ["--dataset_file", "coco_panoptic"]])
def test_a_note_reports_more_objects_than_queries_and_names_the_image_with_the_most(own, capsys, flags):
    dataset = read_panoptic(own) if flags else read(own)
    flags = ["--eval", *flags, "--coco_panoptic_path", own / "panoptic"]
    counts = [len(target["labels"]) for _, target in dataset]
    most = dataset.images[counts.index(max(counts))]["file_name"]
    full = sum(count > max(counts) - 1 for count in counts)
    (note,) = notes_of(capsys, own, *flags, "--num_queries", max(counts) - 1)
    assert f"{full} of 4 images of {dataset.path}" in note and f"{most} with {max(counts)}" in note
    assert notes_of(capsys, own, *flags, "--num_queries", max(counts)) == []


def test_a_note_reports_images_that_share_a_file(own, capsys):
    edit(instances(own), lambda data: data["images"].append({**data["images"][0], "id": 4711}))
    (note,) = notes_of(capsys, own, "--eval")
    assert "2 of the images have the same file, 0000.png" in note


@pytest.mark.parametrize("area", [0, 1, 1e6])
def test_areas_that_do_not_fit_the_boxes_are_noted(own, capsys, area):
    """COCO's metrics by size would count the wrong objects."""
    edit(instances(own), lambda data: [entry.update(area=area, bbox=[1, 1, 35, 33]) for entry in data["annotations"]])
    run(own, "--eval")
    (note,) = (line for line in capsys.readouterr().out.splitlines() if "the area of" in line)
    count = len(load_annotations(own, "val")["annotations"])
    assert note.startswith(f"note: annotations {instances(own)}: the area of {count} of {count} objects does not fit")
    assert f"{area} for [1, 1, 35, 33]" in note
    edit(instances(own), lambda data: [entry.pop("area") for entry in data["annotations"]])
    run(own, "--eval")
    assert "the area of" not in capsys.readouterr().out


def test_areas_of_masks_and_of_a_few_odd_objects_give_no_note(own, capsys):
    objects = [
        {"id": 1, "image_id": 7, "category_id": 1, "bbox": [1, 1, 30, 30], "area": area, "iscrowd": 0}
        for area in [*[2] * 20, *[900] * 19, 0]
    ]  # ropes, boxes, and one object in 40 without an area
    edit(instances(own), lambda data: data.update(annotations=objects))
    run(own, "--eval")
    assert "the area of" not in capsys.readouterr().out


@pytest.mark.parametrize(("count", "categories", "noted"), [(101, [1], True), (100, [1], False), (150, [1, 3], False)])
def test_more_objects_of_a_category_than_coco_counts_are_noted(own, capsys, count, categories, noted):
    objects = [
        {
            "id": number,
            "image_id": 7,
            "category_id": categories[number % len(categories)],
            "bbox": [number % 20, number // 20, 3, 3],
        }
        for number in range(count)
    ]
    edit(instances(own), lambda data: data.update(annotations=objects))
    run(own, "--eval", "--num_queries", 200)
    notes = [line for line in capsys.readouterr().out.splitlines() if "more than 100 objects of one category" in line]
    assert len(notes) == noted and all("1 images" in note and "0000.png" in note for note in notes)


def test_ids_of_categories_that_are_far_apart_are_noted(own, capsys):
    def change(data):
        for entry in (*data["categories"], *data["annotations"]):
            field = "id" if "name" in entry else "category_id"
            entry[field] += 5000

    for split in ("train", "val"):
        data = load_annotations(own, split)
        change(data)
        save_annotations(own, split, data)
    (note,) = notes_of(capsys, own)
    assert "has 3 categories, but ids up to 5004 (cat)" in note


def test_all_ids_may_begin_at_0(own, capsys):
    def change(data):
        for number, entry in enumerate(data["annotations"]):
            entry.update(id=number, image_id=entry["image_id"] - 7, category_id=entry["category_id"] - 1, iscrowd=0)
        for entry in data["images"]:
            entry["id"] -= 7
        for entry in data["categories"]:
            entry["id"] -= 1

    edit(instances(own), change)
    assert measured(read(own))[0] == pytest.approx(1) and notes_of(capsys, own, "--eval") == []


def test_evaluation_over_frozen_weights_alone_is_noted(own, tmp_path, capsys):
    run(own, "--output_dir", tmp_path / "out")
    capsys.readouterr()
    run(own, "--eval", "--masks", "--frozen_weights", tmp_path / "out" / "checkpoint.pth")
    assert "evaluates a mask head with random weights" in capsys.readouterr().out
