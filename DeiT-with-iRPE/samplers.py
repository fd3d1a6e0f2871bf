"""Samplers: which images a rank sees, and in which order."""

from collections.abc import Iterator, Sized

from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import Sampler

from runtime import get_rank, get_world_size


class RASampler(RepeatAugSampler):
    """Repeated augmentation (Hoffer et al., CVPR 2020): three copies of every image, distributed over the ranks.

    In an epoch, each of R ranks sees the first ⌊N/256⌋·256/R samples of its share of the shuffled copies, or ⌈N/R⌉ for
    fewer than 256 images. Call ``set_epoch`` before each epoch.
    """

    def __init__(
        self, dataset: Sized, num_replicas: int | None = None, rank: int | None = None, shuffle: bool = True
    ) -> None:
        super().__init__(
            dataset,
            get_world_size() if num_replicas is None else num_replicas,
            get_rank() if rank is None else rank,
            shuffle,
            # With 256, older timm would select nothing from a smaller data set.
            selected_round=256 if len(dataset) >= 256 else 0,
        )


class ShardSampler(Sampler[int]):
    """Every ``num_replicas``-th index, starting at ``rank``, so that together the ranks see each image exactly once.

    torch's DistributedSampler repeats images to make all shards equally long, so some images would count twice.
    """

    def __init__(self, dataset: Sized, num_replicas: int, rank: int) -> None:
        self.num_replicas = num_replicas
        self.indices = range(rank, len(dataset), num_replicas)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)
