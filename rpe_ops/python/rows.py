"""Attention with relative positions on a GPU by rows of the map, in Triton, for the methods product and cross.

The bucket of a pair of tokens depends only on a *class* of their two rows and on their two columns. Let P be the width
of the map rounded up to a multiple of 16. The products of the tokens with a table, E (B, H, L, classes·P), are stored
in the order E[…, class·P + c'], where c' is the column of the other token. What a term adds for a row of the map is
therefore contiguous, and the kernels read and write 16 adjacent numbers, without look-ups, scatters or atomic
operations. README.md explains the design; rows_kernels.py contains the kernels.
"""

import os
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd.function import once_differentiable

from . import rows_kernels as kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_SPLIT_PROGRAMS = 256  # the number of programs that compute the tables' gradients, if there is enough work for them


class Tile(NamedTuple):
    """The number of tokens that a program owns, how many other tokens it processes at a time, and Triton's options."""

    own: int
    other: int
    num_warps: int = 4
    num_stages: int = 1


# The tile of each kernel, for a dtype and for up to 64 or 128 channels; a benchmark may assign others. Both sizes are
# powers of two and multiples of 16, and `other` is 16 for kernels with sums. In the kernels product, adjoint and
# gradient, `own` counts tokens and `other` counts entries of the products. The tiles for half precision and 64 channels
# are the fastest ones in benchmarks/gpu_*.txt that spill no registers even with a mask and dropout;
# benchmarks/rows_ptxas.txt lists the registers of each kernel.
TILES = {
    (kernel, *key): tile
    for key, tiles in {
        ("half", 64): {
            "forward": Tile(64, 16, 4, 2),
            "forward, sums": Tile(64, 16, 4, 2),
            "queries": Tile(64, 16, 4, 2),
            "queries, sums": Tile(64, 16, 4, 2),
            "keys": Tile(64, 16, 4, 2),
            "keys, sums": Tile(64, 16, 4, 2),
            "product": Tile(128, 64),
            "adjoint": Tile(128, 64, 8),
            "gradient": Tile(64, 128, 4, 3),
        },
        ("half", 128): {
            "forward": Tile(64, 32, 8),
            "forward, sums": Tile(32, 16),
            "queries": Tile(32, 16),
            "queries, sums": Tile(32, 16),
            "keys": Tile(32, 16, 8),
            "keys, sums": Tile(32, 16, 8),
            "product": Tile(64, 64, 8),
            "adjoint": Tile(64, 64, 8),
            "gradient": Tile(64, 64, 8),
        },
        ("float32", 64): {
            "forward": Tile(32, 16, 8),
            "forward, sums": Tile(32, 16),
            "queries": Tile(32, 16, 8),
            "queries, sums": Tile(32, 16, 8),
            "keys": Tile(16, 16),
            "keys, sums": Tile(16, 16),
            "product": Tile(32, 32),
            "adjoint": Tile(32, 32),
            "gradient": Tile(32, 32),
        },
        ("float32", 128): {
            "forward": Tile(16, 16, 8),
            "forward, sums": Tile(16, 16, 8),
            "queries": Tile(16, 16, 4),
            "queries, sums": Tile(16, 16, 4),
            "keys": Tile(16, 16, 4),
            "keys, sums": Tile(16, 16, 4),
            "product": Tile(16, 16, 8),
            "adjoint": Tile(16, 16, 8),
            "gradient": Tile(16, 16, 8),
        },
    }.items()
    for kernel, tile in tiles.items()
}
KERNELS = {kernel: tile for (kernel, *key), tile in TILES.items() if key == ["half", 64]}


def tile(kernel: str, dtype: torch.dtype, channels: int) -> Tile:
    """The entry of `TILES` for a call."""
    return TILES[kernel, "float32" if dtype == torch.float32 else "half", 64 if channels <= 64 else 128]


def takes(q: Tensor, k: Tensor, v: Tensor, tables: list[Tensor], prefix: int) -> bool:
    """Whether `attention` supports this call.

    It needs q, k and v of the same shape and dtype, at most 128 channels and 16 prefix tokens, and tables of one dtype
    whose shapes fit these heads and channels, on a GPU (or, under Triton's interpreter, on the CPU), and Triton 3.3 or
    newer.
    """
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
        and all(_fits(table, q.shape[1], q.shape[3]) for table in tables)
        and hasattr(tl, "tuple")
    )


def _fits(table, heads, channels):
    """Whether a table fits these numbers of heads and channels; a bias table, (H', buckets), has no channels."""
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
        q, k, v: (B, H, L, D), as `takes` requires; q is not scaled. Autocast casts them.
        tables_q, tables_k, tables_v: the tables of the terms on queries, keys and values. A list is empty without that
            term; otherwise it has one table, or two for the cross method (rows, columns). Shapes: (H', D, buckets) on
            queries and keys, (H', buckets, D) on values, (H', buckets) with `bias`.
        layout, sizes: the description of map and method by irpe.py's `row_layout`; the layout is on the device of q.
        bias: whether the tables have a number for every bucket instead of a vector.
        mask: added to the logits, or bool with True where a query may attend to a key; broadcast to (B, H, L, L). It
            gets no gradient.
        dropout_p: dropout probability of the attention weights. The backward pass drops the same weights.
    Returns: (B, H, L, D). A query that may not attend to any key gets zeros, and contributes zero to every gradient.
        Gradients are the same in every run, and cannot be differentiated again.
    """
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    seed = torch.randint(2**62, (1,), device=q.device) if dropout_p else None
    places = "".join(place for place, tables in zip("qkv", (tables_q, tables_k, tables_v), strict=True) if tables)
    tables = [*tables_q, *tables_k, *tables_v]
    arguments = places, layout, list(sizes), bias, mask, seed, float(dropout_p)
    if torch.compiler.is_compiling():
        return torch.ops.rpe_ops.attention_by_rows(q, k, v, tables, *arguments)[0]
    # Calling an operator written in Python takes PyTorch longer than a GPU needs for this attention.
    return _Attention.apply(q, k, v, *arguments, *tables)


# --- Launches --------------------------------------------------------------------------------------------------------


class _Call:
    """Launches the kernels of one call. `values` are the arguments that kernels share, by parameter name."""

    def __init__(self, q, tables, places, layout, sizes, bias, mask, seed, dropout_p):
        batch, heads, length, channels = q.shape
        rows, columns, prefix, classes, row_step, column_step = sizes
        padded = _ceil_div(columns, 16) * 16
        self.q = q
        self.places = places
        self.on_logits = places.replace("v", "")
        self.size = classes * padded
        self.bias = bias
        self.tables = [table.contiguous() for table in tables]
        self.per_place = len(tables) // len(places)
        self.groups = tables[0].shape[0]
        self.mask = None if mask is None else mask.expand(batch, heads, length, length)
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
            "mask": q if mask is None else self.mask,
            "mask_b": 0 if mask is None else self.mask.stride(0),
            "mask_h": 0 if mask is None else self.mask.stride(1),
            "seed": layout if seed is None else seed,
            "dropout_p": dropout_p,
            "DROPOUT": dropout_p > 0,
            "ON_Q": "q" in places,
            "ON_K": "k" in places,
            "ON_V": "v" in places,
            "BIAS": bias,
            "CROSS": self.per_place > 1,
            "scale": channels**-0.5,
            "CHANNELS": channels,
            "BLOCK_D": max(16, 1 << (channels - 1).bit_length()),
            "ids": (rows + 1) ** 2,
            "planes": batch * heads // self.groups,
            "groups": self.groups,
            "tables": self.per_place,
            "buckets": tables[0].shape[1 if places[0] == "v" else -1],
            "on_values": places.find("v"),
        }
        if bias:  # a bias table has a single channel, in which every token is 1
            self.of_tables = self.values | {"scale": 1.0, "CHANNELS": 1, "BLOCK_D": 16}
        else:
            self.of_tables = self.values

    def tile(self, name):
        return tile(name, self.q.dtype, self.q.shape[3])

    def products(self, x):
        """Multiply tensors of tokens, one for each place, by that place's tables: (places, B, H, L, classes·P).

        The products of a bias are (places, 1, H', columns + 1, classes·P), because they do not depend on the tokens.
        """
        values = self.of_tables
        if self.bias:
            shape = 1, self.groups, values["columns"] + 1
            values = values | {
                "planes": 1,
                "heads": self.groups,
                "rows": 1,
                "prefix": min(values["prefix"], 1),
                "length": values["columns"] + 1,
            }
        else:
            shape = self.q.shape[:3]
        products = self.q.new_empty(len(x), *shape, self.size)
        if not x:
            return products
        options = self.tile("product")
        grid = self._blocks_of_columns(values, options), len(x)
        _launch(
            kernels.product_kernel,
            grid,
            options,
            values | _three_strided("x", x) | self._tables(0) | {"products": products},
        )
        return products

    def add_adjoint(self, x, products, first_table=0, first=0):
        """x[first + place] += products[place]·tableᵀ, for the places from `first_table` on."""
        options = self.tile("adjoint")
        grid = self._blocks_of_columns(self.values, options), len(products)
        _launch(
            kernels.adjoint_kernel,
            grid,
            options,
            self.values | _strided("x", x) | self._tables(first_table) | {"products": products, "first": first},
        )

    def _blocks_of_columns(self, values, options):
        tokens = values["planes"] * max(values["rows"], values["prefix"])
        return _ceil_div(tokens, options.own) * values["count"] * self.groups

    def _tables(self, first_place):
        tables = self.tables[first_place * self.per_place :]
        on_values = self.values["on_values"]
        return (
            _three("table", tables[:: self.per_place])
            | _three("table", tables[self.per_place - 1 :: self.per_place], first=3)
            | {"on_values": on_values - first_place if on_values >= 0 else -1}
        )

    def attend(self, kernel, name, products, tokens, by_key=False, **values):
        """Launch an attention kernel; `tokens` are the tensors that it reads token by token, by parameter name."""
        options = self.tile(name)
        of_query, of_key = (0, 0) if self.mask is None else self.mask.stride()[2:]
        of_own, of_other = (of_key, of_query) if by_key else (of_query, of_key)
        for name, x in tokens.items():
            values |= _strided(name, x)
        planes = self.q.shape[0] * self.q.shape[1]
        blocks = _ceil_div(self.values["chunks"] * 16, options.own)
        _launch(
            kernel,
            (planes * blocks,),
            options,
            self.values
            | values
            | {
                "on_q": self._on_logits("q", products),
                "on_k": self._on_logits("k", products),
                "products_b": 0 if self.bias else products.stride(1),
                # If the heads share a bias, they all have the same products.
                "products_h": 0 if self.bias and self.groups == 1 else products.stride(2),
                "mask_own": of_own,
                "mask_other": of_other,
                "MASK": self._mask_kind(of_own, of_other),
            },
        )

    def _on_logits(self, place, products):
        return products[self.on_logits.index(place)] if place in self.on_logits else products

    def _mask_kind(self, of_own, of_other):
        if self.mask is None:
            return 0
        if not of_other:
            return kernels.BY_OWN.value
        if not of_own:
            return kernels.BY_OTHER.value
        return kernels.BY_OWN.value + kernels.BY_OTHER.value

    def gradients(self, x, products):
        """The gradients of the tables, flattened and concatenated, from the gradients of each place's products."""
        values = self.of_tables
        options = self.tile("gradient")
        programs = _ceil_div(self.size, options.other) * values["count"] * self.groups
        blocks = _ceil_div(values["planes"] * max(values["rows"], values["prefix"]), options.own)
        splits = max(1, min(blocks, _SPLIT_PROGRAMS // (programs * len(self.places))))
        partial = self.q.new_empty(
            splits,
            len(self.places),
            self.groups,
            values["columns"] + 1,
            self.size,
            values["CHANNELS"],
            dtype=torch.float32,
        )
        values = values | {"partial": partial, "splits": splits, "steps": _ceil_div(blocks, splits)}
        _launch(
            kernels.gradient_kernel,
            (programs, len(self.places), splits),
            options,
            values | _three_strided("x", x) | _three("products", products),
        )
        grads = self.tables[0].new_empty(sum(table.numel() for table in self.tables))
        grid = values["buckets"] * self.per_place * self.groups, len(self.places)
        _launch(kernels.collect_kernel, grid, Tile(64, 16), values | {"grads": grads})
        return grads


def _launch(kernel, grid, options, values):
    """Launch a kernel with the values that are among its parameters."""
    values = values | {"OWN": options.own, "OTHER": options.other}
    arguments = {name: values[name] for name in kernel.arg_names}
    tensor = next(iter(arguments.values()))
    if INTERPRETED:
        if not isinstance(tensor, FakeTensor):
            kernel[grid](**arguments)
        return
    # wrap_triton takes a quarter of a millisecond, and is only needed while torch.compile traces the call.
    traced = isinstance(tensor, (FakeTensor, FunctionalTensor))
    launcher = torch.library.wrap_triton(kernel) if traced else kernel
    with torch.cuda.device_of(tensor):
        launcher[grid](**arguments, num_warps=options.num_warps, num_stages=options.num_stages)


def _ceil_div(a, b):
    return -(-a // b)  # Triton's cdiv takes longer, since kernels may call it too


def _strided(name, x):
    """A tensor (…, B, H, L, D) and its strides, by the names of a kernel's parameters."""
    b, h, token, _ = x.stride()[-4:]
    return {name: x, f"{name}_b": b, f"{name}_h": h, f"{name}_l": token}


def _three(name, tensors, first=0):
    """Tensors of up to three places, by the names of a kernel's parameters; the last one fills unused parameters."""
    return {f"{name}_{first + place}": tensors[min(place, len(tensors) - 1)] for place in range(3)}


def _three_strided(name, tensors):
    found = {}
    for key, x in _three(name, tensors).items():
        found |= _strided(key, x)
    return found


# --- Operators -------------------------------------------------------------------------------------------------------


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
    """The output, the logarithms of the softmax's sums, and the sums of weights for the term on values."""
    q, k, v = (_contiguous_channels(x) for x in (q, k, v))
    call = _Call(q, tables, places, layout, sizes, bias, mask, seed, dropout_p)
    batch, heads, length, channels = q.shape
    tokens = {"q": k, "k": q}
    products = call.products([tokens[place] for place in call.on_logits])
    # The memory layout is (B, L, H, D), so that the heads can be concatenated without a copy.
    out = q.new_empty(batch, length, heads, channels).transpose(1, 2)
    log_sums = q.new_empty(batch, heads, length, dtype=torch.float32)
    sums = q.new_empty(batch, heads, length, call.size if "v" in places else 0)
    maxima = q.new_empty(batch, heads, length, sums.shape[3] // 16, dtype=torch.float32)
    call.attend(
        kernels.forward_kernel,
        "forward, sums" if "v" in places else "forward",
        products,
        {"q": q, "k": k, "v": v},
        sums=sums,
        maxima=maxima,
        out=out,
        log_sums=log_sums,
    )
    if "v" in places:
        call.add_adjoint(out, sums[None], first_table=len(places) - 1)
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
    """The gradients of k, q and v, (3, B, H, L, D), and of the tables, flattened and concatenated."""
    grad, q, k, v = (_contiguous_channels(x) for x in (grad, q, k, v))
    call = _Call(q, tables, places, layout, sizes, bias, mask, seed, dropout_p)
    batch, heads, length, channels = q.shape
    tokens = {"q": k, "k": q, "v": grad}
    tokens_of_places = [tokens[place] for place in places]
    products = call.products(tokens_of_places)
    # The order is keys, queries, values, because these are multiplied by the tables on queries, keys and values.
    grads = q.new_empty(3, batch, length, heads, channels).transpose(2, 3)
    grad_products = q.new_empty(len(call.on_logits), batch, heads, length, call.size)
    shared = {
        "on_v": products[-1],
        "out": out,
        "log_sums": log_sums,
        "deltas": torch.empty_like(log_sums),
        "sums": grad_products,
        "grads": grads,
    }
    inputs = {"q": q, "k": k, "v": v, "grad_out": grad}
    # The queries' kernel comes first, because it leaves the deltas that the keys' kernel reads.
    call.attend(
        kernels.queries_kernel,
        "queries, sums" if "k" in places else "queries",
        products,
        inputs,
        **shared,
    )
    call.attend(
        kernels.keys_kernel,
        "keys, sums" if "q" in places else "keys",
        products,
        inputs,
        by_key=True,
        **shared,
    )
    if call.on_logits and not bias:
        call.add_adjoint(grads, grad_products, first=0 if "q" in places else 1)
    grads_of_products = [*grad_products] + ([sums] if "v" in places else [])
    return grads, call.gradients(tokens_of_places, grads_of_products)


class _Attention(torch.autograd.Function):
    """The attention for calls that torch.compile does not trace."""

    @staticmethod
    def forward(ctx, q, k, v, places, layout, sizes, bias, mask, seed, dropout_p, *tables) -> Tensor:
        output = _forward(q, k, v, list(tables), places, layout, sizes, bias, mask, seed, dropout_p)
        _save(ctx, (q, k, v, tables, places, layout, sizes, bias, mask, seed, dropout_p), output)
        return output[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad) -> tuple[Tensor | None, ...]:
        grad_q, grad_k, grad_v, of_tables, *others = _differentiate(ctx, grad, backward=_backward)
        return grad_q, grad_k, grad_v, *others, *of_tables


def _contiguous_channels(x):
    return x if x.stride(3) == 1 else x.contiguous()


def _register(name, function):
    """Register an operator. torch.compile traces into it, except under Triton's interpreter, which it cannot trace."""
    if not INTERPRETED:
        return torch.library.triton_op(name, function, mutates_args=())
    operator = torch.library.custom_op(name, function, mutates_args=())
    operator.register_fake(function)  # with fake tensors, the function launches nothing
    return operator


_register("rpe_ops::attention_by_rows_backward", _backward)


def _save(ctx, inputs, output):
    q, k, v, tables, ctx.places, layout, ctx.sizes, ctx.bias, mask, seed, ctx.dropout_p = inputs
    ctx.save_for_backward(*output, q, k, v, layout, mask, seed, *tables)
    ctx.set_materialize_grads(False)  # no zeros for outputs without a gradient


def _differentiate(ctx, grad, *_, backward=torch.ops.rpe_ops.attention_by_rows_backward):
    *saved, layout, mask, seed = ctx.saved_tensors[:9]
    tables = list(ctx.saved_tensors[9:])
    grads, of_tables = backward(
        grad, *saved, tables, ctx.places, layout, ctx.sizes, ctx.bias, mask, seed, ctx.dropout_p
    )
    grad_k, grad_q, grad_v = grads.unbind(0)
    of_tables = of_tables.split([table.numel() for table in tables])
    of_tables = [x.view(table.shape) for x, table in zip(of_tables, tables, strict=True)]
    return grad_q, grad_k, grad_v, of_tables, *[None] * 7


_register("rpe_ops::attention_by_rows", _forward).register_autograd(_differentiate, setup_context=_save)
