"""Random numbers and the order of the data as functions of the position in training.

They depend on the seed, the epoch, the step and the rank only, so that a resumed run continues as if it had never
stopped.
"""

import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from .ranks import get_rank, get_world_size


def seed_everything(*numbers: int) -> None:
    """Seed Python, NumPy and PyTorch from non-negative integers, such as (seed, epoch, step, rank)."""
    torch.manual_seed(_seed_cpu(numbers))


def _seed_cpu(numbers: tuple[int, ...]) -> int:
    """Seed Python, NumPy and PyTorch's generator of the CPU, and return PyTorch's seed."""
    python, numpy, pytorch = np.random.SeedSequence(numbers).generate_state(3)
    random.seed(int(python))
    np.random.seed(numpy)
    torch.default_generator.manual_seed(int(pytorch))
    return int(pytorch)


class SeededDataset(Dataset):
    """``dataset``, indexed by the keys of ``SeededSampler``, which seed the random numbers of each sample."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, ...]) -> Any:
        index, *numbers = key
        # Samples are made on the CPU. torch.manual_seed would also prepare seeds for GPUs, which takes PyTorch longer
        # than a small image takes to load.
        _seed_cpu(tuple(numbers))
        return self.dataset[index]


class SeededSampler(Sampler[tuple[int, ...]]):
    """Keys (index, seed, epoch, position) for a sampler's indices; positions count the samples of all ranks.

    The sampler must assign indices to the ranks round-robin, as torch's DistributedSampler does. ``len`` is that of a
    whole epoch.
    """

    def __init__(self, sampler: Sampler[int], seed: int) -> None:
        self.sampler, self.seed = sampler, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int, done: int = 0) -> None:
        """Go to an epoch in which all ranks together have already seen ``done`` samples."""
        self.sampler.set_epoch(epoch)
        self.epoch, self.first = epoch, done // get_world_size()

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        for position, index in itertools.islice(enumerate(self.sampler), self.first, None):
            yield index, self.seed, self.epoch, position * get_world_size() + get_rank()

    def __len__(self) -> int:
        return len(self.sampler)
