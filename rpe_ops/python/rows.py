"""Attention with relative positions on a GPU by rows of the map, in Triton, for the methods product and cross.

A bucket depends on a pair through a *class* of its two rows and through its two columns. With P the width of the map
rounded up to 16, the products of a token in column c with the table, E (B, H, L, M), M = classes·P, are in the order
E[…, class·P + c'] for columns c' of the other token. So what a term adds for a row of the map lies together: kernels
read, and write gradients of, 16 numbers side by side, without a look-up, a scatter or an atomic operation. README.md
explains the design.

A plane is one head of one image. A chunk is 16 slots of a row of the map, the last of a row partly empty; the prefix is
a chunk of its own. In tensors of M tokens come row by row of the map, then the prefix.
"""

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_SPLIT_PROGRAMS = 256  # that share the sums of the tables' gradients, if there is enough for them


class Tile(NamedTuple):
    """Tokens of its own that a program has, others that it takes at a time, and Triton's options."""

    own: int
    other: int
    num_warps: int = 4
    num_stages: int = 1


# {(kernel, type, channels up to): tile}, for a benchmark to assign to. Both sizes are powers of two and multiples of
# 16, and `other` is 16 where attention has sums. From "product" on, `own` are tokens, and `other` a part of M. These
# are the largest that keep their numbers in registers (benchmarks/rows_ptxas.txt), on an H100 in 128 if they can.
TILES = {
    (kernel, *key): tiles[0 if kernel == "forward" else 1 if "queries" in kernel else 2 if "keys" in kernel else 3]
    for kernel in ("forward", "queries", "queries, sums", "keys", "keys, sums", "product", "adjoint", "gradient")
    for key, tiles in {
        ("half", 64): (Tile(64, 32), Tile(64, 16), Tile(64, 16), Tile(64, 64)),
        ("half", 128): (Tile(64, 32, 8), Tile(32, 16), Tile(32, 16), Tile(64, 64, 8)),
        ("float32", 64): (Tile(32, 16), Tile(32, 16, 8), Tile(16, 16), Tile(32, 32)),
        ("float32", 128): (Tile(16, 16, 8),) * 4,
    }.items()
}
KERNELS = {kernel: tile for (kernel, *key), tile in TILES.items() if key == ["half", 64]}


def tile(kernel: str, dtype: torch.dtype, channels: int) -> Tile:
    """The entry of `TILES` for a call."""
    return TILES[kernel, "float32" if dtype == torch.float32 else "half", 64 if channels <= 64 else 128]


def takes(q: Tensor, k: Tensor, v: Tensor, tables: list[Tensor], prefix: int) -> bool:
    """Whether `attention` is for this call: q, k, v of one shape and type, at most 128 channels and 16 prefix tokens,
    tables of one type for these heads and channels, on a GPU (or, under Triton's interpreter, on the CPU), with Triton
    3.3 or newer."""
    dtype = torch.get_autocast_dtype(q.device.type) if torch.is_autocast_enabled(q.device.type) else q.dtype
    return (
        q.device.type == ("cpu" if INTERPRETED else "cuda")
        and q.shape == k.shape == v.shape
        and q.numel() > 0
        and q.shape[3] <= 128
        and prefix <= 16
        and dtype in (torch.float16, torch.bfloat16, torch.float32)
        and q.dtype == k.dtype == v.dtype
        and len({table.dtype for table in tables}) == 1
        and all(_fits(table, *q.shape[1::2]) for table in tables)
        and hasattr(tl, "tuple")
    )


def _fits(table: Tensor, heads: int, channels: int) -> bool:
    """Whether a table is for so many heads and channels; that of a bias, (H', buckets), has no channels."""
    return len(table) in (1, heads) and (table.dim() == 2 or channels in table.shape[1:])


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables_q: list[Tensor],
    tables_k: list[Tensor],
    tables_v: list[Tensor],
    layout: Tensor,
    sizes: tuple[int, ...],
    bias: bool,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(scale·q·kᵀ + terms on keys and queries + mask)·v + term on values, with scale = D^-1/2 (Eq. 12 to 14).

    Args:
        q, k, v: (B, H, L, D), as `takes` says; q not scaled. Autocast casts them.
        tables_q, tables_k, tables_v: for each place no table, one, or two of a cross (rows, columns), as many in every
            place: (H', D, buckets) on queries and keys, (H', buckets, D) on values, (H', buckets) with `bias`.
        layout, sizes: of the map and the method, as irpe.py's `row_layout` makes them; layout on the device of q.
        bias: whether the tables have a number for every bucket instead of a vector.
        mask: added to the logits, or bool with True where a key may be seen; broadcast to (B, H, L, L); no gradient.
        dropout_p: dropout of the attention, the same in the backward pass.
    Returns: (B, H, L, D). A query that sees nothing gets zeros, and gives none but zero gradients. Gradients are the
        same in every run; they have no derivatives themselves.
    """
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    seed = torch.randint(2**62, (1,), device=q.device) if dropout_p else None
    places = "".join(place for place, tables in zip("qkv", (tables_q, tables_k, tables_v), strict=True) if tables)
    return torch.ops.rpe_ops.attention_by_rows(
        q, k, v, [*tables_q, *tables_k, *tables_v], places, layout, list(sizes), bias, mask, seed, float(dropout_p)
    )[0]


# --- Kernels: attention ----------------------------------------------------------------------------------------------
# A program has a block of tokens of its own and goes through the others: its queries through all keys, or its keys
# through all queries. A tile is (own, other). A term is of the own side if its products are of own tokens.
# `shape` is rows, columns, prefix, row_step, column_step, chunks, padded, size.

# one kernel for maps of all sizes: to compile another takes longer than a training step may
_VARYING = [
    "length",
    "rows",
    "columns",
    "prefix",
    "row_step",
    "column_step",
    "chunks",
    "mask_b",
    "mask_h",
    "mask_own",
    "mask_other",
    "splits",
    "steps",
    "planes",
    "count",
    "ids",
    "first",
]
# what a mask depends on; 0 if there is none
_BY_OWN, _BY_OTHER = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _place(chunk, shape):
    """Row of chunks, 0 for the prefix, and their first column; chunks come column by column, the prefix first."""
    rows, columns, prefix, row_step, column_step, chunks, padded, size = shape
    on_map = tl.minimum(chunk, chunks - 1) - tl.where(prefix > 0, 1, 0)
    row = tl.where(on_map < 0, 0, tl.maximum(on_map, 0) % rows + 1)
    return row, tl.maximum(on_map, 0) // rows * 16


@triton.jit
def _side(first, shape, BIAS: tl.constexpr, SLOTS: tl.constexpr):
    """What is to be known of the slots of some chunks: tokens (and a neighbour where there is none), whether there is
    one, rows, where their sums and their products begin, and the chunks' rows and columns.

    It is given no tensor: torch.compile would take that for one that is written to at these places.
    """
    rows, columns, prefix, row_step, column_step, chunks, padded, size = shape
    chunk = first + tl.arange(0, SLOTS) // 16
    row, column = _place(chunk, shape)
    column += tl.arange(0, SLOTS) % 16
    width = tl.where(row == 0, prefix, columns)
    inside = (column < width) & (chunk < chunks)
    column = tl.minimum(column, width - 1)
    token = tl.where(row == 0, column, prefix + (row - 1) * row_step + column * column_step)
    at = (tl.where(row == 0, rows, row - 1) * columns + column) * size
    at_products = tl.where(row == 0, columns, column) * size if BIAS else at  # those of a column, the prefix the last
    chunk_row, chunk_column = _place(first + tl.arange(0, SLOTS // 16), shape)
    return token, inside, row, at, at_products, chunk_row, chunk_column[:, None] + tl.arange(0, 16)[None, :]


@triton.jit
def _load(x, at, CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr):
    """(tokens, channels) from where each token begins."""
    channel = tl.arange(0, BLOCK_D)[None, :]
    if CHANNELS == BLOCK_D:
        return tl.load(x + (at[:, None] + channel))
    return tl.load(x + (at[:, None] + channel), mask=channel < CHANNELS, other=0.0)


@triton.jit
def _store(x, tile, at, inside, CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write (tokens, channels) to where each token begins."""
    channel = tl.arange(0, BLOCK_D)[None, :]
    tl.store(x + (at[:, None] + channel), tile.to(x.dtype.element_ty), mask=inside[:, None] & (channel < CHANNELS))


@triton.jit
def _term(products, at, row, chunk_row, chunk_column, layout, shape):
    """(slots, other slots) of a term: 16 numbers that lie together for each slot with products and each other chunk."""
    classes = tl.load(layout + (row[:, None] * (shape[0] + 1) + chunk_row[None, :]))
    places = at[:, None, None] + (classes * shape[6])[:, :, None] + chunk_column[None, :, :]
    return tl.reshape(tl.load(products + places), (row.shape[0], chunk_row.shape[0] * 16)).to(tl.float32)


@triton.jit
def _logits(
    x,
    y,
    own,
    other,
    own_products,
    other_products,
    layout,
    shape,
    scale,
    mask,
    mask_own,
    mask_other,
    ON_OWN: tl.constexpr,
    ON_OTHER: tl.constexpr,
    MASK: tl.constexpr,
):
    """A tile of logits in float32, -∞ where the others are not inside."""
    token, _, row, _, at, chunk_row, chunk_column = own
    other_token, inside, other_row, _, other_at, other_chunk_row, other_chunk_column = other
    logits = tl.dot(x, tl.trans(y), input_precision="tf32x3") * scale
    if ON_OWN:
        logits += _term(own_products, at, row, other_chunk_row, other_chunk_column, layout, shape)
    if ON_OTHER:
        logits += tl.trans(_term(other_products, other_at, other_row, chunk_row, chunk_column, layout, shape))
    if MASK:
        if MASK == _BY_OWN:
            value = tl.load(mask + token * mask_own)[:, None]
        elif MASK == _BY_OTHER:
            value = tl.load(mask + other_token * mask_other)[None, :]
        else:
            value = tl.load(mask + (token[:, None] * mask_own + other_token[None, :] * mask_other))
        if mask.dtype.element_ty == tl.int1:
            logits = tl.where(value, logits, float("-inf"))
        else:
            logits += value.to(tl.float32)
    return tl.where(inside[None, :], logits, float("-inf"))


@triton.jit
def _dropped(tile, seed, plane, own, other, length, dropout_p, BY_KEY: tl.constexpr):
    """A tile after dropout, which depends on the seed and on the place alone."""
    place = own[0][:, None] + other[0][None, :] * length if BY_KEY else own[0][:, None] * length + other[0][None, :]
    drawn, _, _, _ = tl.philox(tl.load(seed), place, plane + place * 0, place * 0, place * 0)
    return tl.where(tl.uint_to_uniform_float(drawn) >= dropout_p, tile / (1 - dropout_p), 0.0)


@triton.jit
def _gradient(own, other, x_v_tile, y_v_tile, v_products, layout, shape, ON_VALUES: tl.constexpr, BY_KEY: tl.constexpr):
    """Gradients of a tile of weights, as they are after dropout."""
    grad = tl.dot(x_v_tile, tl.trans(y_v_tile), input_precision="tf32x3")
    if ON_VALUES:
        if BY_KEY:
            grad += tl.trans(_term(v_products, other[3], other[2], own[5], own[6], layout, shape))
        else:
            grad += _term(v_products, own[3], own[2], other[5], other[6], layout, shape)
    return grad


@triton.jit
def _clear(sums, own, layout, shape):
    """Write zeros to the sums of classes that a token meets in no row."""
    rows, columns, prefix, row_step, column_step, chunks, padded, size = shape
    inside, row, at = own[1], own[2], own[3]
    farthest, nearest = tl.load(layout + row * (rows + 1) + 1), tl.load(layout + row * (rows + 1) + rows)
    for start in range(0, size, 16):
        missed = (start // padded < nearest) | (start // padded > farthest)
        missed = missed & ((prefix == 0) | (start != size - padded))  # the prefix is met, in the first chunk
        tl.store(
            sums + (at[:, None] + start + tl.arange(0, 16)[None, :]),
            tl.zeros((row.shape[0], 16), sums.dtype.element_ty),
            mask=(missed & inside)[:, None],
        )


@triton.jit
def _add_to_run(sums, total, tile, own, chunk, layout, shape):
    """The total of a run of chunks of one class, in the same columns, with one more; written where the run ends."""
    inside, row, at = own[1], own[2], own[3]
    other_row, column = _place(chunk, shape)
    next_row, next_column = _place(chunk + 1, shape)
    classes = tl.load(layout + row * (shape[0] + 1) + other_row)
    ends = tl.load(layout + row * (shape[0] + 1) + next_row) != classes
    ends = ends | (next_column != column) | (chunk + 1 == shape[5])
    total += tile
    tl.store(
        sums + (at[:, None] + (classes * shape[6])[:, None] + column + tl.arange(0, 16)[None, :]),
        total.to(sums.dtype.element_ty),
        mask=(ends & inside)[:, None],
    )
    return tl.where(ends[:, None], 0.0, total)


@triton.jit(do_not_specialize=_VARYING)
def _attention_kernel(
    x,
    y,
    x_v,
    y_v,
    own_products,
    other_products,
    v_products,
    sums,
    mask,
    seed,
    layout,
    out,
    log_sums,
    deltas,
    grads,
    x_b,
    x_h,
    x_l,
    y_b,
    y_h,
    y_l,
    x_v_b,
    x_v_h,
    x_v_l,
    y_v_b,
    y_v_h,
    y_v_l,
    products_b,
    products_h,
    mask_b,
    mask_h,
    mask_own,
    mask_other,
    heads,
    length,
    rows,
    columns,
    prefix,
    row_step,
    column_step,
    chunks,
    padded,
    size,
    scale,
    dropout_p,
    FORWARD: tl.constexpr,
    BY_KEY: tl.constexpr,
    ON_OWN: tl.constexpr,
    ON_OTHER: tl.constexpr,
    ON_VALUES: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    """FORWARD, the output of a block x of queries and the logarithms of their softmax's sums; else gradients of a block
    of queries or, BY_KEY, of keys and values, and of the products of the own side, which are sums by runs.

    With a term on values, queries go through the keys once more in the forward pass: its sums need weights that the end
    of the softmax makes. In the backward pass queries have for values the gradients of their output, `v_products` are
    those of them with the table on values, and the queries leave their `deltas`, Σ over keys of p·(gradient of p), to
    the keys. `grads` are those of keys, queries and values, (3, B, L, H, D): of what the tables on q, k, v meet.
    """
    # torch.compile hands numbers over as float64
    scale, dropout_p = tl.cast(scale, tl.float32), tl.cast(dropout_p, tl.float32)
    shape = (rows, columns, prefix, row_step, column_step, chunks, padded, size)
    blocks = tl.cdiv(chunks, OWN // 16)
    plane, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * (OWN // 16)
    planes = (tl.num_programs(0) // blocks).to(tl.int64)
    b, h, plane_64 = (plane // heads).to(tl.int64), plane % heads, plane.to(tl.int64)
    y, y_v, mask = y + b * y_b + h * y_h, y_v + b * y_v_b + h * y_v_h, mask + b * mask_b + h * mask_h
    own_products += b * products_b + h * products_h
    other_products += b * products_b + h * products_h
    log_sums += plane_64 * length
    own = _side(first, shape, BIAS, OWN)
    token, mine, of_plane = own[0], own[1], (b * length * heads + h) * CHANNELS
    x_tile = _load(x + b * x_b + h * x_h, token * x_l, CHANNELS, BLOCK_D)
    total = tl.zeros((OWN, BLOCK_D), tl.float32)
    if FORWARD:
        largest, weight = tl.full((OWN,), float("-inf"), tl.float32), tl.zeros((OWN,), tl.float32)
        for start in range(0, chunks, OTHER // 16):
            other = _side(start, shape, BIAS, OTHER)
            y_tile = _load(y, other[0] * y_l, CHANNELS, BLOCK_D)
            logits = _logits(
                x_tile,
                y_tile,
                own,
                other,
                own_products,
                other_products,
                layout,
                shape,
                scale,
                mask,
                mask_own,
                mask_other,
                ON_OWN,
                ON_OTHER,
                MASK,
            )
            larger = tl.maximum(largest, tl.max(logits, 1))
            finite = tl.where(larger == float("-inf"), 0.0, larger)  # no difference of infinities
            shrink = tl.exp(largest - finite)
            p = tl.exp(logits - finite[:, None])
            weight = weight * shrink + tl.sum(p, 1)
            if not ON_VALUES:
                if DROPOUT:
                    p = _dropped(p, seed, plane, own, other, length, dropout_p, BY_KEY)
                y_v_tile = _load(y_v, other[0] * y_v_l, CHANNELS, BLOCK_D)
                total = tl.dot(p.to(y_v_tile.dtype), y_v_tile, total * shrink[:, None], input_precision="tf32x3")
            largest = larger
        blind = weight == 0.0
        weight = tl.where(blind, 1.0, weight)[:, None]
        # +∞ makes all weights of a query that sees nothing zero, also in the backward pass
        log_sum = tl.where(blind, float("inf"), largest)[:, None] + tl.log(weight)
        tl.store(log_sums + token[:, None], log_sum, mask=mine[:, None])
        if not ON_VALUES:
            total = total / weight
    else:
        deltas += plane_64 * length
        v_products += plane_64 * length * size
        x_v_tile = _load(x_v + b * x_v_b + h * x_v_h, token * x_v_l, CHANNELS, BLOCK_D)
        if BY_KEY:
            total_v = tl.zeros((OWN, BLOCK_D), tl.float32)
        else:
            log_sum = tl.load(log_sums + token[:, None])
            out_tile = _load(out + of_plane, token * heads * CHANNELS, CHANNELS, BLOCK_D)
            delta = tl.sum(out_tile.to(tl.float32) * x_v_tile, 1)[:, None]
            if x.dtype.element_ty == tl.float32:
                # the output is rounded otherwise than gradients of weights, so that what all values have in common does
                # not cancel: float32 has digits to lose by that, and goes through the keys once more
                delta, weight = tl.zeros((OWN, 1), tl.float32), tl.zeros((OWN, 1), tl.float32)
                for start in range(0, chunks, OTHER // 16):
                    other = _side(start, shape, BIAS, OTHER)
                    y_tile = _load(y, other[0] * y_l, CHANNELS, BLOCK_D)
                    p = tl.exp(
                        _logits(
                            x_tile,
                            y_tile,
                            own,
                            other,
                            own_products,
                            other_products,
                            layout,
                            shape,
                            scale,
                            mask,
                            mask_own,
                            mask_other,
                            ON_OWN,
                            ON_OTHER,
                            MASK,
                        )
                        - log_sum
                    )
                    grad = _gradient(
                        own,
                        other,
                        x_v_tile,
                        _load(y_v, other[0] * y_v_l, CHANNELS, BLOCK_D),
                        v_products,
                        layout,
                        shape,
                        ON_VALUES,
                        BY_KEY,
                    )
                    if DROPOUT:
                        grad = _dropped(grad, seed, plane, own, other, length, dropout_p, BY_KEY)
                    delta += tl.sum(p * grad, 1)[:, None]
                    weight += tl.sum(p, 1)[:, None]
                delta /= tl.where(weight == 0.0, 1.0, weight)  # of p as it is here, whose sum is 1 but for rounding
            tl.store(deltas + token[:, None], delta, mask=mine[:, None])
    SUMS: tl.constexpr = ON_VALUES if FORWARD else ON_OWN
    STEP: tl.constexpr = 16 if FORWARD else OTHER
    if SUMS:
        # in the backward pass those of the table on queries, by keys, come first
        sums += (plane_64 + (0 if FORWARD or BY_KEY else planes * ON_OTHER)) * length * size
        _clear(sums, own, layout, shape)
        run = tl.zeros((OWN, 16), tl.float32)
    if ON_VALUES or not FORWARD:
        for start in range(0, chunks, STEP // 16):
            other = _side(start, shape, BIAS, STEP)
            y_tile = _load(y, other[0] * y_l, CHANNELS, BLOCK_D)
            logits = _logits(
                x_tile,
                y_tile,
                own,
                other,
                own_products,
                other_products,
                layout,
                shape,
                scale,
                mask,
                mask_own,
                mask_other,
                ON_OWN,
                ON_OTHER,
                MASK,
            )
            y_v_tile = _load(y_v, other[0] * y_v_l, CHANNELS, BLOCK_D)
            if BY_KEY:
                log_sum, delta = tl.load(log_sums + other[0])[None, :], tl.load(deltas + other[0])[None, :]
            p = tl.exp(logits - log_sum)
            if FORWARD or BY_KEY:
                weights = _dropped(p, seed, plane, own, other, length, dropout_p, BY_KEY) if DROPOUT else p
            if FORWARD:
                total = tl.dot(weights.to(y_v_tile.dtype), y_v_tile, total, input_precision="tf32x3")
                run = _add_to_run(sums, run, weights, own, start, layout, shape)
            else:
                grad = _gradient(own, other, x_v_tile, y_v_tile, v_products, layout, shape, ON_VALUES, BY_KEY)
                if BY_KEY:
                    total_v = tl.dot(weights.to(y_v_tile.dtype), y_v_tile, total_v, input_precision="tf32x3")
                if DROPOUT:
                    grad = _dropped(grad, seed, plane, own, other, length, dropout_p, BY_KEY)
                grad = p * (grad - delta)
                total = tl.dot(grad.to(y_tile.dtype), y_tile, total, input_precision="tf32x3")
                if SUMS:
                    run = _add_to_run(sums, run, grad, own, start, layout, shape)
    if FORWARD:
        _store(out + of_plane, total, token * heads * CHANNELS, mine, CHANNELS, BLOCK_D)
    else:
        grads += of_plane + (0 if BY_KEY else planes * length * CHANNELS)
        _store(grads, total * scale, token * heads * CHANNELS, mine, CHANNELS, BLOCK_D)
        if BY_KEY:
            _store(grads + 2 * planes * length * CHANNELS, total_v, token * heads * CHANNELS, mine, CHANNELS, BLOCK_D)


# --- Kernels: tables --------------------------------------------------------------------------------------------------
# Up to three places, on queries, keys and values, share a launch: `place` counts those there are, and chooses one of
# three tensors. Tables are of all heads together, one group, or of each. A bias is a table of one channel, whose tokens
# have 1 in it.


@triton.jit
def _chosen(place, x_0, x_1, x_2):
    x = x_0
    if place == 1:
        x = x_1
    if place == 2:
        x = x_2
    return x


@triton.jit
def _of_column(
    block,
    column,
    group,
    planes,
    heads,
    groups,
    length,
    rows,
    columns,
    prefix,
    row_step,
    column_step,
    size,
    x_b,
    x_h,
    x_l,
    OWN: tl.constexpr,
):
    """Of a block of the tokens in a column of the maps of all planes of a group (the last column is the prefix):
    whether there is one, and where its products and its channels begin."""
    number, per_plane = block * OWN + tl.arange(0, OWN), tl.where(column == columns, prefix, rows)
    inside = number < planes * per_plane
    number = tl.minimum(number, planes * per_plane - 1)
    plane, row = number // per_plane, number % per_plane
    b, h = (plane // (heads // groups)).to(tl.int64), group * (heads // groups) + plane % (heads // groups)
    token = tl.where(column == columns, row, prefix + row * row_step + column * column_step)
    at = ((b * heads + h) * length + tl.where(column == columns, rows, row) * columns) * size
    at += tl.where(column == columns, row, column) * size
    return inside, at, b * x_b + h * x_h + token * x_l


@triton.jit
def _channels(x, x_at, CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr, BIAS: tl.constexpr):
    """(tokens, channels); for a bias one channel, of 1."""
    if BIAS:
        tile = tl.where(x_at[:, None] * 0 + tl.arange(0, BLOCK_D)[None, :] == 0, 1.0, 0.0)
    else:  # not after a return: Triton compiles what follows one in an `if`, and the types of both would have to agree
        tile = _load(x, x_at, CHANNELS, BLOCK_D)
    return tile


@triton.jit(do_not_specialize=_VARYING)
def _product_kernel(
    x_0,
    x_1,
    x_2,
    table_0,
    table_1,
    table_2,
    table_3,
    table_4,
    table_5,
    products,
    layout,
    x_0_b,
    x_0_h,
    x_0_l,
    x_1_b,
    x_1_h,
    x_1_l,
    x_2_b,
    x_2_h,
    x_2_l,
    planes,
    heads,
    groups,
    length,
    rows,
    columns,
    prefix,
    row_step,
    column_step,
    size,
    count,
    ids,
    buckets,
    scale,
    on_values,
    first,
    CROSS: tl.constexpr,
    ADJOINT: tl.constexpr,
    BIAS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    """products[place] = x·table for a block of the tokens of a column, the table in the order of the products, scaled;
    or, ADJOINT, x[first + place] += products[place]·tableᵀ, x being (…, B, L, H, D)."""
    place, column, group = tl.program_id(1), tl.program_id(0) % count, tl.program_id(0) // count % groups
    if ADJOINT:  # of one tensor
        x, x_b, x_h, x_l = x_0 + (first + place).to(tl.int64) * planes * groups * length * CHANNELS, x_0_b, x_0_h, x_0_l
    else:
        x, x_b = _chosen(place, x_0, x_1, x_2), _chosen(place, x_0_b, x_1_b, x_2_b)
        x_h, x_l = _chosen(place, x_0_h, x_1_h, x_2_h), _chosen(place, x_0_l, x_1_l, x_2_l)
    inside, at, x_at = _of_column(
        tl.program_id(0) // count // groups,
        column,
        group,
        planes,
        heads,
        groups,
        length,
        rows,
        columns,
        prefix,
        row_step,
        column_step,
        size,
        x_b,
        x_h,
        x_l,
        OWN,
    )
    tile = _channels(x, x_at, CHANNELS, BLOCK_D, BIAS)
    channel, by_value = tl.arange(0, BLOCK_D)[:, None], place == on_values
    by_channel, by_bucket = tl.where(by_value, 1, buckets), tl.where(by_value, CHANNELS, 1)
    table = _chosen(place, table_0, table_1, table_2) + group * CHANNELS * buckets + channel * by_channel
    other_table = _chosen(place, table_3, table_4, table_5) + group * CHANNELS * buckets + channel * by_channel
    factor = tl.where(by_value, 1.0, tl.cast(scale, tl.float32))  # float64 from torch.compile
    products += place.to(tl.int64) * planes * groups * length * size
    total = tl.zeros((OWN, BLOCK_D), tl.float32)
    for start in range(0, size, OTHER):
        m = start + tl.arange(0, OTHER)[None, :]
        bucket = tl.load(layout + ids + column * size + m, mask=m < size, other=-1)
        used = (bucket >= 0) & (channel < CHANNELS)
        value = tl.load(table + bucket * by_bucket, mask=used, other=0.0).to(tl.float32)
        if CROSS:
            bucket = tl.load(layout + ids + (columns + 1 + column) * size + m, mask=m < size, other=-1)
            value += tl.load(other_table + bucket * by_bucket, mask=used, other=0.0).to(tl.float32)
        value = (value * factor).to(products.dtype.element_ty)
        places = products + at[:, None] + m
        if ADJOINT:
            of_products = tl.load(places, mask=m < size, other=0.0)
            total = tl.dot(of_products, tl.trans(value), total, input_precision="tf32x3")
        else:
            of_products = tl.dot(tile.to(value.dtype), value, input_precision="tf32x3")
            tl.store(places, of_products.to(products.dtype.element_ty), mask=inside[:, None] & (m < size))
    if ADJOINT:
        _store(x, tile + total, x_at, inside, CHANNELS, BLOCK_D)


@triton.jit(do_not_specialize=_VARYING)
def _gradient_kernel(
    x_0,
    x_1,
    x_2,
    products_0,
    products_1,
    products_2,
    partial,
    x_0_b,
    x_0_h,
    x_0_l,
    x_1_b,
    x_1_h,
    x_1_l,
    x_2_b,
    x_2_h,
    x_2_l,
    planes,
    heads,
    groups,
    length,
    rows,
    columns,
    prefix,
    row_step,
    column_step,
    size,
    count,
    steps,
    BIAS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    """partial[split, place, group, column, m, channel] = Σ of products·x over some blocks of the tokens of a column."""
    place, split, blocks = tl.program_id(1), tl.program_id(2), tl.cdiv(size, OTHER)
    m = tl.program_id(0) % blocks * OTHER + tl.arange(0, OTHER)
    column, group = tl.program_id(0) // blocks % count, tl.program_id(0) // blocks // count
    products = _chosen(place, products_0, products_1, products_2)
    total = tl.zeros((OTHER, BLOCK_D), tl.float32)
    for block in range(split * steps, (split + 1) * steps):
        inside, at, x_at = _of_column(
            block,
            column,
            group,
            planes,
            heads,
            groups,
            length,
            rows,
            columns,
            prefix,
            row_step,
            column_step,
            size,
            _chosen(place, x_0_b, x_1_b, x_2_b),
            _chosen(place, x_0_h, x_1_h, x_2_h),
            _chosen(place, x_0_l, x_1_l, x_2_l),
            OWN,
        )
        tile = _channels(_chosen(place, x_0, x_1, x_2), x_at, CHANNELS, BLOCK_D, BIAS)
        used = inside[:, None] & (m < size)[None, :]
        of_products = tl.trans(tl.load(products + at[:, None] + m[None, :], mask=used, other=0.0))
        total = tl.dot(of_products, tile.to(of_products.dtype), total, input_precision="tf32x3")
    partial += ((((split * tl.num_programs(1) + place) * groups + group) * (columns + 1) + column) * CHANNELS).to(
        tl.int64
    ) * size
    _store(partial, total, m * CHANNELS, m < size, CHANNELS, BLOCK_D)


@triton.jit(do_not_specialize=_VARYING)
def _collect_kernel(
    partial,
    layout,
    grads,
    groups,
    columns,
    ids,
    buckets,
    size,
    splits,
    scale,
    on_values,
    tables,
    CHANNELS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OWN: tl.constexpr,
):
    """Gradient of a bucket: what `partial` has, for all splits, where the order of the products names it."""
    bucket, table = tl.program_id(0) % buckets, tl.program_id(0) // buckets % tables
    group, place = tl.program_id(0) // buckets // tables, tl.program_id(1)
    starts = layout + ids + tables * (columns + 1) * size + table * buckets + bucket
    first, count = tl.load(starts), tl.load(starts + 1) - tl.load(starts)
    where = layout + ids + tables * ((columns + 1) * size + buckets) + 1 + first
    channel = tl.arange(0, BLOCK_D)
    total = tl.zeros((OWN, BLOCK_D), tl.float32)
    for start in range(0, count * splits, OWN):
        number = start + tl.arange(0, OWN)
        inside = number < count * splits
        at = ((number // count).to(tl.int64) * tl.num_programs(1) + place) * groups + group
        at = at * (columns + 1) * size + tl.load(where + number % count, mask=inside, other=0)
        total += tl.load(
            partial + at[:, None] * CHANNELS + channel[None, :],
            mask=inside[:, None] & (channel < CHANNELS)[None, :],
            other=0.0,
        )
    by_value = place == on_values
    grads += ((place * tables + table) * groups + group) * CHANNELS * buckets
    grads += channel * tl.where(by_value, 1, buckets) + bucket * tl.where(by_value, CHANNELS, 1)
    factor = tl.where(by_value, 1.0, tl.cast(scale, tl.float32))
    tl.store(grads, (tl.sum(total, 0) * factor).to(grads.dtype.element_ty), mask=channel < CHANNELS)


# --- Operators -------------------------------------------------------------------------------------------------------


class _Call:
    """The launches of one call; `values` are what kernels share, by the names of their parameters."""

    def __init__(self, q, tables, places, layout, sizes, bias, mask, seed, dropout_p):
        (batch, heads, length, channels), (rows, columns, prefix, classes, row_step, column_step) = q.shape, sizes
        padded, groups = triton.cdiv(columns, 16) * 16, tables[0].shape[0]
        self.q, self.places, self.size, self.bias = q, places, classes * padded, bias
        self.tables = [table.contiguous() for table in tables]
        self.mask = mask = None if mask is None else mask.expand(*q.shape[:3], length)
        self.values = {
            "layout": layout,
            "rows": rows,
            "columns": columns,
            "prefix": prefix,
            "row_step": row_step,
            "column_step": column_step,
            "padded": padded,
            "size": self.size,
            "count": columns + (prefix > 0),
            "chunks": (prefix > 0) + rows * (padded // 16),
            "heads": heads,
            "length": length,
            "mask": q if mask is None else mask,
            "mask_b": 0 if mask is None else mask.stride(0),
            "mask_h": 0 if mask is None else mask.stride(1),
            "seed": layout if seed is None else seed,
            "dropout_p": dropout_p,
            "DROPOUT": dropout_p > 0,
            "ON_VALUES": "v" in places,
            "BIAS": bias,
            "scale": channels**-0.5,
            "CHANNELS": channels,
            "BLOCK_D": max(16, triton.next_power_of_2(channels)),
            "ids": (rows + 1) ** 2,
            "planes": batch * heads // groups,
            "groups": groups,
            "tables": len(tables) // len(places),
            "buckets": tables[0].shape[1 if places[0] == "v" else -1],
            "on_values": places.find("v"),
            "CROSS": len(tables) > len(places),
        }
        self.of_bias = {"scale": 1.0, "CHANNELS": 1, "BLOCK_D": 16} if bias else {}

    def launch(self, kernel, grid, options, **values):
        values = self.values | values | {"OWN": options.own, "OTHER": options.other}
        _launch(kernel, grid, options, {name: values[name] for name in kernel.arg_names})

    def tile(self, name):
        return tile(name, self.q.dtype, self.q.shape[3])

    def by_columns(self, x, products, adjoint=False, first_table=0, first=0):
        """Products of tensors of tokens with the tables from a place on, or `adjoint`, that added to x[first], …"""
        own = (
            {}
            if not self.bias
            else {
                "planes": 1,
                "heads": self.values["groups"],
                "rows": 1,
                "prefix": min(self.values["prefix"], 1),
                "length": self.values["columns"] + 1,
            }
        )
        values, per_place = self.values | own, self.values["tables"]
        options, tables = self.tile("adjoint" if adjoint else "product"), self.tables[first_table * per_place :]
        tokens = values["planes"] * max(values["rows"], values["prefix"])
        grid = triton.cdiv(tokens, options.own) * values["count"] * values["groups"], len(products)
        self.launch(
            _product_kernel,
            grid,
            options,
            **self.of_bias | own,
            **_three("x", x),
            ADJOINT=adjoint,
            **_three("table", tables[::per_place]),
            **_three("table", tables[per_place - 1 :: per_place], 3),
            products=products,
            first=first,
            on_values=self.places.find("v") - first_table if "v" in self.places else -1,
        )
        return products

    def products(self, x):
        """Of a tensor of tokens for each place with its tables, (places, B, H, L, M); of a bias (places, 1, H', …)."""
        values = self.values
        shape = (1, values["groups"], values["columns"] + 1) if self.bias else self.q.shape[:3]
        products = self.q.new_empty(len(x), *shape, self.size)
        return self.by_columns(x, products) if x else products

    def attend(self, name, x, y, x_v, y_v, products, by_key=False, **values):
        on_logits, (own, other) = self.places.replace("v", ""), "qk" if by_key else "kq"
        for side, place in (("own", own), ("other", other)):
            values[f"{side}_products"] = products[on_logits.index(place)] if place in on_logits else products
            values[f"ON_{side}".upper()] = place in on_logits
        # of a bias all images have the same products, and all heads if they share it
        b, h = products.stride()[1:3]
        b, h = (0, h * (products.shape[2] > 1)) if self.bias else (b, h)
        of_own, of_other = (0, 0) if self.mask is None else self.mask.stride()[2:][:: -1 if by_key else 1]
        kind = 0 if self.mask is None else 1 if not of_other else 2 if not of_own else 3
        options, planes = self.tile(name), self.q.shape[0] * self.q.shape[1]
        self.launch(
            _attention_kernel,
            (planes * triton.cdiv(self.values["chunks"] * 16, options.own),),
            options,
            **_strided("x", x),
            **_strided("y", y),
            **_strided("x_v", x_v),
            **_strided("y_v", y_v),
            products_b=b,
            products_h=h,
            MASK=kind,
            mask_own=of_own,
            mask_other=of_other,
            FORWARD=name == "forward",
            BY_KEY=by_key,
            **values,
        )

    def gradients(self, x, products):
        """Gradients of the tables, flat, one after the other, from those of the products, a tensor for each place."""
        values, places, options = self.values, len(self.places), self.tile("gradient")
        programs = triton.cdiv(self.size, options.other) * values["count"] * values["groups"]
        blocks = triton.cdiv(values["planes"] * max(values["rows"], values["prefix"]), options.own)
        splits = max(1, min(blocks, _SPLIT_PROGRAMS // (programs * places)))
        shape = splits, places, values["groups"], values["columns"] + 1, self.size, 1 if self.bias else self.q.shape[3]
        partial = self.q.new_empty(shape, dtype=torch.float32)
        self.launch(
            _gradient_kernel,
            (programs, places, splits),
            options,
            partial=partial,
            steps=triton.cdiv(blocks, splits),
            **self.of_bias,
            **_three("x", x),
            **_three("products", products),
        )
        grads = self.tables[0].new_empty(sum(table.numel() for table in self.tables))
        self.launch(
            _collect_kernel,
            (values["buckets"] * values["tables"] * values["groups"], places),
            Tile(64, 16),
            partial=partial,
            grads=grads,
            splits=splits,
            **self.of_bias,
        )
        return grads


def _launch(kernel, grid, options, arguments):
    tensor = next(iter(arguments.values()))
    if not INTERPRETED:
        with torch.cuda.device_of(tensor):
            torch.library.wrap_triton(kernel)[grid](
                **arguments, num_warps=options.num_warps, num_stages=options.num_stages
            )
    elif not isinstance(tensor, FakeTensor):
        kernel[grid](**arguments)


def _strided(name, x):
    b, h, token, _ = x.stride()[-4:]
    return {name: x, f"{name}_b": b, f"{name}_h": h, f"{name}_l": token}


def _three(name, tensors, first=0):
    """Arguments for up to three places."""
    tensors = [tensors[min(place, len(tensors) - 1)] for place in range(3)]
    if name == "x":
        return _strided("x_0", tensors[0]) | _strided("x_1", tensors[1]) | _strided("x_2", tensors[2])
    return {f"{name}_{first + place}": x for place, x in enumerate(tensors)}


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: list[Tensor],
    places: str,
    layout: Tensor,
    sizes: list[int],
    bias: bool,
    mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, logarithms of the softmax's sums, sums of weights that meet the table on values)"""
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    call = _Call(q, tables, places, layout, sizes, bias, mask, seed, dropout_p)
    products = call.products([{"q": k, "k": q}[place] for place in places if place != "v"])
    # so that heads join to channels without a copy
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
    log_sums = q.new_empty(q.shape[:3], dtype=torch.float32)
    sums = q.new_empty(*q.shape[:3], call.size if "v" in places else 0)
    call.attend("forward", q, k, q, v, products, v_products=q, sums=sums, out=out, log_sums=log_sums, deltas=q, grads=q)
    if "v" in places:
        call.by_columns([out, sums], sums[None], adjoint=True, first_table=len(places) - 1)
    return out, log_sums, sums


def _backward(
    grad: Tensor,
    out: Tensor,
    log_sums: Tensor,
    sums: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: list[Tensor],
    places: str,
    layout: Tensor,
    sizes: list[int],
    bias: bool,
    mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of k, q and v, (3, B, H, L, D), and, flat and one after the other, of the tables"""
    grad, q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (grad, q, k, v))
    call = _Call(q, tables, places, layout, sizes, bias, mask, seed, dropout_p)
    tokens, on_logits = [{"q": k, "k": q, "v": grad}[place] for place in places], places.replace("v", "")
    products = call.products(tokens)
    grads = q.new_empty(3, q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(2, 3)
    grad_products = q.new_empty(len(on_logits), *q.shape[:3], call.size)
    shared = {
        "v_products": products[-1],
        "out": out,
        "log_sums": log_sums,
        "deltas": torch.empty_like(log_sums),
        "sums": grad_products,
        "grads": grads,
    }
    # the queries first, which leave the deltas
    call.attend("queries, sums" if "k" in places else "queries", q, k, grad, v, products, **shared)
    call.attend("keys, sums" if "q" in places else "keys", k, q, v, grad, products, by_key=True, **shared)
    if on_logits and not bias:
        call.by_columns([grads, grad_products], grad_products, adjoint=True, first=int("q" not in places))
    return grads, call.gradients(tokens, [*grad_products, sums][: len(places)])


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
    ctx.set_materialize_grads(False)  # no zeros for outputs without a gradient


def _differentiate(ctx, grad, *_):
    *saved, layout, mask, seed = ctx.saved_tensors[:9]
    tables = list(ctx.saved_tensors[9:])
    grads, of_tables = torch.ops.rpe_ops.attention_by_rows_backward(
        grad, *saved, tables, ctx.places, layout, ctx.sizes, ctx.bias, mask, seed, ctx.dropout_p
    )
    grad_k, grad_q, grad_v = grads.unbind(0)
    of_tables = of_tables.split([table.numel() for table in tables])
    of_tables = [x.view(table.shape) for x, table in zip(of_tables, tables, strict=True)]
    return grad_q, grad_k, grad_v, of_tables, *[None] * 7


_register("rpe_ops::attention_by_rows_backward", _backward)
_register("rpe_ops::attention_by_rows", _forward).register_autograd(_differentiate, setup_context=_save)
