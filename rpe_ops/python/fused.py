"""Attention with relative positions on a GPU, in Triton: forward and backward without a kept tensor of tokens × tokens.

The kernels know nothing of tables. They get the products of queries and keys with the tables, (B, H, L, buckets), look
them up by the shared ids as they make a tile of logits, and give back sums per bucket of the same shape; PyTorch
differentiates the rest. FUSED.md weighs this design against others.

A plane is one head of one picture. Where two tables act in one place, as in a cross, their products lie side by side.
"""
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rpe_index import rpe_bucket_sum

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_WORKSPACE = 2 ** 24  # weights, or gradients of logits, that wait for their sums per bucket at a time


def attention(q, k, v, on_q, on_k, on_v, mask, dropout_p):
    """`rpe_ops.attention` in float16, bfloat16 or float32, for what `takes` says; ids are not checked.

    A query that the mask hides everything from gets zeros, and gives none but zero gradients. Gradients are the same
    in every run; they have no derivatives themselves.
    """
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    mask = None if mask is None else mask.expand(*q.shape[:3], q.shape[2])
    seed = torch.randint(2 ** 62, (1,), device=q.device) if dropout_p else None
    ids_q, ids_k, ids_v = ([ids for ids, _ in terms] for terms in (on_q, on_k, on_v))
    out, sums, _ = torch.ops.rpe_ops.fused_attention(
        q, k, v, _products(k, on_q), _products(q, on_k), ids_q, ids_k, ids_v,
        on_v[0][1].shape[-2] if on_v else 0, mask, seed, float(dropout_p))
    return out + torch.matmul(sums, torch.cat([table for _, table in on_v], -2)) if on_v else out


def takes(q, k, v):
    """Whether q, k and v are for `attention`: of one shape, at most 128 channels, on a GPU (or in the interpreter)."""
    dtype = torch.get_autocast_dtype(q.device.type) if torch.is_autocast_enabled(q.device.type) else q.dtype
    return (q.device.type == ("cpu" if INTERPRETED else "cuda") and q.shape == k.shape == v.shape
            and q.numel() > 0 and q.shape[3] <= 128 and dtype in (torch.float16, torch.bfloat16, torch.float32))


def _products(x, terms):
    if not terms:
        return x.new_empty(*x.shape[:3], 0)
    tables = torch.cat([table for _, table in terms], -1)
    # a table with four dimensions is a bias: its products are the same for every token
    return torch.matmul(x, tables) if tables.dim() < 4 else tables.expand(*x.shape[:3], -1)


# --- Kernels ---------------------------------------------------------------------------------------------------------
# A program has a block of tokens of its own, `own`, and goes through the others, `other`: its queries through all keys,
# or its keys through all queries. A tile is (own, other). Places beyond the end get the values of the last token.

# one kernel for maps of all sizes: to compile another takes longer than a training step may
_VARYING = ["own_terms", "other_terms", "first", "length", "mask_b", "mask_h"]


@triton.jit
def _load(x, token, stride, channels, BLOCK_D: tl.constexpr):
    """(tokens, channels) of a plane."""
    channel = tl.arange(0, BLOCK_D)[None, :]
    return tl.load(x + token[:, None] * stride + channel, mask=channel < channels, other=0.0)


@triton.jit
def _store(x, tile, plane, place, heads, length, channels, BLOCK_D: tl.constexpr):
    """Write (tokens, channels) of a plane to a contiguous (B, L, H, D)."""
    channel = tl.arange(0, BLOCK_D)[None, :]
    token = (plane // heads).to(tl.int64) * length + place[:, None]
    tl.store(x + (token * heads + plane % heads) * channels + channel, tile.to(x.dtype.element_ty),
             mask=(place[:, None] < length) & (channel < channels))


@triton.jit
def _keep(memory, tile, place, other_place, length, inside):
    """Write a tile of a plane to a contiguous (L, L)."""
    tl.store(memory + place[:, None] * length + other_place[None, :], tile.to(memory.dtype.element_ty),
             mask=(place < length)[:, None] & inside)


@triton.jit
def _own(first, length, BLOCK: tl.constexpr):
    """A program's plane, and places and tokens of its block."""
    blocks = tl.cdiv(length, BLOCK)
    place = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return first + tl.program_id(0) // blocks, place, tl.minimum(place, length - 1)


@triton.jit
def _other(start, place, length, padded, STEP: tl.constexpr):
    """Places and tokens of the others that a tile begins with `start`, and its pairs."""
    other_place = start + tl.arange(0, STEP)
    return other_place, tl.minimum(other_place, length - 1), place[:, None] * padded + other_place[None, :]


@triton.jit
def _looked_up(x, products, owner, ids, pair, pairs, buckets, terms):
    """x[pair] + Σ over terms of products[owner, term, ids[term, pair]], the owner being one side of the pair."""
    # a loop, though it has one or two rounds: the terms' registers are not to be alive together
    for term in range(terms):
        bucket = tl.minimum(tl.load(ids + term * pairs + pair).to(tl.int32), buckets - 1)
        x += tl.load(products + (owner * terms + term) * buckets + bucket).to(tl.float32)
    return x


@triton.jit
def _logits(own, other, token, other_token, pair, pairs, inside, own_products, own_ids, own_buckets, own_terms,
            other_products, other_ids, other_buckets, other_terms, mask, mask_own, mask_other, MASKED: tl.constexpr):
    """A tile of logits in float32, -∞ where it is not inside."""
    tokens, other_tokens = token[:, None], other_token[None, :]
    logits = tl.dot(own, tl.trans(other), input_precision="tf32x3")
    logits = _looked_up(logits, own_products, tokens, own_ids, pair, pairs, own_buckets, own_terms)
    logits = _looked_up(logits, other_products, other_tokens, other_ids, pair, pairs, other_buckets, other_terms)
    if MASKED:
        logits += tl.load(mask + tokens * mask_own + other_tokens * mask_other).to(tl.float32)
    return tl.where(inside, logits, float("-inf"))


@triton.jit
def _kept(seed, place, dropout_p, scale):
    """What dropout multiplies by; it depends on the seed and on the place alone."""
    return tl.where(tl.rand(tl.load(seed), place) >= dropout_p, scale, 0.0)


@triton.jit(do_not_specialize=_VARYING)
def _forward_kernel(own, other, other_v, own_products, own_ids, own_buckets, own_terms, other_products, other_ids,
                    other_buckets, other_terms, mask, seed, out, log_sums, memory,
                    own_b, own_h, own_l, other_b, other_h, other_l, other_v_b, other_v_h, other_v_l, mask_b, mask_h,
                    mask_own, mask_other, padded, pairs, first, heads, length, channels, dropout_p, scale,
                    MASKED: tl.constexpr, DROPOUT: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr,
                    STEP: tl.constexpr, BLOCK_D: tl.constexpr):
    """Output of a block of queries, and the logarithms of their softmax's sums; with KEEP their weights, in memory."""
    plane, place, token = _own(first, length, BLOCK)
    b, h, plane_64 = (plane // heads).to(tl.int64), plane % heads, plane.to(tl.int64)
    other += b * other_b + h * other_h
    other_v += b * other_v_b + h * other_v_h
    mask += b * mask_b + h * mask_h
    own_products += plane_64 * length * own_terms * own_buckets
    other_products += plane_64 * length * other_terms * other_buckets
    own_tile = _load(own + b * own_b + h * own_h, token, own_l, channels, BLOCK_D)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    mean = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for start in range(0, length, STEP):
        other_place, other_token, pair = _other(start, place, length, padded, STEP)
        logits = _logits(own_tile, _load(other, other_token, other_l, channels, BLOCK_D), token, other_token, pair,
                         pairs, (other_place < length)[None, :], own_products, own_ids, own_buckets, own_terms,
                         other_products, other_ids, other_buckets, other_terms, mask, mask_own, mask_other, MASKED)
        larger = tl.maximum(largest, tl.max(logits, 1))
        finite = tl.where(larger == float("-inf"), 0.0, larger)  # no difference of infinities
        shrink = tl.exp(largest - finite)
        p = tl.exp(logits - finite[:, None])
        total = total * shrink + tl.sum(p, 1)
        if DROPOUT:
            p *= _kept(seed, plane_64 * pairs + pair, dropout_p, scale)
        v_tile = _load(other_v, other_token, other_v_l, channels, BLOCK_D)
        mean = tl.dot(p.to(v_tile.dtype), v_tile, mean * shrink[:, None], input_precision="tf32x3")
        largest = larger
    blind = total == 0.0
    _store(out, mean / tl.where(blind, 1.0, total)[:, None], plane, place, heads, length, channels, BLOCK_D)
    # +∞ makes all weights of a query that sees nothing zero, also in the backward pass
    log_sum = tl.where(blind, float("inf"), largest + tl.log(tl.where(blind, 1.0, total)))
    tl.store(log_sums + plane_64 * length + place, log_sum, mask=place < length)
    if KEEP:
        memory += (plane_64 - first) * length * length
        for start in range(0, length, STEP):
            other_place, other_token, pair = _other(start, place, length, padded, STEP)
            inside = (other_place < length)[None, :]
            logits = _logits(own_tile, _load(other, other_token, other_l, channels, BLOCK_D), token, other_token, pair,
                             pairs, inside, own_products, own_ids, own_buckets, own_terms, other_products, other_ids,
                             other_buckets, other_terms, mask, mask_own, mask_other, MASKED)
            p = tl.exp(logits - log_sum[:, None])
            if DROPOUT:
                p *= _kept(seed, plane_64 * pairs + pair, dropout_p, scale)
            _keep(memory, p, place, other_place, length, inside)


@triton.jit
def _weights(own_tile, own_v_tile, other_tile, other_v, other_v_l, channels, log_sum, token, other_token, query, pair,
             pairs, inside, own_products, own_ids, own_buckets, own_terms, other_products, other_ids, other_buckets,
             other_terms, v_products, v_ids, v_buckets, v_terms, mask, mask_own, mask_other, MASKED: tl.constexpr,
             BLOCK_D: tl.constexpr):
    """A tile of the softmax's weights, of their gradients as far as dropout leaves them, and the others' values."""
    logits = _logits(own_tile, other_tile, token, other_token, pair, pairs, inside, own_products, own_ids, own_buckets,
                     own_terms, other_products, other_ids, other_buckets, other_terms, mask, mask_own, mask_other,
                     MASKED)
    p = tl.exp(logits - log_sum)
    other_v_tile = _load(other_v, other_token, other_v_l, channels, BLOCK_D)  # no earlier: it takes registers
    grad_p = tl.dot(own_v_tile, tl.trans(other_v_tile), input_precision="tf32x3")
    return p, _looked_up(grad_p, v_products, query, v_ids, pair, pairs, v_buckets, v_terms), other_v_tile


@triton.jit
def _delta(own_tile, own_v_tile, other, other_l, other_v, other_v_l, channels, place, token, log_sum, pairs,
           own_products, own_ids, own_buckets, own_terms, other_products, other_ids, other_buckets, other_terms,
           v_products, v_ids, v_buckets, v_terms, mask, mask_own, mask_other, padded, length, seed, plane_64, dropout_p,
           scale, deltas, MASKED: tl.constexpr, DROPOUT: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
           BLOCK_D: tl.constexpr):
    """Σ over keys of p·(gradient of p) for a block of queries (own, 1), also written to `deltas`.

    The product of the output and its gradient is the same, but rounded otherwise than the gradients of p it is to be
    subtracted from: where values have much in common that would cost the difference its digits.
    """
    delta = tl.zeros((BLOCK,), tl.float32)
    weight = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, length, STEP):
        other_place, other_token, pair = _other(start, place, length, padded, STEP)
        p, grad_p, _ = _weights(
            own_tile, own_v_tile, _load(other, other_token, other_l, channels, BLOCK_D), other_v, other_v_l, channels,
            log_sum, token, other_token, token[:, None], pair, pairs, (other_place < length)[None, :], own_products,
            own_ids, own_buckets, own_terms, other_products, other_ids, other_buckets, other_terms, v_products, v_ids,
            v_buckets, v_terms, mask, mask_own, mask_other, MASKED, BLOCK_D)
        if DROPOUT:
            grad_p *= _kept(seed, plane_64 * pairs + pair, dropout_p, scale)
        delta += tl.sum(p * grad_p, 1)
        weight += tl.sum(p, 1)
    delta /= tl.where(weight == 0.0, 1.0, weight)  # of p as it is here, whose sum is 1 but for rounding
    tl.store(deltas + place, delta, mask=place < length)
    return delta[:, None]


@triton.jit(do_not_specialize=[*_VARYING, "v_terms"])
def _backward_kernel(own, other, own_v, other_v, own_products, own_ids, own_buckets, own_terms, other_products,
                     other_ids, other_buckets, other_terms, v_products, v_ids, v_buckets, v_terms, mask, seed,
                     log_sums, deltas, own_grad, own_v_grad, memory,
                     own_b, own_h, own_l, other_b, other_h, other_l, own_v_b, own_v_h, own_v_l, other_v_b, other_v_h,
                     other_v_l, mask_b, mask_h, mask_own, mask_other, padded, pairs, first, heads, length,
                     channels, dropout_p, scale, MASKED: tl.constexpr, DROPOUT: tl.constexpr, BY_KEY: tl.constexpr,
                     KEEP: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr):
    """Gradients of a block of queries or, BY_KEY, of keys and values; with KEEP those of their logits, in memory.

    Queries have for values the gradients of their output, and `v_products` are the gradients of the sums per bucket.
    Queries leave their `deltas`, Σ over keys of p·(gradient of p), to the keys.
    """
    plane, place, token = _own(first, length, BLOCK)
    b, h, plane_64 = (plane // heads).to(tl.int64), plane % heads, plane.to(tl.int64)
    other += b * other_b + h * other_h
    other_v += b * other_v_b + h * other_v_h
    mask += b * mask_b + h * mask_h
    own_products += plane_64 * length * own_terms * own_buckets
    other_products += plane_64 * length * other_terms * other_buckets
    v_products += plane_64 * length * v_terms * v_buckets
    log_sums += plane_64 * length
    deltas += plane_64 * length
    memory += (plane_64 - first) * length * length
    own_tile = _load(own + b * own_b + h * own_h, token, own_l, channels, BLOCK_D)
    own_v_tile = _load(own_v + b * own_v_b + h * own_v_h, token, own_v_l, channels, BLOCK_D)
    if not BY_KEY:
        query, log_sum = token[:, None], tl.load(log_sums + token)[:, None]
        delta = _delta(own_tile, own_v_tile, other, other_l, other_v, other_v_l, channels, place, token, log_sum, pairs,
                       own_products, own_ids, own_buckets, own_terms, other_products, other_ids, other_buckets,
                       other_terms, v_products, v_ids, v_buckets, v_terms, mask, mask_own, mask_other, padded, length,
                       seed, plane_64, dropout_p, scale, deltas, MASKED, DROPOUT, BLOCK, STEP, BLOCK_D)
    total = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    total_v = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for start in range(0, length, STEP):
        other_place, other_token, pair = _other(start, place, length, padded, STEP)
        inside = (other_place < length)[None, :]
        other_tile = _load(other, other_token, other_l, channels, BLOCK_D)
        if BY_KEY:
            query = other_token[None, :]
            delta, log_sum = tl.load(deltas + query), tl.load(log_sums + query)
        p, grad_p, other_v_tile = _weights(
            own_tile, own_v_tile, other_tile, other_v, other_v_l, channels, log_sum, token, other_token, query, pair,
            pairs, inside, own_products, own_ids, own_buckets, own_terms, other_products, other_ids, other_buckets,
            other_terms, v_products, v_ids, v_buckets, v_terms, mask, mask_own, mask_other, MASKED, BLOCK_D)
        if DROPOUT:
            draw = other_place[None, :] * padded + place[:, None] if BY_KEY else pair
            kept = _kept(seed, plane_64 * pairs + draw, dropout_p, scale)
            grad_p *= kept
        grad_logits = (p * (grad_p - delta)).to(other_tile.dtype)
        if KEEP:
            _keep(memory, grad_logits, place, other_place, length, inside)
        total = tl.dot(grad_logits, other_tile, total, input_precision="tf32x3")
        if BY_KEY:
            if DROPOUT:
                p *= kept
            total_v = tl.dot(p.to(other_v_tile.dtype), other_v_tile, total_v, input_precision="tf32x3")
    _store(own_grad, total, plane, place, heads, length, channels, BLOCK_D)
    if BY_KEY:
        _store(own_v_grad, total_v, plane, place, heads, length, channels, BLOCK_D)


# --- Operators -------------------------------------------------------------------------------------------------------

@torch.library.custom_op("rpe_ops::fused_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, products_q: Tensor, products_k: Tensor, ids_q: list[Tensor],
             ids_k: list[Tensor], ids_v: list[Tensor], buckets_v: int, mask: Tensor | None, seed: Tensor | None,
             dropout_p: float) -> tuple[Tensor, Tensor, Tensor]:
    """(output without the term on values, sums of the weights per bucket, logarithms of the softmax's sums)"""
    out, log_sums = _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    arguments = {**_sides(q, k, mask), **_values("other_v", v), **_terms("own", products_k, ids_k),
                 **_terms("other", products_q, ids_q), **_dropout(seed, dropout_p), "out": out, "log_sums": log_sums}
    return out, _sums_per_bucket(_forward_kernel, q, ids_v, buckets_v, arguments), log_sums


@torch.library.custom_op("rpe_ops::fused_attention_backward", mutates_args=())
def _backward(grad: Tensor, grad_sums: Tensor, log_sums: Tensor, q: Tensor, k: Tensor, v: Tensor, products_q: Tensor,
              products_k: Tensor, ids_q: list[Tensor], ids_k: list[Tensor], ids_v: list[Tensor], buckets_v: int,
              mask: Tensor | None, seed: Tensor | None,
              dropout_p: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the products"""
    grad_q, grad_k, grad_v = (_like(q) for _ in range(3))
    shared = {"log_sums": log_sums, "deltas": torch.empty_like(log_sums), "own_v_grad": grad_v,
              **_dropout(seed, dropout_p)}
    queries = {**shared, **_sides(q, k, mask), **_values("own_v", grad), **_values("other_v", v), "own_grad": grad_q,
               **_terms("own", products_k, ids_k), **_terms("other", products_q, ids_q),
               **_terms("v", grad_sums, ids_v), "BY_KEY": False}
    sums_k = _sums_per_bucket(_backward_kernel, q, ids_k, products_k.shape[3] // max(len(ids_k), 1), queries)
    # after the queries, which leave the deltas
    keys = {**shared, **_sides(k, q, mask, by_key=True), **_values("own_v", v), **_values("other_v", grad),
            "own_grad": grad_k, **_terms("own", products_q, ids_q, True), **_terms("other", products_k, ids_k, True),
            **_terms("v", grad_sums, ids_v, True), "BY_KEY": True}
    sums_q = _sums_per_bucket(_backward_kernel, q, [ids.t() for ids in ids_q],
                              products_q.shape[3] // max(len(ids_q), 1), keys)
    return grad_q, grad_k, grad_v, sums_q.to(products_q.dtype), sums_k.to(products_k.dtype)


def _sides(own, other, mask, by_key=False):
    """Arguments of a launch that say where things lie."""
    length = own.shape[2]
    padded = _padded(length)
    strides = (0,) * 4 if mask is None else mask.stride()
    across = (1, 0) if by_key else (0, 1)
    return {**_values("own", own), **_values("other", other), "heads": own.shape[1], "length": length,
            "channels": own.shape[3], "mask": own if mask is None else mask, "mask_b": strides[0],
            "mask_h": strides[1], "mask_own": strides[2 + across[0]], "mask_other": strides[2 + across[1]],
            "padded": padded, "pairs": padded ** 2, "MASKED": mask is not None}


def _values(name, x):
    x = x if x.stride(3) == 1 else x.contiguous()
    return {name: x, f"{name}_b": x.stride(0), f"{name}_h": x.stride(1), f"{name}_l": x.stride(2)}


def _terms(name, products, ids, by_key=False):
    """Products and ids of one place; ids (own, other) in the narrowest type, of all terms, padded to whole tiles."""
    length, buckets = products.shape[2], products.shape[3] // max(len(ids), 1)
    dtype = torch.uint8 if buckets <= 2 ** 8 else torch.int16 if buckets <= 2 ** 15 else torch.int32
    narrow = products.new_zeros(len(ids), _padded(length), _padded(length), dtype=dtype)
    for term, indices in enumerate(ids):
        narrow[term, :length, :length] = indices.t() if by_key else indices
    return {f"{name}_products": products.contiguous(), f"{name}_ids": narrow, f"{name}_buckets": buckets,
            f"{name}_terms": len(ids)}


def _padded(length):
    return triton.cdiv(length, 64) * 64


def _dropout(seed, p):
    # without dropout nobody reads the seed, but a kernel wants a pointer
    return {"seed": torch.empty(0, dtype=torch.int64) if seed is None else seed, "dropout_p": p,
            "scale": 1 / (1 - p) if p < 1 else 0.0, "DROPOUT": p > 0}


def tiling(dtype, channels):
    """Tokens and channels of a tile: the largest that spills no registers (benchmarks/fused_ptxas.txt)."""
    small, large = ((32, 16), (16, 16)) if dtype == torch.float32 else ((64, 32), (64, 16))
    block, step = small if channels <= 64 else large
    return {"BLOCK": block, "STEP": step, "BLOCK_D": max(16, triton.next_power_of_2(channels)), "num_warps": 8,
            "num_stages": 1, "maxnreg": 255}


def _sums_per_bucket(kernel, q, ids, buckets, arguments):
    """Run a kernel, some planes at a time; returns the sums (B, H, L, terms·buckets) of what it leaves in memory."""
    planes, length = q.shape[0] * q.shape[1], q.shape[2]
    step = min(planes, max(1, _WORKSPACE // length ** 2)) if ids else planes
    memory = q.new_empty(step, length, length) if ids else q
    sums = q.new_empty(planes, length, len(ids), buckets)
    options = tiling(q.dtype, q.shape[3])
    for first in range(0, planes, step):
        last = min(first + step, planes)
        _launch(kernel, (last - first) * triton.cdiv(length, options["BLOCK"]), first=first, memory=memory,
                KEEP=bool(ids), **arguments, **options)
        for term, indices in enumerate(ids):
            sums[first:last, :, term] = rpe_bucket_sum(memory[None, :last - first], indices, buckets)[0]
    return sums.flatten(2).unflatten(0, q.shape[:2])


def _launch(kernel, programs, **arguments):
    with torch.cuda.device_of(arguments["own"]):
        kernel[programs,](**arguments)


def _like(x):
    """Uninitialised (B, H, L, D) whose heads join to channels without a copy."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


@_forward.register_fake
def _(q, k, v, products_q, products_k, ids_q, ids_k, ids_v, buckets_v, mask, seed, dropout_p):
    return _like(q), q.new_empty(*q.shape[:3], len(ids_v) * buckets_v), q.new_empty(q.shape[:3], dtype=torch.float32)


@_backward.register_fake
def _(grad, grad_sums, log_sums, q, k, v, products_q, products_k, *_):
    return *(_like(q) for _ in range(3)), *(x.new_empty(x.shape) for x in (products_q, products_k))


def _save(ctx, inputs, output):
    *tensors, ids_q, ids_k, ids_v, ctx.buckets_v, mask, seed, ctx.dropout_p = inputs
    ctx.save_for_backward(output[2], *tensors, mask, seed)
    ctx.ids = ids_q, ids_k, ids_v


def _differentiate(ctx, grad, grad_sums, _):
    *tensors, mask, seed = ctx.saved_tensors
    grads = torch.ops.rpe_ops.fused_attention_backward(grad, grad_sums, *tensors, *ctx.ids, ctx.buckets_v, mask, seed,
                                                       ctx.dropout_p)
    return *grads, *([None] * len(ids) for ids in ctx.ids), None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
