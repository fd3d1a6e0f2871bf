"""Both operators in plain PyTorch: slow but exact. The tests compare the extension with them."""

from torch import Tensor


def rpe_index(input: Tensor, index: Tensor) -> Tensor:
    """Gather (batch, heads, Lq, buckets) with ids (Lq, Lk) into (batch, heads, Lq, Lk).

    See `rpe_ops.rpe_index.rpe_index`.
    """
    return input.gather(3, index.long().expand(*input.shape[:2], *index.shape))


def rpe_bucket_sum(input: Tensor, index: Tensor, num_buckets: int) -> Tensor:
    """Sum (batch, heads, Lq, Lk) per bucket of ids (Lq, Lk) into (batch, heads, Lq, num_buckets).

    Half types are summed in float32, which `scatter_add` alone does not do. See `rpe_ops.rpe_index.rpe_bucket_sum`.
    """
    wide = input.float() if input.element_size() < 4 else input
    sums = wide.new_zeros(*input.shape[:3], num_buckets)
    return sums.scatter_add(3, index.long().expand(input.shape), wide).to(input.dtype)
