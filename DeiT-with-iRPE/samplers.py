"""Which pictures a process sees, and in which order."""

from collections.abc import Iterator, Sized

from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import Sampler

from runtime import get_rank, get_world_size


class RASampler(RepeatAugSampler):
    """Repeated augmentation (Hoffer et al., CVPR 2020): three copies of every picture, dealt out over the processes.

    An epoch is the first ⌊N/256⌋·256/processes samples of the shuffled copies on each process, all ⌈N/processes⌉ for
    fewer than 256 pictures. Call ``set_epoch`` before each epoch.
    """

    def __init__(
        self, dataset: Sized, num_replicas: int | None = None, rank: int | None = None, shuffle: bool = True
    ) -> None:
        super().__init__(
            dataset,
            get_world_size() if num_replicas is None else num_replicas,
            get_rank() if rank is None else rank,
            shuffle,
            selected_round=256 if len(dataset) >= 256 else 0,
        )  # older timm would select nothing


class ShardSampler(Sampler[int]):
    """Every ``num_replicas``-th index from ``rank`` on: together the processes see each picture exactly once.

    torch's DistributedSampler repeats pictures until the shards are equally long, which would count some twice.
    """

    def __init__(self, dataset: Sized, num_replicas: int, rank: int) -> None:
        self.num_replicas = num_replicas
        self.indices = range(rank, len(dataset), num_replicas)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)
