"""The gather and the bucket sum behind iRPE's contextual mode, each the other's adjoint.

    rpe_index       Y[b,h,i,j] = input[b,h,i,index[i,j]]
    rpe_bucket_sum  S[b,h,i,c] = sum of input[b,h,i,j] over all j with index[i,j] = c

`rpe_index_add_` and `rpe_bucket_sum_add_` do the same in place, for the blockwise attention on the CPU.

iRPE on keys and queries adds rpe_index(x @ table, ids) to the logits (Wu et al., ICCV 2021, Eq. 12 and 13). iRPE on
values adds rpe_bucket_sum(attention, ids, buckets) @ table to the output (Eq. 14).
"""

from typing import Any

import torch
from torch import Tensor


def rpe_index(input: Tensor, index: Tensor) -> Tensor:
    """Gather along the buckets, with ids that all images and heads share.

    input: (batch, heads, Lq, buckets), float16, bfloat16, float32 or float64, any strides.
    index: (Lq, Lk), int32 or int64, each id in [0, buckets).
    Returns (batch, heads, Lq, Lk) in the dtype of input. On CUDA the stride between rows is a multiple of 16, because
    PyTorch's attention wants this alignment of a mask. Reverse mode can differentiate the result with respect to input
    any number of times. Forward mode (`torch.func.jvp`) is not supported; do not use it.

    Raises ValueError or TypeError for wrong shapes and dtypes. On the CPU an id out of range raises IndexError. On CUDA
    its result is NaN, and no memory is read for it (see `validate_index`).
    """
    return torch.ops.rpe_ops.rpe_index(input, index)


def rpe_bucket_sum(input: Tensor, index: Tensor, num_buckets: int) -> Tensor:
    """Sum along the keys per bucket, with ids that all images and heads share.

    input: (batch, heads, Lq, Lk), float16, bfloat16, float32 or float64, any strides.
    index: (Lq, Lk), int32 or int64, each id in [0, num_buckets).
    Returns (batch, heads, Lq, num_buckets) in the dtype of input; half types are summed in float32. The result is the
    same in every run and for any number of threads. Reverse mode can differentiate it with respect to input any number
    of times. Forward mode (`torch.func.jvp`) is not supported; do not use it.

    Raises ValueError or TypeError for wrong shapes and dtypes. On the CPU an id out of range raises IndexError. On CUDA
    the sums leave it out (see `validate_index`).
    """
    return torch.ops.rpe_ops.rpe_bucket_sum(input, index, num_buckets)


def rpe_index_add_(output: Tensor, input: Tensor, index: Tensor, by_key: bool = False) -> None:
    """Gather as `rpe_index` does, and add the result to `output` in place. CPU only, without derivatives.

    output[b,h,i,j] += input[b,h,i,index[i,j]], or input[b,h,j,index[i,j]] with `by_key`

    output: (batch, heads, Lq, Lk), float32 or float64, contiguous.
    input: (batch, heads, Lq, buckets), or (batch, heads, Lk, buckets) with `by_key`; the dtype of output, any strides.
    index: (Lq, Lk), int32 or int64.

    Raises ValueError or TypeError for wrong shapes, strides and dtypes, and IndexError for an id out of range. After an
    IndexError `output` may contain part of the result.
    """
    torch.ops.rpe_ops.rpe_index_add_(output, input, index, by_key)


def rpe_bucket_sum_add_(output: Tensor, input: Tensor, index: Tensor) -> None:
    """Adjoint of `rpe_index_add_` with `by_key`, in place. CPU only, without derivatives.

    output[b,h,j,index[i,j]] += input[b,h,i,j]

    The result is the same in every run and for any number of threads.

    output: (batch, heads, Lk, buckets), float32 or float64, contiguous.
    input: (batch, heads, Lq, Lk), the dtype of output, any strides.
    index: (Lq, Lk), int32 or int64.

    Raises ValueError or TypeError for wrong shapes, strides and dtypes, and IndexError for an id out of range.
    """
    torch.ops.rpe_ops.rpe_bucket_sum_add_(output, input, index)


def validate_index(index: Tensor, num_buckets: int) -> None:
    """Raise IndexError unless every id of `index` (any shape, any device) is in [0, num_buckets).

    Call it once, where the ids are created. On CUDA it synchronizes with the device, so the operators do not check ids.
    """
    if index.numel() == 0:
        return
    for bound in torch.stack(torch.aminmax(index)).tolist():
        if not 0 <= bound < num_buckets:
            raise IndexError(f"rpe_ops: id {bound} is not one of the {num_buckets} buckets (0 to {num_buckets - 1})")


class RPEIndexFunction:
    """`RPEIndexFunction.apply(input, index)` equals `rpe_index(input, index)`. The authors' code uses this name."""

    apply = staticmethod(rpe_index)


@torch.library.register_fake("rpe_ops::rpe_index")
def _(input: Tensor, index: Tensor) -> Tensor:
    torch._check(input.dim() == 4 and index.dim() == 2, lambda: "rpe_index: input must be 4-D and index 2-D")
    torch._check(input.size(2) == index.size(0), lambda: "rpe_index: input and index differ in their queries")
    keys = index.size(1)
    if input.device.type == "cuda":  # 16 is kRowAlignment in csrc/rpe_ops.h.
        return input.new_empty(*input.shape[:3], (keys + 15) // 16 * 16)[..., :keys]
    return input.new_empty(*input.shape[:3], keys)


@torch.library.register_fake("rpe_ops::rpe_bucket_sum")
def _(input: Tensor, index: Tensor, num_buckets: int) -> Tensor:
    torch._check(input.dim() == 4 and index.dim() == 2, lambda: "rpe_bucket_sum: input must be 4-D and index 2-D")
    torch._check(input.size(2) == index.size(0), lambda: "rpe_bucket_sum: input and index differ in their queries")
    torch._check(input.size(3) == index.size(1), lambda: "rpe_bucket_sum: input and index differ in their keys")
    return input.new_empty(*input.shape[:3], num_buckets)


@torch.library.register_fake("rpe_ops::rpe_index_add_")
def _(output: Tensor, input: Tensor, index: Tensor, by_key: bool = False) -> None:
    owner = 1 if by_key else 0
    torch._check(output.dim() == input.dim() == 4 and index.dim() == 2, lambda: "rpe_index_add_: wrong dimensions")
    torch._check(input.size(2) == index.size(owner), lambda: "rpe_index_add_: input and index differ")
    torch._check(output.shape == (*input.shape[:2], *index.shape), lambda: "rpe_index_add_: wrong shape of output")


@torch.library.register_fake("rpe_ops::rpe_bucket_sum_add_")
def _(output: Tensor, input: Tensor, index: Tensor) -> None:
    torch._check(output.dim() == input.dim() == 4 and index.dim() == 2, lambda: "rpe_bucket_sum_add_: wrong dimensions")
    torch._check(input.shape[2:] == index.shape, lambda: "rpe_bucket_sum_add_: input and index differ")
    torch._check(
        output.shape[:3] == (*input.shape[:2], index.size(1)), lambda: "rpe_bucket_sum_add_: wrong shape of output"
    )


def _save_index(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.num_buckets = inputs[0].size(3)


torch.library.register_autograd(
    "rpe_ops::rpe_index",
    lambda ctx, grad: (rpe_bucket_sum(grad, ctx.saved_tensors[0], ctx.num_buckets), None),
    setup_context=_save_index,
)
torch.library.register_autograd(
    "rpe_ops::rpe_bucket_sum",
    lambda ctx, grad: (rpe_index(grad, ctx.saved_tensors[0]), None, None),
    setup_context=_save_index,
)


def _with_mapped_dimension_first(what: str, in_dims: tuple[int | None, ...], input: Tensor, index: Tensor) -> Tensor:
    """The input of a call under torch.vmap, (vmap's dimension, batch, heads, ...)."""
    if in_dims[1] is not None:
        raise ValueError(f"rpe_ops.{what}: torch.vmap cannot map over index, which all images share")
    return input.movedim(in_dims[0], 0)


def _vmap_index(info: Any, in_dims: tuple[int | None, ...], input: Tensor, index: Tensor) -> tuple[Tensor, int]:
    """Run `rpe_index` under torch.vmap as one call with a larger batch."""
    input = _with_mapped_dimension_first("rpe_index", in_dims, input, index)
    return rpe_index(input.flatten(0, 1), index).unflatten(0, input.shape[:2]), 0


def _vmap_bucket_sum(
    info: Any, in_dims: tuple[int | None, ...], input: Tensor, index: Tensor, num_buckets: int
) -> tuple[Tensor, int]:
    """Run `rpe_bucket_sum` under torch.vmap as one call with a larger batch."""
    input = _with_mapped_dimension_first("rpe_bucket_sum", in_dims, input, index)
    return rpe_bucket_sum(input.flatten(0, 1), index, num_buckets).unflatten(0, input.shape[:2]), 0


torch.library.register_vmap("rpe_ops::rpe_index", _vmap_index)
torch.library.register_vmap("rpe_ops::rpe_bucket_sum", _vmap_bucket_sum)
