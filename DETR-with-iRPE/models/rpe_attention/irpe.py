"""Image relative position encoding (iRPE) for vision transformers, in a single file that you can copy.

Wu, Peng, Chen, Fu, Chao: "Rethinking and Improving Relative Position Encoding for Vision Transformer", ICCV 2021.

    config = get_rpe_config(ratio=1.9, method="product", mode="ctx", shared_head=True, skip=1, rpe_on="k")
    rpe_q, rpe_k, rpe_v = build_rpe(config, head_dim=64, num_heads=6)
    out = rpe_attention(q, k, v, rpe_q=rpe_q, rpe_k=rpe_k, rpe_v=rpe_v)

Shapes: B images, H heads, L tokens (`skip` prefix tokens, then the map row by row), D channels per head, `nb` buckets,
H' = 1 if the heads share their tables, else H.
"""

import enum
import functools
import math
import numbers
import operator
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Faster kernels for the same operators. An extension that was built for another PyTorch raises an error that says so.
try:
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
        "the installed rpe_ops is older than this irpe.py; rebuild it, in the iRPE repository: "
        "pip install ./rpe_ops --no-build-isolation --no-deps --force-reinstall"
    )


# --- From positions to buckets ---------------------------------------------------------------------------------------


class METHOD(str, enum.Enum):
    """How an offset on the map is mapped to a bucket. Functions accept a member or its short name."""

    EUCLIDEAN = "euc"
    QUANT = "quant"
    PRODUCT = "product"
    CROSS = "cross"
    CROSS_ROWS = "cross_rows"
    CROSS_COLS = "cross_cols"


def piecewise_index(relative_position: Tensor, alpha: float, beta: float, gamma: float, dtype: torch.dtype) -> Tensor:
    """The piecewise function g (Eq. 18): identity near zero, logarithmic further out, at most β.

    Args:
        relative_position: offsets or distances in tokens, integer or float tensor of any shape.
        alpha: end of the identity part.
        beta: largest value.
        gamma: distance at which the largest value is reached (up to rounding).
        dtype: integer type of the result.
    Returns: tensor of the same shape with integers in [-int(β), int(β)].
    """
    x = relative_position.float()
    # float32 logarithms and rounding half to even resolve ties as they did when the released models were trained. The
    # clamp keeps the logarithm finite for values that torch.where discards.
    growth = torch.log(x.abs().clamp(min=alpha) / alpha) / math.log(gamma / alpha)
    far = (alpha + growth * (beta - alpha)).round().clamp(max=beta) * x.sign()
    return torch.where(x.abs() <= alpha, x.round(), far).to(dtype)


# method: (function that computes the bucket of the offset (dr, dc), number of axes that the buckets span). The function
# takes `index`, which is g + int(β) and has the values 0 ... size - 1.
_MAPPINGS = {
    METHOD.EUCLIDEAN: (lambda dr, dc, index, size: index((dr.square() + dc.square()).float().sqrt().round()), 1),
    METHOD.QUANT: (lambda dr, dc, index, size: index(dr.square() + dc.square()), 1),
    METHOD.PRODUCT: (lambda dr, dc, index, size: index(dr) * size + index(dc), 2),
    METHOD.CROSS_ROWS: (lambda dr, dc, index, size: index(dr), 1),
    METHOD.CROSS_COLS: (lambda dr, dc, index, size: index(dc), 1),
}


def _count_buckets(method: METHOD, skip: int, beta: float) -> int:
    return (2 * int(beta) + 1) ** _MAPPINGS[method][1] + (skip > 0)


def get_bucket_ids_2d(
    method: METHOD | str,
    height: int,
    width: int,
    skip: int,
    alpha: float,
    beta: float,
    gamma: float,
    dtype: torch.dtype = torch.long,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, int]:
    """The bucket of every pair of tokens, from the method's mapping and the piecewise function g (Eq. 18).

    Args:
        method: a `METHOD` or its short name; for cross, one axis (`cross_rows` or `cross_cols`).
        height, width: size of the map, in tokens.
        skip: number of prefix tokens before the map; all pairs with one of them share the last bucket.
        alpha, beta, gamma: see `piecewise_index`.
    Returns: ids (L, L) with L = skip + height·width, where ids[i, j] is the bucket of query i and key j; and the
        number of buckets, including those that this map does not use.
    Raises: ValueError for a method that has no mapping of its own, like cross.
    """
    method = METHOD(_choice("method", method, [m.value for m in _MAPPINGS]))
    table = _offset_ids(method, height, width, alpha, beta, gamma, dtype, device)
    # ids[(r, c), (r', c')] = table[r - r' + height - 1, c - c' + width - 1], so the ids of a query are a window of it.
    ids = table.unfold(0, height, 1).unfold(1, width, 1).flip(2, 3).reshape(height * width, height * width)
    num_buckets = _count_buckets(method, skip, beta)
    return F.pad(ids, (skip, 0, skip, 0), value=num_buckets - 1), num_buckets


def _offset_ids(
    method: METHOD,
    height: int,
    width: int,
    alpha: float,
    beta: float,
    gamma: float,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """The bucket of every offset, (2·height - 1, 2·width - 1), starting with the offset (1 - height, 1 - width)."""
    dr, dc = (torch.arange(1 - n, n, device=device) for n in (height, width))

    def index(x: Tensor) -> Tensor:
        return piecewise_index(x, alpha, beta, gamma, dtype) + int(beta)

    bucket_of, _ = _MAPPINGS[method]
    return bucket_of(dr[:, None], dc, index, 2 * int(beta) + 1).expand(2 * height - 1, 2 * width - 1)


def _parts(method: METHOD) -> tuple[METHOD, ...]:
    """The mapping of each table of a method: cross has two tables, and the others have one."""
    return (METHOD.CROSS_ROWS, METHOD.CROSS_COLS) if method is METHOD.CROSS else (method,)


def _in_a_thread(compute: Callable[[], Any]) -> Any:
    """Return `compute()`, executed in a new thread.

    The caller may be in inference mode, trace with fake tensors, or have set a default device. A new thread inherits
    none of this, so the cached result is an ordinary tensor that every later caller can use.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(compute).result()


@functools.lru_cache(maxsize=32)  # an entry takes 8 MB on DETR's largest maps
def _cached_ids(
    methods: tuple[METHOD, ...],
    height: int,
    width: int,
    skip: int,
    piecewise: tuple[float, float, float],
    device: torch.device,
    dtype: torch.dtype,
    transposed: bool,
) -> Tensor:
    """Bucket ids of each method's table, (tables, L, L), or their transposes."""

    def compute() -> Tensor:
        # Always computed on the CPU, because another device's logarithm may round a tie into the next bucket.
        ids = torch.stack([get_bucket_ids_2d(x, height, width, skip, *piecewise, dtype)[0] for x in methods])
        return (ids.mT.contiguous() if transposed else ids).to(device)

    return _in_a_thread(compute)


def row_layout(offset_ids: Tensor, skip: int, num_buckets: int) -> tuple[Tensor, tuple[int, ...]]:
    """Describe a map for the kernels of `rpe_ops.rows`.

    Two offsets between rows are in the same *row class* if, for every offset between columns, they give the same
    bucket. The kernels support the methods product and cross, which have few row classes.

    Args:
        offset_ids: buckets of every offset, (tables, 2·height - 1, 2·width - 1), on the CPU; cross has two tables.
        skip: number of prefix tokens before the map; their pairs use the last bucket of each table.
        num_buckets: number of buckets of each table.
    Returns: a flat int32 tensor, and the sizes (rows, columns, prefix tokens, row classes, distance in tokens from one
        row to the next, and from one column to the next). The map is transposed if that fills chunks of 16 tokens
        better. The tensor is the concatenation of
        1. the class of each pair of rows, (rows + 1, rows + 1), where row 0 stands for the prefix;
        2. for each table, the bucket for each column (the last one stands for the prefix), row class, and column of the
           other token, with -1 where there is none: (tables, columns + 1, classes, columns rounded up to a multiple of
           16);
        3. for each bucket of each table, where its list in part 4 begins; then the end of the last list;
        4. for each bucket of each table, the list of its positions in part 2.
    Raises: ValueError if the offsets of a row class are not contiguous.
    """
    rows, columns = ((size + 1) // 2 for size in offset_ids.shape[1:])
    steps = columns, 1
    if columns * _round_up_to_16(rows) < rows * _round_up_to_16(columns):
        rows, columns, steps, offset_ids = columns, rows, (1, columns), offset_ids.mT
    pattern = offset_ids.transpose(0, 1).flatten(1)
    class_of = F.pad((pattern[1:] != pattern[:-1]).any(1).cumsum(0), (1, 0))
    classes = int(class_of[-1]) + 1
    if len(pattern.unique(dim=0)) != classes:
        raise ValueError("the offsets of a row class do not follow each other, as they do for product and cross")
    row, column = torch.arange(rows), torch.arange(columns)
    of_rows = F.pad(class_of[row[:, None] - row + rows - 1], (1, 0, 1, 0), value=classes)
    ids = torch.full((len(offset_ids), columns + 1, classes + (skip > 0), _round_up_to_16(columns)), -1)
    of_classes = offset_ids[:, torch.searchsorted(class_of, torch.arange(classes))]
    ids[:, :-1, :classes, :columns] = of_classes[:, :, column[:, None] - column + columns - 1].transpose(1, 2)
    if skip:
        ids[:, :-1, -1, :skip] = ids[:, -1, -1, : max(columns, skip)] = num_buckets - 1
    ids = ids.flatten(1)
    places = [(of_table == bucket).nonzero()[:, 0] for of_table in ids for bucket in range(num_buckets)]
    starts = torch.tensor([0, *map(len, places)]).cumsum(0)
    layout = torch.cat([of_rows.flatten(), ids.flatten(), starts, *places]).int()
    return layout, (rows, columns, skip, classes + (skip > 0), *steps)


def _round_up_to_16(size: int) -> int:
    return -(-size // 16) * 16


@functools.lru_cache(maxsize=256)
def _cached_row_layout(
    method: METHOD,
    height: int,
    width: int,
    skip: int,
    piecewise: tuple[float, float, float],
    device: torch.device,
) -> tuple[Tensor, tuple[int, ...]]:
    """`row_layout` of a method, with the tensor on a device."""

    def compute() -> tuple[Tensor, tuple[int, ...]]:
        ids = torch.stack([_offset_ids(x, height, width, *piecewise, torch.long, "cpu") for x in _parts(method)])
        layout, sizes = row_layout(ids, skip, _count_buckets(_parts(method)[0], skip, piecewise[1]))
        return layout.to(device), sizes

    return _in_a_thread(compute)


# --- Configuration ---------------------------------------------------------------------------------------------------

_MODES = {"bias": "bias", "ctx": "contextual", "contextual": "contextual"}
_RPE_ON = ("q", "k", "v", "qk", "kv", "qv", "qkv")
RPE_GRAMMAR = "rpe-{ratio}-{euc|quant|cross|product}-{bias|ctx}-{shared_head: 0|1}-{q|k|v|qk|kv|qv|qkv}"


def _choice(name: str, value: Any, allowed: tuple | list) -> Any:
    """Return the value, or raise ValueError that lists the allowed values if it is not one of them."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(str, allowed))}")
    return value


@dataclass(frozen=True)
class RPEConfig:
    """The configuration of an encoding. `get_rpe_config` creates it from checked values; `build_rpe` builds modules."""

    ratio: float
    method: METHOD
    mode: str
    shared_head: bool
    skip: int
    rpe_on: str

    @property
    def piecewise(self) -> tuple[float, float, float]:
        """(α, β, γ) of `piecewise_index`."""
        return self.ratio, 2 * self.ratio, 8 * self.ratio


def get_rpe_config(
    ratio: float = 1.9,
    method: METHOD | str = "product",
    mode: str = "ctx",
    shared_head: bool = True,
    skip: int = 0,
    rpe_on: str = "k",
) -> RPEConfig:
    """Check the values of an encoding, and return its `RPEConfig`.

    Args:
        ratio: scales the piecewise function: α = ratio, β = 2·ratio, γ = 8·ratio.
        method: `euc`, `quant`, `cross` or `product`, or a `METHOD`.
        mode: `bias` (a number per bucket) or `ctx`/`contextual` (a vector per bucket, multiplied by the queries, the
            keys or the attention weights).
        shared_head: whether all heads share one table; otherwise each head has its own.
        skip: number of prefix tokens before the map: 0 in DETR, 1 with a class token, 2 in a distilled DeiT.
        rpe_on: which of queries, keys and values get a term: q, k, v, qk, kv, qv or qkv; v only in contextual mode.
    Raises: ValueError that states the allowed values.
    """
    if not (isinstance(ratio, numbers.Real) and 0 < ratio < math.inf):
        raise ValueError(f"ratio is {ratio!r}; it must be a number above 0, such as 1.9")
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


def parse_rpe(text: str) -> RPEConfig:
    """Parse a string of the form `RPE_GRAMMAR` to an `RPEConfig` with skip=0.

    Raises: ValueError that says which part is wrong.
    """
    name, *parts = text.split("-")
    if name != "rpe" or len(parts) != 5:
        raise ValueError(
            f"it must have 6 parts separated by '-', of which the first is 'rpe', but has {len(parts) + 1}, beginning "
            f"with {name!r}"
        )
    ratio, method, mode, shared_head, rpe_on = parts
    ratio = float(ratio) if ratio.replace(".", "", 1).isdecimal() else ratio  # get_rpe_config rejects other text
    return get_rpe_config(ratio, method, mode, _choice("shared_head", shared_head, ("0", "1")) == "1", rpe_on=rpe_on)


# --- Modules ---------------------------------------------------------------------------------------------------------


@torch.compiler.assume_constant_result
def _is_exporting() -> bool:
    """Whether torch.export is tracing this call; always False on PyTorch 2.6, which cannot tell.

    The decorator makes torch.compile call this function instead of tracing it: PyTorch 2.11 would otherwise assume that
    `is_exporting` is True inside a compiled model.
    """
    return getattr(torch.compiler, "is_exporting", bool)()


def _is_recorded() -> bool:
    """Whether torch.export or torch.jit.trace (and thus torch.onnx.export) records this call.

    A recorded model must run without rpe_ops, for example in onnxruntime, so it may only use PyTorch's own operators.
    """
    return _is_exporting() or torch.jit.is_tracing()


def _is_transformed() -> bool:
    """Whether torch.func transforms this call, for example torch.vmap."""
    return torch._C._are_functorch_transforms_active()


@torch.compiler.assume_constant_result  # torch.compile cannot trace the query
def _is_differentiated_by_func() -> bool:
    """Whether torch.func.grad, jvp or a similar transform differentiates this call. rpe_ops supports none of them."""
    interpreters = torch._C._functorch.get_interpreter_stack() or []
    return any(interpreter.key().name in ("Grad", "Jvp") for interpreter in interpreters)


def _use_rpe_ops(device: torch.device) -> bool:
    if not HAS_RPE_OPS or _is_recorded() or (_is_transformed() and _is_differentiated_by_func()):
        return False
    return device.type == "cpu" or (device.type == "cuda" and rpe_ops.has_cuda)


def _gather_buckets(lookup: Tensor, ids: Tensor) -> Tensor:
    """Y[b, h, i, j] = lookup[b, h, i, ids[i, j]] for `lookup` (B, H, Lq, nb) and `ids` (Lq, Lk)."""
    if _use_rpe_ops(lookup.device):
        return rpe_index(lookup, ids)
    return lookup.gather(-1, ids.expand(*lookup.shape[:2], -1, -1))


def _sum_buckets(attn: Tensor, ids: Tensor, num_buckets: int) -> Tensor:
    """S[b, h, i, c] = Σ attn[b, h, i, j] over all j with ids[i, j] = c, (B, H, Lq, nb).

    It is accumulated in float32 or higher, and returned in the dtype of `attn`.
    """
    if _use_rpe_ops(attn.device):
        return rpe_bucket_sum(attn, ids, num_buckets)
    total = attn.new_zeros(*attn.shape[:-1], num_buckets, dtype=torch.promote_types(attn.dtype, torch.float32))
    return total.scatter_add(-1, ids.expand_as(attn), attn.to(total.dtype)).to(attn.dtype)


# Error messages suggest at most this many prefix tokens as `skip`: a class token and four registers, as in DINOv2.
_LIKELY_PREFIX_TOKENS = 5


def _whole_size(name: str, value: Any) -> int:
    """A size of the map as an int. Raises ValueError if it is not a positive integer."""
    try:
        size = operator.index(value)  # makes torch.compile treat sizes as constants
    except TypeError:
        size = 0
    if size < 1:
        raise ValueError(f"the map's {name} is {value!r}; it must be a whole number of tokens, 1 or more")
    return size


def _map_size(length: int, height: int | None, width: int | None, skip: int) -> tuple[int, int]:
    """(height, width) of the map in a sequence of `length` tokens, of which the first `skip` are prefix tokens.

    Without height and width, the map is square. Raises: ValueError if the length does not fit.
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
        height = width = math.isqrt(length)  # the square map that another `skip` would give
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
    """One term of the encoding, on queries, keys or values, with one table.

    Args:
        head_dim, num_heads: D and H.
        config: the encoding; its `rpe_on` is not used here.
        on: "q", "k" or "v".
        method: the axis of this table in `iRPE_Cross`; otherwise the method of the configuration.

    The table starts at zero. It is `lookup_table_bias` (H', nb) in bias mode, else `lookup_table_weight`, of shape
    (H', D, nb) on queries and keys and (H', nb, D) on values.
    """

    def __init__(
        self, head_dim: int, num_heads: int, config: RPEConfig, on: str = "k", method: METHOD | None = None
    ) -> None:
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

    def bucket_ids(
        self,
        length: int,
        device: torch.device | str,
        height: int | None = None,
        width: int | None = None,
        transposed: bool = False,
    ) -> Tensor:
        """Bucket ids of the map, (L, L), or their transpose. Without height and width, the map is square.

        Raises: ValueError if `length` is not height·width + skip, or a size is not a positive integer.
        """
        length = operator.index(length)  # makes torch.compile treat sizes as constants
        height, width = _map_size(length, height, width, self.config.skip)
        # torch.compile would confuse two different constants from the same function, so compiled code gets the ids
        # and transposes them itself.
        flip = transposed and torch.compiler.is_compiling()
        ids = self._constant_ids(height, width, torch.device(device), transposed and not flip)
        ids = ids[-1 if self.method is METHOD.CROSS_COLS else 0]
        return ids.t() if flip else ids

    @torch.compiler.assume_constant_result
    def _constant_ids(self, height: int, width: int, device: torch.device, transposed: bool) -> Tensor:
        """Bucket ids of all tables of the method, (tables, L, L).

        assume_constant_result makes torch.compile call this function and store its result, because it cannot trace the
        cache and the thread behind it.
        """
        methods = _parts(self.config.method)
        dtype = torch.int32 if _use_rpe_ops(device) else torch.int64  # PyTorch's own gather requires int64
        return _cached_ids(methods, height, width, self.config.skip, self.config.piecewise, device, dtype, transposed)

    def terms(
        self, length: int, device: torch.device, height: int | None = None, width: int | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """This module's term in the form that `rpe_ops.attention` expects: a list of (ids, table)."""
        ids = self.bucket_ids(length, device, height, width, transposed=self.on == "q")
        return [(ids, self._table * self._table.shape[-2] ** -0.5 if self.on == "q" else self._table)]

    @property
    def tables(self) -> list[nn.Parameter]:
        """The table of this module, as a list."""
        return [self.lookup_table_bias if self.config.mode == "bias" else self.lookup_table_weight]

    @property
    def _table(self) -> Tensor:
        if self.config.mode == "bias":  # every token uses the same row of lookup values
            return self.lookup_table_bias[None, :, None]
        # If the heads share a table, it needs no head axis: matmul then folds batch and heads into a single product.
        weight = self.lookup_table_weight
        return weight[0] if len(weight) == 1 else weight

    def forward(self, x: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """The term that this table adds to the logits (on q, k) or to the output (on v), Eq. 12 to 14.

        Args:
            x: on k, the scaled queries, (B, H, L, D); on q, the scaled keys, (B, H, L, D); on v, the attention weights
                after the softmax, (B, H, L, L).
            height, width: size of the map, in tokens; square if not given.
        Returns: on q and k, the term for the logits, (B, H, L, L), or (1, H', L, L) in bias mode; on q, its last two
            axes are (keys, queries). On v, the term for the output, (B, H, L, D).
        Raises: ValueError if L does not fit the map and the configured skip.
        """
        ids = self.bucket_ids(x.shape[-2], x.device, height, width)
        if self.config.mode == "bias":
            return _gather_buckets(self._table.expand(-1, -1, len(ids), -1), ids)
        if self.on == "v":
            return torch.matmul(_sum_buckets(x, ids, self.num_buckets), self._table)
        return _gather_buckets(torch.matmul(x, self._table), ids)

    def __prepare_scriptable__(self) -> NoReturn:
        """Raise an error. torch.jit.script calls this method of every module before it compiles a model."""
        raise RuntimeError(
            "torch.jit.script cannot compile iRPE, whose bucket ids Python computes; use "
            "torch.jit.trace, torch.export or torch.compile"
        )

    def extra_repr(self) -> str:
        return f"on={self.on}, method={self.method.value}, num_buckets={self.num_buckets}, {self.config}"


class iRPE_Cross(nn.Module):
    """The cross method: the sum of a term with a table for rows and one with a table for columns.

    Arguments and methods are those of `iRPE`.
    """

    def __init__(self, head_dim: int, num_heads: int, config: RPEConfig, on: str = "k") -> None:
        super().__init__()
        self.config = config
        self.rp_rows = iRPE(head_dim, num_heads, config, on, METHOD.CROSS_ROWS)
        self.rp_cols = iRPE(head_dim, num_heads, config, on, METHOD.CROSS_COLS)

    def terms(
        self, length: int, device: torch.device, height: int | None = None, width: int | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        args = length, device, height, width
        return self.rp_rows.terms(*args) + self.rp_cols.terms(*args)

    @property
    def tables(self) -> list[nn.Parameter]:
        return self.rp_rows.tables + self.rp_cols.tables

    def forward(self, x: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        return self.rp_rows(x, height, width) + self.rp_cols(x, height, width)


def build_rpe(
    rpe_config: RPEConfig | None, head_dim: int, num_heads: int
) -> tuple[iRPE | iRPE_Cross | None, iRPE | iRPE_Cross | None, iRPE | iRPE_Cross | None]:
    """Build the modules (rpe_q, rpe_k, rpe_v) of a configuration, with None for terms that it does not have.

    Args:
        rpe_config: from `get_rpe_config`, or None for no encoding.
        head_dim, num_heads: D and H.
    Raises: ValueError if `rpe_config` is anything else.
    """
    if rpe_config is None:
        return None, None, None
    if not isinstance(rpe_config, RPEConfig):
        raise ValueError(f"rpe_config is {rpe_config!r}; it must come from get_rpe_config, or be None")
    module = iRPE_Cross if rpe_config.method is METHOD.CROSS else iRPE
    return tuple(module(head_dim, num_heads, rpe_config, on) if on in rpe_config.rpe_on else None for on in "qkv")


# --- Attention -------------------------------------------------------------------------------------------------------

# On a GPU, PyTorch's attention copies a mask and its gradient unless their rows are aligned to this many elements.
_ROW_ALIGNMENT = 16
_ALIGNED_DEVICES = ("cuda",)


class _AlignedSum(torch.autograd.Function):
    """The sum of broadcast terms, with the aligned rows that `scaled_dot_product_attention` needs."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *terms: Tensor) -> Tensor:
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
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # autograd casts each gradient to the type of its input
        return None, *(
            grad.sum_to_size(shape) if needed else None
            for shape, needed in zip(ctx.shapes, ctx.needs_input_grad[1:], strict=True)
        )


def add_terms(terms: list[Tensor]) -> Tensor:
    """Add up terms for the logits, for use as the mask of `scaled_dot_product_attention`.

    Args:
        terms: tensors that broadcast to (B, H, L, L).
    Returns: the sum. On a GPU, its rows are aligned and it has the dtype of the computation, because PyTorch's
        attention would copy it otherwise.
    """
    device = terms[0].device.type
    # torch.compile aligns masks itself; torch.jit.trace and torch.func do not support this autograd.Function.
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or _is_transformed()
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


def _has_aligned_rows(x: Tensor) -> bool:
    return x.stride(-1) == 1 and all(stride % _ROW_ALIGNMENT == 0 for stride in x.stride()[:-1])


_MAX_CLASSES = 15  # With more row classes, the products of `rpe_ops.rows` would be as large as the logits.


def _goes_by_rows(q: Tensor, k: Tensor, v: Tensor, modules: list[iRPE | iRPE_Cross], mask: Tensor | None) -> bool:
    """Whether `rpe_ops.rows` computes this call. It does not support Euclidean and quantization buckets."""
    configs = [module.config for module in modules]
    kinds = {(x.ratio, x.method, x.mode, x.shared_head, x.skip) for x in configs}
    fits = (
        len(kinds) == 1
        and configs[0].method in (METHOD.PRODUCT, METHOD.CROSS)
        and 2 * int(configs[0].piecewise[1]) + 1 <= _MAX_CLASSES
    )
    tables = [table for module in modules for table in module.tables]
    # This is called even if `fits` is False, because it rejects an unknown value of IRPE_ATTENTION.
    return rpe_ops.rows_take(q, k, v, tables, configs[0].skip, mask, modules) and fits


# iRPE._constant_ids explains assume_constant_result. There are two functions, because torch.compile can store a tensor
# or numbers as a constant, but not a tuple of both.
@torch.compiler.assume_constant_result
def _constant_row_layout(*key: Any) -> Tensor:
    return _cached_row_layout(*key)[0]


@torch.compiler.assume_constant_result
def _constant_row_sizes(*key: Any) -> tuple[int, ...]:
    return _cached_row_layout(*key)[1]


def _check_self_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless q, k and v, (B, H, L, D), belong to the same tokens. B and H may be broadcast."""
    if torch.jit.is_tracing():  # sizes are tensors then, and comparing them prints a warning
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


def rpe_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpe_q: nn.Module | None = None,
    rpe_k: nn.Module | None = None,
    rpe_v: nn.Module | None = None,
    height: int | None = None,
    width: int | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(scale·q·kᵀ + terms on keys and queries + mask)·v + term on values, with scale = D^-1/2 (Eq. 12 to 14).

    Args:
        q, k, v: (B, H, L, D), q not yet scaled.
        rpe_q, rpe_k, rpe_v: modules from `build_rpe`, or None.
        height, width: size of the map, in tokens; square if not given. A map is 2-D: fold a video's frames into the
            batch dimension.
        attn_mask: as in `scaled_dot_product_attention`: added to the logits, or bool with True where a query may attend
            to a key; broadcast to (B, H, L, L). The output is zero for queries that may not attend to any key.
        dropout_p: dropout probability of the attention weights; pass 0 in evaluation.
    Returns: (B, H, L, D).
    Raises: ValueError if any module is given and q, k and v do not belong to the tokens of one map, or L does not fit
        the map and skip.
    """
    modules = [module for module in (rpe_q, rpe_k, rpe_v) if module is not None]
    if not modules and (attn_mask is None or not _is_transformed()):
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p)
    if modules:
        _check_self_attention(q, k, v)
    may_use_rpe_ops = _may_use_rpe_ops(modules)
    if may_use_rpe_ops and _goes_by_rows(q, k, v, modules, attn_mask):
        return _attention_by_rows(q, k, v, (rpe_q, rpe_k, rpe_v), height, width, attn_mask, dropout_p)
    q = q * q.shape[-1] ** -0.5
    mask, fully_masked = (None, None) if attn_mask is None else _additive_mask(attn_mask, q.dtype)
    if may_use_rpe_ops and rpe_ops.attention_takes(q, k, v, mask, modules):
        terms = [rpe.terms(q.shape[2], q.device, height, width) if rpe else [] for rpe in (rpe_q, rpe_k, rpe_v)]
        out = rpe_ops.attention(q, k, v, *terms, mask, dropout_p)
    else:
        out = _composed_attention(q, k, v, rpe_q, rpe_k, rpe_v, height, width, mask, dropout_p)
    return out if mask is None else out.masked_fill(fully_masked, 0)


def _may_use_rpe_ops(modules: list[nn.Module]) -> bool:
    """Whether rpe_ops may compute attention with these modules, if its operators take the inputs."""
    if not modules or not HAS_RPE_OPS or _is_recorded():
        return False
    # rpe_ops replaces the forward methods of this file's classes, so subclasses with their own forward cannot use it.
    return all(type(part) in (iRPE, iRPE_Cross) for rpe in modules for part in rpe.modules())


def _additive_mask(mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The mask in additive form, (…, L, L), and which queries may not attend to any key, (…, L, 1).

    The rows of those queries are set to zero, because the softmax of a row of -∞ would be NaN.
    """
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -math.inf)
    fully_masked = mask.amax(-1, keepdim=True) == -math.inf
    return mask.masked_fill(fully_masked, 0), fully_masked


def _attention_by_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    modules: tuple[iRPE | iRPE_Cross | None, ...],
    height: int | None,
    width: int | None,
    attn_mask: Tensor | None,
    dropout_p: float,
) -> Tensor:
    """`rpe_attention` computed by `rpe_ops.rows`; q is not scaled, and `modules` are (rpe_q, rpe_k, rpe_v)."""
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


def _composed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpe_q: nn.Module | None,
    rpe_k: nn.Module | None,
    rpe_v: nn.Module | None,
    height: int | None,
    width: int | None,
    mask: Tensor | None,
    dropout_p: float,
) -> Tensor:
    """`rpe_attention` from the modules' terms and PyTorch's operators; q is already scaled, the mask is additive."""
    terms = [
        rpe_k and rpe_k(q, height, width),
        rpe_q and rpe_q(k * q.shape[-1] ** -0.5, height, width).transpose(-2, -1),
        mask,
    ]
    terms = [term for term in terms if term is not None]
    # Under torch.func, PyTorch's attention cannot always differentiate its mask.
    if rpe_v is not None or _is_transformed():
        logits = functools.reduce(torch.add, terms, torch.matmul(q, k.transpose(-2, -1)))
        attn = F.dropout(logits.softmax(-1), dropout_p)
        out = torch.matmul(attn, v)
        return out if rpe_v is None else out + rpe_v(attn, height, width)
    # Without a term on values, PyTorch's attention computes everything else, with the terms as its mask.
    out = F.scaled_dot_product_attention(q, k, v, add_terms(terms), dropout_p, scale=1.0)
    # The strides of the output depend on whether gradients are computed, which may change after tracing.
    return out.clone(memory_format=torch.contiguous_format) if _is_recorded() else out
