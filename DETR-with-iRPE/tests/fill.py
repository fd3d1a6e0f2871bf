"""The deterministic weights and inputs that the golden numbers were measured with."""

import zlib
from collections.abc import Mapping

import numpy as np
import torch


def fill_state_dict(state_dict: Mapping[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    """New values for every key, drawn from ``prefix + key`` and the shape alone."""
    return {
        key: torch.from_numpy(_values(prefix + key, tuple(value.shape)))
        for key, value in state_dict.items()
        if not key.endswith("num_batches_tracked")
    }


def image(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal float32 input of the given shape."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def _values(key: str, shape: tuple[int, ...]) -> np.ndarray:
    z = np.random.RandomState(zlib.crc32(key.encode()) & 0xFFFFFFFF).standard_normal(size=shape).astype(np.float32)
    if key.endswith("running_var"):
        return 1 + np.float32(0.1) * np.abs(z)
    if key.endswith("running_mean"):
        return np.float32(0.1) * z
    if "lookup_table" in key or key in ("pos_embed", "cls_token", "dist_token"):
        return np.float32(0.2) * z
    if len(shape) == 1:
        return 1 + np.float32(0.1) * z if key.endswith("weight") else np.float32(0.02) * z
    return z / np.sqrt(np.float32(np.prod(shape[1:])))
