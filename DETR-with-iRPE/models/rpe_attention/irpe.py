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

try:  # kernels that do the same faster; a build that does not fit this PyTorch says so itself
    import rpe_ops
    from rpe_ops.rpe_index import rpe_bucket_sum, rpe_index

    HAS_RPE_OPS = True
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("rpe_ops"):
        raise
    HAS_RPE_OPS = False
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        warnings.warn(
            "the extension rpe_ops is not installed; iRPE computes the same without it, but slower. To build "
            "it, in the iRPE repository: pip install ./rpe_ops --no-build-isolation",
            stacklevel=2,
        )
if HAS_RPE_OPS and not hasattr(rpe_ops, "rows_take"):
    raise ImportError(
        "the installed rpe_ops is older than this irpe.py; build it anew, in the iRPE repository: "
        "pip install ./rpe_ops --no-build-isolation --no-deps --force-reinstall"
    )


# --- From positions to buckets ---------------------------------------------------------------------------------------


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


# method -> (bucket of the offset (dr, dc), number of axes that the buckets span); `index` is g + int(β), so its
# values are 0 ... size - 1
_MAPPINGS = {
    METHOD.EUCLIDEAN: (lambda dr, dc, index, size: index((dr.square() + dc.square()).float().sqrt().round()), 1),
    METHOD.QUANT: (lambda dr, dc, index, size: index(dr.square() + dc.square()), 1),
    METHOD.PRODUCT: (lambda dr, dc, index, size: index(dr) * size + index(dc), 2),
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
    method = METHOD(_choice("method", method, [m.value for m in _MAPPINGS]))
    table = _offset_ids(method, height, width, alpha, beta, gamma, dtype, device)
    # ids[(r, c), (r', c')] = table[r - r' + height - 1, c - c' + width - 1]: a window of the table for every query
    ids = table.unfold(0, height, 1).unfold(1, width, 1).flip(2, 3).reshape(height * width, height * width)
    num_buckets = _count_buckets(method, skip, beta)
    return F.pad(ids, (skip, 0, skip, 0), value=num_buckets - 1), num_buckets


def _offset_ids(method, height, width, alpha, beta, gamma, dtype, device):
    """Bucket of every offset, (2·height - 1, 2·width - 1), from 1 - height and 1 - width on."""
    dr, dc = (torch.arange(1 - n, n, device=device) for n in (height, width))
    return _MAPPINGS[method][0](
        dr[:, None], dc, lambda x: piecewise_index(x, alpha, beta, gamma, dtype) + int(beta), 2 * int(beta) + 1
    ).expand(2 * height - 1, 2 * width - 1)


def _parts(method):
    """The methods of the tables of a method."""
    return (METHOD.CROSS_ROWS, METHOD.CROSS_COLS) if method is METHOD.CROSS else (method,)


def _in_a_thread(compute):
    """`compute()`, in a thread that has no inference mode, fake tensors or default device of the caller: what is cached
    must be good for every later caller."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(compute).result()


@functools.lru_cache(maxsize=32)  # 8 MB each on DETR's largest maps
def _kept_ids(methods, height, width, skip, piecewise, device, dtype, transposed):
    def compute():
        # always on the CPU: another device's logarithm may move a tie to the next bucket
        ids = torch.stack([get_bucket_ids_2d(x, height, width, skip, *piecewise, dtype)[0] for x in methods])
        return (ids.mT.contiguous() if transposed else ids).to(device)

    return _in_a_thread(compute)


def row_layout(offset_ids, skip, num_buckets):
    """What `rpe_ops.rows` has to know of a map on which a bucket depends on a pair through a class of its two rows, and
    through its two columns, as for product and cross.

    Args:
        offset_ids: (tables, 2·height - 1, 2·width - 1) on the CPU, buckets of every offset; two tables for a cross.
        skip: prefix tokens before the map; their pairs have the last of each table's `num_buckets`.
    Returns: an int32 tensor, and sizes, (rows, columns, prefix tokens, classes, steps from row to row and from column
        to column). Columns are the axis that fills chunks of 16 tokens better. The tensor has, one after the other: the
        class of each pair of rows, row 0 being the prefix; for each table the bucket of each column (the last being the
        prefix), class and column of the other token, -1 where there is none; for each bucket of each table where its
        list begins; and these lists of places in that order of columns, classes and columns.
    Raises: ValueError if rows of one class do not follow each other.
    """
    rows, columns = ((size + 1) // 2 for size in offset_ids.shape[1:])
    steps = columns, 1
    if columns * _whole_chunks(rows) < rows * _whole_chunks(columns):
        rows, columns, steps, offset_ids = columns, rows, (1, columns), offset_ids.mT
    pattern = offset_ids.transpose(0, 1).flatten(1)
    class_of = F.pad((pattern[1:] != pattern[:-1]).any(1).cumsum(0), (1, 0))
    classes = int(class_of[-1]) + 1
    if len(pattern.unique(dim=0)) != classes:
        raise ValueError("rows of one class do not follow each other, as they do for product and cross")
    row, column = torch.arange(rows), torch.arange(columns)
    of_rows = F.pad(class_of[row[:, None] - row + rows - 1], (1, 0, 1, 0), value=classes)
    ids = torch.full((len(offset_ids), columns + 1, classes + (skip > 0), _whole_chunks(columns)), -1)
    of_classes = offset_ids[:, torch.searchsorted(class_of, torch.arange(classes))]
    ids[:, :-1, :classes, :columns] = of_classes[:, :, column[:, None] - column + columns - 1].transpose(1, 2)
    if skip:
        ids[:, :-1, -1, :skip] = ids[:, -1, -1, : max(columns, skip)] = num_buckets - 1
    ids = ids.flatten(1)
    places = [(of_table == bucket).nonzero()[:, 0] for of_table in ids for bucket in range(num_buckets)]
    starts = torch.tensor([0, *map(len, places)]).cumsum(0)
    layout = torch.cat([of_rows.flatten(), ids.flatten(), starts, *places]).int()
    return layout, (rows, columns, skip, classes + (skip > 0), *steps)


def _whole_chunks(size):
    return -(-size // 16) * 16


@functools.lru_cache(maxsize=256)
def _kept_row_layout(method, height, width, skip, piecewise, device):
    def compute():
        ids = torch.stack([_offset_ids(x, height, width, *piecewise, torch.long, "cpu") for x in _parts(method)])
        layout, sizes = row_layout(ids, skip, _count_buckets(_parts(method)[0], skip, piecewise[1]))
        return layout.to(device), sizes

    return _in_a_thread(compute)


# --- Configuration ---------------------------------------------------------------------------------------------------

_MODES = {"bias": "bias", "ctx": "contextual", "contextual": "contextual"}
_RPE_ON = ("q", "k", "v", "qk", "kv", "qv", "qkv")
RPE_GRAMMAR = "rpe-{ratio}-{euc|quant|cross|product}-{bias|ctx}-{shared_head: 0|1}-{q|k|v|qk|kv|qv|qkv}"


def _choice(name, value, allowed):
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(str, allowed))}")
    return value


@dataclass(frozen=True)
class RPEConfig:
    """What `build_rpe` builds; made, with checks, by `get_rpe_config`."""

    ratio: float
    method: METHOD
    mode: str
    shared_head: bool
    skip: int
    rpe_on: str

    @property
    def piecewise(self):
        """(α, β, γ) of `piecewise_index`."""
        return self.ratio, 2 * self.ratio, 8 * self.ratio


def get_rpe_config(ratio=1.9, method="product", mode="ctx", shared_head=True, skip=0, rpe_on="k"):
    """An `RPEConfig`, which describes an encoding.

    Args:
        ratio: scales the piecewise function: α = ratio, β = 2·ratio, γ = 8·ratio.
        method: `euc`, `quant`, `cross` or `product`, or a `METHOD`.
        mode: `bias` (a number per bucket) or `ctx`/`contextual` (a vector per bucket, which meets q, k or p).
        shared_head: one table for all heads, or one a head.
        skip: prefix tokens before the map: 0 in DETR, 1 with a class token, 2 in a distilled DeiT.
        rpe_on: where it acts: q, k, v, qk, kv, qv or qkv; v only in contextual mode.
    Raises: ValueError that names the allowed values.
    """
    if not (isinstance(ratio, numbers.Real) and 0 < ratio < math.inf):
        raise ValueError(f"ratio is {ratio!r}; it must be a number above 0, as 1.9")
    if not (isinstance(skip, numbers.Integral) and skip >= 0):
        raise ValueError(f"skip is {skip!r}; it must be the number of prefix tokens: 0, 1, 2, ...")
    method = METHOD(_choice("method", method, ("euc", "quant", "cross", "product")))
    mode = _MODES[_choice("mode", mode, tuple(_MODES))]
    shared_head = bool(_choice("shared_head", shared_head, (True, False)))
    if mode == "bias" and "v" in _choice("rpe_on", rpe_on, _RPE_ON):
        raise ValueError(
            f"mode 'bias' with rpe_on {rpe_on!r}: a bias on values does not exist; use mode 'ctx', or rpe_on q, k or qk"
        )
    return RPEConfig(float(ratio), method, mode, shared_head, int(skip), _choice("rpe_on", rpe_on, _RPE_ON))


def parse_rpe(text):
    """The `RPEConfig`, with skip=0, of a text as `RPE_GRAMMAR` has it; ValueError that says which part is wrong."""
    name, *parts = text.split("-")
    if name != "rpe" or len(parts) != 5:
        raise ValueError(f"it has {len(parts) + 1} parts, the first being {name}, and not 6, the first being rpe")
    ratio, method, mode, shared_head, rpe_on = parts
    ratio = float(ratio) if ratio.replace(".", "", 1).isdecimal() else ratio  # which get_rpe_config refuses
    return get_rpe_config(ratio, method, mode, _choice("shared_head", shared_head, ("0", "1")) == "1", rpe_on=rpe_on)


# --- Modules ---------------------------------------------------------------------------------------------------------


@torch.compiler.assume_constant_result
def _is_exporting():
    """Whether torch.export is tracing this call; PyTorch 2.6 cannot tell.

    torch.compile evaluates this function instead of tracing it, because PyTorch 2.11 would treat the answer as always
    True inside a compiled model.
    """
    return getattr(torch.compiler, "is_exporting", bool)()


def _is_recorded():
    """Whether torch.export or torch.jit.trace (so also torch.onnx.export, either way) records this call.

    What they record must run without rpe_ops, as in onnxruntime, so it may hold PyTorch's own operators only.
    """
    return _is_exporting() or torch.jit.is_tracing()


def _use_rpe_ops(device):
    return HAS_RPE_OPS and not _is_recorded() and (device.type == "cpu" or device.type == "cuda" and rpe_ops.has_cuda)


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


# the most that a suggestion of `skip` assumes: a class token and four registers, as in DINOv2
_LIKELY_PREFIX_TOKENS = 5


def _whole_size(name, value):
    try:
        size = operator.index(value)  # torch.compile is to take sizes for constants
    except TypeError:
        size = 0
    if size < 1:
        raise ValueError(f"the map's {name} is {value!r}; it must be a whole number of tokens, 1 or more")
    return size


def _map_size(length, height, width, skip):
    """(height, width) of the map of `length` tokens, `skip` of which come before it; square if neither is given.

    Raises: ValueError if there is no such map.
    """
    if (height is None) != (width is None):
        raise ValueError(f"the map's height is {height} and its width {width}; give both, or neither for a square map")
    square = height is None
    if square:
        height = width = math.isqrt(max(length - skip, 0))
    else:
        height, width = _whole_size("height", height), _whole_size("width", width)
    if height > 0 and length == height * width + skip:
        return height, width
    if square:
        height = width = math.isqrt(length)  # which another skip would give
    prefix = length - height * width
    if height > 0 and 0 <= prefix <= _LIKELY_PREFIX_TOKENS:
        raise ValueError(
            f"{length} tokens on a map of {height}×{width} leave {prefix} prefix tokens, but the encoding "
            f"was built with skip={skip}; set skip={prefix}, or give the height and width of the map"
        )
    kind = "a square map" if square else f"a map of {height}×{width}"
    raise ValueError(
        f"{length} tokens do not form {kind} after the prefix tokens (skip={skip}); give the height and "
        "width of the map, which is 2-D: fold a video's frames into the batch"
    )


class iRPE(nn.Module):
    """One term of the encoding with one table: on queries, keys or values.

    Args:
        head_dim, num_heads: D and H.
        config: RPEConfig; its `rpe_on` is not read here.
        on: "q", "k" or "v".
        method: for `iRPE_Cross`, the axis of this table; otherwise the configuration's method.

    The table starts at zero. It is `lookup_table_bias` (H', nb) in bias mode, else `lookup_table_weight`, of shape
    (H', D, nb) on queries and keys and (H', nb, D) on values.
    """

    def __init__(self, head_dim, num_heads, config, on="k", method=None):
        super().__init__()
        self.config, self.on = config, _choice("on", on, ("q", "k", "v"))
        self.method = method or config.method
        self.num_buckets = _count_buckets(self.method, config.skip, config.piecewise[1])
        heads = 1 if config.shared_head else num_heads
        if config.mode == "bias":
            self.lookup_table_bias = nn.Parameter(torch.zeros(heads, self.num_buckets))
        else:
            table = (self.num_buckets, head_dim) if on == "v" else (head_dim, self.num_buckets)
            self.lookup_table_weight = nn.Parameter(torch.zeros(heads, *table))

    def bucket_ids(self, length, device, height=None, width=None, transposed=False):
        """Ids (L, L) of the map, or their transpose; without height and width it is square with side √(L - skip).

        Raises: ValueError if `length` is not height·width + skip, or a size is not a whole number above 0.
        """
        length = operator.index(length)  # torch.compile is to take sizes for constants
        height, width = _map_size(length, height, width, self.config.skip)
        flip = transposed and torch.compiler.is_compiling()  # which takes two constants of one function for the same
        ids = self._constant_ids(height, width, torch.device(device), transposed and not flip)
        ids = ids[-1 if self.method is METHOD.CROSS_COLS else 0]  # so both axes of a cross are in one
        return ids.t() if flip else ids

    @torch.compiler.assume_constant_result
    def _constant_ids(self, height, width, device, transposed):
        methods = _parts(self.config.method)
        dtype = torch.int32 if _use_rpe_ops(device) else torch.int64  # PyTorch's own gather takes no int32
        return _kept_ids(methods, height, width, self.config.skip, self.config.piecewise, device, dtype, transposed)

    def terms(self, length, device, height=None, width=None):
        """A list of (ids, table), as `rpe_ops.attention` takes the term of this module."""
        ids = self.bucket_ids(length, device, height, width, transposed=self.on == "q")
        return [(ids, self._table * self._table.shape[-2] ** -0.5 if self.on == "q" else self._table)]

    @property
    def tables(self):
        """Its parameters, one, or two of a cross."""
        return [self.lookup_table_bias if self.config.mode == "bias" else self.lookup_table_weight]

    @property
    def _table(self):
        if self.config.mode == "bias":  # as if every token had these products
            return self.lookup_table_bias[None, :, None]
        # without the head axis where the heads share it: then matmul folds the batch into rows
        weight = self.lookup_table_weight
        return weight[0] if len(weight) == 1 else weight

    def forward(self, x, height=None, width=None):
        """What this table adds to the logits (on q, k) or to the output (on v); Eq. 12 to 14.

        Args:
            x: on q and k the scaled queries or keys, (B, H, L, D); on v the attention after softmax, (B, H, L, L).
            height, width: the map, in tokens; square if not given.
        Returns: on q and k what is added to the logits, (B, H, L, L), or (1, H', L, L) in bias mode; on v what is
            added to the output, (B, H, L, D).
        Raises: ValueError if L does not fit the map and the configured skip.
        """
        ids = self.bucket_ids(x.shape[-2], x.device, height, width)
        if self.config.mode == "bias":
            return _gather_buckets(self._table.expand(-1, -1, len(ids), -1), ids)
        if self.on == "v":
            return torch.matmul(_sum_buckets(x, ids, self.num_buckets), self._table)
        return _gather_buckets(torch.matmul(x, self._table), ids)

    def __prepare_scriptable__(self):
        """What torch.jit.script calls on every module before it compiles one."""
        raise RuntimeError(
            "torch.jit.script cannot compile iRPE, whose bucket ids Python computes; use "
            "torch.jit.trace, torch.export or torch.compile"
        )

    def extra_repr(self):
        return f"on={self.on}, method={self.method.value}, num_buckets={self.num_buckets}, {self.config}"


class iRPE_Cross(nn.Module):
    """The cross method: a table for rows and one for columns, whose terms are added. Its methods are as `iRPE`'s."""

    def __init__(self, head_dim, num_heads, config, on="k"):
        super().__init__()
        self.config = config
        self.rp_rows = iRPE(head_dim, num_heads, config, on, METHOD.CROSS_ROWS)
        self.rp_cols = iRPE(head_dim, num_heads, config, on, METHOD.CROSS_COLS)

    def terms(self, *args):
        return self.rp_rows.terms(*args) + self.rp_cols.terms(*args)

    @property
    def tables(self):
        return self.rp_rows.tables + self.rp_cols.tables

    def forward(self, x, height=None, width=None):
        return self.rp_rows(x, height, width) + self.rp_cols(x, height, width)


def build_rpe(rpe_config, head_dim, num_heads):
    """Modules (rpe_q, rpe_k, rpe_v) of a configuration for heads of `head_dim` channels; None where it has none."""
    if rpe_config is None:
        return None, None, None
    if not isinstance(rpe_config, RPEConfig):
        raise ValueError(f"rpe_config is {rpe_config!r}; it must come from get_rpe_config, or be None")
    module = iRPE_Cross if rpe_config.method is METHOD.CROSS else iRPE
    return tuple(module(head_dim, num_heads, rpe_config, on) if on in rpe_config.rpe_on else None for on in "qkv")


# --- Attention -------------------------------------------------------------------------------------------------------

# On a GPU PyTorch's attention copies a mask whose rows do not begin at such multiples, and its gradient too.
_ROW_ALIGNMENT = 16
_ALIGNED_DEVICES = ("cuda",)


class _AlignedSum(torch.autograd.Function):
    """Sum of broadcast terms for `scaled_dot_product_attention`, written once, into aligned rows."""

    @staticmethod
    def forward(ctx, dtype, *terms):
        ctx.shapes = [term.shape for term in terms]
        *rows, length = torch.broadcast_shapes(*ctx.shapes)
        padded = -(-length // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
        total = terms[0].new_empty(*rows, padded, dtype=dtype)[..., :length]
        if len(terms) == 1:
            return total.copy_(terms[0])
        torch.add(terms[0].expand_as(total), terms[1], out=total)
        for term in terms[2:]:
            total += term
        return total

    @staticmethod
    def backward(ctx, grad):
        # autograd brings a gradient to its input's type
        return None, *(
            grad.sum_to_size(shape) if needed else None
            for shape, needed in zip(ctx.shapes, ctx.needs_input_grad[1:], strict=True)
        )


def add_terms(terms):
    """The sum of terms for the logits, each broadcast to (B, H, L, L), as `scaled_dot_product_attention` takes its mask
    with the fewest copies: on a GPU with aligned rows, in the type that it computes in."""
    device = terms[0].device.type
    # torch.compile aligns the masks that it writes itself; traces and torch.func take no autograd.Function
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
    if device not in _ALIGNED_DEVICES or traced:
        return functools.reduce(torch.add, terms)
    autocast = torch.is_autocast_enabled(device)
    dtype = (
        torch.get_autocast_dtype(device)
        if autocast
        else functools.reduce(torch.promote_types, [term.dtype for term in terms])
    )
    if len(terms) == 1 and terms[0].dtype == dtype and _has_aligned_rows(terms[0]):
        return terms[0]
    return _AlignedSum.apply(dtype, *terms)


def _has_aligned_rows(x):
    return x.stride(-1) == 1 and all(stride % _ROW_ALIGNMENT == 0 for stride in x.stride()[:-1])


_MOST_CLASSES = 15  # of rows of the map: with more, products by rows are as large as logits


def _goes_by_rows(q, k, v, modules, mask):
    """Whether `rpe_ops.rows` is for this call. Buckets of euclid and quantization mix rows and columns."""
    configs = [module.config for module in modules]
    kinds = {(x.ratio, x.method, x.mode, x.shared_head, x.skip) for x in configs}
    fits = (
        len(kinds) == 1
        and configs[0].method in (METHOD.PRODUCT, METHOD.CROSS)
        and 2 * int(configs[0].piecewise[1]) + 1 <= _MOST_CLASSES
    )
    tables = [table for module in modules for table in module.tables]
    # asked in any case: it refuses an unknown IRPE_ATTENTION
    return rpe_ops.rows_take(q, k, v, tables, configs[0].skip, mask, modules) and fits


@torch.compiler.assume_constant_result
def _constant_row_layout(*key):
    return _kept_row_layout(*key)[0]


@torch.compiler.assume_constant_result
def _constant_row_sizes(*key):
    return _kept_row_layout(*key)[1]


def _check_self_attention(q, k, v):
    """Raise ValueError unless q, k and v, (B, H, L, D), are of the same tokens; heads and batches may broadcast."""
    if torch.jit.is_tracing():  # in which sizes are tensors, and comparing them warns
        return
    if q.ndim == 4 and q.shape == k.shape == v.shape:
        return
    tensors = (q, k, v)
    fits = all(x.ndim == 4 and x.shape[2] == q.shape[2] for x in tensors) and q.shape[3] == k.shape[3]
    for one, other in ((q, k), (q, v), (k, v)):
        fits = fits and all(a == b or a == 1 or b == 1 for a, b in zip(one.shape[:2], other.shape[:2], strict=True))
    if not fits:
        shapes = ", ".join(str(tuple(x.shape)) for x in tensors)
        raise ValueError(
            f"q, k and v have shapes {shapes}; relative positions are for self-attention on one map: give "
            "all three as (batch, heads, tokens, channels) of the same tokens, or leave out rpe_q, rpe_k "
            "and rpe_v for cross-attention"
        )


def rpe_attention(q, k, v, rpe_q=None, rpe_k=None, rpe_v=None, height=None, width=None, attn_mask=None, dropout_p=0.0):
    """softmax(scale·q·kᵀ + terms on keys and queries + mask)·v + term on values, with scale = D^-1/2.

    Args:
        q, k, v: (B, H, L, D), q not yet scaled.
        rpe_q, rpe_k, rpe_v: modules from `build_rpe`, or None.
        height, width: the map, in tokens; square if not given. A map is 2-D: fold a video's frames into the batch.
        attn_mask: as in `scaled_dot_product_attention`: added to the logits, or bool with True where a key may be
            seen; broadcast to (B, H, L, L).
        dropout_p: dropout of the attention; give 0 in evaluation.
    Returns: (B, H, L, D).
    Raises: ValueError, with modules, if q, k and v are not of one map's tokens or L does not fit the map and skip.
    """
    modules = [module for module in (rpe_q, rpe_k, rpe_v) if module is not None]
    if not modules:
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p)
    _check_self_attention(q, k, v)
    # what rpe_ops computes is what `forward` computes, unless that is somebody else's
    ours = all(type(part) in (iRPE, iRPE_Cross) for rpe in modules for part in rpe.modules())
    ours = ours and HAS_RPE_OPS and not _is_recorded()
    if ours and _goes_by_rows(q, k, v, modules, attn_mask):
        return _attention_by_rows(q, k, v, (rpe_q, rpe_k, rpe_v), height, width, attn_mask, dropout_p)
    q, mask, blind = q * q.shape[-1] ** -0.5, attn_mask, None
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -math.inf)
        blind = mask.amax(-1, keepdim=True) == -math.inf  # queries that may see nothing get zeros in the end
        mask = mask.masked_fill(blind, 0)
    if ours and rpe_ops.attention_takes(q, k, v, mask, modules):
        terms = [rpe.terms(q.shape[2], q.device, height, width) if rpe else [] for rpe in (rpe_q, rpe_k, rpe_v)]
        out = rpe_ops.attention(q, k, v, *terms, mask, dropout_p)
    else:
        out = _composed_attention(q, k, v, rpe_q, rpe_k, rpe_v, height, width, mask, dropout_p)
    return out if mask is None else out.masked_fill(blind, 0)


def _attention_by_rows(q, k, v, modules, height, width, attn_mask, dropout_p):
    """The attention of `rpe_ops.rows`; q is not scaled, and modules are those on queries, keys and values, or None."""
    config = next(module.config for module in modules if module is not None)
    tables = [module.tables if module is not None else [] for module in modules]
    size = _map_size(operator.index(q.shape[2]), height, width, config.skip)
    key = config.method, *size, config.skip, config.piecewise, q.device
    return rpe_ops.blockwise.rows.attention(
        q,
        k,
        v,
        *tables,
        _constant_row_layout(*key),
        _constant_row_sizes(*key),
        config.mode == "bias",
        attn_mask,
        dropout_p,
    )


def _composed_attention(q, k, v, rpe_q, rpe_k, rpe_v, height, width, mask, dropout_p):
    """Attention from the modules' own terms and PyTorch's operators; q is scaled, and the mask is added."""
    terms = [
        rpe_k and rpe_k(q, height, width),
        rpe_q and rpe_q(k * q.shape[-1] ** -0.5, height, width).transpose(-2, -1),
        mask,
    ]
    terms = [term for term in terms if term is not None]
    if rpe_v is not None:
        logits = functools.reduce(torch.add, terms, torch.matmul(q, k.transpose(-2, -1)))
        attn = F.dropout(logits.softmax(-1), dropout_p)
        return torch.matmul(attn, v) + rpe_v(attn, height, width)
    # without a term on values PyTorch's attention does the rest, and takes what is added to the logits as its mask
    out = F.scaled_dot_product_attention(q, k, v, add_terms(terms), dropout_p, scale=1.0)
    # its strides depend on whether gradients are asked for, which may change after the trace
    return out.clone(memory_format=torch.contiguous_format) if _is_recorded() else out
