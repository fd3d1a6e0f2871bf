"""Attention with contextual relative positions on a CPU, block by block, with the extension's operators.

Neither pass allocates a tensor of batch × heads × tokens × tokens. A block consists of whole rows of logits, and the
backward pass computes it again, as FlashAttention does (Dao et al., NeurIPS 2022).
"""

import importlib.util
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .rpe_index import rpe_bucket_sum, rpe_bucket_sum_add_, rpe_index, rpe_index_add_

ON_CUDA = "rows"  # The default on a GPU. "composed" uses PyTorch's operators, `rpe_index` and `rpe_bucket_sum`.
ATTENTION = os.environ.get("IRPE_ATTENTION", ON_CUDA)
_IS_CHOSEN = "IRPE_ATTENTION" in os.environ
_can_import_rows = importlib.util.find_spec("triton") is not None
rows = None  # The module of that name, from the first call on that may need it: importing Triton takes seconds.

_BLOCK = 2**20  # Logits per block: 4 MB of float32, which fit into a processor's cache.

Terms: TypeAlias = Sequence[tuple[Tensor, Tensor]]  # Relative position terms: pairs of (ids, table).


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    on_q: Terms = (),
    on_k: Terms = (),
    on_v: Terms = (),
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(q·kᵀ + terms on keys and queries + mask)·v + terms on values (Wu et al., ICCV 2021, Eq. 12 to 14).

        logits[b,h,i,j] += (q[b,h,i] @ table)[ids[i,j]]     for each (ids, table) on keys
        logits[b,h,i,j] += (k[b,h,j] @ table)[ids[i,j]]     for each (ids, table) on queries: ids of the pairs (j, i)
        out[b,h,i]      += Σ_j p[b,h,i,j] table[ids[i,j]]   for each (ids, table) on values, p after dropout

    Args:
        q, k, v: (B, H, L, D), float32 or float64, on a CPU; q is already scaled. `attention_takes` has all conditions.
        on_q, on_k, on_v: lists of pairs (ids, table). ids: (L, L), int32 or int64. table: (D, buckets) or
            (H, D, buckets) on queries and keys, (buckets, D) or (H, buckets, D) on values.
        mask: added to the logits, can be broadcast to (B, H, L, L), and needs no gradient. The result of a query is
            undefined if the mask hides all keys from it.
        dropout_p: probability of dropout on the attention weights. The backward pass drops the same weights.
    Returns: (B, H, L, D), differentiable any number of times with respect to q, k, v and the tables. Only second
        derivatives allocate tensors of (B, H, L, L).
    Raises: ValueError if `attention_takes` returns False, IndexError for an id out of range.
    """
    if not attention_takes(q, k, v, mask):
        raise ValueError(
            f"rpe_ops.attention got q, k, v of {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)} and "
            f"{q.dtype} on {q.device}; it takes float32 or float64 of one shape on a CPU, in eager mode and without "
            "autocast (see rpe_ops.attention_takes)"
        )
    if mask is not None:
        mask = mask.expand(*q.shape[:3], k.shape[2])
    ids = [[indices for indices, _ in terms] for terms in (on_k, on_q, on_v)]
    tables = [table for terms in (on_k, on_q, on_v) for _, table in terms]
    return _BlockwiseAttention.apply(q, k, v, mask, dropout_p, ids, *tables)


def attention_takes(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, modules: Iterable[nn.Module] = ()
) -> bool:
    """Whether `attention` can compute this call in place of `modules`, whose `forward` then does not run.

    It can if q, k and v are float32 or float64 tensors of one shape on a CPU, if nothing compiles, traces or transforms
    the call and autocast is off, if the mask needs no gradient, and if the modules are contextual (no bias tables) and
    have neither hooks nor a replaced `forward`.
    """
    if not _may_replace(mask, modules) or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return (
        q.shape == k.shape
        and q.shape[:3] == v.shape[:3]
        and q.dtype in (torch.float32, torch.float64)
        and all(x.device.type == "cpu" and x.dtype == q.dtype for x in (q, k, v))
        and not any(hasattr(part, "lookup_table_bias") for module in modules for part in module.modules())
    )


def rows_take(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: list[Tensor],
    prefix: int,
    mask: Tensor | None = None,
    modules: Iterable[nn.Module] = (),
) -> bool:
    """Whether `rows.attention` computes this call in place of `modules`, whose `forward` then does not run.

    On a GPU it does if all of these hold:

    - the environment does not contain IRPE_ATTENTION=composed;
    - the call computes in half precision, or the environment contains IRPE_ATTENTION=rows, because the speed in float32
      has not been measured;
    - nothing traces or transforms the call, the mask needs no gradient, and the modules have neither hooks nor a
      replaced `forward`;
    - `rows.takes` accepts q, k, v (B, H, L, D), the tables, the number of prefix tokens and the mask.

    Raises: ValueError if IRPE_ATTENTION is neither composed nor rows.
    """
    if ATTENTION not in ("composed", "rows"):
        raise ValueError(f"IRPE_ATTENTION is {ATTENTION!r}; it must be composed or rows, or not be set")
    if ATTENTION == "composed" or not _may_replace(mask, modules):
        return False
    # With IRPE_ATTENTION=rows, Triton's interpreter may also run on a CPU.
    if not _IS_CHOSEN and (q.device.type != "cuda" or dtype_of(q) not in (torch.float16, torch.bfloat16)):
        return False
    return _import_rows() and rows.takes(q, k, v, tables, prefix, mask)


def dtype_of(q: Tensor) -> torch.dtype:
    """The dtype in which attention computes, which autocast may set; q must be on a CPU or a GPU."""
    kind = q.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else q.dtype


def _import_rows() -> bool:
    """Import `rows`. Returns whether that is possible: PyTorch for CPUs comes without Triton.

    A Triton that cannot be imported raises an error only if the user has asked for it.
    """
    global rows, _can_import_rows
    if rows is None and _can_import_rows:
        try:
            from . import rows
        except Exception as error:  # an ImportError, or an OSError for a missing library, for example
            if _IS_CHOSEN:
                raise
            _can_import_rows = False
            warnings.warn(
                f"rpe_ops cannot use its kernels for GPUs, because Triton cannot be imported ({error!r}), and uses "
                "PyTorch's operators; IRPE_ATTENTION=composed in the environment chooses them without this warning",
                stacklevel=2,
            )
    return rows is not None


# This is what torch.compiler.assume_constant_result does, which would import Triton now.
_import_rows._dynamo_marked_constant = True


def _may_replace(mask: Tensor | None, modules: Iterable[nn.Module]) -> bool:
    """Whether an attention may run in place of these modules.

    It may outside of torch.func and tracing, with a mask that needs no gradient, and if the modules have neither hooks
    nor a replaced `forward`.
    """
    if torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    if mask is not None and mask.requires_grad:
        return False
    parts = [part for module in modules for part in module.modules()]
    return not (torch.nn.modules.module._has_any_global_hook() or any(map(_is_hooked, parts)))


def _is_hooked(module: nn.Module) -> bool:
    """Whether the module has hooks or a `forward` that replaces its class's."""
    return bool(
        "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


class _BlockwiseAttention(torch.autograd.Function):
    """`attention`. `ids` are three lists of ids: on keys, on queries and on values, with one tensor for each table."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        dropout_p: float,
        ids: list[list[Tensor]],
        *tables: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, mask, *tables)
        ctx.ids, ctx.dropout = ids, _Dropout(dropout_p)
        (on_k, on_q, on_v), drop = _pairs(ids, tables), ctx.dropout.start()
        out = torch.empty_like(v)
        for batch, rows, attn in _attention_blocks(q, k, mask, on_k, on_q):
            drop(attn)
            block = torch.matmul(attn, v[batch])
            for indices, table in on_v:
                # Not in place: activation checkpointing may keep the products, which must not change then.
                block = block + torch.matmul(rpe_bucket_sum(attn, indices[rows], table.shape[-2]), table)
            out[batch, :, rows] = block
        return out

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, *tables = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable_gradients(ctx, grad_out, mask, q, k, v, *tables)
        (on_k, on_q, on_v), drop = _pairs(ctx.ids, tables), ctx.dropout.start()
        grad_q, grad_k, grad_v, *grad_tables = (torch.zeros_like(x) for x in (q, k, v, *tables))
        grads_k, grads_q, grads_v = _pairs(ctx.ids, grad_tables)
        for batch, rows, attn, grad in _attention_blocks(q, k, mask, on_k, on_q, spares=1):
            grad_rows = grad_out[batch, :, rows]
            _matmul(grad_rows, v[batch].transpose(2, 3), out=grad)
            for indices, table in on_v:
                rpe_index_add_(grad, torch.matmul(grad_rows, table.transpose(-2, -1)), indices[rows])
            kept, grad = drop(attn.clone() if ctx.dropout.p else attn, grad)
            _add_product(grad_v[batch], kept, grad_rows)
            for indices, grad_table in grads_v:
                _add_product(grad_table, rpe_bucket_sum(kept, indices[rows], grad_table.shape[-2]), grad_rows)
            torch._softmax_backward_data(grad, attn, -1, attn.dtype, grad_input=grad)
            _add_product(grad_k[batch], grad, q[batch, :, rows])
            block = torch.matmul(grad, k[batch])
            for (indices, table), (_, grad_table) in zip(on_k, grads_k, strict=True):
                sums = rpe_bucket_sum(grad, indices[rows], table.shape[-1])
                block += torch.matmul(sums, table.transpose(-2, -1))
                _add_product(grad_table, q[batch, :, rows], sums)
            grad_q[batch, :, rows] = block
            if rows.start == 0:  # The block begins new images.
                sums_q = [q.new_zeros(*k[batch].shape[:3], table.shape[-1]) for _, table in on_q]
            for (indices, _), sums in zip(on_q, sums_q, strict=True):
                rpe_bucket_sum_add_(sums, grad, indices[rows])
            if rows.stop == k.shape[2]:
                for (_, table), (_, grad_table), sums in zip(on_q, grads_q, sums_q, strict=True):
                    grad_k[batch] += torch.matmul(sums, table.transpose(-2, -1))
                    _add_product(grad_table, k[batch], sums)
        return grad_q, grad_k, grad_v, None, None, None, *grad_tables


def _differentiable_gradients(
    ctx: Any, grad_out: Tensor, mask: Tensor | None, *inputs: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients that can be differentiated again, from operators that allocate (B, H, L, L) tensors."""
    inputs = [x.view_as(x) for x in inputs]  # k and v may be one tensor, but each needs its own gradient.
    q, k, v, *tables = inputs
    out = _whole_attention(q, k, v, mask, ctx.dropout.start(), *_pairs(ctx.ids, tables))
    needed = ctx.needs_input_grad[:3] + ctx.needs_input_grad[6:]
    grads = iter(
        torch.autograd.grad(
            out, [x for x, wanted in zip(inputs, needed, strict=True) if wanted], grad_out, create_graph=True
        )
    )
    grad_q, grad_k, grad_v, *grad_tables = (next(grads) if wanted else None for wanted in needed)
    return grad_q, grad_k, grad_v, None, None, None, *grad_tables


def _whole_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    drop: Callable[..., tuple[Tensor, ...]],
    on_k: Terms,
    on_q: Terms,
    on_v: Terms,
) -> Tensor:
    """`attention` without blocks, as differentiable operators."""
    logits = torch.matmul(q, k.transpose(2, 3))
    for indices, table in on_k:
        logits = logits + rpe_index(torch.matmul(q, table), indices)
    for indices, table in on_q:
        logits = logits + rpe_index(torch.matmul(k, table), indices.t()).transpose(2, 3)
    attn = (logits if mask is None else logits + mask).softmax(-1)
    kept = torch.ones_like(attn)
    for batch, rows in _blocks(q):
        (kept[batch, :, rows],) = drop(kept[batch, :, rows].contiguous())
    attn = attn * kept
    out = torch.matmul(attn, v)
    for indices, table in on_v:
        out = out + torch.matmul(rpe_bucket_sum(attn, indices, table.shape[-2]), table)
    return out


class _Dropout:
    """Dropout with probability `p` that drops the same weights in every pass over the blocks.

    It keeps the seed of its random numbers instead of masks.
    """

    def __init__(self, p: float) -> None:
        self.p = p
        self.seed = torch.randint(2**62, ()).item() if p else 0

    def start(self) -> Callable[..., tuple[Tensor, ...]]:
        """Begin a pass. Returns a function to call with the tensors of each block, in order.

        The function draws one mask per call, applies it to all its tensors in place, and returns them.
        """
        generator = torch.Generator().manual_seed(self.seed)

        def drop(*tensors: Tensor) -> tuple[Tensor, ...]:
            if self.p:
                dropped = torch.empty_like(tensors[0], dtype=torch.bool).bernoulli_(self.p, generator=generator)
                for x in tensors:
                    x.masked_fill_(dropped, 0).mul_(1 / (1 - self.p) if self.p < 1 else 0.0)
            return tensors

        return drop


def _pairs(ids: list[list[Tensor]], tables: Iterable[Tensor]) -> list[list[tuple[Tensor, Tensor]]]:
    """Three lists of (ids, table): on keys, on queries and on values."""
    tables = iter(tables)
    return [[(indices, next(tables)) for indices in group] for group in ids]


def _blocks(q: Tensor) -> list[tuple[slice, slice]]:
    """(slice of images, slice of rows) of each block: several whole images, or some rows of one image.

    A block has at most `_BLOCK` logits, or a single row if one row has more.
    """
    images, heads, length, _ = q.shape
    size = max(heads * length * length, 1)
    parts, step = min(math.ceil(size / _BLOCK), max(length, 1)), max(1, _BLOCK // size)
    starts = [length * part // parts for part in range(parts + 1)]
    return [
        (slice(first, min(first + step, images)), rows)
        for first in range(0, images, step)
        for rows in itertools.starmap(slice, itertools.pairwise(starts))
    ]


def _attention_blocks(
    q: Tensor, k: Tensor, mask: Tensor | None, on_k: Terms, on_q: Terms, spares: int = 0
) -> Iterator[tuple]:
    """Yield (images, rows, softmax of their logits (b, H, rows, L), and `spares` empty tensors of the same shape).

    The next block overwrites these tensors, because new memory pages cost more time than the arithmetic on them.
    """
    shapes = [(*q[batch, :, rows].shape[:3], k.shape[2]) for batch, rows in _blocks(q)]
    memory = q.new_empty(1 + spares, max(map(math.prod, shapes), default=0))
    for (batch, rows), shape in zip(_blocks(q), shapes, strict=True):
        if rows.start == 0:  # The block begins new images.
            lookups = [(indices, torch.matmul(k[batch], table)) for indices, table in on_q]
        logits, *rest = memory[:, : math.prod(shape)].unflatten(1, shape)
        _matmul(q[batch, :, rows], k[batch].transpose(2, 3), out=logits)
        for indices, table in on_k:
            rpe_index_add_(logits, torch.matmul(q[batch, :, rows], table), indices[rows])
        for indices, lookup in lookups:
            rpe_index_add_(logits, lookup, indices[rows], by_key=True)
        if mask is not None:
            logits += mask[batch, :, rows]
        yield batch, rows, torch.softmax(logits, -1, out=logits), *rest


def _matmul(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write the product of 4-D tensors directly to `out`; torch.matmul would copy it there."""
    torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out=out.flatten(0, 1))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += aᵀ·b for 4-D a and b, summed over the dimensions (batch, heads) that `total` lacks."""
    if total.dim() == 4 and len(total) == 1:
        total[0].baddbmm_(a[0].transpose(1, 2), b[0])
    else:
        total += torch.matmul(a.transpose(2, 3), b).sum_to_size(total.shape)
