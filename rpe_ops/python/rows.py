"""Attention with relative positions on a GPU by rows of the map, in Triton, for the methods product and cross.

A bucket depends on a pair through a *class* of its two rows and through its two columns. So the table is expanded, once
a call, for every column c of a token and every class: `expanded[..., c, d, class·P + c']`, where P is the width of the
map rounded up to 16. Products of tokens with it, E (B, H, L, M) with M = classes·P, have a term's values for a row of
the map side by side: kernels read, and write gradients of, 16 numbers that lie together, without a look-up, a scatter
or an atomic operation. rpe_ops/README.md explains the design.

A plane is one head of one image. A chunk is 16 slots of one row of the map, the last of a row partly empty; the prefix
tokens are a chunk of their own. Tokens are numbered row by row of the map, then the prefix, in all tensors of M.
"""
import math
import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_CHUNK = 16
_SPLIT_PROGRAMS = 256  # programs that share the sums of a table's gradient, if there is enough for them


class Tile(NamedTuple):
    """Tokens of its own that a program has, others that it takes at a time, and Triton's options."""
    own: int
    other: int
    num_warps: int
    num_stages: int


KERNELS = ("forward", "queries", "queries, sums", "keys", "keys, sums", "product", "adjoint", "gradient")
# {(kernel, type, channels up to): tile}: a benchmark may assign others. `own` and `other` are powers of two and
# multiples of 16, `other` is 16 where a kernel has sums. For products, their adjoint and the gradient of the table, `own`
# are tokens, and `other` is how much of M is done at a time.
TILES = {(kernel, width, channels): tile for channels in (64, 128) for width in ("half", "float32")
         for kernel, tile in {
             "forward": Tile(64, 32, 4, 1),
             "queries": Tile(64, 32, 4, 1),
             "queries, sums": Tile(64, 16, 4, 1),
             "keys": Tile(64, 16, 4, 1),
             "keys, sums": Tile(64, 16, 4, 1),
             "product": Tile(64, 64, 4, 1),
             "adjoint": Tile(64, 64, 4, 1),
             "gradient": Tile(64, 64, 4, 1)}.items()}


def tile(kernel: str, dtype: torch.dtype, channels: int) -> Tile:
    """The entry of `TILES` for a call."""
    return TILES[kernel, "float32" if dtype == torch.float32 else "half", 64 if channels <= 64 else 128]


class RowMap(NamedTuple):
    """What the kernels know of a map and a method; made by `describe`."""
    layout: Tensor  # int32: classes of pairs of rows, ids of every column, and for every bucket where it is
    sizes: tuple[int, ...]  # rows, columns, prefix tokens, classes, and the steps from row to row and column to column


def describe(offset_ids: Tensor, prefix: int, buckets: int) -> RowMap:
    """A map's classes of rows.

    Args:
        offset_ids: (tables, 2h-1, 2w-1) on the CPU, the bucket of every offset between positions on a map of h×w, from
            1-h and 1-w on; two tables for a cross.
        prefix: tokens before the map; their pairs have the last bucket.
        buckets: of every table.
    Raises: ValueError if rows of one class do not follow each other, as for methods that mix the axes.
    """
    height, width = ((size + 1) // 2 for size in offset_ids.shape[1:])
    rows, columns, steps = height, width, (width, 1)
    if width * _rounded(height) < height * _rounded(width):  # the axis that is padded less is that of columns
        rows, columns, steps, offset_ids = width, height, (1, width), offset_ids.mT
    patterns, counts = offset_ids.transpose(0, 1).flatten(1), len(offset_ids)
    of_offset = torch.cat([torch.zeros(1, dtype=torch.long), (patterns[1:] != patterns[:-1]).any(1).cumsum(0)])
    classes = int(of_offset[-1]) + 1
    if len(patterns.unique(dim=0)) != classes:
        raise ValueError("rows.describe got ids whose rows of one class do not follow each other; this is for the "
                         "methods product and cross")
    row, column = torch.arange(rows), torch.arange(columns)
    of_rows = torch.full((rows + 1, rows + 1), classes)
    of_rows[1:, 1:] = of_offset[row[:, None] - row + rows - 1]
    first = torch.searchsorted(of_offset, torch.arange(classes))  # an offset of each class
    ids = torch.full((counts, columns + 1, classes + (prefix > 0), _rounded(columns)), -1)
    ids[:, :columns, :classes, :columns] = offset_ids[:, first][:, :, column[:, None] - column + columns - 1
                                                                ].transpose(1, 2)
    if prefix:
        ids[:, :columns, classes, :prefix] = buckets - 1
        ids[:, columns, classes, :max(columns, prefix)] = buckets - 1
    ids = ids.flatten(1)
    where = [(table == bucket).nonzero()[:, 0] for table in ids for bucket in range(buckets)]
    starts = torch.tensor([0, *map(len, where)]).cumsum(0)
    layout = torch.cat([of_rows.flatten(), ids.flatten(), starts, *where]).int()
    return RowMap(layout, (rows, columns, prefix, classes + (prefix > 0), *steps))


def _rounded(size):
    return -(-size // _CHUNK) * _CHUNK


def takes(q: Tensor, k: Tensor, v: Tensor, tables: list[Tensor], prefix: int) -> bool:
    """Whether `attention` is for this call: q, k, v of one shape, at most 128 channels and 16 prefix tokens, tables of
    one type, on a GPU (or, under Triton's interpreter, on the CPU)."""
    dtype = torch.get_autocast_dtype(q.device.type) if torch.is_autocast_enabled(q.device.type) else q.dtype
    return (q.device.type == ("cpu" if INTERPRETED else "cuda") and q.shape == k.shape == v.shape and q.numel() > 0
            and q.shape[3] <= 128 and prefix <= _CHUNK and dtype in (torch.float16, torch.bfloat16, torch.float32)
            and len({table.dtype for table in tables}) == 1)


def attention(q: Tensor, k: Tensor, v: Tensor, tables_q: list[Tensor], tables_k: list[Tensor],
              tables_v: list[Tensor], row_map: RowMap, bias: bool, mask: Tensor | None = None,
              dropout_p: float = 0.0) -> Tensor:
    """softmax(scale·q·kᵀ + terms on keys and queries + mask)·v + term on values, with scale = D^-1/2 (Eq. 12 to 14).

    Args:
        q, k, v: (B, H, L, D), as `takes` says; q not scaled. Autocast casts them.
        tables_q, tables_k, tables_v: for each place no table, one, or two of a cross (rows, columns), as many in every
            place: (H', D, buckets) on queries and keys, (H', buckets, D) on values, (H', buckets) with `bias`.
        row_map: of the map and the method, on the device of q.
        bias: whether the tables have a number for every bucket instead of a vector.
        mask: added to the logits, or bool with True where a key may be seen; broadcast to (B, H, L, L); no gradient.
        dropout_p: dropout of the attention, the same in the backward pass.
    Returns: (B, H, L, D). A query that sees nothing gets zeros, and gives none but zero gradients. Gradients are the
        same in every run; they have no derivatives themselves.
    """
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    if mask is not None:
        mask = (mask.view(torch.uint8) if mask.dtype == torch.bool else mask).expand(*q.shape[:3], q.shape[2])
    seed = torch.randint(2 ** 62, (1,), device=q.device) if dropout_p else None
    places = "".join(place for place, tables in zip("qkv", (tables_q, tables_k, tables_v), strict=True) if tables)
    return torch.ops.rpe_ops.attention_by_rows(q, k, v, [*tables_q, *tables_k, *tables_v], places, row_map.layout,
                                               list(row_map.sizes), bias, mask, seed, float(dropout_p))[0]


# --- Kernels: places on the map ----------------------------------------------------------------------------------------

# one kernel for maps of all sizes: to compile another takes longer than a training step may
_VARYING = ["length", "rows", "columns", "prefix", "row_step", "column_step", "chunks", "mask_b", "mask_h", "mask_own",
            "mask_other", "splits", "steps", "planes", "count", "ids", "first"]


# what a mask depends on; 0 if there is none
_BY_OWN, _BY_OTHER, _BY_BOTH = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def _place(chunk, rows, prefix, chunks):
    """Row of chunks, 0 for the prefix, and their first column; chunks come column by column, the prefix first."""
    on_map = tl.minimum(chunk, chunks - 1) - tl.where(prefix > 0, 1, 0)
    row = tl.where(on_map < 0, 0, tl.maximum(on_map, 0) % rows + 1)
    return row, tl.maximum(on_map, 0) // rows * 16


@triton.jit
def _tokens(first, rows, columns, prefix, row_step, column_step, chunks, SLOTS: tl.constexpr):
    """Row, column and token of the slots from a chunk on, and whether there is one; if not they are of a neighbour."""
    slot = tl.arange(0, SLOTS)
    chunk = first + slot // 16
    row, column = _place(chunk, rows, prefix, chunks)
    column += slot % 16
    width = tl.where(row == 0, prefix, columns)
    inside = (column < width) & (chunk < chunks)
    column = tl.minimum(column, width - 1)
    token = tl.where(row == 0, column, prefix + (row - 1) * row_step + column * column_step)
    return row, column, token, inside


@triton.jit
def _at(row, column, rows, columns, size, BIAS: tl.constexpr):
    """Where a token begins in a plane of size-M rows; with BIAS, where its column does, the prefix being the last."""
    if BIAS:
        return tl.where(row == 0, columns, column) * size
    return (tl.where(row == 0, rows, row - 1) * columns + column) * size


@triton.jit
def _load(x, token, stride, CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr):
    """(tokens, channels) of a plane."""
    channel = tl.arange(0, BLOCK_D)[None, :]
    if CHANNELS == BLOCK_D:
        return tl.load(x + (token[:, None] * stride + channel))
    return tl.load(x + (token[:, None] * stride + channel), mask=channel < CHANNELS, other=0.0)


@triton.jit
def _store(x, tile, token, stride, inside, CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write (tokens, channels) of a plane."""
    channel = tl.arange(0, BLOCK_D)[None, :]
    tl.store(x + (token[:, None] * stride + channel), tile.to(x.dtype.element_ty),
             mask=inside[:, None] & (channel < CHANNELS))


# --- Kernels: attention ------------------------------------------------------------------------------------------------
# A program has a block of tokens of its own, `own`, and goes through the others, `other`: its queries through all keys,
# or its keys through all queries. A tile is (own, other). A term is of the own side if its products are of own tokens.

@triton.jit
def _term(products, layout, at, row, chunk_row, chunk_column, rows, padded, SLOTS: tl.constexpr):
    """(slots, SLOTS) of a term: 16 numbers that lie together for every slot that has the products and every chunk."""
    classes = tl.load(layout + (row[:, None] * (rows + 1) + chunk_row[None, :]))
    column = chunk_column[:, None] + tl.arange(0, 16)[None, :]
    places = at[:, None, None] + (classes * padded)[:, :, None] + column[None, :, :]
    return tl.reshape(tl.load(products + places), (at.shape[0], SLOTS)).to(tl.float32)


@triton.jit
def _masked(logits, mask, own_token, other_token, mask_own, mask_other, MASK: tl.constexpr):
    """Logits with the mask, which may depend on the own or the other side alone."""
    if MASK == _BY_OWN:
        value = tl.load(mask + own_token * mask_own)[:, None]
    elif MASK == _BY_OTHER:
        value = tl.load(mask + other_token * mask_other)[None, :]
    else:
        value = tl.load(mask + (own_token[:, None] * mask_own + other_token[None, :] * mask_other))
    if mask.dtype.element_ty == tl.uint8:
        return tl.where(value != 0, logits, float("-inf"))
    return logits + value.to(tl.float32)


@triton.jit
def _logits(own, other, scale, own_products, own_at, own_row, own_chunk_row, own_chunk_column, own_token,
            other_products, other_at, other_row, other_chunk_row, other_chunk_column, other_token, inside, layout, rows,
            padded, mask, mask_own, mask_other, ON_OWN: tl.constexpr, ON_OTHER: tl.constexpr, MASK: tl.constexpr,
            OWN: tl.constexpr, OTHER: tl.constexpr):
    """A tile of logits in float32, -∞ where the others are not inside."""
    logits = tl.dot(own, tl.trans(other), input_precision="tf32x3") * scale
    if ON_OWN:
        logits += _term(own_products, layout, own_at, own_row, other_chunk_row, other_chunk_column, rows, padded, OTHER)
    if ON_OTHER:
        logits += tl.trans(_term(other_products, layout, other_at, other_row, own_chunk_row, own_chunk_column, rows,
                                 padded, OWN))
    if MASK:
        logits = _masked(logits, mask, own_token, other_token, mask_own, mask_other, MASK)
    return tl.where(inside[None, :], logits, float("-inf"))


@triton.jit
def _kept(seed, plane, query, key, length, dropout_p):
    """What dropout multiplies by; it depends on the seed and on the place alone."""
    place = query * length + key
    drawn, _, _, _ = tl.philox(tl.load(seed), place, plane + place * 0, place * 0, place * 0)
    return tl.where(tl.uint_to_uniform_float(drawn) >= dropout_p, 1 / (1 - dropout_p), 0.0)


@triton.jit
def _clear(sums, layout, at, row, inside, rows, prefix, padded, size):
    """Write zeros to the sums of classes that a token meets in no row."""
    farthest, nearest = tl.load(layout + row * (rows + 1) + 1), tl.load(layout + row * (rows + 1) + rows)
    zeros = tl.zeros((row.shape[0], 16), sums.dtype.element_ty)
    for start in range(0, size, 16):
        missed = (start // padded < nearest) | (start // padded > farthest)
        missed = missed & ((prefix == 0) | (start != size - padded))  # the prefix is met, in the first chunk
        tl.store(sums + (at[:, None] + start + tl.arange(0, 16)[None, :]), zeros, mask=(missed & inside)[:, None])


@triton.jit
def _add_to_run(sums, total, tile, layout, at, row, inside, chunk, rows, prefix, chunks, padded):
    """The total of a run of chunks of one class, the same columns, with one chunk more; written where the run ends."""
    other_row, column = _place(chunk, rows, prefix, chunks)
    next_row, next_column = _place(chunk + 1, rows, prefix, chunks)
    classes = tl.load(layout + row * (rows + 1) + other_row)
    ends = (tl.load(layout + row * (rows + 1) + next_row) != classes) | (next_column != column) | (chunk + 1 == chunks)
    total += tile
    tl.store(sums + (at[:, None] + (classes * padded)[:, None] + column + tl.arange(0, 16)[None, :]),
             total.to(sums.dtype.element_ty), mask=(ends & inside)[:, None])
    return tl.where(ends[:, None], 0.0, total)


@triton.jit(do_not_specialize=_VARYING)
def _forward_kernel(own, other, other_v, own_products, other_products, sums, mask, seed, layout, out, log_sums,
                    own_b, own_h, own_l, other_b, other_h, other_l, other_v_b, other_v_h, other_v_l, products_b,
                    products_h, mask_b, mask_h, mask_own, mask_other, heads, length, rows, columns, prefix, row_step,
                    column_step, chunks, padded, size, scale, dropout_p, ON_OWN: tl.constexpr, ON_OTHER: tl.constexpr,
                    ON_VALUES: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
                    CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr):
    """Output of a block of queries, the logarithms of their softmax's sums and, with a term on values, sums of weights.

    Then the queries go through the keys twice: sums of weights need weights that the end of the softmax makes.
    """
    blocks = tl.cdiv(chunks, OWN // 16)
    plane, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * (OWN // 16)
    b, h, plane_64 = (plane // heads).to(tl.int64), plane % heads, plane.to(tl.int64)
    other += b * other_b + h * other_h
    other_v += b * other_v_b + h * other_v_h
    own_products += b * products_b + h * products_h
    other_products += b * products_b + h * products_h
    mask += b * mask_b + h * mask_h
    row, column, token, mine = _tokens(first, rows, columns, prefix, row_step, column_step, chunks, OWN)
    chunk_row, chunk_column = _place(first + tl.arange(0, OWN // 16), rows, prefix, chunks)
    at = _at(row, column, rows, columns, size, BIAS)
    own_tile = _load(own + b * own_b + h * own_h, token, own_l, CHANNELS, BLOCK_D)
    largest = tl.full((OWN,), float("-inf"), tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    mean = tl.zeros((OWN, BLOCK_D), tl.float32)
    for start in range(0, chunks, OTHER // 16):
        other_row, other_column, other_token, inside = _tokens(start, rows, columns, prefix, row_step, column_step,
                                                               chunks, OTHER)
        other_chunk_row, other_chunk_column = _place(start + tl.arange(0, OTHER // 16), rows, prefix, chunks)
        logits = _logits(own_tile, _load(other, other_token, other_l, CHANNELS, BLOCK_D), scale, own_products, at, row,
                         chunk_row, chunk_column, token, other_products,
                         _at(other_row, other_column, rows, columns, size, BIAS), other_row, other_chunk_row,
                         other_chunk_column, other_token, inside, layout, rows, padded, mask, mask_own, mask_other,
                         ON_OWN, ON_OTHER, MASK, OWN, OTHER)
        larger = tl.maximum(largest, tl.max(logits, 1))
        finite = tl.where(larger == float("-inf"), 0.0, larger)  # no difference of infinities
        shrink = tl.exp(largest - finite)
        p = tl.exp(logits - finite[:, None])
        total = total * shrink + tl.sum(p, 1)
        if not ON_VALUES:
            if DROPOUT:
                p *= _kept(seed, plane, token[:, None], other_token[None, :], length, dropout_p)
            v_tile = _load(other_v, other_token, other_v_l, CHANNELS, BLOCK_D)
            mean = tl.dot(p.to(v_tile.dtype), v_tile, mean * shrink[:, None], input_precision="tf32x3")
        largest = larger
    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    # +∞ makes all weights of a query that sees nothing zero, also in the backward pass
    log_sum = tl.where(blind, float("inf"), largest + tl.log(total))
    tl.store(log_sums + plane_64 * length + token, log_sum, mask=mine)
    if ON_VALUES:
        sums += plane_64 * length * size
        at_sums = _at(row, column, rows, columns, size, False)
        _clear(sums, layout, at_sums, row, mine, rows, prefix, padded, size)
        run = tl.zeros((OWN, 16), tl.float32)
        for chunk in range(0, chunks):
            other_row, other_column, other_token, inside = _tokens(chunk, rows, columns, prefix, row_step, column_step,
                                                                   chunks, 16)
            other_chunk_row, other_chunk_column = _place(chunk + tl.arange(0, 1), rows, prefix, chunks)
            logits = _logits(own_tile, _load(other, other_token, other_l, CHANNELS, BLOCK_D), scale, own_products, at,
                             row, chunk_row, chunk_column, token, other_products,
                             _at(other_row, other_column, rows, columns, size, BIAS), other_row, other_chunk_row,
                             other_chunk_column, other_token, inside, layout, rows, padded, mask, mask_own, mask_other,
                             ON_OWN, ON_OTHER, MASK, OWN, 16)
            p = tl.exp(logits - log_sum[:, None])
            if DROPOUT:
                p *= _kept(seed, plane, token[:, None], other_token[None, :], length, dropout_p)
            v_tile = _load(other_v, other_token, other_v_l, CHANNELS, BLOCK_D)
            mean = tl.dot(p.to(v_tile.dtype), v_tile, mean, input_precision="tf32x3")
            run = _add_to_run(sums, run, p, layout, at_sums, row, mine, chunk, rows, prefix, chunks, padded)
    else:
        mean = mean / total[:, None]
    out += (b * length * heads + h) * CHANNELS
    _store(out, mean, token, heads * CHANNELS, mine, CHANNELS, BLOCK_D)


@triton.jit(do_not_specialize=_VARYING)
def _backward_kernel(own, other, own_v, other_v, own_products, other_products, v_products, sums, mask, seed, layout, out,
                     log_sums, deltas, grads,
                     own_b, own_h, own_l, other_b, other_h, other_l, own_v_b, own_v_h, own_v_l, other_v_b, other_v_h,
                     other_v_l, products_b, products_h, mask_b, mask_h, mask_own, mask_other, heads, length, rows,
                     columns, prefix, row_step, column_step, chunks, padded, size, scale, dropout_p,
                     BY_KEY: tl.constexpr, ON_OWN: tl.constexpr, ON_OTHER: tl.constexpr, ON_VALUES: tl.constexpr,
                     BIAS: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr, CHANNELS: tl.constexpr,
                     BLOCK_D: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr):
    """Gradients of a block of queries or, BY_KEY, of keys and values, and of the products of the own side, by runs.

    `grads` are those of keys, queries and values, each as `_like` makes it, in the order of the tables that they meet.

    Queries have for values the gradients of their output, and `v_products` are those of them with the table on values.
    Queries leave their `deltas`, Σ over keys of p·(gradient of p), to the keys.
    """
    blocks = tl.cdiv(chunks, OWN // 16)
    plane, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * (OWN // 16)
    b, h, plane_64 = (plane // heads).to(tl.int64), plane % heads, plane.to(tl.int64)
    other += b * other_b + h * other_h
    other_v += b * other_v_b + h * other_v_h
    own_products += b * products_b + h * products_h
    other_products += b * products_b + h * products_h
    v_products += plane_64 * length * size
    mask += b * mask_b + h * mask_h
    log_sums += plane_64 * length
    deltas += plane_64 * length
    tokens_first = (b * length * heads + h) * CHANNELS
    row, column, token, mine = _tokens(first, rows, columns, prefix, row_step, column_step, chunks, OWN)
    chunk_row, chunk_column = _place(first + tl.arange(0, OWN // 16), rows, prefix, chunks)
    at = _at(row, column, rows, columns, size, BIAS)
    at_sums = _at(row, column, rows, columns, size, False)
    own_tile = _load(own + b * own_b + h * own_h, token, own_l, CHANNELS, BLOCK_D)
    own_v_tile = _load(own_v + b * own_v_b + h * own_v_h, token, own_v_l, CHANNELS, BLOCK_D)
    if not BY_KEY:
        log_sum = tl.load(log_sums + token)[:, None]
        out_tile = _load(out + tokens_first, token, heads * CHANNELS, CHANNELS, BLOCK_D)
        delta = tl.sum(out_tile.to(tl.float32) * own_v_tile.to(tl.float32), 1)
        tl.store(deltas + token, delta, mask=mine)
        delta = delta[:, None]
    planes = (tl.num_programs(0) // blocks).to(tl.int64)
    if ON_OWN:
        if ON_OTHER and not BY_KEY:  # gradients of products of keys with the table on queries come first
            sums += planes * length * size
        sums += plane_64 * length * size
        _clear(sums, layout, at_sums, row, mine, rows, prefix, padded, size)
        run = tl.zeros((OWN, 16), tl.float32)
    total = tl.zeros((OWN, BLOCK_D), tl.float32)
    if BY_KEY:
        total_v = tl.zeros((OWN, BLOCK_D), tl.float32)
    for start in range(0, chunks, OTHER // 16):
        other_row, other_column, other_token, inside = _tokens(start, rows, columns, prefix, row_step, column_step,
                                                               chunks, OTHER)
        other_chunk_row, other_chunk_column = _place(start + tl.arange(0, OTHER // 16), rows, prefix, chunks)
        other_tile = _load(other, other_token, other_l, CHANNELS, BLOCK_D)
        logits = _logits(own_tile, other_tile, scale, own_products, at, row, chunk_row, chunk_column, token,
                         other_products, _at(other_row, other_column, rows, columns, size, BIAS), other_row,
                         other_chunk_row, other_chunk_column, other_token, inside, layout, rows, padded, mask, mask_own,
                         mask_other, ON_OWN, ON_OTHER, MASK, OWN, OTHER)
        if BY_KEY:
            log_sum, delta = tl.load(log_sums + other_token)[None, :], tl.load(deltas + other_token)[None, :]
        p = tl.exp(logits - log_sum)
        other_v_tile = _load(other_v, other_token, other_v_l, CHANNELS, BLOCK_D)
        grad_p = tl.dot(own_v_tile, tl.trans(other_v_tile), input_precision="tf32x3")
        if ON_VALUES:
            if BY_KEY:
                other_at = _at(other_row, other_column, rows, columns, size, False)
                grad_p += tl.trans(_term(v_products, layout, other_at, other_row, chunk_row, chunk_column, rows, padded,
                                         OWN))
            else:
                grad_p += _term(v_products, layout, at_sums, row, other_chunk_row, other_chunk_column, rows, padded,
                                OTHER)
        weights = p
        if DROPOUT:
            if BY_KEY:
                kept = _kept(seed, plane, other_token[None, :], token[:, None], length, dropout_p)
            else:
                kept = _kept(seed, plane, token[:, None], other_token[None, :], length, dropout_p)
            grad_p *= kept
            weights = p * kept
        grad = p * (grad_p - delta)
        if BY_KEY:
            total_v = tl.dot(weights.to(other_v_tile.dtype), other_v_tile, total_v, input_precision="tf32x3")
        total = tl.dot(grad.to(other_tile.dtype), other_tile, total, input_precision="tf32x3")
        if ON_OWN:
            run = _add_to_run(sums, run, grad, layout, at_sums, row, mine, start, rows, prefix, chunks, padded)
    grads += tokens_first
    tensor = planes * length * CHANNELS
    if BY_KEY:
        _store(grads, total * scale, token, heads * CHANNELS, mine, CHANNELS, BLOCK_D)
        _store(grads + 2 * tensor, total_v, token, heads * CHANNELS, mine, CHANNELS, BLOCK_D)
    else:
        _store(grads + tensor, total * scale, token, heads * CHANNELS, mine, CHANNELS, BLOCK_D)


# --- Kernels: tables ---------------------------------------------------------------------------------------------------
# Up to three places, on queries, keys and values, share a launch: `place` counts those there are, and chooses one of
# three tensors. Tables are of all heads together, one group, or of each, `groups`.

@triton.jit
def _chosen(place, x_0, x_1, x_2):
    x = x_0
    if place == 1:
        x = x_1
    if place == 2:
        x = x_2
    return x


@triton.jit(do_not_specialize=_VARYING)
def _expand_kernel(table_0, table_1, table_2, other_table_0, other_table_1, other_table_2, layout, expanded, groups,
                   columns, ids, buckets, size, scale, on_values, CROSS: tl.constexpr, CHANNELS: tl.constexpr,
                   BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr):
    """expanded[place, group, column, channel, m]: the scaled entry of the table, or of both, that `ids` name; or 0."""
    blocks = tl.cdiv(size, BLOCK_M)
    place = tl.program_id(1)
    column, group = tl.program_id(0) // blocks % (columns + 1), tl.program_id(0) // blocks // (columns + 1)
    m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    channel = tl.arange(0, BLOCK_D)[:, None]
    by_bucket, by_channel = tl.where(place == on_values, CHANNELS, 1), tl.where(place == on_values, 1, buckets)
    inside = (channel < CHANNELS) & (m < size)
    bucket = tl.load(layout + ids + column * size + m, mask=m < size, other=-1)
    at = group * CHANNELS * buckets + channel * by_channel + bucket * by_bucket
    value = tl.load(_chosen(place, table_0, table_1, table_2) + at, mask=inside & (bucket >= 0), other=0.0)
    value = value.to(tl.float32)
    if CROSS:
        bucket = tl.load(layout + ids + (columns + 1 + column) * size + m, mask=m < size, other=-1)
        at = group * CHANNELS * buckets + channel * by_channel + bucket * by_bucket
        value += tl.load(_chosen(place, other_table_0, other_table_1, other_table_2) + at,
                         mask=inside & (bucket >= 0), other=0.0).to(tl.float32)
    value *= tl.where(place == on_values, 1.0, scale)
    expanded += (((place * groups + group) * (columns + 1) + column) * CHANNELS).to(tl.int64) * size
    tl.store(expanded + channel * size + m, value.to(expanded.dtype.element_ty), mask=inside)


@triton.jit
def _tokens_of_column(block, column, group, planes, heads, groups, length, rows, columns, prefix, row_step, column_step,
                      size, BLOCK: tl.constexpr):
    """Of a block of the tokens in a column of the maps of all planes of a group, or in the prefix, the last column:
    image, head, token, where its products begin, and whether there is one."""
    number = block * BLOCK + tl.arange(0, BLOCK)
    per_plane = tl.where(column == columns, prefix, rows)
    inside = number < planes * per_plane
    number = tl.minimum(number, planes * per_plane - 1)
    plane, row = number // per_plane, number % per_plane
    b, h = (plane // (heads // groups)).to(tl.int64), group * (heads // groups) + plane % (heads // groups)
    token = tl.where(column == columns, row, prefix + row * row_step + column * column_step)
    place = tl.where(column == columns, rows * columns + row, row * columns + column)
    return b, h, token, ((b * heads + h) * length + place) * size, inside


@triton.jit(do_not_specialize=_VARYING)
def _product_kernel(x_0, x_1, x_2, expanded, products, b_0, h_0, l_0, b_1, h_1, l_1, b_2, h_2, l_2, planes, heads,
                    groups, length, rows, columns, prefix, row_step, column_step, size, count, CHANNELS: tl.constexpr,
                    BLOCK_D: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr):
    """products[place, image, head, token] = x·expanded of its column, for a block of the tokens of a column."""
    place, column, group = tl.program_id(1), tl.program_id(0) % count, tl.program_id(0) // count % groups
    b, h, token, at, inside = _tokens_of_column(tl.program_id(0) // count // groups, column, group, planes, heads,
                                                groups, length, rows, columns, prefix, row_step, column_step, size, OWN)
    x = _chosen(place, x_0, x_1, x_2)
    x_at = b * _chosen(place, b_0, b_1, b_2) + h * _chosen(place, h_0, h_1, h_2) + token * _chosen(place, l_0, l_1, l_2)
    tile = _load(x, x_at, 1, CHANNELS, BLOCK_D)
    expanded += (((place * groups + group) * (columns + 1) + column) * CHANNELS).to(tl.int64) * size
    products += place.to(tl.int64) * planes * groups * length * size
    channel = tl.arange(0, BLOCK_D)[:, None]
    for start in range(0, size, OTHER):
        m = start + tl.arange(0, OTHER)[None, :]
        table = tl.load(expanded + channel * size + m, mask=(channel < CHANNELS) & (m < size), other=0.0)
        tl.store(products + at[:, None] + m, tl.dot(tile, table, input_precision="tf32x3").to(products.dtype.element_ty),
                 mask=inside[:, None] & (m < size))


@triton.jit(do_not_specialize=_VARYING)
def _adjoint_kernel(x, first, expanded, products, planes, heads, groups, length, rows, columns, prefix, row_step,
                    column_step, size, count, CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr, OWN: tl.constexpr,
                    OTHER: tl.constexpr):
    """x[first + place] += products·expandedᵀ for a block of the tokens of a column; x lies as (…, B, L, H, D)."""
    place, column, group = tl.program_id(1), tl.program_id(0) % count, tl.program_id(0) // count % groups
    b, h, token, at, inside = _tokens_of_column(tl.program_id(0) // count // groups, column, group, planes, heads,
                                                groups, length, rows, columns, prefix, row_step, column_step, size, OWN)
    x_at = ((b * length + token) * heads + h) * CHANNELS
    x += (first + place).to(tl.int64) * planes * groups * length * CHANNELS
    expanded += (((place * groups + group) * (columns + 1) + column) * CHANNELS).to(tl.int64) * size
    products += place.to(tl.int64) * planes * groups * length * size
    channel = tl.arange(0, BLOCK_D)[:, None]
    total = _load(x, x_at, 1, CHANNELS, BLOCK_D).to(tl.float32)
    for start in range(0, size, OTHER):
        m = start + tl.arange(0, OTHER)[None, :]
        tile = tl.load(products + at[:, None] + m, mask=m < size, other=0.0)
        table = tl.load(expanded + channel * size + m, mask=(channel < CHANNELS) & (m < size), other=0.0)
        total = tl.dot(tile, tl.trans(table), total, input_precision="tf32x3")
    _store(x, total, x_at, 1, inside, CHANNELS, BLOCK_D)


@triton.jit(do_not_specialize=_VARYING)
def _gradient_kernel(x_0, x_1, x_2, products_0, products_1, products_2, partial, b_0, h_0, l_0, b_1, h_1, l_1, b_2, h_2,
                     l_2, planes, heads, groups, length, rows, columns, prefix, row_step, column_step, size, count,
                     splits, steps, BIAS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr,
                     OWN: tl.constexpr, OTHER: tl.constexpr):
    """partial[split, place, group, column, m, channel] = Σ of products·x over some blocks of the tokens of a column."""
    place, split = tl.program_id(1), tl.program_id(2)
    blocks = tl.cdiv(size, OTHER)
    m = tl.program_id(0) % blocks * OTHER + tl.arange(0, OTHER)[None, :]
    column, group = tl.program_id(0) // blocks % count, tl.program_id(0) // blocks // count
    x, products = _chosen(place, x_0, x_1, x_2), _chosen(place, products_0, products_1, products_2)
    x_b, x_h, x_l = _chosen(place, b_0, b_1, b_2), _chosen(place, h_0, h_1, h_2), _chosen(place, l_0, l_1, l_2)
    channel = tl.arange(0, BLOCK_D)[None, :]
    total = tl.zeros((OTHER, BLOCK_D), tl.float32)
    for block in range(split * steps, (split + 1) * steps):
        b, h, token, at, inside = _tokens_of_column(block, column, group, planes, heads, groups, length, rows, columns,
                                                    prefix, row_step, column_step, size, OWN)
        tile = tl.load(products + at[:, None] + m, mask=inside[:, None] & (m < size), other=0.0)
        if BIAS:  # as if a token had one channel, and 1 in it
            x_tile = tl.where((channel == 0) & (token[:, None] >= 0), 1.0, 0.0).to(tile.dtype)
        else:
            x_tile = _load(x, b * x_b + h * x_h + token * x_l, 1, CHANNELS, BLOCK_D)
        total = tl.dot(tl.trans(tile), x_tile, total, input_precision="tf32x3")
    partial += ((((split * tl.num_programs(1) + place) * groups + group) * (columns + 1) + column) * CHANNELS
                ).to(tl.int64) * size
    m = tl.program_id(0) % blocks * OTHER + tl.arange(0, OTHER)
    _store(partial, total, m, CHANNELS, m < size, CHANNELS, BLOCK_D)


@triton.jit(do_not_specialize=_VARYING)
def _collect_kernel(partial, layout, grads, groups, columns, ids, buckets, size, splits, scale, on_values, tables,
                    CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    """Gradient of a bucket: what `partial` has, for all splits, in the places of the expanded table that name it."""
    bucket, table = tl.program_id(0) % buckets, tl.program_id(0) // buckets % tables
    group, place = tl.program_id(0) // buckets // tables, tl.program_id(1)
    starts = layout + ids + tables * (columns + 1) * size + table * buckets + bucket
    where = layout + ids + tables * ((columns + 1) * size + buckets) + 1
    first, last = tl.load(starts), tl.load(starts + 1)
    channel = tl.arange(0, BLOCK_D)[None, :]
    total = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for start in range(0, (last - first) * splits, BLOCK):
        number = start + tl.arange(0, BLOCK)
        inside = number < (last - first) * splits
        split = (number // (last - first)).to(tl.int64)
        at = tl.load(where + first + number % (last - first), mask=inside, other=0)
        at += ((split * tl.num_programs(1) + place) * groups + group) * (columns + 1) * size
        total += tl.load(partial + at[:, None] * CHANNELS + channel, mask=inside[:, None] & (channel < CHANNELS),
                         other=0.0)
    by_bucket, by_channel = tl.where(place == on_values, CHANNELS, 1), tl.where(place == on_values, 1, buckets)
    grads += ((place * tables + table) * groups + group) * CHANNELS * buckets + bucket * by_bucket
    channel = tl.arange(0, BLOCK_D)
    total = tl.sum(total, 0) * tl.where(place == on_values, 1.0, scale)
    tl.store(grads + channel * by_channel, total.to(grads.dtype.element_ty), mask=channel < CHANNELS)


# --- Operators ---------------------------------------------------------------------------------------------------------

class _Call:
    """The launches of one call."""

    def __init__(self, q, tables, places, layout, sizes, bias, mask, seed, dropout_p):
        rows, columns, prefix, classes, row_step, column_step = sizes
        (batch, heads, length, channels), padded = q.shape, _rounded(columns)
        groups, per_place = tables[0].shape[0], len(tables) // len(places)
        self.q, self.places, self.size = q, places, classes * padded
        self.table_shape = (groups, columns + 1, 1 if bias else channels, self.size)
        self.planes_tokens = batch * heads // groups * max(rows, prefix)  # of a column, at most
        if mask is not None:
            mask = (mask.view(torch.uint8) if mask.dtype == torch.bool else mask).expand(*q.shape[:3], length)
        self.mask = mask
        # by the names of the kernels' parameters
        self.arguments = {
            "layout": layout, "rows": rows, "columns": columns, "prefix": prefix, "row_step": row_step,
            "column_step": column_step, "padded": padded, "size": self.size,
            "chunks": (prefix > 0) + rows * (padded // _CHUNK), "heads": heads, "length": length,
            "scale": channels ** -0.5, "CHANNELS": channels, "BLOCK_D": max(16, triton.next_power_of_2(channels)),
            "BIAS": bias, "mask": q if mask is None else mask, "mask_b": 0 if mask is None else mask.stride(0),
            "mask_h": 0 if mask is None else mask.stride(1), "seed": layout if seed is None else seed,
            "dropout_p": dropout_p, "DROPOUT": dropout_p > 0, "ON_VALUES": "v" in places}
        self.of_tables = self.arguments | {
            "ids": (rows + 1) ** 2, "count": columns + (prefix > 0), "planes": batch * heads // groups,
            "groups": groups, "tables": per_place, "buckets": tables[0].shape[1 if places[0] == "v" else -1],
            "on_values": places.find("v"), "CROSS": per_place == 2}
        if bias:  # a table of one channel, and not scaled
            self.of_tables |= {"scale": 1.0, "CHANNELS": 1, "BLOCK_D": 16}

    def tile(self, kernel):
        return tile(kernel, self.q.dtype, self.q.shape[3])

    def expand(self, tables):
        """Expanded tables, (places, groups, columns + 1, D, M) in the type of q."""
        expanded = self.q.new_empty(len(self.places), *self.table_shape)
        of_place = [tables[::self.of_tables["tables"]], tables[1::2]] if self.of_tables["CROSS"] else [tables, tables]
        grid = triton.cdiv(self.size, 64) * math.prod(self.table_shape[:2]), len(self.places)
        _launch(_expand_kernel, grid, Tile(0, 0, 4, 1), self.of_tables, expanded=expanded, BLOCK_M=64,
                **_three("table", of_place[0]), **_three("other_table", of_place[1]))
        return expanded

    def multiply(self, tokens, expanded):
        """Products by columns of a tensor of tokens for each place, (places, B, H, L, M)."""
        products = self.q.new_empty(len(tokens), *self.q.shape[:3], self.size)
        if tokens:
            self._by_columns(_product_kernel, "product", len(tokens), expanded=expanded, products=products,
                             **_three("x", tokens), **_strides_of_three(tokens))
        return products

    def add_adjoint(self, tokens, first, places, products, expanded):
        """Add products·expandedᵀ to tensors of tokens, (…, B, L, H, D), from the `first` on."""
        if places:
            self._by_columns(_adjoint_kernel, "adjoint", places, expanded=expanded, products=products, x=tokens,
                             first=first)

    def _by_columns(self, kernel, name, places, **arguments):
        options, of = self.tile(name), self.of_tables
        grid = triton.cdiv(self.planes_tokens, options.own) * of["count"] * of["groups"], places
        _launch(kernel, grid, options, of, **arguments)

    def gradients(self, tables, tokens, products):
        """Gradients of the tables, flat and one after the other, from those of the products, a tensor for each place."""
        options, of, places = self.tile("gradient"), self.of_tables, len(self.places)
        programs = triton.cdiv(self.size, options.other) * of["count"] * of["groups"]
        blocks = triton.cdiv(self.planes_tokens, options.own)
        splits = max(1, min(blocks, _SPLIT_PROGRAMS // (programs * places)))
        steps = triton.cdiv(blocks, splits)
        partial = self.q.new_empty(splits, places, *self.table_shape, dtype=torch.float32)
        _launch(_gradient_kernel, (programs, places, splits), options, of, partial=partial, splits=splits, steps=steps,
                **_three("x", tokens), **_strides_of_three(tokens), **_three("products", products))
        grads = tables[0].new_empty(sum(table.numel() for table in tables))
        _launch(_collect_kernel, (of["buckets"] * of["tables"] * of["groups"], places), Tile(0, 0, 4, 1), of,
                partial=partial, grads=grads, splits=splits, BLOCK=64)
        return grads

    def attend(self, kernel, name, by_key, products, **arguments):
        """A kernel of attention; its own side has the products for a table on keys or, `by_key`, on queries."""
        options, on_logits = self.tile(name), self.places.replace("v", "")
        own, other = ("q", "k") if by_key else ("k", "q")
        values = self.arguments | arguments | {"BY_KEY": by_key, "ON_OWN": own in on_logits, "ON_OTHER": other in on_logits}
        for side, place in (("own_products", own), ("other_products", other)):
            values[side] = products[on_logits.index(place)] if place in on_logits else products
        # of a bias all images have the same products, and all heads if they share it
        strides = (0, products.stride(1) * (products.shape[1] > 1)) if values["BIAS"] else products.stride()[1:3]
        values |= {"products_b": strides[0], "products_h": strides[1]}
        of_own, of_other = (0, 0) if self.mask is None else self.mask.stride()[2:][::-1 if by_key else 1]
        values |= {"mask_own": of_own, "mask_other": of_other,
                   "MASK": 0 if self.mask is None else 1 if not of_other else 2 if not of_own else 3}
        planes = self.q.shape[0] * self.q.shape[1]
        _launch(kernel, (planes * triton.cdiv(values["chunks"] * _CHUNK, options.own),), options, values)


def _launch(kernel, grid, options, values, **more):
    """Launch a kernel with those of the values that it has parameters for."""
    values = values | more | {"OWN": options.own, "OTHER": options.other}
    arguments = {name: values[name] for name in kernel.arg_names}
    if not INTERPRETED:
        torch.library.wrap_triton(kernel)[grid](**arguments, num_warps=options.num_warps, num_stages=options.num_stages)
    elif not isinstance(values["layout"], FakeTensor):
        kernel[grid](**arguments)


def _three(name, tensors):
    """Arguments for up to three places."""
    return {f"{name}_{place}": tensors[min(place, len(tensors) - 1)] for place in range(3)}


def _strides_of_three(tensors):
    strides = [tensors[min(place, len(tensors) - 1)].stride() for place in range(3)]
    return {f"{name}_{place}": stride[axis] for place, stride in enumerate(strides) for axis, name in enumerate("bhl")}


def _values(name, x):
    return {name: x, f"{name}_b": x.stride(0), f"{name}_h": x.stride(1), f"{name}_l": x.stride(2)}


def _with_channels_together(x):
    return x if x.stride(3) == 1 else x.contiguous()


def _like(x):
    """Uninitialised (B, H, L, D) whose heads join to channels without a copy."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def _forward(q: Tensor, k: Tensor, v: Tensor, tables: list[Tensor], places: str, layout: Tensor, sizes: list[int],
             bias: bool, mask: Tensor | None, seed: Tensor | None,
             dropout_p: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(output, logarithms of the softmax's sums, expanded tables, sums of weights that meet the table on values)"""
    q, k, v = map(_with_channels_together, (q, k, v))
    call = _Call(q, tables, places, layout, sizes, bias, mask, seed, dropout_p)
    expanded = call.expand(tables)
    products = expanded if bias else call.multiply([{"q": k, "k": q}[x] for x in places.replace("v", "")], expanded)
    out, log_sums = _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    sums = q.new_empty(*q.shape[:3], call.size if "v" in places else 0)
    call.attend(_forward_kernel, "forward", False, products, **_values("own", q), **_values("other", k),
                **_values("other_v", v), sums=sums, out=out, log_sums=log_sums)
    if "v" in places:
        call.add_adjoint(out, 0, 1, sums, expanded[-1])
    return out, log_sums, expanded, sums


def _backward(grad: Tensor, out: Tensor, log_sums: Tensor, expanded: Tensor, sums: Tensor, q: Tensor, k: Tensor,
              v: Tensor, tables: list[Tensor], places: str, layout: Tensor, sizes: list[int], bias: bool,
              mask: Tensor | None, seed: Tensor | None, dropout_p: float) -> tuple[Tensor, Tensor]:
    """Gradients of k, q and v, (3, B, H, L, D), and, flat and one after the other, of the tables"""
    grad, q, k, v = map(_with_channels_together, (grad, q, k, v))
    call = _Call(q, tables, places, layout, sizes, bias, mask, seed, dropout_p)
    tokens, on_logits = [{"q": k, "k": q, "v": grad}[place] for place in places], places.replace("v", "")
    products = expanded if bias else call.multiply(tokens, expanded)
    grads = q.new_empty(3, q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(2, 3)
    grad_products = q.new_empty(len(on_logits), *q.shape[:3], call.size)
    shared = {"out": out, "log_sums": log_sums, "deltas": torch.empty_like(log_sums), "grads": grads,
              "sums": grad_products, "v_products": products[-1]}
    # the queries first, which leave the deltas
    for by_key, own, other, own_v, other_v in ((False, q, k, grad, v), (True, k, q, v, grad)):
        name = ("keys" if by_key else "queries") + ", sums" * (("q" if by_key else "k") in places)
        call.attend(_backward_kernel, name, by_key, products, **shared, **_values("own", own),
                    **_values("other", other), **_values("own_v", own_v), **_values("other_v", other_v))
    if not bias:
        call.add_adjoint(grads, int("q" not in places), len(on_logits), grad_products, expanded)
    return grads, call.gradients(tables, tokens, [*grad_products, sums][:len(places)])


def _register(name, function):
    """An operator that torch.compile sees through, or, since it cannot see into the interpreter, takes as a whole."""
    if not INTERPRETED:
        return torch.library.triton_op(name, function, mutates_args=())
    operator = torch.library.custom_op(name, function, mutates_args=())
    operator.register_fake(function)  # which launches nothing then
    return operator


def _save(ctx, inputs, output):
    q, k, v, tables, ctx.places, layout, ctx.sizes, ctx.bias, mask, seed, ctx.dropout_p = inputs
    ctx.save_for_backward(*output, q, k, v, layout, mask, seed, *tables)


def _differentiate(ctx, grad, *_):
    *saved, layout, mask, seed = ctx.saved_tensors[:10]
    tables = list(ctx.saved_tensors[10:])
    grads, of_tables = torch.ops.rpe_ops.attention_by_rows_backward(
        grad, *saved, tables, ctx.places, layout, ctx.sizes, ctx.bias, mask, seed, ctx.dropout_p)
    grad_k, grad_q, grad_v = grads.unbind(0)
    of_tables = of_tables.split([table.numel() for table in tables])
    of_tables = [x.view(table.shape) for x, table in zip(of_tables, tables, strict=True)]
    return grad_q, grad_k, grad_v, of_tables, *[None] * 7


_register("rpe_ops::attention_by_rows_backward", _backward)
_register("rpe_ops::attention_by_rows", _forward).register_autograd(_differentiate, setup_context=_save)
