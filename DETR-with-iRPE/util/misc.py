"""Pictures of different sizes as one batch."""

import torch
import torch.nn.functional as F


class NestedTensor:
    """Padded pictures (B, C, H, W) with their mask (B, H, W), True on the padding."""

    def __init__(self, tensors, mask):
        self.tensors, self.mask = tensors, mask

    def to(self, device, non_blocking=False):
        return NestedTensor(*(x.to(device, non_blocking=non_blocking) for x in self.decompose()))

    def pin_memory(self):
        return NestedTensor(*(x.pin_memory() for x in self.decompose()))

    def decompose(self):
        """(tensors, mask)"""
        return self.tensors, self.mask


def nested_tensor_from_tensor_list(tensor_list):
    """Pad pictures with zeros on the right and at the bottom to the largest height and width.

    Args:
        tensor_list: list of (C, H, W) tensors, or one tensor (B, C, H, W).
    Returns: NestedTensor.
    Raises: ValueError for anything else.
    """
    if isinstance(tensor_list, torch.Tensor) and tensor_list.dim() == 4 and tensor_list.shape[0]:
        # nothing to pad, and no loop: torch.export can leave the batch size open
        return NestedTensor(tensor_list, torch.zeros_like(tensor_list[:, 0], dtype=torch.bool))
    if not len(tensor_list) or any(x.dim() != 3 or len(x) != len(tensor_list[0]) for x in tensor_list):
        raise ValueError(
            f"pictures of shapes {[tuple(x.shape) for x in tensor_list]}; a batch takes one or more of "
            "shape (channels, height, width) with the same number of channels"
        )
    height, width = (max(x.shape[axis] for x in tensor_list) for axis in (1, 2))
    mask = torch.ones(len(tensor_list), height, width, dtype=torch.bool, device=tensor_list[0].device)
    for picture, hidden in zip(tensor_list, mask, strict=True):
        hidden[: picture.shape[1], : picture.shape[2]] = False
    padded = [F.pad(x, (0, width - x.shape[2], 0, height - x.shape[1])) for x in tensor_list]
    return NestedTensor(torch.stack(padded), mask)


def collate_fn(batch):
    """List of (picture, target) → (NestedTensor, tuple of targets)."""
    pictures, targets = zip(*batch, strict=True)
    return nested_tensor_from_tensor_list(pictures), targets
