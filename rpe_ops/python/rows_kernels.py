"""Triton kernels of attention by rows of the map; rows.py launches them, and README.md explains the design.

Terms used here:
    chunk: 16 slots with up to 16 neighbouring tokens of one row of the map, or with the prefix tokens.
    slot: the place of one token in a chunk; it may be empty.
    plane: one head of one image.
    own, other: a program owns a block of tokens and loops over the others. The forward and the queries' kernel own
        queries and loop over keys; the keys' kernel owns keys and loops over queries. A tile is (own, other).
    products: the products of a token with the table of a term, one number for each row class and column of the other
        token, (…, L, classes·P), where P is the map's width rounded up to a multiple of 16. A term on keys uses the
        products of queries, a term on queries those of keys, and a term on values, in the backward pass, those of the
        output's gradients.
    sums: in the layout of products, sums over the rows of a class: weights for a term on values, otherwise gradients of
        logits.
    shape: the tuple rows, columns, prefix, row_step, column_step, chunks, padded (P), size (classes·P).
    layout: row classes, (rows + 1)², with the prefix first, and then what irpe.py's `row_layout` adds for the tables.
    ids_offset: where the bucket ids begin in `layout`, (rows + 1)².
    column_count: the number of columns, plus one if there is a prefix, which counts as one more column.
"""

import triton
import triton.language as tl

# One compiled kernel serves maps of all sizes, because compiling a kernel in a training step would take too long.
VARYING = [
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
    "column_count",
    "ids_offset",
    "first",
]

# What a mask depends on. MASK is 0 without a mask, and BY_OWN + BY_OTHER for a full one.
BY_OWN = tl.constexpr(1)
BY_OTHER = tl.constexpr(2)


# --- Where tokens are ------------------------------------------------------------------------------------------------


@triton.jit
def _place(chunk, shape):
    """The row of each chunk, where row 0 is the prefix, and its first column.

    The prefix comes first. The chunks of the map then follow in blocks of 16 columns, each from top to bottom.
    """
    rows, columns, prefix, row_step, column_step, chunks, padded, size = shape
    on_map = tl.minimum(chunk, chunks - 1) - tl.where(prefix > 0, 1, 0)
    row = tl.where(on_map < 0, 0, tl.maximum(on_map, 0) % rows + 1)
    return row, tl.maximum(on_map, 0) // rows * 16


@triton.jit
def _side(first, shape, BIAS: tl.constexpr, SLOTS: tl.constexpr):
    """Describe the slots of some chunks, as a tuple:

    0: the token of each slot; an empty slot repeats the last token of its row.
    1: whether the slot has a token.
    2: the row of each slot.
    3: where the sums of its token begin. 4: where the products of its token begin.
    5: rows of the chunks. 6: columns of the chunks' slots, (chunks, 16).

    No tensor is passed in, because torch.compile would assume that the kernel writes to it here.
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
    # A bias has products for each column, and for the prefix after them, instead of each token.
    at_products = tl.where(row == 0, columns, column) * size if BIAS else at
    chunk_row, chunk_column = _place(first + tl.arange(0, SLOTS // 16), shape)
    return token, inside, row, at, at_products, chunk_row, chunk_column[:, None] + tl.arange(0, 16)[None, :]


@triton.jit
def _own_plane(chunks, heads, OWN: tl.constexpr):
    """(plane, image, head, first chunk) of a program's own tokens. The image is int64, because offsets may be large."""
    blocks = tl.cdiv(chunks, OWN // 16)
    plane = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * (OWN // 16)
    return plane, (plane // heads).to(tl.int64), plane % heads, first


@triton.jit
def _planes(chunks, OWN: tl.constexpr):
    """The number of planes, in int64, because offsets may be large."""
    return (tl.num_programs(0) // tl.cdiv(chunks, OWN // 16)).to(tl.int64)


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


# --- Parts of an attention -------------------------------------------------------------------------------------------


@triton.jit
def _term(products, at, row, chunk_row, chunk_column, layout, shape):
    """A term for each own slot and each chunk on the other side: 16 adjacent numbers for each such pair."""
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
    """A tile of logits in float32; -∞ for slots on the other side without a token."""
    logits = tl.dot(x, tl.trans(y), input_precision="tf32x3") * scale
    if ON_OWN:
        logits += _term(own_products, own[4], own[2], other[5], other[6], layout, shape)
    if ON_OTHER:
        logits += tl.trans(_term(other_products, other[4], other[2], own[5], own[6], layout, shape))
    if MASK:
        if MASK == BY_OWN:
            value = tl.load(mask + own[0] * mask_own)[:, None]
        elif MASK == BY_OTHER:
            value = tl.load(mask + other[0] * mask_other)[None, :]
        else:
            value = tl.load(mask + (own[0][:, None] * mask_own + other[0][None, :] * mask_other))
        if mask.dtype.element_ty == tl.int1:
            logits = tl.where(value, logits, float("-inf"))
        else:
            logits += value.to(tl.float32)
    return tl.where(other[1][None, :], logits, float("-inf"))


@triton.jit
def _dropout(tile, seed, plane, query, key, length, dropout_p):
    """A tile after dropout, which depends only on seed, plane, query and key; the latter two broadcast to the tile."""
    place = query * length + key
    drawn, _, _, _ = tl.philox(tl.load(seed), place, plane + place * 0, place * 0, place * 0)
    return tl.where(tl.uint_to_uniform_float(drawn) >= dropout_p, tile / (1 - dropout_p), 0.0)


@triton.jit
def _unmet(start, row, layout, shape):
    """Whether no row of the map has the row class of the sums at `start` for a token in `row`."""
    rows, columns, prefix, row_step, column_step, chunks, padded, size = shape
    farthest = tl.load(layout + row * (rows + 1) + 1)
    nearest = tl.load(layout + row * (rows + 1) + rows)
    unmet = (start // padded < nearest) | (start // padded > farthest)
    return unmet & ((prefix == 0) | (start != size - padded))  # the first chunk meets the prefix


@triton.jit
def _clear_unmet(sums, own, layout, shape):
    """Write zeros to the sums of the row classes that occur in no row of the map for a token."""
    inside, row, at = own[1], own[2], own[3]
    for start in range(0, shape[7], 16):
        tl.store(
            sums + (at[:, None] + start + tl.arange(0, 16)[None, :]),
            tl.zeros((row.shape[0], 16), sums.dtype.element_ty),
            mask=(_unmet(start, row, layout, shape) & inside)[:, None],
        )


# A run is a stretch of chunks in the same columns whose rows have one class for the own token. The next two functions
# each find the end of a run themselves: if a function returned where to store, torch.compile would assume that the
# kernel writes to the layout, from which that place is read.


@triton.jit
def _add_to_run(sums, total, own, chunk, layout, shape):
    """Write the sums of the runs that end with a chunk; returns the sums to continue with."""
    inside, row, at = own[1], own[2], own[3]
    other_row, column = _place(chunk, shape)
    next_row, next_column = _place(chunk + 1, shape)
    classes = tl.load(layout + row * (shape[0] + 1) + other_row)
    ends = tl.load(layout + row * (shape[0] + 1) + next_row) != classes
    ends = ends | (next_column != column) | (chunk + 1 == shape[5])
    tl.store(
        sums + (at[:, None] + (classes * shape[6])[:, None] + column + tl.arange(0, 16)[None, :]),
        total.to(sums.dtype.element_ty),
        mask=(ends & inside)[:, None],
    )
    return tl.where(ends[:, None], 0.0, total)


@triton.jit
def _store_maximum(maxima, largest, own, chunk, layout, shape):
    """Write the largest logit so far for the runs that end with a chunk."""
    inside, row, at = own[1], own[2], own[3]
    other_row, column = _place(chunk, shape)
    next_row, next_column = _place(chunk + 1, shape)
    classes = tl.load(layout + row * (shape[0] + 1) + other_row)
    ends = tl.load(layout + row * (shape[0] + 1) + next_row) != classes
    ends = ends | (next_column != column) | (chunk + 1 == shape[5])
    tl.store(maxima + (at + classes * shape[6] + column) // 16, largest, mask=ends & inside)


@triton.jit
def _normalise(sums, maxima, log_sum, own, layout, shape):
    """Multiply each sum by exp(its maximum - log_sum), and write zeros for row classes that no row has for a token."""
    inside, row, at = own[1], own[2], own[3]
    for start in range(0, shape[7], 16):
        places = sums + (at[:, None] + start + tl.arange(0, 16)[None, :])
        factor = tl.exp(tl.load(maxima + (at + start) // 16)[:, None] - log_sum)
        total = tl.load(places).to(tl.float32) * factor
        total = tl.where(_unmet(start, row, layout, shape)[:, None], 0.0, total)
        tl.store(places, total.to(sums.dtype.element_ty), mask=inside[:, None])


# --- Attention -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    q,
    k,
    v,
    on_k,
    on_q,
    sums,
    maxima,
    mask,
    seed,
    layout,
    out,
    log_sums,
    q_b,
    q_h,
    q_l,
    k_b,
    k_h,
    k_l,
    v_b,
    v_h,
    v_l,
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
    ON_K: tl.constexpr,
    ON_Q: tl.constexpr,
    ON_V: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    """The output of a block of queries, and the log-sum-exp of each row of logits.

    A term on values also needs `sums`, for each query the sums of the weights of each run, which are multiplied by the
    table on values afterwards. As the maximum of the logits changes during the loop, each sum is stored with the
    current maximum, in `maxima`, and is rescaled at the end.
    """
    scale = tl.cast(scale, tl.float32)  # torch.compile passes numbers as float64
    dropout_p = tl.cast(dropout_p, tl.float32)
    shape = (rows, columns, prefix, row_step, column_step, chunks, padded, size)
    plane, b, h, first = _own_plane(chunks, heads, OWN)
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    mask += b * mask_b + h * mask_h
    on_k += b * products_b + h * products_h
    on_q += b * products_b + h * products_h
    own = _side(first, shape, BIAS, OWN)
    token = own[0]
    q_tile = _load(q + b * q_b + h * q_h, token * q_l, CHANNELS, BLOCK_D)
    total = tl.zeros((OWN, BLOCK_D), tl.float32)
    largest = tl.full((OWN,), float("-inf"), tl.float32)
    denominator = tl.zeros((OWN,), tl.float32)
    if ON_V:
        sums += plane.to(tl.int64) * length * size
        maxima += plane.to(tl.int64) * length * (size // 16)
        run = tl.zeros((OWN, 16), tl.float32)
    for start in range(0, chunks, OTHER // 16):
        other = _side(start, shape, BIAS, OTHER)
        k_tile = _load(k, other[0] * k_l, CHANNELS, BLOCK_D)
        logits = _logits(
            q_tile, k_tile, own, other, on_k, on_q, layout, shape, scale, mask, mask_own, mask_other, ON_K, ON_Q, MASK
        )
        larger = tl.maximum(largest, tl.max(logits, 1))
        finite = tl.where(larger == float("-inf"), 0.0, larger)  # avoids -∞ minus -∞
        shrink = tl.exp(largest - finite)
        p = tl.exp(logits - finite[:, None])
        denominator = denominator * shrink + tl.sum(p, 1)
        if DROPOUT:
            p = _dropout(p, seed, plane, token[:, None], other[0][None, :], length, dropout_p)
        v_tile = _load(v, other[0] * v_l, CHANNELS, BLOCK_D)
        total = tl.dot(p.to(v_tile.dtype), v_tile, total * shrink[:, None], input_precision="tf32x3")
        if ON_V:
            _store_maximum(maxima, larger, own, start, layout, shape)
            run = _add_to_run(sums, run * shrink[:, None] + p, own, start, layout, shape)
        largest = larger
    fully_masked = denominator == 0.0
    denominator = tl.where(fully_masked, 1.0, denominator)[:, None]
    # For a query that may not attend to any key, +∞ makes every weight zero, here and in the backward pass.
    log_sum = tl.where(fully_masked, float("inf"), largest)[:, None] + tl.log(denominator)
    tl.store(log_sums + plane.to(tl.int64) * length + token[:, None], log_sum, mask=own[1][:, None])
    if ON_V:
        tl.debug_barrier()  # a thread now reads what other threads may have written
        _normalise(sums, maxima, log_sum, own, layout, shape)
    out += (b * length * heads + h) * CHANNELS
    _store(out, total / denominator, token * heads * CHANNELS, own[1], CHANNELS, BLOCK_D)


@triton.jit(do_not_specialize=VARYING)
def deltas_kernel(
    q,
    k,
    v,
    grad_out,
    on_k,
    on_q,
    on_v,
    mask,
    seed,
    layout,
    log_sums,
    deltas,
    q_b,
    q_h,
    q_l,
    k_b,
    k_h,
    k_l,
    v_b,
    v_h,
    v_l,
    grad_out_b,
    grad_out_h,
    grad_out_l,
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
    ON_K: tl.constexpr,
    ON_Q: tl.constexpr,
    ON_V: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    """`deltas`, Σ over keys of p·(gradient of p), for a block of queries, as the kernels of the gradients compute p.

    Only float32 needs this kernel. In half precision, the queries' kernel computes deltas as the row sums of
    out·grad_out, which are mathematically equal. Because `out` was rounded separately, a large mean of all values would
    not cancel exactly, and float32 would lose precision.
    """
    scale = tl.cast(scale, tl.float32)  # torch.compile passes numbers as float64
    dropout_p = tl.cast(dropout_p, tl.float32)
    shape = (rows, columns, prefix, row_step, column_step, chunks, padded, size)
    plane, b, h, first = _own_plane(chunks, heads, OWN)
    plane_64 = plane.to(tl.int64)
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    mask += b * mask_b + h * mask_h
    on_k += b * products_b + h * products_h
    on_q += b * products_b + h * products_h
    on_v += plane_64 * length * size
    own = _side(first, shape, BIAS, OWN)
    token = own[0]
    q_tile = _load(q + b * q_b + h * q_h, token * q_l, CHANNELS, BLOCK_D)
    grad_tile = _load(grad_out + b * grad_out_b + h * grad_out_h, token * grad_out_l, CHANNELS, BLOCK_D)
    log_sum = tl.load(log_sums + plane_64 * length + token[:, None])
    delta = tl.zeros((OWN, 1), tl.float32)
    weight_sum = tl.zeros((OWN, 1), tl.float32)
    for start in range(0, chunks, OTHER // 16):
        other = _side(start, shape, BIAS, OTHER)
        k_tile = _load(k, other[0] * k_l, CHANNELS, BLOCK_D)
        v_tile = _load(v, other[0] * v_l, CHANNELS, BLOCK_D)
        logits = _logits(
            q_tile, k_tile, own, other, on_k, on_q, layout, shape, scale, mask, mask_own, mask_other, ON_K, ON_Q, MASK
        )
        p = tl.exp(logits - log_sum)
        grad = tl.dot(grad_tile, tl.trans(v_tile), input_precision="tf32x3")
        if ON_V:
            grad += _term(on_v, own[3], own[2], other[5], other[6], layout, shape)
        if DROPOUT:
            grad = _dropout(grad, seed, plane, token[:, None], other[0][None, :], length, dropout_p)
        delta += tl.sum(p * grad, 1)[:, None]
        weight_sum += tl.sum(p, 1)[:, None]
    delta /= tl.where(weight_sum == 0.0, 1.0, weight_sum)  # the sum of the weights is 1 except for rounding
    tl.store(deltas + plane_64 * length + token[:, None], delta, mask=own[1][:, None])


@triton.jit(do_not_specialize=VARYING)
def queries_kernel(
    q,
    k,
    v,
    grad_out,
    on_k,
    on_q,
    on_v,
    sums,
    mask,
    seed,
    layout,
    out,
    log_sums,
    deltas,
    grads,
    q_b,
    q_h,
    q_l,
    k_b,
    k_h,
    k_l,
    v_b,
    v_h,
    v_l,
    grad_out_b,
    grad_out_h,
    grad_out_l,
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
    ON_K: tl.constexpr,
    ON_Q: tl.constexpr,
    ON_V: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    """Gradients of a block of queries and, with a term on keys, of their products.

    The gradients of queries are the second part of `grads`. Those of products are the second part of `sums`, or the
    only one without a term on queries. Both tensors are passed whole, because torch.compile would copy slices. In
    half precision, the kernel also writes `deltas` for the keys' kernel; see `deltas_kernel`.
    """
    scale = tl.cast(scale, tl.float32)  # torch.compile passes numbers as float64
    dropout_p = tl.cast(dropout_p, tl.float32)
    shape = (rows, columns, prefix, row_step, column_step, chunks, padded, size)
    plane, b, h, first = _own_plane(chunks, heads, OWN)
    plane_64 = plane.to(tl.int64)
    of_plane = (b * length * heads + h) * CHANNELS  # in tensors of (B, L, H, D)
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    mask += b * mask_b + h * mask_h
    on_k += b * products_b + h * products_h
    on_q += b * products_b + h * products_h
    on_v += plane_64 * length * size
    own = _side(first, shape, BIAS, OWN)
    token = own[0]
    q_tile = _load(q + b * q_b + h * q_h, token * q_l, CHANNELS, BLOCK_D)
    grad_tile = _load(grad_out + b * grad_out_b + h * grad_out_h, token * grad_out_l, CHANNELS, BLOCK_D)
    log_sum = tl.load(log_sums + plane_64 * length + token[:, None])
    if q.dtype.element_ty == tl.float32:
        delta = tl.load(deltas + plane_64 * length + token[:, None])
    else:
        out_tile = _load(out + of_plane, token * heads * CHANNELS, CHANNELS, BLOCK_D)
        delta = tl.sum(out_tile.to(tl.float32) * grad_tile, 1)[:, None]
        tl.store(deltas + plane_64 * length + token[:, None], delta, mask=own[1][:, None])
    total = tl.zeros((OWN, BLOCK_D), tl.float32)
    if ON_K:
        sums += (plane_64 + _planes(chunks, OWN) * ON_Q) * length * size
        _clear_unmet(sums, own, layout, shape)
        run = tl.zeros((OWN, 16), tl.float32)
    for start in range(0, chunks, OTHER // 16):
        other = _side(start, shape, BIAS, OTHER)
        k_tile = _load(k, other[0] * k_l, CHANNELS, BLOCK_D)
        v_tile = _load(v, other[0] * v_l, CHANNELS, BLOCK_D)
        logits = _logits(
            q_tile, k_tile, own, other, on_k, on_q, layout, shape, scale, mask, mask_own, mask_other, ON_K, ON_Q, MASK
        )
        p = tl.exp(logits - log_sum)
        grad = tl.dot(grad_tile, tl.trans(v_tile), input_precision="tf32x3")
        if ON_V:
            grad += _term(on_v, own[3], own[2], other[5], other[6], layout, shape)
        if DROPOUT:
            grad = _dropout(grad, seed, plane, token[:, None], other[0][None, :], length, dropout_p)
        grad = p * (grad - delta)
        total = tl.dot(grad.to(k_tile.dtype), k_tile, total, input_precision="tf32x3")
        if ON_K:
            run = _add_to_run(sums, run + grad, own, start, layout, shape)
    grad_q = grads + of_plane + _planes(chunks, OWN) * length * CHANNELS
    _store(grad_q, total * scale, token * heads * CHANNELS, own[1], CHANNELS, BLOCK_D)


@triton.jit(do_not_specialize=VARYING)
def keys_kernel(
    q,
    k,
    v,
    grad_out,
    on_k,
    on_q,
    on_v,
    sums,
    mask,
    seed,
    layout,
    log_sums,
    deltas,
    grads,
    q_b,
    q_h,
    q_l,
    k_b,
    k_h,
    k_l,
    v_b,
    v_h,
    v_l,
    grad_out_b,
    grad_out_h,
    grad_out_l,
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
    ON_K: tl.constexpr,
    ON_Q: tl.constexpr,
    ON_V: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    """Gradients of a block of keys and values and, with a term on queries, of the keys' products.

    They are the first and the third part of `grads`, and the first part of `sums`; see `queries_kernel`.
    """
    scale = tl.cast(scale, tl.float32)  # torch.compile passes numbers as float64
    dropout_p = tl.cast(dropout_p, tl.float32)
    shape = (rows, columns, prefix, row_step, column_step, chunks, padded, size)
    plane, b, h, first = _own_plane(chunks, heads, OWN)
    plane_64 = plane.to(tl.int64)
    q += b * q_b + h * q_h
    grad_out += b * grad_out_b + h * grad_out_h
    mask += b * mask_b + h * mask_h
    on_k += b * products_b + h * products_h
    on_q += b * products_b + h * products_h
    on_v += plane_64 * length * size
    log_sums += plane_64 * length
    deltas += plane_64 * length
    own = _side(first, shape, BIAS, OWN)
    token = own[0]
    k_tile = _load(k + b * k_b + h * k_h, token * k_l, CHANNELS, BLOCK_D)
    v_tile = _load(v + b * v_b + h * v_h, token * v_l, CHANNELS, BLOCK_D)
    total_k = tl.zeros((OWN, BLOCK_D), tl.float32)
    total_v = tl.zeros((OWN, BLOCK_D), tl.float32)
    if ON_Q:
        sums += plane_64 * length * size
        _clear_unmet(sums, own, layout, shape)
        run = tl.zeros((OWN, 16), tl.float32)
    for start in range(0, chunks, OTHER // 16):
        other = _side(start, shape, BIAS, OTHER)
        q_tile = _load(q, other[0] * q_l, CHANNELS, BLOCK_D)
        grad_tile = _load(grad_out, other[0] * grad_out_l, CHANNELS, BLOCK_D)
        logits = _logits(
            k_tile, q_tile, own, other, on_q, on_k, layout, shape, scale, mask, mask_own, mask_other, ON_Q, ON_K, MASK
        )
        p = tl.exp(logits - tl.load(log_sums + other[0])[None, :])
        weights = p
        grad = tl.dot(v_tile, tl.trans(grad_tile), input_precision="tf32x3")
        if ON_V:
            grad += tl.trans(_term(on_v, other[3], other[2], own[5], own[6], layout, shape))
        if DROPOUT:
            weights = _dropout(p, seed, plane, other[0][None, :], token[:, None], length, dropout_p)
            grad = _dropout(grad, seed, plane, other[0][None, :], token[:, None], length, dropout_p)
        total_v = tl.dot(weights.to(grad_tile.dtype), grad_tile, total_v, input_precision="tf32x3")
        grad = p * (grad - tl.load(deltas + other[0])[None, :])
        total_k = tl.dot(grad.to(q_tile.dtype), q_tile, total_k, input_precision="tf32x3")
        if ON_Q:
            run = _add_to_run(sums, run + grad, own, start, layout, shape)
    grad_k = grads + (b * length * heads + h) * CHANNELS  # in tensors of (B, L, H, D)
    grad_v = grad_k + 2 * _planes(chunks, OWN) * length * CHANNELS
    _store(grad_k, total_k * scale, token * heads * CHANNELS, own[1], CHANNELS, BLOCK_D)
    _store(grad_v, total_v, token * heads * CHANNELS, own[1], CHANNELS, BLOCK_D)


# --- Tables ----------------------------------------------------------------------------------------------------------
# Terms on up to three places (queries, keys, values) share a launch: `place` counts the places that have tables, and
# selects one of three tensors. If the heads share their tables, they form one group; otherwise every head is a group. A
# bias is treated as a table with a single channel, in which every token is 1.


@triton.jit
def _select(place, x_0, x_1, x_2):
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
    """A block of the tokens of one column, or of the prefix if `column` is `columns`, in all maps of a group.

    Returns: whether there is a token, where its products begin, and where its channels begin.
    """
    per_plane = tl.where(column == columns, prefix, rows)
    number = block * OWN + tl.arange(0, OWN)
    inside = number < planes * per_plane
    number = tl.minimum(number, planes * per_plane - 1)
    plane = number // per_plane
    row = number % per_plane
    b = (plane // (heads // groups)).to(tl.int64)
    h = group * (heads // groups) + plane % (heads // groups)
    token = tl.where(column == columns, row, prefix + row * row_step + column * column_step)
    at = ((b * heads + h) * length + tl.where(column == columns, rows, row) * columns) * size
    at += tl.where(column == columns, row, column) * size
    return inside, at, b * x_b + h * x_h + token * x_l


@triton.jit
def _channels(x, x_at, CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr, BIAS: tl.constexpr):
    """Load (tokens, channels). For a bias, there is a single channel, which is 1."""
    if BIAS:
        tile = tl.where(x_at[:, None] * 0 + tl.arange(0, BLOCK_D)[None, :] == 0, 1.0, 0.0)
    else:  # Triton would require the same type from two returns
        tile = _load(x, x_at, CHANNELS, BLOCK_D)
    return tile


@triton.jit
def _table_tile(
    place,
    column,
    group,
    start,
    table_0,
    table_1,
    table_2,
    table_3,
    table_4,
    table_5,
    layout,
    ids_offset,
    columns,
    size,
    buckets,
    scale,
    on_values,
    dtype: tl.constexpr,
    CROSS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OTHER: tl.constexpr,
):
    """Load a tile (channels, OTHER) of a place's table, in the order of the products of tokens in a column.

    Tables on queries and keys are (channels, buckets), and the tile is scaled; those on values are (buckets, channels).
    """
    channel = tl.arange(0, BLOCK_D)[:, None]
    by_channel = tl.where(place == on_values, 1, buckets)
    by_bucket = tl.where(place == on_values, CHANNELS, 1)
    of_group = group * CHANNELS * buckets + channel * by_channel
    m = start + tl.arange(0, OTHER)[None, :]
    bucket = tl.load(layout + ids_offset + column * size + m, mask=m < size, other=-1)
    used = (bucket >= 0) & (channel < CHANNELS)
    table = _select(place, table_0, table_1, table_2) + of_group
    value = tl.load(table + bucket * by_bucket, mask=used, other=0.0).to(tl.float32)
    if CROSS:
        bucket = tl.load(layout + ids_offset + (columns + 1 + column) * size + m, mask=m < size, other=-1)
        table = _select(place, table_3, table_4, table_5) + of_group
        value += tl.load(table + bucket * by_bucket, mask=used, other=0.0).to(tl.float32)
    factor = tl.where(place == on_values, 1.0, tl.cast(scale, tl.float32))  # torch.compile passes float64
    return (value * factor).to(dtype)


@triton.jit(do_not_specialize=VARYING)
def product_kernel(
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
    column_count,
    ids_offset,
    buckets,
    scale,
    on_values,
    CROSS: tl.constexpr,
    BIAS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    """products[place] = x·table for a block of the tokens of a column."""
    place = tl.program_id(1)
    column = tl.program_id(0) % column_count
    group = tl.program_id(0) // column_count % groups
    x = _select(place, x_0, x_1, x_2)
    x_b = _select(place, x_0_b, x_1_b, x_2_b)
    x_h = _select(place, x_0_h, x_1_h, x_2_h)
    x_l = _select(place, x_0_l, x_1_l, x_2_l)
    inside, at, x_at = _of_column(
        tl.program_id(0) // column_count // groups,
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
    dtype: tl.constexpr = products.dtype.element_ty
    tile = _channels(x, x_at, CHANNELS, BLOCK_D, BIAS).to(dtype)
    products += place.to(tl.int64) * planes * groups * length * size
    for start in range(0, size, OTHER):
        table = _table_tile(
            place,
            column,
            group,
            start,
            table_0,
            table_1,
            table_2,
            table_3,
            table_4,
            table_5,
            layout,
            ids_offset,
            columns,
            size,
            buckets,
            scale,
            on_values,
            dtype,
            CROSS,
            CHANNELS,
            BLOCK_D,
            OTHER,
        )
        m = start + tl.arange(0, OTHER)[None, :]
        result = tl.dot(tile, table, input_precision="tf32x3")
        tl.store(products + at[:, None] + m, result.to(dtype), mask=inside[:, None] & (m < size))


@triton.jit(do_not_specialize=VARYING)
def adjoint_kernel(
    x,
    products,
    table_0,
    table_1,
    table_2,
    table_3,
    table_4,
    table_5,
    layout,
    x_b,
    x_h,
    x_l,
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
    column_count,
    ids_offset,
    buckets,
    scale,
    on_values,
    first,
    CROSS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    """x[first + place] += products[place]·tableᵀ for a block of the tokens of a column; x is (…, B, L, H, D)."""
    place = tl.program_id(1)
    column = tl.program_id(0) % column_count
    group = tl.program_id(0) // column_count % groups
    inside, at, x_at = _of_column(
        tl.program_id(0) // column_count // groups,
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
    dtype: tl.constexpr = products.dtype.element_ty
    x += (first + place).to(tl.int64) * planes * groups * length * CHANNELS
    products += place.to(tl.int64) * planes * groups * length * size
    total = tl.zeros((OWN, BLOCK_D), tl.float32)
    for start in range(0, size, OTHER):
        table = _table_tile(
            place,
            column,
            group,
            start,
            table_0,
            table_1,
            table_2,
            table_3,
            table_4,
            table_5,
            layout,
            ids_offset,
            columns,
            size,
            buckets,
            scale,
            on_values,
            dtype,
            CROSS,
            CHANNELS,
            BLOCK_D,
            OTHER,
        )
        m = start + tl.arange(0, OTHER)[None, :]
        of_products = tl.load(products + at[:, None] + m, mask=m < size, other=0.0)
        total = tl.dot(of_products, tl.trans(table), total, input_precision="tf32x3")
    total += _load(x, x_at, CHANNELS, BLOCK_D)
    _store(x, total, x_at, inside, CHANNELS, BLOCK_D)


@triton.jit(do_not_specialize=VARYING)
def gradient_kernel(
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
    column_count,
    steps,
    BIAS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    """partial[split, place, group, column, m, channel] = Σ of products·x over some blocks of the tokens of a column."""
    place = tl.program_id(1)
    split = tl.program_id(2)
    parts = tl.cdiv(size, OTHER)
    m = tl.program_id(0) % parts * OTHER + tl.arange(0, OTHER)
    column = tl.program_id(0) // parts % column_count
    group = tl.program_id(0) // parts // column_count
    x = _select(place, x_0, x_1, x_2)
    x_b = _select(place, x_0_b, x_1_b, x_2_b)
    x_h = _select(place, x_0_h, x_1_h, x_2_h)
    x_l = _select(place, x_0_l, x_1_l, x_2_l)
    products = _select(place, products_0, products_1, products_2)
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
            x_b,
            x_h,
            x_l,
            OWN,
        )
        tile = _channels(x, x_at, CHANNELS, BLOCK_D, BIAS)
        used = inside[:, None] & (m < size)[None, :]
        of_products = tl.trans(tl.load(products + at[:, None] + m[None, :], mask=used, other=0.0))
        total = tl.dot(of_products, tile.to(of_products.dtype), total, input_precision="tf32x3")
    part = ((split * tl.num_programs(1) + place) * groups + group) * (columns + 1) + column
    partial += (part * CHANNELS).to(tl.int64) * size
    _store(partial, total, m * CHANNELS, m < size, CHANNELS, BLOCK_D)


@triton.jit(do_not_specialize=VARYING)
def collect_kernel(
    partial,
    layout,
    grads,
    groups,
    columns,
    ids_offset,
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
    """The gradient of one bucket: the sum of `partial` over all splits and over the positions that use the bucket."""
    bucket = tl.program_id(0) % buckets
    table = tl.program_id(0) // buckets % tables
    group = tl.program_id(0) // buckets // tables
    place = tl.program_id(1)
    starts = layout + ids_offset + tables * (columns + 1) * size + table * buckets + bucket
    first = tl.load(starts)
    count = tl.load(starts + 1) - first
    where = layout + ids_offset + tables * ((columns + 1) * size + buckets) + 1 + first
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
    by_channel = tl.where(place == on_values, 1, buckets)
    by_bucket = tl.where(place == on_values, CHANNELS, 1)
    grads += ((place * tables + table) * groups + group) * CHANNELS * buckets
    grads += channel * by_channel + bucket * by_bucket
    factor = tl.where(place == on_values, 1.0, tl.cast(scale, tl.float32))  # torch.compile passes float64
    tl.store(grads, (tl.sum(total, 0) * factor).to(grads.dtype.element_ty), mask=channel < CHANNELS)
