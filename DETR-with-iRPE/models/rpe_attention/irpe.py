"""Image relative position encoding (iRPE) for vision transformers, in one file to copy.

Wu, Peng, Chen, Fu, Chao: "Rethinking and Improving Relative Position Encoding for Vision Transformer", ICCV 2021.

    config = get_rpe_config(ratio=1.9, method="product", mode="ctx", shared_head=True, skip=1, rpe_on="k")
    rpe_q, rpe_k, rpe_v = build_rpe(config, head_dim=64, num_heads=6)
    out = rpe_attention(q, k, v, rpe_q=rpe_q, rpe_k=rpe_k, rpe_v=rpe_v)

Shapes: B pictures, H heads, L tokens (`skip` prefix tokens, then the map row by row), D channels of a head,
`nb` buckets, H' = 1 if the heads share their tables, else H.
"""
import enum
import functools
import itertools
import math
import numbers
import operator
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

__all__ = ["METHOD", "RPEConfig", "build_rpe", "get_bucket_ids_2d", "get_rpe_config", "iRPE", "iRPE_Cross",
           "piecewise_index", "rpe_attention"]


# ---------------------------------------------------------------------------------------------------------------------
# The operators: a gather along the bucket axis and its adjoint, a sum per bucket

try:
    import rpe_ops
    from rpe_ops.rpe_index import rpe_bucket_sum, rpe_bucket_sum_add_, rpe_index, rpe_index_add_, validate_index
    HAS_RPE_OPS = True
except ImportError as error:  # a build that does not fit this PyTorch says so itself
    if error.name == "rpe_ops.rpe_index" and not isinstance(error, ModuleNotFoundError):
        raise ImportError("the installed rpe_ops is older than this irpe.py; build it anew, in the iRPE repository: "
                          "pip install ./rpe_ops --no-build-isolation --no-deps --force-reinstall") from error
    if not (isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("rpe_ops")):
        raise
    HAS_RPE_OPS = False
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        warnings.warn("the extension rpe_ops is not installed; iRPE computes the same without it, but slower. To build "
                      "it, in the iRPE repository: pip install ./rpe_ops --no-build-isolation", stacklevel=2)


# an exported program must run without rpe_ops, as in onnxruntime; PyTorch 2.6 cannot tell when it exports
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)


def _use_rpe_ops(device):
    return (HAS_RPE_OPS and not _is_exporting()
            and (device.type == "cpu" or (device.type == "cuda" and rpe_ops.has_cuda)))


def _gather_buckets(lookup, ids):
    """Y[b, h, i, j] = lookup[b, h, i, ids[i, j]] for `lookup` (B, H, Lq, nb) and `ids` (Lq, Lk)."""
    if _use_rpe_ops(lookup.device):
        return rpe_index(lookup, ids)
    return lookup.gather(-1, ids.expand(*lookup.shape[:2], -1, -1))


def _sum_buckets(attn, ids, num_buckets):
    """S[b, h, i, c] = Σ over j with ids[i, j] = c of attn[b, h, i, j], added in at least float32; (B, H, Lq, nb)."""
    if _use_rpe_ops(attn.device):
        return rpe_bucket_sum(attn, ids, num_buckets)
    total = attn.new_zeros(*attn.shape[:-1], num_buckets, dtype=torch.promote_types(attn.dtype, torch.float32))
    return total.scatter_add(-1, ids.expand_as(attn), attn.to(total.dtype)).to(attn.dtype)


def _add_gathered(logits, lookup, ids, by_key=False):
    """logits[b, h, i, j] += lookup[b, h, i, ids[i, j]], or lookup[b, h, j, ids[i, j]] with `by_key`."""
    if HAS_RPE_OPS:
        rpe_index_add_(logits, lookup, ids, by_key)
    elif by_key:
        logits.add_(_gather_buckets(lookup, ids.t()).transpose(-2, -1))
    else:
        logits.add_(_gather_buckets(lookup, ids))


def _add_key_sums(sums, attn, ids):
    """sums[b, h, j, ids[i, j]] += attn[b, h, i, j], the adjoint of `_add_gathered` with `by_key`."""
    if HAS_RPE_OPS:
        rpe_bucket_sum_add_(sums, attn, ids)
    else:
        attn = attn.transpose(-2, -1)
        sums.scatter_add_(-1, ids.t().expand_as(attn), attn)


# ---------------------------------------------------------------------------------------------------------------------
# From positions to buckets

class METHOD(str, enum.Enum):
    """How an offset on the map becomes a bucket. The short names work wherever a member does."""
    EUCLIDEAN = "euc"
    QUANT = "quant"
    PRODUCT = "product"
    CROSS = "cross"
    CROSS_ROWS = "cross_rows"
    CROSS_COLS = "cross_cols"


def piecewise_index(relative_position, alpha, beta, gamma, dtype):
    """The piecewise function g (Eq. 18): identity near zero, logarithmic further out, at most β.

    Args:
        relative_position: offsets or distances in tokens, integer or float tensor of any shape.
        alpha, beta, gamma: end of the identity part, largest value, distance at which it is reached (up to rounding).
        dtype: integer type of the result.
    Returns: tensor of the same shape with whole values in [-int(β), int(β)].
    """
    x = relative_position.float()
    # float32 logarithms and half-to-even rounding decide ties as they did when the released models were trained;
    # the clamp keeps log away from the values that torch.where discards
    growth = torch.log(x.abs().clamp(min=alpha) / alpha) / math.log(gamma / alpha)
    far = (alpha + growth * (beta - alpha)).round().clamp(max=beta) * x.sign()
    return torch.where(x.abs() <= alpha, x.round(), far).to(dtype)


def _euclidean(dr, dc, index, size):
    return index((dr.square() + dc.square()).float().sqrt().round())


def _quantization(dr, dc, index, size):
    return index(dr.square() + dc.square())


def _product(dr, dc, index, size):
    return index(dr) * size + index(dc)


# method -> (bucket of the offset (dr, dc), number of axes that the buckets span); `index` is g + int(β), so its
# values are 0 ... size - 1
_MAPPINGS = {
    METHOD.EUCLIDEAN: (_euclidean, 1),
    METHOD.QUANT: (_quantization, 1),
    METHOD.PRODUCT: (_product, 2),
    METHOD.CROSS_ROWS: (lambda dr, dc, index, size: index(dr), 1),
    METHOD.CROSS_COLS: (lambda dr, dc, index, size: index(dc), 1),
}


def _count_buckets(method, skip, beta):
    return (2 * int(beta) + 1) ** _MAPPINGS[method][1] + (skip > 0)


def get_bucket_ids_2d(method, height, width, skip, alpha, beta, gamma, dtype=torch.long, device="cpu"):
    """Bucket of every pair of tokens: a mapping of the paper, made of its piecewise function g (Eq. 18).

    Args:
        method: a `METHOD` or its short name; cross is asked for an axis at a time (`cross_rows`, `cross_cols`).
        height, width: the map, in tokens.
        skip: prefix tokens before the map; every pair with one of them shares the last bucket.
        alpha, beta, gamma: see `piecewise_index`.
    Returns: ids (L, L) with L = skip + height·width, where ids[i, j] is the bucket of query i and key j, and the
        number of buckets, used on this map or not.
    Raises: ValueError for a method without a mapping of its own.
    """
    method = _choice("method", method, [m.value for m in _MAPPINGS], METHOD)
    size = 2 * int(beta) + 1
    dr, dc = (torch.arange(1 - n, n, device=device) for n in (height, width))
    table = _MAPPINGS[method][0](dr[:, None], dc, lambda x: piecewise_index(x, alpha, beta, gamma, dtype) + int(beta),
                                 size).expand(2 * height - 1, 2 * width - 1)
    # ids[(r, c), (r', c')] = table[r - r' + height - 1, c - c' + width - 1]: a window of the table for every query
    ids = table.unfold(0, height, 1).unfold(1, width, 1).flip(2, 3).reshape(height * width, height * width)
    num_buckets = _count_buckets(method, skip, beta)
    return F.pad(ids, (skip, 0, skip, 0), value=num_buckets - 1), num_buckets


@functools.lru_cache(maxsize=32)  # 8 MB each on DETR's largest maps
def _cached_bucket_ids(method, height, width, skip, alpha, beta, gamma, device, dtype, transposed=False):
    def compute():
        # always on the CPU: another device's logarithm may move a tie to the next bucket
        ids, num_buckets = get_bucket_ids_2d(method, height, width, skip, alpha, beta, gamma, dtype)
        if HAS_RPE_OPS:
            validate_index(ids, num_buckets)  # the kernels for CUDA do not check at every call
        return (ids.t().contiguous() if transposed else ids).to(device)

    # a thread of its own has no inference mode, fake tensors or default device of the caller: what is cached here
    # must be good for every later caller
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(compute).result()


# ---------------------------------------------------------------------------------------------------------------------
# Configuration

_MODES = {"bias": "bias", "ctx": "contextual", "contextual": "contextual"}
_METHODS = ("euc", "quant", "cross", "product")
_RPE_ON = ("q", "k", "v", "qk", "kv", "qv", "qkv")


def _choice(name, value, allowed, convert=lambda value: value):
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(str, allowed))}")
    return convert(value)


@dataclass(frozen=True)
class RPEConfig:
    """What `build_rpe` builds; see `get_rpe_config`. Wrong values raise ValueError and name the right ones."""
    ratio: float = 1.9
    method: METHOD = METHOD.PRODUCT
    mode: str = "contextual"
    shared_head: bool = True
    skip: int = 0
    rpe_on: str = "k"

    def __post_init__(self):
        def put(name, value):
            object.__setattr__(self, name, value)

        put("method", _choice("method", self.method, _METHODS, METHOD))
        put("mode", _MODES[_choice("mode", self.mode, tuple(_MODES))])
        put("shared_head", bool(_choice("shared_head", self.shared_head, (True, False))))
        _choice("rpe_on", self.rpe_on, _RPE_ON)
        if not (isinstance(self.ratio, numbers.Real) and 0 < self.ratio < math.inf):
            raise ValueError(f"ratio is {self.ratio!r}; it must be a number above 0, as 1.9")
        if not (isinstance(self.skip, numbers.Integral) and self.skip >= 0):
            raise ValueError(f"skip is {self.skip!r}; it must be the number of prefix tokens: 0, 1, 2, ...")
        put("ratio", float(self.ratio))
        put("skip", int(self.skip))
        if self.mode == "bias" and "v" in self.rpe_on:
            raise ValueError(f"mode 'bias' with rpe_on {self.rpe_on!r}: a bias on values does not exist; "
                             "use mode 'ctx', or rpe_on q, k or qk")

    @property
    def piecewise(self):
        """(α, β, γ) of `piecewise_index`."""
        return self.ratio, 2 * self.ratio, 8 * self.ratio


def get_rpe_config(ratio=1.9, method="product", mode="ctx", shared_head=True, skip=0, rpe_on="k"):
    """Describe an encoding.

    Args:
        ratio: scales the piecewise function: α = ratio, β = 2·ratio, γ = 8·ratio.
        method: `euc`, `quant`, `cross` or `product`, or a `METHOD`.
        mode: `bias` (a number per bucket) or `ctx`/`contextual` (a vector per bucket, which meets q, k or p).
        shared_head: one table for all heads, or one a head.
        skip: prefix tokens before the map: 0 in DETR, 1 with a class token, 2 in a distilled DeiT.
        rpe_on: where it acts: q, k, v, qk, kv, qv or qkv; v only in contextual mode.
    Returns: RPEConfig.
    Raises: ValueError that names the allowed values.
    """
    return RPEConfig(ratio, method, mode, shared_head, skip, rpe_on)


# ---------------------------------------------------------------------------------------------------------------------
# Modules

class iRPE(nn.Module):
    """One term of the encoding with one table: on queries, keys or values.

    Args:
        head_dim: D.
        num_heads: H.
        config: RPEConfig; its `rpe_on` is not read here.
        on: "q", "k" or "v".
        method: for `iRPE_Cross`, the axis of this table; otherwise the configuration's method.

    The table starts at zero. It is `lookup_table_bias` (H', nb) in bias mode, else `lookup_table_weight`, of shape
    (H', D, nb) on queries and keys and (H', nb, D) on values.
    """

    def __init__(self, head_dim, num_heads, config, on="k", method=None):
        super().__init__()
        self.config, self.on, self.num_heads = config, _choice("on", on, ("q", "k", "v")), num_heads
        self.method = method or config.method
        self.num_buckets = _count_buckets(self.method, config.skip, config.piecewise[1])
        heads = 1 if config.shared_head else num_heads
        if config.mode == "bias":
            if on == "v":
                raise ValueError("mode is 'bias' on values, which does not exist; use mode 'ctx'")
            self.lookup_table_bias = nn.Parameter(torch.empty(heads, self.num_buckets))
        else:
            table = (self.num_buckets, head_dim) if on == "v" else (head_dim, self.num_buckets)
            self.lookup_table_weight = nn.Parameter(torch.empty(heads, *table))
        self.reset_parameters()

    def reset_parameters(self):
        for table in self.parameters():
            nn.init.zeros_(table)

    def bucket_ids(self, length, device, height=None, width=None, transposed=False):
        """Ids (L, L) of the map, or their transpose; without height and width it is square with side ⌊√L⌋.

        Raises: ValueError if `length` is not height·width + skip.
        """
        length = operator.index(length)  # torch.compile is to take sizes for constants
        if height is None or width is None:
            height = width = math.isqrt(length)
        height, width, skip = operator.index(height), operator.index(width), self.config.skip
        if length != height * width + skip:
            raise ValueError(
                f"{length} tokens on a map of {height}×{width} leave {length - height * width} prefix tokens, but the "
                f"encoding was built with skip={skip}; set skip={max(length - height * width, 0)}, or give the height "
                "and width of the map")
        return self._shared_bucket_ids(height, width, device, transposed)

    @torch.compiler.assume_constant_result
    def _shared_bucket_ids(self, height, width, device, transposed):
        device = torch.device(device)
        dtype = torch.int32 if _use_rpe_ops(device) else torch.int64  # PyTorch's own gather takes no int32
        return _cached_bucket_ids(self.method, height, width, self.config.skip, *self.config.piecewise, device, dtype,
                                  transposed)

    @property
    def parts(self):
        """The modules with a table each whose terms are added: itself."""
        return [self]

    @property
    def table(self):
        """The contextual table, without the head axis where the heads share it: then matmul folds batch into rows."""
        weight = self.lookup_table_weight
        return weight[0] if len(weight) == 1 else weight

    def forward(self, x, height=None, width=None):
        """What this table adds to the logits (on q, k) or to the output (on v).

        Args:
            x: on q and k the scaled queries or keys, (B, H, L, D); on v the attention after softmax, (B, H, L, L).
            height, width: the map, in tokens; square if not given.
        Returns: on q and k what is added to the logits, (B, H, L, L), or (1, H', L, L) in bias mode; on v what is
            added to the output, (B, H, L, D).
        Raises: ValueError if L does not fit the map and the configured skip.
        """
        ids = self.bucket_ids(x.shape[-2], x.device, height, width)
        if self.config.mode == "bias":
            table = self.lookup_table_bias
            return _gather_buckets(table[None, :, None].expand(-1, -1, len(ids), -1), ids)
        if self.on == "v":
            return torch.matmul(_sum_buckets(x, ids, self.num_buckets), self.table)
        return _gather_buckets(torch.matmul(x, self.table), ids)

    def extra_repr(self):
        config = self.config
        return (f"on={self.on}, method={self.method.value}, mode={config.mode}, ratio={config.ratio}, "
                f"skip={config.skip}, shared_head={config.shared_head}, num_buckets={self.num_buckets}")


class iRPE_Cross(nn.Module):
    """The cross method: a table for rows and one for columns, whose terms are added."""

    def __init__(self, head_dim, num_heads, config, on="k"):
        super().__init__()
        self.rp_rows = iRPE(head_dim, num_heads, config, on, METHOD.CROSS_ROWS)
        self.rp_cols = iRPE(head_dim, num_heads, config, on, METHOD.CROSS_COLS)

    @property
    def parts(self):
        """The modules with a table each whose terms are added."""
        return [self.rp_rows, self.rp_cols]

    def forward(self, x, height=None, width=None):
        """As `iRPE.forward`."""
        return self.rp_rows(x, height, width) + self.rp_cols(x, height, width)


def build_rpe(rpe_config, head_dim, num_heads):
    """Modules (rpe_q, rpe_k, rpe_v) of a configuration for heads of `head_dim` channels; None where it has none."""
    if rpe_config is None:
        return None, None, None
    if not isinstance(rpe_config, RPEConfig):
        raise ValueError(f"rpe_config is {rpe_config!r}; it must come from get_rpe_config, or be None")
    module = iRPE_Cross if rpe_config.method is METHOD.CROSS else iRPE
    return tuple(module(head_dim, num_heads, rpe_config, on) if on in rpe_config.rpe_on else None for on in "qkv")


# ---------------------------------------------------------------------------------------------------------------------
# Attention

def _add(total, term):
    """total + term, in place where shapes allow: no backward reads `total`, and a new (B, H, L, L) costs a pass.

    A module's term may so change after the module returned it: a forward hook that keeps it has to copy it.
    """
    if total is None:
        return term
    return total.add_(term) if torch.broadcast_shapes(total.shape, term.shape) == total.shape else total + term


_BLOCK = 2 ** 20  # logits at work at a time: 4 MB of float32, few enough to stay in a processor's cache


class _BlockwiseAttention(torch.autograd.Function):
    """Attention with contextual terms, block by block, so that memory never holds a tensor of (B, H, L, L).

    A block has whole rows of logits, and the backward pass makes it again, as in FlashAttention (Dao et al., NeurIPS
    2022), with the same dropout. Derivatives of the second order go through `_differentiable_attention`.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, q, k, v, mask, dropout_p, ids, *tables):
        """Attend.

        Args:
            q, k, v: (B, H, L, D), q scaled.
            mask: what is added to the logits, (B, H, L, L), or None.
            ids: lists of ids (L, L) on keys, on queries, there transposed, and on values; one for every table.
            tables: on keys, on queries, there scaled, both (D, nb) or (H, D, nb), and on values with (nb, D).
        Returns: (B, H, L, D).
        """
        ctx.save_for_backward(q, k, v, mask, *tables)
        ctx.ids, ctx.dropout = ids, _Dropout(dropout_p)
        (on_k, on_q, on_v), drop = _pairs(ids, tables), ctx.dropout.start()
        out = torch.empty_like(v)
        for batch, rows, attn in _attention_blocks(q, k, mask, on_k, on_q):
            drop(attn)
            block = torch.matmul(attn, v[batch])
            for indices, table in on_v:  # not in place: a checkpoint that saves products must find them as they were
                block = block + torch.matmul(_sum_buckets(attn, indices[rows], table.shape[-2]), table)
            out[batch, :, rows] = block
        return out

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad_out):
        q, k, v, mask, *tables = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _BlockwiseAttention._differentiable_gradients(ctx, grad_out, mask, q, k, v, *tables)
        (on_k, on_q, on_v), drop = _pairs(ctx.ids, tables), ctx.dropout.start()
        grad_q, grad_k, grad_v, *grad_tables = (torch.zeros_like(x) for x in (q, k, v, *tables))
        grads_k, grads_q, grads_v = _pairs(ctx.ids, grad_tables)
        for batch, rows, attn, grad in _attention_blocks(q, k, mask, on_k, on_q, spares=1):
            grad_rows = grad_out[batch, :, rows]
            _matmul(grad_rows, v[batch].transpose(2, 3), out=grad)
            for indices, table in on_v:
                _add_gathered(grad, torch.matmul(grad_rows, table.transpose(-2, -1)), indices[rows])
            kept, grad = drop(attn.clone() if ctx.dropout.p else attn, grad)
            _add_product(grad_v[batch], kept, grad_rows)
            for indices, grad_table in grads_v:
                _add_product(grad_table, _sum_buckets(kept, indices[rows], grad_table.shape[-2]), grad_rows)
            torch._softmax_backward_data(grad, attn, -1, attn.dtype, grad_input=grad)
            _add_product(grad_k[batch], grad, q[batch, :, rows])
            block = torch.matmul(grad, k[batch])
            for (indices, table), (_, grad_table) in zip(on_k, grads_k, strict=True):
                sums = _sum_buckets(grad, indices[rows], table.shape[-1])
                block += torch.matmul(sums, table.transpose(-2, -1))
                _add_product(grad_table, q[batch, :, rows], sums)
            grad_q[batch, :, rows] = block
            if rows.start == 0:  # of new pictures
                sums_q = [q.new_zeros(*k[batch].shape[:3], table.shape[-1]) for _, table in on_q]
            for (indices, _), sums in zip(on_q, sums_q, strict=True):
                _add_key_sums(sums, grad, indices[rows])
            if rows.stop == k.shape[2]:
                for (_, table), (_, grad_table), sums in zip(on_q, grads_q, sums_q, strict=True):
                    grad_k[batch] += torch.matmul(sums, table.transpose(-2, -1))
                    _add_product(grad_table, k[batch], sums)
        return grad_q, grad_k, grad_v, None, None, None, *grad_tables

    @staticmethod
    def _differentiable_gradients(ctx, grad_out, mask, *inputs):
        inputs = [x.view_as(x) for x in inputs]  # k may be the same tensor as v, but their gradients are two
        q, k, v, *tables = inputs
        out = _differentiable_attention(q, k, v, mask, ctx.dropout.start(), *_pairs(ctx.ids, tables))
        needed = ctx.needs_input_grad[:3] + ctx.needs_input_grad[6:]
        grads = iter(torch.autograd.grad(out, [x for x, wanted in zip(inputs, needed, strict=True) if wanted], grad_out,
                                         create_graph=True))
        grad_q, grad_k, grad_v, *grad_tables = (next(grads) if wanted else None for wanted in needed)
        return grad_q, grad_k, grad_v, None, None, None, *grad_tables


class _Dropout:
    """Dropout with probability `p` that a second pass over the same blocks repeats, without keeping what it drew."""

    def __init__(self, p):
        self.p, self.seed = p, torch.randint(2 ** 62, ()).item() if p else 0

    def start(self):
        """A function that drops the next places from each of the tensors it is given, in place, and returns them."""
        generator = torch.Generator().manual_seed(self.seed)

        def drop(*tensors):
            if self.p:
                dropped = torch.empty_like(tensors[0], dtype=torch.bool).bernoulli_(self.p, generator=generator)
                for x in tensors:
                    x.masked_fill_(dropped, 0).mul_(1 / (1 - self.p) if self.p < 1 else 0.0)
            return tensors

        return drop


def _differentiable_attention(q, k, v, mask, drop, on_k, on_q, on_v):
    """What `_BlockwiseAttention` computes, of differentiable operators and with (B, H, L, L) tensors."""
    logits = torch.matmul(q, k.transpose(2, 3))
    for indices, table in on_k:
        logits = logits + _gather_buckets(torch.matmul(q, table), indices)
    for indices, table in on_q:
        logits = logits + _gather_buckets(torch.matmul(k, table), indices.t()).transpose(2, 3)
    attn = (logits if mask is None else logits + mask).softmax(-1)
    kept = torch.ones_like(attn)
    for batch, rows in _blocks(q):
        kept[batch, :, rows], = drop(kept[batch, :, rows].contiguous())
    attn = attn * kept
    out = torch.matmul(attn, v)
    for indices, table in on_v:
        out = out + torch.matmul(_sum_buckets(attn, indices, table.shape[-2]), table)
    return out


def _pairs(ids, tables):
    """For keys, queries and values a list of (ids, table)."""
    tables = iter(tables)
    return [[(indices, next(tables)) for indices in group] for group in ids]


def _blocks(q):
    """Slices of pictures and of rows, at most `_BLOCK` logits each or one row: some pictures, or rows of one."""
    pictures, heads, length, _ = q.shape
    size = max(heads * length * length, 1)
    parts, step = min(math.ceil(size / _BLOCK), max(length, 1)), max(1, _BLOCK // size)
    starts = [length * part // parts for part in range(parts + 1)]
    return [(slice(first, min(first + step, pictures)), rows) for first in range(0, pictures, step)
            for rows in itertools.starmap(slice, itertools.pairwise(starts))]


def _attention_blocks(q, k, mask, on_k, on_q, spares=0):
    """Yield (pictures, rows, softmax of their logits (b, H, rows, L), spare tensors of the same shape).

    The next block overwrites them: pages that are new to the process cost more time than the arithmetic on them.
    """
    shapes = [(*q[batch, :, rows].shape[:3], k.shape[2]) for batch, rows in _blocks(q)]
    memory = q.new_empty(1 + spares, max(map(math.prod, shapes), default=0))
    for (batch, rows), shape in zip(_blocks(q), shapes, strict=True):
        if rows.start == 0:  # of new pictures
            lookups = [(indices, torch.matmul(k[batch], table)) for indices, table in on_q]
        logits, *rest = memory[:, :math.prod(shape)].unflatten(1, shape)
        _matmul(q[batch, :, rows], k[batch].transpose(2, 3), out=logits)
        for indices, table in on_k:
            _add_gathered(logits, torch.matmul(q[batch, :, rows], table), indices[rows])
        for indices, lookup in lookups:
            _add_gathered(logits, lookup, indices[rows], by_key=True)
        if mask is not None:
            logits += mask[batch, :, rows]
        yield batch, rows, torch.softmax(logits, -1, out=logits), *rest


def _matmul(a, b, out):
    """Product of 4-D tensors written to `out`, which torch.matmul would copy to."""
    torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out=out.flatten(0, 1))


def _add_product(total, a, b):
    """total += aᵀ·b for 4-D a and b, summed over the batch, and over the heads, where `total` has none."""
    if total.dim() == 4 and len(total) == 1:
        total[0].baddbmm_(a[0].transpose(1, 2), b[0])
    else:
        total += torch.matmul(a.transpose(2, 3), b).sum_to_size(total.shape)


def _can_go_blockwise(q, k, v, mask, modules):
    """Whether `_blockwise_attention` is for this call: eager float32 or float64 on a CPU, contextual terms alone."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    if torch.is_autocast_enabled("cpu") or (mask is not None and mask.requires_grad):
        return False
    return (q.shape == k.shape and q.shape[:3] == v.shape[:3] and q.dtype in (torch.float32, torch.float64)
            and all(x.device.type == "cpu" and x.dtype == q.dtype for x in (q, k, v))
            and not _has_any_global_hook() and all(map(_is_plain, modules)))


def _is_plain(module):
    """Whether an encoding's `forward` is ours, contextual, and hooked by nobody, so that it need not be called."""
    if type(module) is iRPE_Cross:
        own = all(map(_is_plain, module.parts))
    else:
        own = type(module) is iRPE and module.config.mode == "contextual"
    return own and "forward" not in vars(module) and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def _blockwise_attention(q, k, v, rpe_q, rpe_k, rpe_v, height, width, mask, dropout_p):
    """As the end of `rpe_attention`, with q scaled."""
    parts_q, parts_k, parts_v = ([] if module is None else module.parts for module in (rpe_q, rpe_k, rpe_v))
    ids = [[part.bucket_ids(q.shape[2], q.device, height, width, transposed=parts is parts_q) for part in parts]
           for parts in (parts_k, parts_q, parts_v)]
    scale = q.shape[-1] ** -0.5
    tables = [part.table for part in parts_k] + [part.table * scale for part in parts_q]
    tables += [part.table for part in parts_v]
    if mask is not None:
        mask = mask.expand(*q.shape[:3], k.shape[2])
    return _BlockwiseAttention.apply(q, k, v, mask, dropout_p, ids, *tables)


def rpe_attention(q, k, v, rpe_q=None, rpe_k=None, rpe_v=None, height=None, width=None, attn_mask=None, dropout_p=0.0):
    """softmax(scale·q·kᵀ + terms on keys and queries + mask)·v + term on values, with scale = D^-1/2.

    Args:
        q, k, v: (B, H, L, D), q not yet scaled.
        rpe_q, rpe_k, rpe_v: modules from `build_rpe`, or None.
        height, width: the map, in tokens; square if not given.
        attn_mask: as in `scaled_dot_product_attention`: added to the logits, or bool with True where a key may be
            seen; broadcast to (B, H, L, L).
        dropout_p: dropout of the attention; give 0 in evaluation.
    Returns: (B, H, L, D).
    """
    modules = [module for module in (rpe_q, rpe_k, rpe_v) if module is not None]
    if not modules:
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p)
    q, mask, blind = q * q.shape[-1] ** -0.5, attn_mask, None
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -math.inf)
        blind = mask.amax(-1, keepdim=True) == -math.inf  # queries that may see nothing get zeros in the end
        mask = mask.masked_fill(blind, 0)
    attend = _blockwise_attention if _can_go_blockwise(q, k, v, mask, modules) else _whole_attention
    out = attend(q, k, v, rpe_q, rpe_k, rpe_v, height, width, mask, dropout_p)
    return out if mask is None else out.masked_fill(blind, 0)


def _whole_attention(q, k, v, rpe_q, rpe_k, rpe_v, height, width, mask, dropout_p):
    """As the end of `rpe_attention`, with q scaled."""
    logits = None
    if rpe_k is not None:
        logits = _add(logits, rpe_k(q, height, width))
    if rpe_q is not None:
        logits = _add(logits, rpe_q(k * q.shape[-1] ** -0.5, height, width).transpose(-2, -1))
    if mask is not None:
        logits = _add(logits, mask)
    # without a term on values PyTorch's attention does the rest, and takes what is added to the logits as its mask
    if rpe_v is None:
        out = F.scaled_dot_product_attention(q, k, v, logits, dropout_p, scale=1.0)
        # its strides depend on whether gradients are asked for, which may change after the trace
        return out.clone(memory_format=torch.contiguous_format) if _is_exporting() else out
    logits = _add(logits, torch.matmul(q, k.transpose(-2, -1)))
    attn = F.dropout(logits.softmax(-1), dropout_p)
    del logits  # its memory is still in the cache when the next tensor of this size is made
    return torch.matmul(attn, v) + rpe_v(attn, height, width)
