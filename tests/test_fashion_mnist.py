"""fashion_mnist.py on a small synthetic data set, whose images have their number as pixel value."""

import argparse
import gzip

import fashion_mnist
import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import datasets
import main
import runtime
from runtime import UserError


@pytest.fixture
def source(tmp_path):
    """A folder with the four files: 5 images of each class for training and 2 for the test, in turn."""
    for prefix, count in (("train", 50), ("t10k", 20)):
        numbers = np.arange(count, dtype=np.uint8)
        images = np.broadcast_to(numbers[:, None, None] + 100, (count, 28, 28))
        for name, content in (
            ("images-idx3", bytes(16) + images.tobytes()),
            ("labels-idx1", bytes(8) + (numbers % 10).tobytes()),
        ):
            (tmp_path / f"{prefix}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
    return tmp_path


def run(source, train_images=3):
    fashion_mnist.main(argparse.Namespace(source=source, output_dir=source / "out", train_images=train_images))


def test_the_parts_share_no_image_and_each_is_in_the_folder_of_its_class(source, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "VAL", 2)
    run(source)
    names = sorted(path.name for path in (source / "out" / "test" / "val").iterdir())
    assert len(names) == 10 and {"T-shirt-or-top", "Ankle-boot"} <= {*names}
    parts = {
        part: {path: np.asarray(Image.open(path)) for path in (source / "out" / part).rglob("*.png")}
        for part in ("tune/train", "tune/val", "test/val")
    }
    assert [len(images) for images in parts.values()] == [30, 20, 20]
    numbers = [int(image[16, 16]) - 100 for part in ("tune/train", "tune/val") for image in parts[part].values()]
    assert sorted(numbers) == [*range(50)]
    for part, images in parts.items():
        for path, image in images.items():
            label = (int(image[16, 16]) - 100) % 10
            assert path.parent.name == fashion_mnist.CLASSES[label]
            border = 0 if part == "tune/train" else 2
            inside = image[border : border + 28, border : border + 28]
            assert image.shape == (28 + 2 * border, 28 + 2 * border)
            assert inside.min() >= 100 and np.count_nonzero(image) == 28 * 28


def test_training_and_evaluation_see_the_pixels_of_the_data_set(source, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "VAL", 2)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 28, 28), dtype=np.uint8)
    (source / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + pixels.tobytes()))
    run(source)
    flags = runtime.ArgumentParser(parents=[main.get_args_parser()]).parse_args(
        "--input-size 28 --min-crop 1 --aa none --color-jitter 0 --hflip 0 --reprob 0".split()
    )
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    for part, is_train in (("tune/train", True), ("tune/val", False)):
        for path in (source / "out" / part).rglob("*.png"):
            image = datasets.build_transform(is_train, flags)(Image.open(path).convert("RGB"))
            expected = torch.from_numpy(pixels[int(path.stem)]).float() / 255
            assert torch.allclose(image, (expected - mean) / std, atol=1e-6)


def test_images_without_labels_are_refused(source):
    (source / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8 + 19)))
    with pytest.raises(UserError, match="has 20 images and 19 labels in the files t10k"):
        run(source)


@pytest.mark.parametrize(
    "content", [b"no gzip", gzip.compress(bytes(16 + 28 * 28 + 5)), gzip.compress(bytes(16))[:10] + bytes([7] * 20)]
)
def test_a_file_that_cannot_be_read_is_named(source, content):
    (source / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(
        UserError, match="train-images-idx3-ubyte.gz cannot be read .* --source must hold the data set's four .gz"
    ):
        run(source)


@pytest.mark.parametrize("train_images", [0, 5801])
def test_an_impossible_number_of_training_images_is_refused(source, train_images):
    with pytest.raises(UserError, match=f"--train-images {train_images} must be from 1 to 5800"):
        run(source, train_images)
    assert not (source / "out").exists()
