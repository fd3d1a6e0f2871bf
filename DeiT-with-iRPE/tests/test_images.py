"""Images of every mode, orientation and shape: what becomes of them, what is said of them, and how errors name them."""

import io
import json
import pickle
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import nn
from torch.utils.data import DataLoader

import main
from conftest import parse, small, write_images, write_tar
from datasets import RandomResizedCrop, build_dataset, build_transform, load_image
from engine import evaluate
from images import DARK, DEEP_MODES, EXIF_ORIENTED, Oddities, oddities, to_rgb, without_ends
from runtime import UserError

ORIENTATION = 0x0112
DEEP = np.array([[0, 255, 256, 32768, 40000, 65535]], np.uint16)
SHALLOW = DEEP >> 8


# Modes


@pytest.mark.parametrize("mode", sorted({*Image.MODES} - {*DEEP_MODES, "La"}))
def test_modes_of_eight_bits_are_what_pillow_makes_of_them(mode):
    size = len(Image.new(mode, (40, 30)).tobytes())
    image = Image.frombytes(mode, (40, 30), np.random.RandomState(0).bytes(size))
    assert np.array_equal(to_rgb(image), image.convert("RGB")) and to_rgb(image).mode == "RGB"
    assert oddities(image) == 0


def test_transparent_palettes_keep_their_colours():
    image = Image.frombytes("P", (16, 16), bytes(range(256)))
    image.putpalette(np.random.RandomState(0).bytes(768))
    image.info["transparency"] = 7
    assert np.array_equal(to_rgb(image), image.convert("RGB"))


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_sixteen_bits_keep_the_highest_eight(mode):
    pixels = DEEP.astype(">u2" if mode == "I;16B" else "<u2")
    image = to_rgb(Image.frombytes(mode, (6, 1), pixels.tobytes()))
    assert image.mode == "RGB" and np.array_equal(np.asarray(image), np.stack([SHALLOW] * 3, axis=-1))


@pytest.mark.parametrize(("mode", "words"), [("I", "I, 32-bit integers"), ("F", "F, floating-point numbers")])
def test_a_mode_of_unknown_range_is_refused(mode, words):
    with pytest.raises(ValueError, match=f"its mode is {words} of an unknown range: save it with 8 or 16 bits"):
        to_rgb(Image.new(mode, (3, 2)))


def test_a_mode_that_pillow_cannot_convert_is_named():
    with pytest.raises(ValueError, match="its mode La to RGB"):
        to_rgb(Image.new("La", (3, 2)))


def png_of_16_bits(colour_type, samples):
    """A PNG of one row, made by hand, since Pillow writes no colour of 16 bits."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    channels = {0: 1, 2: 3}[colour_type]
    row = b"\0" + np.asarray(samples, ">u2").tobytes()
    header = struct.pack(">IIBBBBB", len(samples) // channels, 1, 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")


def tiff_of_12_bits(pixels):
    """A TIFF of one row of greyscale, made by hand; two samples are packed into three bytes."""
    bits = "".join(f"{value:012b}" for value in pixels)
    content = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
    tags = [
        (256, 3, len(pixels)),
        (257, 3, 1),
        (258, 3, 12),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8 + 2 + 12 * 9 + 4),
        (277, 3, 1),
        (278, 3, 1),
        (279, 4, len(content)),
    ]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II" + struct.pack("<HIH", 42, 8, len(tags)) + entries + bytes(4) + content


def saved(image, *arguments, **options):
    file = io.BytesIO()
    image.save(file, *arguments, **options)
    return file.getvalue()


FILES = {
    "grey PNG": (png_of_16_bits(0, DEEP[0]), SHALLOW[0]),
    "colour PNG": (png_of_16_bits(2, np.repeat(DEEP[0], 3)), SHALLOW[0]),
    "PGM": (b"P5 6 1 65535\n" + DEEP.astype(">u2").tobytes(), SHALLOW[0]),
    "PGM of 10 bits": (b"P5 2 1 1023\n" + np.array([0, 1023], ">u2").tobytes(), [0, 255]),
    "TIFF": (saved(Image.fromarray(DEEP), "TIFF"), SHALLOW[0]),
    "TIFF with its high bytes first": (
        saved(Image.frombytes("I;16B", (6, 1), DEEP.astype(">u2").tobytes()), "TIFF"),
        SHALLOW[0],
    ),
    "TIFF of 12 bits": (tiff_of_12_bits([0, 15, 16, 4095]), [0, 0, 1, 255]),
    "animated GIF": (
        saved(Image.new("L", (2, 1), 90), "GIF", save_all=True, append_images=[Image.new("L", (2, 1), 200)]),
        [90, 90],
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_more_than_eight_bits_are_scaled_and_of_many_frames_the_first_is_taken(tmp_path, name):
    content, expected = FILES[name]
    (tmp_path / "image").write_bytes(content)
    image = np.asarray(load_image(str(tmp_path / "image")))
    assert image.shape == (1, len(expected), 3) and np.array_equal(image[0], np.stack([expected] * 3, axis=-1))


def test_png_of_sixteen_bits_is_scaled_also_where_pillow_opens_it_as_32():
    image = Image.fromarray(DEEP.astype(np.int32))
    image.format = "PNG"  # as Pillow before 11.3
    assert np.array_equal(np.asarray(to_rgb(image))[..., 0], SHALLOW)


@pytest.mark.parametrize("flags", [[], ["--load-tar"]])
def test_a_folder_and_a_tar_scale_deep_images_and_name_those_of_unknown_range(tmp_path, flags):
    (tmp_path / "val" / "ant").mkdir(parents=True)
    (tmp_path / "val" / "bee").mkdir()
    Image.fromarray(np.full((40, 40), 40000, np.uint16)).save(tmp_path / "val" / "ant" / "0.png")
    Image.new("F", (40, 40), 0.5).save(tmp_path / "val" / "bee" / "1.tif")
    write_tar(tmp_path / "val.tar", tmp_path / "val")
    dataset, _ = build_dataset(False, parse("--data-path", tmp_path, "--data-set", "FOLDER", *flags))
    dataset.transform = np.asarray
    assert (dataset[0][0] == 40000 >> 8).all()
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"^image .*bee/1.tif.* cannot be read: its mode is F, floating-point"):
            list(DataLoader(dataset, num_workers=workers))


# Notes


def save_turned(path, orientation, size=(40, 30)):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (*size, 3), np.uint8)).save(path, exif=exif)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", [1, 6, 0, 9])
def test_the_stored_pixels_are_used_whatever_exif_says_as_torchvision_does(tmp_path, suffix, orientation):
    path = str(tmp_path / f"image.{suffix}")
    save_turned(path, orientation)
    assert np.array_equal(load_image(path), torchvision.datasets.folder.pil_loader(path))
    with Image.open(path) as image:
        assert oddities(image) == (EXIF_ORIENTED if orientation == 6 else 0)


def test_damaged_exif_data_is_no_obstacle(tmp_path):
    path = tmp_path / "image.jpg"
    Image.new("RGB", (40, 30)).save(path, exif=b"Exif\0\0MM\0*" + b"\xff" * 20)
    with Image.open(path) as image, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert oddities(image) == 0
    assert load_image(str(path)).size == (40, 30)


def test_deep_images_that_are_black_once_scaled_are_counted():
    for pixels, odd in (([0, 255], DARK), ([0, 0], 0), ([3, 256], 0)):
        assert oddities(Image.fromarray(np.array([pixels], np.uint16))) == odd
    with Image.open(io.BytesIO(tiff_of_12_bits([1, 15]))) as image:
        assert oddities(image) == DARK


def test_a_note_counts_every_image_once_whichever_processes_met_it():
    odd = Oddities(9)
    for index in (3, 3, 5):
        odd.add(index, EXIF_ORIENTED)
    (note,) = odd.tell("image{}".format, lambda mine: [mine, {3: EXIF_ORIENTED, 8: EXIF_ORIENTED}])
    assert note.startswith("note: 3 of the images read so far, such as image3, have an EXIF tag")
    assert odd.tell("image{}".format, lambda mine: [mine]) == []


def test_one_note_tells_of_the_turned_images_that_workers_of_a_run_met(tmp_path, capsys):
    for split, turned in (("train", 4), ("val", 2)):
        write_images(tmp_path / split, ("ant", "bee"), 2)
        for number in range(turned):
            save_turned(tmp_path / split / "ant" / f"turned{number}.jpg", 8)
    main.main(parse(*small(tmp_path, "--num_workers", 1, "--epochs", 2, "--no-repeated-aug", "--batch-size", 4)))
    notes = [line for line in capsys.readouterr().out.splitlines() if "EXIF" in line]
    assert [note[: len("note: 4")] for note in notes] == ["note: 4", "note: 2"]
    assert "train/ant/turned0.jpg" in notes[0] and "val/ant/turned0.jpg" in notes[1]


def test_images_as_they_should_be_give_no_note(image_root, capsys):
    dataset, _ = build_dataset(False, parse(*small(image_root)))
    evaluate(DataLoader(dataset, 8), nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3)), torch.device("cpu"))
    assert "note" not in capsys.readouterr().out


def test_a_single_class_is_noted(tmp_path, capsys):
    write_images(tmp_path / "train", ("ant",), 2)
    build_dataset(True, parse(*small(tmp_path)))
    assert "has a single class, ant" in capsys.readouterr().out


# Shapes

SHAPES = [(1, 1), (1, 2), (3, 1), (2, 2), (2000, 10), (10, 2000), (1, 3000), (3000, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_images_of_extreme_shape_are_trained_and_evaluated_on(shape):
    image = Image.new("RGB", shape, (124, 116, 104))
    train, val = (
        build_transform(is_train, parse("--input-size", 32, "--aa", "none", "--color-jitter", 0, "--reprob", 0))
        for is_train in (True, False)
    )
    for seed in range(50):
        random.seed(seed)
        result = train(image)
        assert result.shape == (3, 32, 32) and result.abs().max() < 0.02
    result = val(image)
    assert result.shape == (3, 32, 32) and result.abs().max() < 0.02


def test_only_the_ends_of_very_long_images_are_cut_off():
    long = Image.fromarray(np.arange(1000, dtype=np.uint8)[None].repeat(2, 0))
    assert np.array_equal(without_ends(long), np.asarray(long)[:, 400:600])
    for size in ((200, 2), (3, 300), (640, 480)):
        image = Image.new("RGB", size)
        assert without_ends(image) is image


@pytest.mark.parametrize("shape", [(40, 40), (500, 375), (30, 90)])
def test_random_crops_of_ordinary_images_are_timms(shape):
    image, options = Image.new("RGB", shape), ((0.08, 1.0), (3 / 4, 4 / 3))
    for seed in range(100):
        random.seed(seed)
        expected = RandomResizedCropAndInterpolation.get_params(image, *options)
        random.seed(seed)
        assert RandomResizedCrop.get_params(image, *options) == expected


# Errors


@pytest.fixture
def of_each_kind(tmp_path, monkeypatch):
    """Data sets of a training split with a single class, by kind, and how errors name their first image."""
    write_images(tmp_path / "train", ("ant",), 2)
    write_tar(tmp_path / "train.tar", tmp_path / "train")
    listing = {
        "images": [{"id": 1, "file_name": "train/ant/0.png"}],
        "annotations": [{"image_id": 1, "category_id": 0}],
    }
    (tmp_path / "train2018.json").write_text(json.dumps(listing))
    (tmp_path / "categories.json").write_text(json.dumps([{"id": 0, "name": "ant"}]))
    cifar = torchvision.datasets.CIFAR100
    (tmp_path / cifar.base_folder).mkdir()
    for name in ("train", "test"):
        content = {"data": np.zeros((2, 3072), np.uint8), "fine_labels": [7, 99]}
        (tmp_path / cifar.base_folder / name).write_bytes(pickle.dumps(content))
    (tmp_path / cifar.base_folder / "meta").write_bytes(pickle.dumps({"fine_label_names": ["x"] * 100}))
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5: True)
    kinds = {"folder": ["FOLDER"], "tar": ["FOLDER", "--load-tar"], "iNaturalist": ["INAT"], "CIFAR": ["CIFAR"]}
    names = {
        "folder": f"{tmp_path}/train/ant/0.png",
        "tar": f"ant/0.png in {tmp_path}/train.tar",
        "iNaturalist": f"{tmp_path}/train/ant/0.png",
        "CIFAR": "0 of CIFAR-100's training set",
    }
    return {
        kind: (build_dataset(True, parse("--data-path", tmp_path, "--data-set", *flags))[0], names[kind])
        for kind, flags in kinds.items()
    }


def fail(image):
    raise KeyError("no such colour")


@pytest.mark.parametrize("kind", ["folder", "tar", "iNaturalist", "CIFAR"])
def test_any_error_of_a_transform_names_the_image(of_each_kind, kind):
    dataset, name = of_each_kind[kind]
    dataset.transform = fail
    with pytest.raises(UserError) as caught:
        dataset[0]
    assert str(caught.value) == f"image {name} cannot be transformed: KeyError: 'no such colour'"
    assert isinstance(caught.value.__cause__, KeyError)


def test_any_error_in_a_worker_names_the_image(of_each_kind):
    dataset, name = of_each_kind["tar"]
    dataset.transform = fail
    with pytest.raises(UserError) as caught:
        list(DataLoader(dataset, num_workers=1))
    assert str(caught.value) == f"image {name} cannot be transformed: KeyError: 'no such colour'"


def test_any_error_of_a_decoder_names_the_image(of_each_kind, monkeypatch):
    dataset, name = of_each_kind["folder"]
    monkeypatch.setattr(Image.Image, "convert", lambda *_: 1 // 0)
    with pytest.raises(UserError) as caught:
        dataset[0]
    assert str(caught.value).startswith(f"image {name} cannot be read: ZeroDivisionError")
