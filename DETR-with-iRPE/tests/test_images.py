"""Images of every mode, orientation and shape are read, and errors name the image."""

import io
import json
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2

import main
import visualize
from conftest import load_annotations, pack, parse, save_annotations, small, write_panoptic, write_set
from datasets import build_dataset, eval_loader
from datasets.coco import read_image
from datasets.coco_panoptic import read_ids
from datasets.transforms import make_coco_transforms
from util.images import resized_size
from util.runtime import UserError

ORIENTATION = 0x0112


def read(root, split="val", *flags):
    return build_dataset(split, parse(*small(root, *flags)))


@pytest.fixture
def own(tmp_path):
    """A data set with panoptic annotations, which a test may change."""
    root = write_set(tmp_path / "set", count=4)
    for split in ("train", "val"):
        write_panoptic(root, root / "panoptic", split)
    return root


def pixels_of(root):
    dataset = read(root)
    dataset.transforms = lambda image, target: np.asarray(image)
    return [dataset[number] for number in range(len(dataset))]


# ---------------------------------------------------------------------------------------------------------------------
# Modes


@pytest.mark.parametrize("packed", [False, True])
def test_deep_images_are_scaled_in_a_folder_and_in_a_zip(own, packed):
    path = own / "val2017" / "0000.png"
    expected, before = pixels_of(own)[1:], Image.open(path)
    deep = np.arange(before.width * before.height, dtype=np.uint16).reshape(before.height, before.width) * 7
    Image.fromarray(deep).save(path)
    if packed:
        pack(own, "val")
        shutil.rmtree(own / "val2017")
    first, *others = pixels_of(own)
    assert np.array_equal(first, np.stack([deep >> 8] * 3, axis=-1)) and first.max() > 100
    assert all(np.array_equal(one, other) for one, other in zip(others, expected, strict=True))


@pytest.mark.parametrize(("mode", "packed"), [("F", False), ("I", False), ("F", True)])
def test_error_names_an_image_whose_mode_has_an_unknown_range_also_in_a_worker(own, mode, packed):
    path = own / "val2017" / "0003.png"
    Image.new(mode, Image.open(path).size).save(path, "TIFF")
    if packed:
        pack(own, "val")
        shutil.rmtree(own / "val2017")
    where = f"0003.png in {own}/val2017.zip" if packed else str(path)
    with pytest.raises(UserError) as caught:
        list(eval_loader(read(own), parse(*small(own, "--num_workers", 1))))
    assert str(caught.value).startswith(f"image {where} cannot be read: its mode is {mode}, ")


def ids_image(mode):
    """A file object with a map of the segment ids 5, 9 and 5 in an image mode."""
    ids = np.array([[5, 9, 5]])
    if mode in ("RGB", "RGBA", "P"):
        image = Image.fromarray(np.stack([ids, 0 * ids, 0 * ids], axis=-1).astype(np.uint8))
        image = image.quantize(8) if mode == "P" else image.convert(mode)
    else:
        image = Image.fromarray(ids.astype({"L": np.uint8, "I;16": np.uint16, "F": np.float32}[mode]))
    file = io.BytesIO()
    image.save(file, "TIFF" if mode == "F" else "PNG")
    return file


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_a_panoptic_map_may_have_a_palette_or_transparency(mode):
    assert read_image(ids_image(mode), "map", read_ids).tolist() == [[5, 9, 5]]


@pytest.mark.parametrize("mode", ["L", "I;16", "F"])
def test_a_panoptic_map_without_8_bit_colours_is_rejected(mode):
    with pytest.raises(
        UserError, match=f"^image map cannot be read: its mode is {mode}, but the ids of segments are col"
    ):
        read_image(ids_image(mode), "map", read_ids)


def test_a_panoptic_map_with_16_bits_per_colour_is_not_read_as_void(own):
    path = own / "panoptic" / "panoptic_val2017" / "7.png"
    colours = np.asarray(Image.open(path)).astype(">u2")  # Pillow keeps the high bytes, which are 0

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", colours.shape[1], colours.shape[0], 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in colours)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    dataset = read(own, "val", "--dataset_file", "coco_panoptic", "--coco_panoptic_path", own / "panoptic")
    with pytest.raises(UserError, match="7.png has no pixel of any of the"):
        dataset[0]


# ---------------------------------------------------------------------------------------------------------------------
# Orientation


def turn(path, orientation=6):
    """Set the EXIF orientation of an image file without changing its pixels."""
    with Image.open(path) as image:
        exif = image.getexif()
        exif[ORIENTATION] = orientation
        image.save(path, exif=exif)


def test_pixels_are_used_as_stored_with_a_single_note_for_all_workers(own, capsys):
    plain = list(read(own))
    for split, count in (("train", 4), ("val", 2)):
        for number in range(count):
            turn(own / f"{split}2017" / f"{number:04}.png")
    for (image, target), (expected, expected_target) in zip(read(own), plain, strict=True):
        assert torch.equal(image, expected) and torch.equal(target["boxes"], expected_target["boxes"])
    capsys.readouterr()
    main.main(parse(*small(own, "--num_workers", 2, "--epochs", 2)))
    notes = [line for line in capsys.readouterr().out.splitlines() if "EXIF" in line]
    assert [note[: len("note: 4 of")] for note in notes] == ["note: 4 of", "note: 2 of"]
    assert all(
        f"such as {own}/{split}2017/0000.png, have an EXIF" in note
        for split, note in zip(("train", "val"), notes, strict=True)
    )


def test_error_explains_annotations_of_the_rotated_image(own):
    turn(own / "val2017" / "0001.png")
    data = load_annotations(own, "val")
    image = data["images"][1]
    image["width"], image["height"] = image["height"], image["width"]
    data["annotations"] = []
    save_annotations(own, "val", data)
    with pytest.raises(UserError, match="0001.png has .* its EXIF orientation turns it, but COCO's boxes are those of"):
        list(read(own))


def test_drawings_use_pixels_as_stored_and_print_a_note(own, tmp_path, monkeypatch, capsys):
    path = own / "val2017" / "0001.png"
    turn(path)
    seen = []
    monkeypatch.setattr(visualize, "load_model", lambda args, argv: (args, torch.nn.Identity(), {}, {}))
    monkeypatch.setattr(visualize, "drawings", lambda model, image, *_: seen.append(image) or [])
    visualize.main(
        visualize.parser().parse_args(
            ["--resume", "x", "--output_dir", str(tmp_path / "out"), "--device", "cpu", "--image", str(path)]
        )
    )
    assert np.array_equal(seen[0], Image.open(path).convert("RGB"))
    assert f"image {path} has the EXIF orientation 6 and is drawn as it is stored" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Shapes


def sample(width, height):
    boxes = torch.tensor([[0, 0, width, height], [0, 0, width / 2, height / 2]])
    target = {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
        "labels": torch.tensor([1, 2]),
        "masks": tv_tensors.Mask(torch.ones(2, height, width, dtype=torch.uint8)),
    }
    return Image.new("RGB", (width, height)), target


@pytest.mark.parametrize("shape", [(2000, 10), (10, 2000), (1, 1), (2, 1), (1, 300), (5000, 1)])
def test_images_of_extreme_shape_keep_at_least_one_pixel_and_their_boxes(shape):
    for split in ("train", "val"):
        transforms = make_coco_transforms(split, 64)
        for seed in range(20 if split == "train" else 1):
            torch.manual_seed(seed)
            image, target = transforms(*sample(*shape))
            assert min(image.shape[1:]) >= 1 and max(image.shape[1:]) <= 107
            assert target["masks"].shape[1:] == image.shape[1:] and len(target["boxes"]) == len(target["masks"])
            assert ((0 <= target["boxes"]) & (target["boxes"] < 1 + 1e-6)).all()


def test_resized_sides_are_torchvisions_unless_one_would_be_0():
    random = np.random.RandomState(0)
    for _ in range(500):
        height, width, short_side, more = (int(value) for value in random.randint(1, 900, 4))
        for max_size in (None, short_side + more):
            box = tv_tensors.BoundingBoxes([[0, 0, 1, 1]], format="XYXY", canvas_size=(height, width))
            expected = v2.Resize(short_side, max_size=max_size)(box).canvas_size
            assert resized_size(height, width, short_side, max_size) == tuple(max(1, side) for side in expected)


def test_training_and_evaluation_accept_images_of_extreme_shape(tmp_path):
    root = write_set(tmp_path / "set", count=4)
    for split in ("train", "val"):
        data = load_annotations(root, split)
        for image, (width, height) in zip(data["images"][:3], [(2000, 10), (1, 300), (1, 1)], strict=True):
            Image.new("RGB", (width, height), (200, 90, 10)).save(root / f"{split}2017" / image["file_name"])
            image.update(width=width, height=height)
            data["annotations"] = [entry for entry in data["annotations"] if entry["image_id"] != image["id"]]
            data["annotations"].append(
                {
                    "id": 900 + image["id"],
                    "image_id": image["id"],
                    "category_id": 1,
                    "bbox": [0, 0, width, height],
                    "iscrowd": 0,
                    "area": width * height,
                    "segmentation": [[0, 0, width, 0, width, height, 0, height]],
                }
            )
        save_annotations(root, split, data)
    main.main(parse(*small(root, "--masks", "--output_dir", tmp_path, "--batch_size", 1)))
    row = json.loads((tmp_path / "log.txt").read_text())
    assert np.isfinite(row["train_loss"]) and np.isfinite(row["test_loss"])


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def fail(*_):
    raise KeyError("no such colour")


@pytest.mark.parametrize(
    ("part", "flags"), [("transforms", []), ("read_objects", []), ("read_objects", ["--dataset_file", "coco_panoptic"])]
)
def test_any_error_names_the_image(own, part, flags):
    dataset = read(own, "val", *flags, "--coco_panoptic_path", own / "panoptic")
    setattr(dataset, part, fail)
    with pytest.raises(UserError) as caught:
        dataset[0]
    assert str(caught.value) == f"image 0000.png of {dataset.path} cannot be transformed: KeyError: 'no such colour'"
    assert isinstance(caught.value.__cause__, KeyError)


def test_any_error_in_a_worker_names_the_image(own):
    dataset = read(own)
    dataset.transforms = fail
    with pytest.raises(UserError) as caught:
        list(DataLoader(dataset, num_workers=1, collate_fn=list))
    assert str(caught.value) == f"image 0000.png of {dataset.path} cannot be transformed: KeyError: 'no such colour'"


def test_any_error_of_a_decoder_names_the_image(own, monkeypatch):
    monkeypatch.setattr(Image.Image, "convert", lambda *_: 1 // 0)
    with pytest.raises(UserError, match=f"^image {own}/val2017/0000.png cannot be read: ZeroDivisionError"):
        read(own)[0]
