"""Images and annotations are read from folders and zips and by several workers, and errors name what is wrong."""

import json
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle_tools
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes

from conftest import COCO_SAMPLE, load_annotations, pack, parse, save_annotations, small, write_set
from datasets import build_dataset, eval_loader, train_loader
from datasets.coco import CocoDetection
from datasets.rle import to_rle
from util.box_ops import box_cxcywh_to_xyxy
from util.runtime import UserError


def dataset(root, split="val", *flags):
    return build_dataset(split, parse(*small(root, *flags)))


@pytest.fixture
def own(tmp_path):
    """A data set that a test may change."""
    return write_set(tmp_path / "set", count=4, splits=("val",))


def edit(root, change):
    data = load_annotations(root, "val")
    change(data)
    save_annotations(root, "val", data)


def test_targets_are_the_annotations_without_crowds(coco):
    data, images = load_annotations(coco, "val"), dataset(coco)
    assert len(images) == len(data["images"])
    for image, target in images:
        objects = [a for a in data["annotations"] if a["image_id"] == target["image_id"] and not a["iscrowd"]]
        height, width = target["orig_size"].tolist()
        boxes = box_cxcywh_to_xyxy(target["boxes"]) * torch.tensor([width, height, width, height])
        expected = torch.tensor([a["bbox"] for a in objects]).reshape(-1, 4)
        expected[:, 2:] += expected[:, :2]
        torch.testing.assert_close(boxes, expected, rtol=0, atol=1e-3)
        assert target["labels"].tolist() == [a["category_id"] for a in objects]
        assert min(image.shape[1:]) == 64 and image.shape[1:] == tuple(target["size"].tolist())


def drawn(segmentation):
    """A change of the annotations to an image of 8×6 pixels (height, width) whose only object has the segmentation."""

    def find(data):
        data["images"] = [{**data["images"][0], "height": 8, "width": 6}]
        data["annotations"] = [
            {"id": 4711, "image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4], "segmentation": segmentation}
        ]

    return find


RECTANGLE = np.zeros((8, 6), np.uint8)
RECTANGLE[2:6, 1:4] = 1
NOTCHED = RECTANGLE.copy()
NOTCHED[4:6, 2:4] = 0


@pytest.mark.parametrize(
    ("segmentation", "expected"),
    [
        ([[1, 2, 4, 2, 4, 6, 1, 6]], RECTANGLE),
        ([[1, 2, 4, 2, 4, 4, 1, 4], [1, 4, 2, 4, 2, 6, 1, 6]], NOTCHED),
        ({"size": [8, 6], "counts": [10, 4, 4, 4, 4, 4, 18]}, RECTANGLE),
        ("compressed", NOTCHED),
    ],
)
def test_masks_are_read_from_polygons_and_both_kinds_of_rle(own, segmentation, expected):
    if segmentation == "compressed":
        rle = rle_tools.encode(np.asfortranarray(expected))
        segmentation = {**rle, "counts": rle["counts"].decode()}
    edit(own, drawn(segmentation))
    Image.new("RGB", (6, 8)).save(own / "val2017" / "0000.png")
    masks = CocoDetection(own, "val", lambda *pair: pair, masks=True)[0][1]["masks"]
    assert isinstance(masks, tv_tensors.Mask) and masks.shape == (1, 8, 6)
    assert np.array_equal(masks[0], expected)


def test_compressed_and_uncompressed_counts_of_random_masks_are_accepted():
    random = np.random.RandomState(0)
    for _ in range(50):
        height, width = random.randint(1, 90, 2)
        mask = random.rand(height, width) < random.rand()
        mask[: random.randint(height + 1)] = random.randint(2)  # long and short runs
        compressed = rle_tools.encode(np.asfortranarray(mask.astype(np.uint8)))
        pixels = np.r_[0, mask.ravel(order="F")]  # the first count is that of leading zeros
        changes = np.flatnonzero(np.diff(pixels))
        uncompressed = np.diff(np.r_[0, changes, mask.size]).tolist()
        for counts in (compressed["counts"].decode(), uncompressed, [float(count) for count in uncompressed]):
            rle = to_rle({"size": [height, width], "counts": counts}, height, width, "object")
            assert np.array_equal(rle_tools.decode(rle), mask)


def test_targets_have_a_bool_mask_of_every_object_with_the_size_of_the_image(coco):
    for (image, target), (_, bare) in zip(dataset(coco, "val", "--masks"), dataset(coco), strict=True):
        masks, (height, width) = target["masks"], image.shape[1:]
        assert masks.dtype == torch.bool and masks.shape == (len(target["labels"]), height, width)
        assert "masks" not in bare and torch.equal(bare["boxes"], target["boxes"])
        boxes = box_cxcywh_to_xyxy(target["boxes"]) * torch.tensor([width, height, width, height])
        torch.testing.assert_close(masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1]), boxes, rtol=0, atol=2.5)


def test_a_data_set_without_objects_has_empty_targets_of_the_same_types(own):
    edit(own, lambda data: data.update(annotations=[]))
    target = dataset(own, "val", "--masks")[0][1]
    assert target["boxes"].shape == (0, 4) and target["labels"].dtype == torch.int64
    assert target["masks"].shape == (0, *target["size"].tolist()) and target["masks"].dtype == torch.bool


@pytest.mark.parametrize(
    ("segmentation", "words"),
    [
        (None, "None"),
        ([], "--masks needs polygons"),
        ([[1, 2, 4, 2]], "three points"),
        ([[1, 2, 4, 2, 4, 6], [1, 2, 4, 2, 4, 6, 1]], "three points"),
        ([[1, 2, 4, 2, 4, float("nan")]], "pixels"),
        ([[1, 2, 4, 2, 4, "6"]], "pixels"),
        ([1, 2, 4, 2, 4, 6], "three points"),
        ({"size": [6, 8], "counts": [10, 38]}, "[6, 8]"),
        ({"size": [8, 6], "counts": [10, 37]}, "counts add up to 47:"),
        ({"size": [8, 6], "counts": [10, 39]}, "counts add up to 49:"),
        ({"size": [8, 6], "counts": [-10, 58]}, "48"),
        ({"size": [8, 6], "counts": "abc"}, "decoded (its last count is incomplete)"),
        ({"size": [8, 6], "counts": "~"}, "decoded (its counts contain the character '~')"),
        ({"size": [8, 6], "counts": ":44000"}, "counts add up to 30:"),
        ({"size": [8, 6], "counts": ""}, "counts add up to 0:"),
        ({"size": [8, 6], "counts": "Pb0"}, "counts add up to 576:"),
        ({"size": [8, 6], "counts": ["a"]}, "decoded"),
        ({"size": [8, 6], "counts": [10.5, 37.5]}, "decoded"),
        ({"size": [8, 6]}, "decoded (its counts are None"),
    ],
)
def test_a_segmentation_that_cannot_be_drawn_is_named_where_masks_are_asked_for(own, segmentation, words):
    edit(own, drawn(segmentation))
    dataset(own)
    with pytest.raises(UserError) as caught:
        dataset(own, "val", "--masks")
    assert "object 4711" in str(caught.value) and words in str(caught.value)


def test_a_folder_a_zip_and_both_together_give_the_same_images(coco, tmp_path):
    packed, mixed = tmp_path / "packed", tmp_path / "mixed"
    for root in (packed, mixed):
        shutil.copytree(coco / "annotations", root / "annotations")
        pack(root, "val", coco / "val2017")
    (mixed / "val2017").mkdir()
    shutil.copy(coco / "val2017" / "0001.png", mixed / "val2017")
    expected = list(dataset(coco))
    for root in (packed, mixed):
        for (image, target), (other, other_target) in zip(expected, dataset(root), strict=True):
            assert torch.equal(image, other) and torch.equal(target["boxes"], other_target["boxes"])


def test_several_workers_can_read_a_zip(coco, tmp_path):
    shutil.copytree(coco / "annotations", tmp_path / "annotations")
    pack(tmp_path, "val", coco / "val2017")
    images = dataset(tmp_path)
    expected = [images[i][0] for i in range(len(images))]  # opens the zip before the workers start
    for _ in range(3):
        loader = eval_loader(images, parse(*small(tmp_path, "--num_workers", 2, "--batch_size", 1)))
        assert all(torch.equal(batch.tensors[0], image) for (batch, _), image in zip(loader, expected, strict=True))


def test_class_count_comes_from_the_annotations(coco):
    assert dataset(coco).num_classes == 5
    if COCO_SAMPLE.is_dir():
        assert dataset(COCO_SAMPLE).num_classes == 91


def test_training_loader_shuffles_all_images_anew_in_each_epoch(coco):
    loader = train_loader(dataset(coco, "train"), parse(*small(coco)))
    orders = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        orders.append([target["image_id"].item() for _, targets in loader for target in targets])
    assert orders[0] == orders[2] != orders[1] and sorted(orders[0]) == sorted(orders[1]) == [7, 17, 27, 37, 47, 57]


def test_remove_difficult_removes_difficult_objects_from_training(tmp_path):
    root = write_set(tmp_path / "set", count=2)
    for split in ("train", "val"):
        data = load_annotations(root, split)
        data["annotations"] = [{**a, "iscrowd": 0, "difficult": int(i == 0)} for i, a in enumerate(data["annotations"])]
        save_annotations(root, split, data)
    counts = {
        (split, flags): sum(len(target["labels"]) for _, target in dataset(root, split, *flags))
        for split in ("train", "val")
        for flags in ((), ("--remove_difficult",))
    }
    assert counts["train", ("--remove_difficult",)] == counts["train", ()] - 1
    assert counts["val", ("--remove_difficult",)] == counts["val", ()]


def test_boxes_without_area_are_removed_with_a_single_note(tmp_path, capsys):
    root = write_set(tmp_path / "set", count=2, splits=("val",))

    def change(data):
        good = {**data["annotations"][0], "iscrowd": 0, "bbox": [1, 1, 20, 20]}
        data["annotations"] = [
            good,
            {**good, "id": 9001, "bbox": [1, 1, 0, 5]},
            {**good, "id": 9002, "category_id": 4},
            *({**good, "id": 9003, "bbox": [3, 3, 10, -3]} for _ in range(5)),
        ]

    edit(root, change)
    labels = dataset(root)[0][1]["labels"].tolist()
    (note,) = capsys.readouterr().out.splitlines()
    assert "object 9001" in note and "6 of 8 boxes" in note
    assert labels == [load_annotations(root, "val")["annotations"][0]["category_id"], 4]


def test_a_single_box_outside_the_image_among_thousands_is_clipped_with_a_note(tmp_path, capsys):
    root = write_set(tmp_path / "set", count=2, splits=("val",))

    def change(data):
        good = {**data["annotations"][0], "iscrowd": 0, "bbox": [1, 1, 20, 20]}
        data["annotations"] = [good] * 3000 + [{**good, "id": 9002, "bbox": [-9, 1, 20, 20]}]

    edit(root, change)
    images = dataset(root)
    assert "object 9002" in capsys.readouterr().out
    assert len(images[0][1]["labels"]) == 3001
    assert images[0][1]["boxes"][-1, 2] * images[0][1]["orig_size"][1] == pytest.approx(11, abs=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Errors: each is a UserError whose message names what is wrong


def refused(root, *words, read=False):
    with pytest.raises(UserError) as caught:
        images = dataset(root)
        if read:
            list(images)
    assert all(str(word) in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_error_names_missing_annotations(tmp_path):
    refused(tmp_path, "instances_val2017.json", "--coco_path")


def test_error_names_truncated_annotations(own):
    path = own / "annotations" / "instances_val2017.json"
    path.write_text(path.read_text()[:200])
    refused(own, path, "not JSON")


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        json.dumps({"images": [], "categories": [], "annotations": []}),
        json.dumps({"images": [{"id": 1}], "categories": [], "annotations": []}),
    ],
)
def test_json_in_another_format_is_rejected(own, content):
    (own / "annotations" / "instances_val2017.json").write_text(content)
    refused(own, "instances_val2017.json")


def test_error_names_missing_folder_and_zip(own):
    shutil.rmtree(own / "val2017")
    refused(own, own / "val2017", own / "val2017.zip")


def test_error_names_an_image_missing_from_folder_and_zip(own):
    pack(own, "val")
    (own / "val2017" / "0002.png").unlink()
    dataset(own)  # the image is still in the zip
    (own / "val2017.zip").unlink()
    refused(own, "0002.png", own / "val2017", "1 of 4")


def test_error_names_a_truncated_zip(own):
    pack(own, "val")
    shutil.rmtree(own / "val2017")
    archive = own / "val2017.zip"
    archive.write_bytes(archive.read_bytes()[:-100])
    refused(own, archive, "truncated")


def test_error_names_a_damaged_file_in_a_zip(own):
    pack(own, "val")
    shutil.rmtree(own / "val2017")
    archive = own / "val2017.zip"
    with zipfile.ZipFile(archive) as opened:
        start = opened.infolist()[2].header_offset
    content = bytearray(archive.read_bytes())
    content[start + 200 : start + 300] = bytes(100)
    archive.write_bytes(content)
    refused(own, "0002.png", archive, read=True)


def test_error_names_an_encrypted_zip(own):
    pack(own, "val")
    shutil.rmtree(own / "val2017")
    archive = own / "val2017.zip"
    content = bytearray(archive.read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1  # mark the first file as encrypted in the zip's directory
    archive.write_bytes(content)
    refused(own, "0000.png", archive, "encrypted", read=True)


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [("images", "file_name", 3), ("annotations", "image_id", [7]), ("annotations", "category_id", {})],
)
def test_error_names_a_field_of_another_type(own, part, field, value):
    edit(own, lambda data: data[part][0].update({field: value}))
    refused(own, field, repr(value), part)


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_error_names_a_truncated_image(own, content):
    path = own / "val2017" / "0003.png"
    path.write_bytes(path.read_bytes()[:1500] if content is None else content)
    refused(own, path, read=True)


def test_error_of_a_worker_names_a_truncated_image(own):
    path = own / "val2017" / "0003.png"
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(UserError) as caught:
        list(eval_loader(dataset(own), parse(*small(own, "--num_workers", 1))))
    assert str(path) in str(caught.value) and "Traceback" not in str(caught.value)


def test_error_names_an_image_of_another_size_than_annotated(own):
    Image.new("RGB", (33, 44)).save(own / "val2017" / "0000.png")
    refused(own, "0000.png", "44×33", read=True)


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ([1000, 2, 5, 5], "extends beyond"),
        ([2, 2, 500, 5], "extends beyond"),
        ([1, 2, 3], "four finite numbers"),
        (["a", 1, 2, 3], "four finite numbers"),
        ([float("nan"), 1, 2, 3], "four finite numbers"),
    ],
)
def test_error_names_a_box_outside_the_image(own, box, words):
    edit(
        own,
        lambda data: data["annotations"].append(
            {"id": 4711, "image_id": 7, "category_id": 1, "bbox": box, "iscrowd": 0, "area": 4}
        ),
    )
    refused(own, "4711", words)


def test_a_data_set_in_which_no_box_has_an_area_is_rejected(own):
    edit(own, lambda data: [entry.update(bbox=[5, 5, 10, 0], iscrowd=0) for entry in data["annotations"]])
    refused(own, "object 1 ", "no area")


@pytest.mark.parametrize(
    ("field", "value", "words"), [("image_id", 99, "image 99"), ("category_id", 99, "category 99")]
)
def test_error_names_an_object_of_an_unknown_image_or_category(own, field, value, words):
    edit(own, lambda data: data["annotations"][0].update({field: value}))
    refused(own, "object 1 ", words)


@pytest.mark.parametrize("part", ["images", "categories"])
def test_error_names_an_id_that_is_not_a_whole_number(own, part):
    edit(own, lambda data: data[part][0].update(id="seven"))
    refused(own, "'seven'", part)


def test_two_images_with_the_same_id_are_rejected(own):
    edit(own, lambda data: data["images"][1].update(id=7))
    refused(own, "same id")


def test_boxes_may_exceed_the_image_by_a_rounding_error(own):
    edit(
        own,
        lambda data: data["annotations"][0].update(
            image_id=7, iscrowd=0, bbox=[-0.4, 0, data["images"][0]["width"] + 0.9, 12.0]
        ),
    )
    target = CocoDetection(own, "val", lambda *pair: pair)[0][1]
    assert target["boxes"][0].tolist() == [0, 0, load_annotations(own, "val")["images"][0]["width"], 12]
