"""Attention with relative positions on a GPU, in Triton: forward and backward without a kept tensor of tokens × tokens.

The kernels know nothing of tables. They get the products of queries and keys with the tables, (B, H, L, buckets), look
them up by the shared ids as they make a tile of logits, and give back sums per bucket of the same shape; PyTorch
differentiates the rest. FUSED.md weighs this design against others.

A plane is one head of one picture. Where two tables act in one place, as in a cross, their products lie side by side.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rpe_index import rpe_bucket_sum

INTERPRETED = triton.knobs.runtime.interpret if hasattr(triton, "knobs") else False
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


def takes(q, k, v, mask):
    """Whether `attention` is for this call: of one shape, at most 128 channels, on a GPU (or under the interpreter)."""
    dtype = torch.get_autocast_dtype(q.device.type) if torch.is_autocast_enabled(q.device.type) else q.dtype
    return (q.device.type == ("cpu" if INTERPRETED else "cuda") and q.shape == k.shape == v.shape
            and q.shape[3] <= 128 and dtype in (torch.float16, torch.bfloat16, torch.float32)
            and (mask is None or not mask.requires_grad))


def _products(x, terms):
    if not terms:
        return x.new_empty(*x.shape[:3], 0)
    tables = torch.cat([table for _, table in terms], -1)
    # a table with four dimensions is a bias: its products are the same for every token
    return torch.matmul(x, tables) if tables.dim() < 4 else tables.expand(*x.shape[:3], -1)


# --- Kernels ---------------------------------------------------------------------------------------------------------

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
def _looked_up(x, products, owner, ids, pair, pairs, buckets, terms):
    """x[i, j] + Σ over terms of products[owner, term, ids[term, i, j]], where the owner is i or j."""
    for term in range(terms):
        bucket = tl.load(ids + term * pairs + pair).to(tl.int32)
        x += tl.load(products + (owner * terms + term) * buckets + tl.minimum(bucket, buckets - 1)).to(tl.float32)
    return x


@triton.jit
def _logits(q, k, row, col, pair, pairs, inside, products_q, products_k, ids_q, ids_k, mask, mask_i, mask_j, buckets_q,
            buckets_k, terms_q, terms_k, MASKED: tl.constexpr):
    """A tile of logits in float32, -∞ where it is not inside."""
    rows, cols = row[:, None], col[None, :]
    logits = tl.dot(q, tl.trans(k), input_precision="tf32x3")
    logits = _looked_up(logits, products_k, rows, ids_k, pair, pairs, buckets_k, terms_k)
    logits = _looked_up(logits, products_q, cols, ids_q, pair, pairs, buckets_q, terms_q)
    if MASKED:
        logits += tl.load(mask + rows * mask_i + cols * mask_j).to(tl.float32)
    return tl.where(inside, logits, float("-inf"))


@triton.jit
def _dropped(x, seed, place, dropout_p, scale):
    """Dropout that depends on the seed and on the place alone."""
    return tl.where(tl.rand(tl.load(seed), place) >= dropout_p, x * scale, 0.0)


@triton.jit(do_not_specialize=["terms_q", "terms_k"])
def _forward_kernel(q, k, v, products_q, products_k, ids_q, ids_k, mask, seed, out, log_sums, weights,
                    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, mask_b, mask_h, mask_i, mask_j,
                    first, heads, length, padded, channels, buckets_q, buckets_k, terms_q, terms_k, dropout_p, scale,
                    MASKED: tl.constexpr, DROPOUT: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr,
                    BLOCK_D: tl.constexpr):
    """Output of a block of queries and the logarithms of their softmax's sums; with KEEP their weights as well."""
    blocks, pairs = tl.cdiv(length, BLOCK), padded * padded
    plane = first + tl.program_id(0) // blocks
    b, h = (plane // heads).to(tl.int64), plane % heads
    q, k, v = q + b * q_b + h * q_h, k + b * k_b + h * k_h, v + b * v_b + h * v_h
    mask += b * mask_b + h * mask_h
    products_q += plane.to(tl.int64) * length * terms_q * buckets_q
    products_k += plane.to(tl.int64) * length * terms_k * buckets_k
    own = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    row = tl.minimum(own, length - 1)  # beyond the end the last token again, which nobody sees
    q_tile = _load(q, row, q_l, channels, BLOCK_D)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    mean = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for start in range(0, length, BLOCK):
        other = start + tl.arange(0, BLOCK)
        col = tl.minimum(other, length - 1)
        pair = own[:, None] * padded + other[None, :]
        inside = (other < length)[None, :]
        k_tile = _load(k, col, k_l, channels, BLOCK_D)
        logits = _logits(q_tile, k_tile, row, col, pair, pairs, inside, products_q, products_k, ids_q, ids_k, mask,
                         mask_i, mask_j, buckets_q, buckets_k, terms_q, terms_k, MASKED)
        larger = tl.maximum(largest, tl.max(logits, 1))
        finite = tl.where(larger == float("-inf"), 0.0, larger)  # no difference of infinities
        shrink = tl.exp(largest - finite)
        p = tl.exp(logits - finite[:, None])
        total = total * shrink + tl.sum(p, 1)
        if DROPOUT:
            p = _dropped(p, seed, plane.to(tl.int64) * pairs + pair, dropout_p, scale)
        v_tile = _load(v, col, v_l, channels, BLOCK_D)
        mean = tl.dot(p.to(v_tile.dtype), v_tile, mean * shrink[:, None], input_precision="tf32x3")
        largest = larger
    blind = total == 0.0
    _store(out, mean / tl.where(blind, 1.0, total)[:, None], plane, own, heads, length, channels, BLOCK_D)
    # +∞ makes all weights of a query that sees nothing zero, also in the backward pass
    log_sum = tl.where(blind, float("inf"), largest + tl.log(tl.where(blind, 1.0, total)))
    tl.store(log_sums + plane.to(tl.int64) * length + own, log_sum, mask=own < length)
    if KEEP:
        weights += (plane - first).to(tl.int64) * length * length
        for start in range(0, length, BLOCK):
            other = start + tl.arange(0, BLOCK)
            col = tl.minimum(other, length - 1)
            pair = own[:, None] * padded + other[None, :]
            inside = (other < length)[None, :]
            k_tile = _load(k, col, k_l, channels, BLOCK_D)
            logits = _logits(q_tile, k_tile, row, col, pair, pairs, inside, products_q, products_k, ids_q, ids_k, mask,
                             mask_i, mask_j, buckets_q, buckets_k, terms_q, terms_k, MASKED)
            p = tl.exp(logits - log_sum[:, None])
            if DROPOUT:
                p = _dropped(p, seed, plane.to(tl.int64) * pairs + pair, dropout_p, scale)
            tl.store(weights + own[:, None] * length + other[None, :], p.to(weights.dtype.element_ty),
                     mask=(own < length)[:, None] & inside)


@triton.jit(do_not_specialize=["terms_q", "terms_k", "terms_v"])
def _backward_kernel(q, k, v, grad, products_q, products_k, products_v, ids_q, ids_k, ids_v, mask, seed, out, log_sums,
                     deltas, grad_q, grad_k, grad_v, grad_logits,
                     q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, grad_b, grad_h, grad_l, mask_b, mask_h, mask_i,
                     mask_j, first, heads, length, padded, channels, buckets_q, buckets_k, buckets_v, terms_q, terms_k,
                     terms_v, dropout_p, scale, MASKED: tl.constexpr, DROPOUT: tl.constexpr, BY_KEY: tl.constexpr,
                     KEEP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Gradients of a block of queries or, BY_KEY, of keys and values; with KEEP those of their logits as well.

    `products_v` are the gradients of the sums per bucket. What is kept is (plane, i, j) or, BY_KEY, (plane, j, i).
    `deltas`, Σ over j of p·(gradient of p), arrive with what the sums per bucket contribute; queries add the rest.
    """
    blocks, pairs = tl.cdiv(length, BLOCK), padded * padded
    plane = first + tl.program_id(0) // blocks
    b, h = (plane // heads).to(tl.int64), plane % heads
    q, k, v = q + b * q_b + h * q_h, k + b * k_b + h * k_h, v + b * v_b + h * v_h
    grad += b * grad_b + h * grad_h
    mask += b * mask_b + h * mask_h
    products_q += plane.to(tl.int64) * length * terms_q * buckets_q
    products_k += plane.to(tl.int64) * length * terms_k * buckets_k
    products_v += plane.to(tl.int64) * length * terms_v * buckets_v
    log_sums += plane.to(tl.int64) * length
    deltas += plane.to(tl.int64) * length
    grad_logits += (plane - first).to(tl.int64) * length * length
    own = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    token = tl.minimum(own, length - 1)  # beyond the end the last token again, which nobody sees
    if BY_KEY:
        k_tile, v_tile = _load(k, token, k_l, channels, BLOCK_D), _load(v, token, v_l, channels, BLOCK_D)
    else:
        q_tile, grad_tile = _load(q, token, q_l, channels, BLOCK_D), _load(grad, token, grad_l, channels, BLOCK_D)
        out_tile = _load(out + (b * length * heads + h) * channels, token, heads * channels, channels, BLOCK_D)
        delta = tl.load(deltas + token) + tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
        tl.store(deltas + own, delta, mask=own < length)
        log_sum = tl.load(log_sums + token)
    total = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    total_v = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for start in range(0, length, BLOCK):
        other = start + tl.arange(0, BLOCK)
        other_token = tl.minimum(other, length - 1)
        if BY_KEY:
            row, col = other_token, token
            pair = other[:, None] * padded + own[None, :]
            inside = (other < length)[:, None]
            q_tile, grad_tile = _load(q, row, q_l, channels, BLOCK_D), _load(grad, row, grad_l, channels, BLOCK_D)
            delta, log_sum = tl.load(deltas + row), tl.load(log_sums + row)
        else:
            row, col = token, other_token
            pair = own[:, None] * padded + other[None, :]
            inside = (other < length)[None, :]
            k_tile, v_tile = _load(k, col, k_l, channels, BLOCK_D), _load(v, col, v_l, channels, BLOCK_D)
        logits = _logits(q_tile, k_tile, row, col, pair, pairs, inside, products_q, products_k, ids_q, ids_k, mask,
                         mask_i, mask_j, buckets_q, buckets_k, terms_q, terms_k, MASKED)
        p = tl.exp(logits - log_sum[:, None])
        grad_p = tl.dot(grad_tile, tl.trans(v_tile), input_precision="tf32x3")
        grad_p = _looked_up(grad_p, products_v, row[:, None], ids_v, pair, pairs, buckets_v, terms_v)
        if DROPOUT:
            grad_p = _dropped(grad_p, seed, plane.to(tl.int64) * pairs + pair, dropout_p, scale)
        tile = (p * (grad_p - delta[:, None])).to(q_tile.dtype)
        if BY_KEY:
            if DROPOUT:
                p = _dropped(p, seed, plane.to(tl.int64) * pairs + pair, dropout_p, scale)
            total = tl.dot(tl.trans(tile), q_tile, total, input_precision="tf32x3")
            total_v = tl.dot(tl.trans(p.to(grad_tile.dtype)), grad_tile, total_v, input_precision="tf32x3")
        else:
            total = tl.dot(tile, k_tile, total, input_precision="tf32x3")
        if KEEP:
            place = own[None, :] * length + other[:, None] if BY_KEY else own[:, None] * length + other[None, :]
            end = (own < length)[None, :] if BY_KEY else (own < length)[:, None]
            tl.store(grad_logits + place, tile, mask=inside & end)
    if BY_KEY:
        _store(grad_k, total, plane, own, heads, length, channels, BLOCK_D)
        _store(grad_v, total_v, plane, own, heads, length, channels, BLOCK_D)
    else:
        _store(grad_q, total, plane, own, heads, length, channels, BLOCK_D)


# --- Operators -------------------------------------------------------------------------------------------------------

@torch.library.custom_op("rpe_ops::fused_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, products_q: Tensor, products_k: Tensor, ids_q: list[Tensor],
             ids_k: list[Tensor], ids_v: list[Tensor], buckets_v: int, mask: Tensor | None, seed: Tensor | None,
             dropout_p: float) -> tuple[Tensor, Tensor, Tensor]:
    """(output without the term on values, sums of the weights per bucket, logarithms of the softmax's sums)"""
    out, log_sums = _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    common = _common(q, k, v, products_q, products_k, ids_q, ids_k, mask, seed, dropout_p)

    def launch(first, last, weights):
        _launch(_forward_kernel, first, last, common, out=out, log_sums=log_sums, weights=weights, KEEP=bool(ids_v))

    return out, _sums_per_bucket(q, ids_v, buckets_v, launch), log_sums


@torch.library.custom_op("rpe_ops::fused_attention_backward", mutates_args=())
def _backward(grad: Tensor, grad_sums: Tensor, out: Tensor, sums: Tensor, log_sums: Tensor, q: Tensor, k: Tensor,
              v: Tensor, products_q: Tensor, products_k: Tensor, ids_q: list[Tensor], ids_k: list[Tensor],
              ids_v: list[Tensor], buckets_v: int, mask: Tensor | None, seed: Tensor | None,
              dropout_p: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the products"""
    grads, grad = [_like(q) for _ in range(3)], _planar(grad)
    common = _common(q, k, v, products_q, products_k, ids_q, ids_k, mask, seed, dropout_p) | {
        "grad": grad, **_strides("grad", grad.stride()), "out": out, "log_sums": log_sums,
        "deltas": (grad_sums.float() * sums).sum(-1), "products_v": grad_sums.contiguous(),
        "ids_v": _narrow(ids_v, buckets_v, q), "buckets_v": buckets_v, "terms_v": len(ids_v),
        "grad_q": grads[0], "grad_k": grads[1], "grad_v": grads[2]}

    def launch(first, last, grad_logits):
        _launch(_backward_kernel, first, last, common, grad_logits=grad_logits, BY_KEY=False, KEEP=bool(ids_k))

    def launch_by_key(first, last, grad_logits):
        _launch(_backward_kernel, first, last, common, grad_logits=grad_logits, BY_KEY=True, KEEP=bool(ids_q))

    # queries first: they complete the deltas
    sums_k = _sums_per_bucket(q, ids_k, common["buckets_k"], launch)
    sums_q = _sums_per_bucket(q, [ids.t() for ids in ids_q], common["buckets_q"], launch_by_key)
    return *grads, sums_q.to(products_q.dtype), sums_k.to(products_k.dtype)


def _sums_per_bucket(q, ids, buckets, launch):
    """(B, H, L, terms·buckets) of the (planes, L, L) that `launch(first, last, memory)` makes, some planes at a time."""
    planes, length = q.shape[0] * q.shape[1], q.shape[2]
    if not ids:
        launch(0, planes, q)
        return q.new_empty(*q.shape[:3], 0)
    step = min(planes, max(1, _WORKSPACE // length ** 2))
    memory, sums = q.new_empty(step, length, length), q.new_empty(planes, length, len(ids), buckets)
    for first in range(0, planes, step):
        last = min(first + step, planes)
        launch(first, last, memory)
        for term, indices in enumerate(ids):
            sums[first:last, :, term] = rpe_bucket_sum(memory[None, :last - first], indices, buckets)[0]
    return sums.flatten(2).unflatten(0, q.shape[:2])


def _launch(kernel, first, last, common, **arguments):
    """Run a kernel for the planes from `first` to `last`."""
    with torch.cuda.device_of(common["q"]):
        kernel[(last - first) * triton.cdiv(common["length"], common["BLOCK"]),](first=first, **common, **arguments)


def _common(q, k, v, products_q, products_k, ids_q, ids_k, mask, seed, dropout_p):
    """Arguments that all launches of a call share."""
    q, k, v = map(_planar, (q, k, v))
    terms_q, terms_k = len(ids_q), len(ids_k)
    buckets_q, buckets_k = products_q.shape[3] // max(terms_q, 1), products_k.shape[3] // max(terms_k, 1)
    return {"q": q, "k": k, "v": v, **_strides("q", q.stride()), **_strides("k", k.stride()),
            **_strides("v", v.stride()), "heads": q.shape[1], "length": q.shape[2], "padded": _padded(q.shape[2]), "channels": q.shape[3],
            "products_q": products_q.contiguous(), "ids_q": _narrow(ids_q, buckets_q, q), "buckets_q": buckets_q,
            "products_k": products_k.contiguous(), "ids_k": _narrow(ids_k, buckets_k, q), "buckets_k": buckets_k,
            "mask": q if mask is None else mask, **_strides("mask", (0,) * 4 if mask is None else mask.stride()),
            "seed": q if seed is None else seed, "dropout_p": dropout_p,
            "scale": 1 / (1 - dropout_p) if dropout_p < 1 else 0.0,
            "terms_q": terms_q, "terms_k": terms_k, "MASKED": mask is not None, "DROPOUT": dropout_p > 0,
            **tiling(q.dtype, q.shape[3])}


def _strides(name, strides):
    axes = "bhij" if name == "mask" else "bhl"
    return {f"{name}_{axis}": stride for axis, stride in zip(axes, strides, strict=False)}


def tiling(dtype, channels):
    """Tokens and channels of a tile, and how a program works on it."""
    return {"BLOCK": 32 if dtype == torch.float32 or channels > 64 else 64,
            "BLOCK_D": max(16, triton.next_power_of_2(channels)), "num_warps": 4, "num_stages": 2}


def _narrow(ids, buckets, like):
    """The ids of all terms in the narrowest type, padded to whole tiles; (terms, L', L')."""
    dtype = torch.uint8 if buckets <= 2 ** 8 else torch.int16 if buckets <= 2 ** 15 else torch.int32
    length = like.shape[2]
    narrow = like.new_zeros(len(ids), _padded(length), _padded(length), dtype=dtype)
    for term, indices in enumerate(ids):
        narrow[term, :length, :length] = indices
    return narrow


def _padded(length):
    return triton.cdiv(length, 64) * 64


def _like(x):
    """Uninitialised (B, H, L, D) whose heads join to channels without a copy."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def _planar(x):
    return x if x.stride(3) == 1 else x.contiguous()


@_forward.register_fake
def _(q, k, v, products_q, products_k, ids_q, ids_k, ids_v, buckets_v, mask, seed, dropout_p):
    return _like(q), q.new_empty(*q.shape[:3], len(ids_v) * buckets_v), q.new_empty(q.shape[:3], dtype=torch.float32)


@_backward.register_fake
def _(grad, grad_sums, out, sums, log_sums, q, k, v, products_q, products_k, *_):
    return *(_like(q) for _ in range(3)), *(x.new_empty(x.shape) for x in (products_q, products_k))


def _save(ctx, inputs, output):
    *tensors, ids_q, ids_k, ids_v, ctx.buckets_v, mask, seed, ctx.dropout_p = inputs
    ctx.save_for_backward(*output, *tensors, mask, seed)
    ctx.ids = ids_q, ids_k, ids_v


def _differentiate(ctx, grad, grad_sums, _):
    *tensors, mask, seed = ctx.saved_tensors
    grads = torch.ops.rpe_ops.fused_attention_backward(grad, grad_sums, *tensors, *ctx.ids, ctx.buckets_v, mask, seed,
                                                       ctx.dropout_p)
    return *grads, *([None] * len(ids) for ids in ctx.ids), None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
