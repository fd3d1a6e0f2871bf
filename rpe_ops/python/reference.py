"""Both operators in plain PyTorch: slow, exact, and what the extension is tested against."""

from torch import Tensor


def rpe_index(input: Tensor, index: Tensor) -> Tensor:
    """(batch, heads, Lq, buckets), (Lq, Lk) -> (batch, heads, Lq, Lk); see `rpe_ops.rpe_index.rpe_index`."""
    return input.gather(3, index.long().expand(*input.shape[:2], *index.shape))


def rpe_bucket_sum(input: Tensor, index: Tensor, num_buckets: int) -> Tensor:
    """(batch, heads, Lq, Lk), (Lq, Lk) -> (batch, heads, Lq, buckets); see `rpe_ops.rpe_index.rpe_bucket_sum`.

    Half types are summed in float32, which `scatter_add` alone does not do.
    """
    wide = input.float() if input.element_size() < 4 else input
    sums = wide.new_zeros(*input.shape[:3], num_buckets)
    return sums.scatter_add(3, index.long().expand(input.shape), wide).to(input.dtype)
