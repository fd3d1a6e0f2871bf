"""What the tests of train_together.py and train_stacked.py share: a small data set, separate runs, and comparisons."""

import numpy as np
import pytest
import torch
from PIL import Image
from train_together import main

import runtime


def write_class_folders(root, images_per_class, shape, darkest_range, step):
    """Write two classes of random images, which differ in brightness.

    Args:
        images_per_class: by the name of the split.
        shape: of an image, as (H, W) or (H, W, 3).
        darkest_range: pixel values of the first class are below it; those of the second are larger by `step`.
    """
    random = np.random.RandomState(0)
    for split, count in images_per_class.items():
        for label in range(2):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.randint(0, darkest_range, shape) + step * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")


def run_separately(lines):
    """Run commands of main.py in this process, one after the other."""
    parser = runtime.ArgumentParser(parents=[main.get_args_parser()])
    for line in lines:
        main.main(parser.parse_args(line.split()[2:]))


def assert_close(first, second, rtol=0.0, atol=0.0):
    """Compare nested containers: numbers and tensors within the tolerance, anything else exactly."""
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        torch.testing.assert_close(first, second, rtol=rtol, atol=atol)
    elif isinstance(first, dict):
        assert list(first) == list(second)
        assert_close(list(first.values()), list(second.values()), rtol, atol)
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for pair in zip(first, second, strict=True):
            assert_close(*pair, rtol, atol)
    elif isinstance(first, float):
        assert first == pytest.approx(second, rel=rtol, abs=atol)
    else:
        assert first == second
