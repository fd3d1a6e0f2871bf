"""Batches of images of different sizes."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


class NestedTensor:
    """A batch of padded images or feature maps.

    Attributes:
        tensors: (B, C, H, W).
        mask: (B, H, W), bool, True on the padding.
    """

    def __init__(self, tensors: torch.Tensor, mask: torch.Tensor) -> None:
        self.tensors = tensors
        self.mask = mask

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "NestedTensor":
        """Copy both tensors to a device."""
        return NestedTensor(*(x.to(device, non_blocking=non_blocking) for x in self.decompose()))

    def pin_memory(self) -> "NestedTensor":
        """Copy both tensors to pinned memory; the DataLoader calls this."""
        return NestedTensor(*(x.pin_memory() for x in self.decompose()))

    def decompose(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(tensors, mask)"""
        return self.tensors, self.mask


def nested_tensor_from_tensor_list(tensor_list: torch.Tensor | Sequence[torch.Tensor]) -> NestedTensor:
    """Pad images with zeros on the right and at the bottom to the largest height and width of the batch.

    Args:
        tensor_list: list of images (C, H, W), or one tensor (B, C, H, W).
    Raises: ValueError for an empty batch and for tensors of other shapes.
    """
    if isinstance(tensor_list, torch.Tensor) and tensor_list.dim() == 4 and tensor_list.shape[0]:
        # Nothing needs padding. Without a loop over the batch, torch.export can leave the batch size dynamic.
        return NestedTensor(tensor_list, torch.zeros_like(tensor_list[:, 0], dtype=torch.bool))
    if not len(tensor_list) or any(x.dim() != 3 or len(x) != len(tensor_list[0]) for x in tensor_list):
        raise ValueError(
            f"images of shapes {[tuple(x.shape) for x in tensor_list]}; a batch takes one or more of "
            "shape (channels, height, width) with the same number of channels"
        )
    height = max(x.shape[1] for x in tensor_list)
    width = max(x.shape[2] for x in tensor_list)
    mask = torch.ones(len(tensor_list), height, width, dtype=torch.bool, device=tensor_list[0].device)
    for image, image_mask in zip(tensor_list, mask, strict=True):
        image_mask[: image.shape[1], : image.shape[2]] = False
    padded = [F.pad(x, (0, width - x.shape[2], 0, height - x.shape[1])) for x in tensor_list]
    return NestedTensor(torch.stack(padded), mask)


def collate_fn(batch: Sequence[tuple[torch.Tensor, dict]]) -> tuple[NestedTensor, tuple[dict, ...]]:
    """Collate (image, target) pairs into a padded batch and a tuple of targets."""
    images, targets = zip(*batch, strict=True)
    return nested_tensor_from_tensor_list(images), targets
