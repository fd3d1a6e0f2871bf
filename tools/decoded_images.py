"""The batches of `train_stacked.py`: training images that are decoded once, and a batch of every seed in each step."""

import argparse
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import MaybeToTensor
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from train_together import main, runtime

from images import naming
from runtime import UserError

MAX_IMAGE_BYTES = 8 * 2**30


class DecodedImages(Dataset):
    """A training set whose images are decoded once; its items are (augmented pixels, class).

    The pixels are uint8, (H, W, 3). `normalization` completes the transform on the model's device.

    Args:
        dataset: a training set of datasets.py. It loses its transform.
    Raises: UserError if its transform does not end with the conversion to a tensor and the normalization, or if the
        images need too much memory.
    """

    def __init__(self, dataset: Dataset) -> None:
        *augmentation, to_tensor, normalization = dataset.transform.transforms
        if not isinstance(to_tensor, MaybeToTensor) or not isinstance(normalization, transforms.Normalize):
            raise UserError(f"train_stacked.py cannot use the transform {dataset.transform}: use train_together.py")
        self.augment = transforms.Compose(augmentation)
        self._mean, self._std = normalization.mean, normalization.std
        self.classes, self.name = dataset.classes, dataset.name
        self.oddities = getattr(dataset, "oddities", None)  # for the notes on unusual images
        dataset.transform = unchanged
        self._samples = []
        size = 0
        for i in range(len(dataset)):
            image, target = dataset[i]
            size += 4 * image.width * image.height  # Pillow's RGB images have four bytes per pixel
            check_memory("training", size)
            self._samples.append((image, target))

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        image, target = self._samples[i]
        with naming(self.name(i), "transformed"):
            return np.asarray(self.augment(image)), target

    def normalization(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """The end of main.py's transform, a function of pixels: (..., H, W, 3) uint8 to (..., 3, H, W) float32."""
        # A tensor as the divisor, since a GPU divides by a Python number less exactly.
        white = torch.tensor(255.0, device=device)
        mean, std = (
            torch.as_tensor(values, dtype=torch.float32, device=device)[:, None, None]
            for values in (self._mean, self._std)
        )
        return lambda pixels: (pixels.movedim(-1, -3).float() / white - mean) / std


def unchanged(image: Image.Image) -> Image.Image:
    """The image, as the transform of a data set."""
    return image


def check_memory(split: str, size: int) -> None:
    """Raise ``UserError`` if the images of a data set need too much memory."""
    if size > MAX_IMAGE_BYTES:
        raise UserError(
            f"the decoded images of the {split} set need more than {MAX_IMAGE_BYTES / 2**30:.0f} GiB of memory: "
            "train_stacked.py is for small images; use train_together.py"
        )


def collate(samples: list[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
    """A batch of `DecodedImages`: pixels (B, H, W, 3), classes (B,).

    They are arrays, because a worker hands tensors over by file descriptors, which takes longer than copying them.
    """
    pixels, targets = zip(*samples, strict=True)
    return np.stack(pixels), np.array(targets)


def build_loader(command: argparse.Namespace, images: DecodedImages) -> DataLoader:
    """The batches of one seed, in main.py's order."""
    return DataLoader(
        runtime.SeededDataset(images),
        command.batch_size,
        sampler=main.build_train_sampler(command, images),
        drop_last=True,
        collate_fn=collate,
        num_workers=command.num_workers,
        worker_init_fn=runtime.own_group,
        persistent_workers=command.num_workers > 0,
        timeout=command.step_timeout if command.num_workers else 0,
    )


class Batches:
    """The batches of all seeds, step by step, in tensors whose addresses stay: (seeds, B, 3, H, W), (seeds, B)."""

    def __init__(self, loaders: list[DataLoader], images: DecodedImages, device: torch.device) -> None:
        self._loaders, self._device = loaders, device
        self._normalize = images.normalization(device)
        self.batch_size = loaders[0].batch_size
        self._images: Tensor | None = None
        self._targets: Tensor | None = None

    def __len__(self) -> int:
        return len(self._loaders[0])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # All loaders start at once, before the first batch of any of them is waited for.
        for batches in zip(*[runtime.read_batches(loader) for loader in self._loaders], strict=True):
            pixels, targets = (self._to_device(np.stack(column)) for column in zip(*batches, strict=True))
            images = self._normalize(pixels)
            if self._images is None:
                self._images, self._targets = images, targets
            else:
                self._images.copy_(images)
                self._targets.copy_(targets)
            yield self._images, self._targets

    def _to_device(self, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(values)
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)
