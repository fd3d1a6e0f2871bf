"""Attention with relative positions on a GPU by rows of the map, in Triton, for the methods product and cross.

Two offsets between rows are in the same *row class* if, for every offset between columns, they give the same bucket.
The bucket of a pair of tokens thus depends only on its row class and on the two columns. Let P be the width of the map
rounded up to a multiple of 16. The products of the tokens with a table, E (B, H, L, classes·P), are stored in the order
E[…, class·P + c'], where c' is the column of the other token. What a term adds for a row of the map is therefore
contiguous, and the kernels read and write 16 adjacent numbers, without look-ups, scatters or atomic operations.
README.md explains the design; rows_kernels.py contains the kernels.
"""

import functools
import os
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from . import rows_kernels as kernels
from .blockwise import dtype_of

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
            "deltas": Tile(32, 16, 8),
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
            "deltas": Tile(16, 16, 4),
            "queries": Tile(16, 16, 2),
            "queries, sums": Tile(16, 16, 2),
            "keys": Tile(16, 16, 4),
            "keys, sums": Tile(16, 16, 4),
            "product": Tile(16, 16, 8),
            "adjoint": Tile(16, 16, 8),
            "gradient": Tile(16, 16, 8),
        },
    }.items()
    for kernel, tile in tiles.items()
}
HALF_64_TILES = {kernel: tile for (kernel, *key), tile in TILES.items() if key == ["half", 64]}


def tile(kernel: str, dtype: torch.dtype, channels: int) -> Tile:
    """The entry of `TILES` for a call."""
    return TILES[kernel, "float32" if dtype == torch.float32 else "half", 64 if channels <= 64 else 128]


def takes(q: Tensor, k: Tensor, v: Tensor, tables: list[Tensor], prefix: int, mask: Tensor | None = None) -> bool:
    """Whether `attention` supports this call.

    It needs q, k and v of the same shape and dtype, at most 128 channels and 16 prefix tokens, and tables of one dtype
    whose shapes fit these heads and channels, on an NVIDIA GPU of compute capability 8.0 or higher (or, under Triton's
    interpreter, on the CPU), and Triton 3.3 or newer. Within an image, the kernels compute offsets with 32 bits.
    """
    return (
        _is_supported(q.device)
        and q.shape == k.shape == v.shape
        and q.numel() > 0
        and q.shape[3] <= 128
        and prefix <= 16
        and dtype_of(q) in (torch.float16, torch.bfloat16, torch.float32)
        and q.dtype == k.dtype == v.dtype
        and len({table.dtype for table in tables}) == 1
        and all(_fits(table, q.shape[1], q.shape[3]) for table in tables)
        and all(_has_short_offsets(x) for x in (q, k, v, mask) if x is not None)
        and hasattr(tl, "tuple")
    )


def _has_short_offsets(x):
    """Whether the elements of one image are less than 2**31 apart."""
    sizes = zip(x.shape[-3:], x.stride()[-3:], strict=True)
    return sum((size - 1) * stride for size, stride in sizes) < 2**31


@torch.compiler.assume_constant_result  # torch.compile cannot trace the query of a GPU's properties
def _is_supported(device):
    """Whether the kernels run on this device. They were written for GPUs with bfloat16, compute capability 8.0."""
    if INTERPRETED:
        return device.type == "cpu"
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device) >= (8, 0)


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
        Gradients are the same in every run. Differentiating them again raises RuntimeError.
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


class _Launch:
    """A kernel launch whose arguments are all fixed except the tensors.

    Launching a kernel through Triton takes longer than most of these kernels run, because Triton derives from every
    argument which compiled kernel it needs. Only the first call does that.
    """

    def __init__(self, kernel, grid, options, numbers):
        numbers = numbers | {"OWN": options.own, "OTHER": options.other}
        self.kernel = kernel
        self.grid = (*grid, 1, 1)[:3]
        self.options = options
        self.arguments = [numbers.get(name) for name in kernel.arg_names]
        self.tensor_parameters = [(i, name) for i, name in enumerate(kernel.arg_names) if name not in numbers]
        self.launch_again = None

    def __call__(self, tensors):
        arguments = self.arguments.copy()
        for i, name in self.tensor_parameters:
            arguments[i] = tensors[name]
        with torch.cuda.device_of(arguments[0]):
            if self.launch_again is None:
                self.launch_again = _launch(self.kernel, self.grid, self.options, arguments)
            else:
                self.launch_again(*arguments)


def _launch(kernel, grid, options, arguments):
    """Launch a kernel through Triton.

    Returns: a function that launches the same compiled kernel, or None while torch.compile traces the call.
    """
    tensor = arguments[0]
    if INTERPRETED:
        if not isinstance(tensor, FakeTensor):
            kernel[grid](*arguments)
        return kernel[grid]
    # wrap_triton takes a quarter of a millisecond, and is only needed while torch.compile traces the call.
    traced = isinstance(tensor, (FakeTensor, FunctionalTensor))
    launcher = torch.library.wrap_triton(kernel) if traced else kernel
    compiled = launcher[grid](
        **dict(zip(kernel.arg_names, arguments, strict=True)),
        num_warps=options.num_warps,
        num_stages=options.num_stages,
    )
    return None if traced else compiled[grid]


@functools.lru_cache(maxsize=1024)
def _known_launches(*signature):
    """The launches of all calls with this signature, by kernel. It is empty at first, and `_Call.launch` fills it.

    Every size of a batch's maps has a signature of its own.
    """
    return {}


def forget_launches() -> None:
    """Let the next calls go through Triton again, for example after a change of its debugging options."""
    _known_launches.cache_clear()


def _signature(x):
    """Everything about an argument of a call on which a launch's compiled kernel, grid or numbers can depend."""
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16
    if isinstance(x, (list, tuple)):
        return tuple(_signature(element) for element in x)
    return x


class _Call:
    """A forward or backward pass. Its methods launch kernels, each of which it launches at most once."""

    def __init__(self, name, saved, q, k, v, tables, places, layout, sizes, bias, mask, seed, dropout_p):
        batch, heads, length, channels = q.shape
        columns, classes = sizes[1], sizes[3]
        self.q = q
        self.places = places
        self.on_logits = places.replace("v", "")
        self.sizes = sizes
        self.padded = _ceil_div(columns, 16) * 16
        self.size = classes * self.padded
        self.bias = bias
        self.dropout_p = dropout_p
        self.tables = [table.contiguous() for table in tables]
        self.per_place = len(tables) // len(places)
        self.groups = tables[0].shape[0]
        self.mask = None if mask is None else mask.expand(batch, heads, length, length)
        self.tensors = {
            "layout": layout,
            "mask": q if mask is None else self.mask,
            "seed": layout if seed is None else seed,
        }
        if isinstance(q, (FakeTensor, FunctionalTensor)):  # torch.compile traces the call
            self.launches = {}
        else:
            # The tensors that a pass allocates need no signature: allocations are aligned, and so are their slices,
            # because `size` is a multiple of 16.
            tensors = (*saved, q, k, v, self.tables, layout, self.mask, seed)
            self.launches = _known_launches(
                name, places, *sizes, bias, dropout_p, *TILES.values(), *_signature(tensors)
            )

    def launch(self, kernel, tensors, describe, *args):
        """Launch a kernel. If it is new, `describe(*args)` returns its grid, its tile, and its numbers by name."""
        name = kernel.fn.__name__
        if name not in self.launches:
            self.launches[name] = _Launch(kernel, *describe(*args))
        self.launches[name](self.tensors | tensors)

    @functools.cached_property
    def numbers(self):
        """The arguments that kernels share, except for tensors, by parameter name."""
        rows, columns, prefix, _, row_step, column_step = self.sizes
        _, heads, length, channels = self.q.shape
        return {
            "rows": rows,
            "columns": columns,
            "prefix": prefix,
            "row_step": row_step,
            "column_step": column_step,
            "padded": self.padded,
            "size": self.size,
            "column_count": columns + (prefix > 0),
            "chunks": (prefix > 0) + rows * (self.padded // 16),
            "heads": heads,
            "length": length,
            "mask_b": 0 if self.mask is None else self.mask.stride(0),
            "mask_h": 0 if self.mask is None else self.mask.stride(1),
            "dropout_p": self.dropout_p,
            "DROPOUT": self.dropout_p > 0,
            "ON_Q": "q" in self.places,
            "ON_K": "k" in self.places,
            "ON_V": "v" in self.places,
            "BIAS": self.bias,
            "CROSS": self.per_place > 1,
            "scale": channels**-0.5,
            "CHANNELS": channels,
            "BLOCK_D": max(16, 1 << (channels - 1).bit_length()),
            "ids_offset": (rows + 1) ** 2,
            "planes": self.q.shape[0] * heads // self.groups,
            "groups": self.groups,
            "tables": self.per_place,
            "buckets": self.tables[0].shape[1 if self.places[0] == "v" else -1],
            "on_values": self.places.find("v"),
        }

    @property
    def numbers_of_tables(self):
        """`numbers` for a kernel that multiplies tokens by tables or computes the gradients of tables."""
        if self.bias:  # a bias table has a single channel, in which every token is 1
            return self.numbers | {"scale": 1.0, "CHANNELS": 1, "BLOCK_D": 16}
        return self.numbers

    def tile(self, name):
        return tile(name, self.q.dtype, self.q.shape[3])

    def products(self, x):
        """Multiply tensors of tokens, one for each place, by that place's tables: (places, B, H, L, classes·P).

        The products of a bias are (places, 1, H', columns + 1, classes·P), because they do not depend on the tokens.
        """
        shape = (1, self.groups, self.sizes[1] + 1) if self.bias else self.q.shape[:3]
        products = self.q.new_empty(len(x), *shape, self.size)
        if x:
            tensors = _three("x", x) | self._tables(0) | {"products": products}
            self.launch(kernels.product_kernel, tensors, self._describe_products, x)
        return products

    def _describe_products(self, x):
        numbers = self.numbers_of_tables
        if self.bias:
            numbers = numbers | {
                "planes": 1,
                "heads": self.groups,
                "rows": 1,
                "prefix": min(numbers["prefix"], 1),
                "length": numbers["columns"] + 1,
            }
        options = self.tile("product")
        grid = self._blocks_of_columns(numbers, options), len(x)
        return grid, options, numbers | _three_strides("x", x)

    def add_adjoint(self, x, products, first_table=0, first=0):
        """x[first + place] += products[place]·tableᵀ, for the places from `first_table` on."""
        tensors = self._tables(first_table) | {"x": x, "products": products}
        self.launch(kernels.adjoint_kernel, tensors, self._describe_adjoint, x, products, first_table, first)

    def _describe_adjoint(self, x, products, first_table, first):
        options = self.tile("adjoint")
        grid = self._blocks_of_columns(self.numbers, options), len(products)
        on_values = self.numbers["on_values"]
        return (
            grid,
            options,
            self.numbers
            | _strides("x", x)
            | {"first": first, "on_values": on_values - first_table if on_values >= 0 else -1},
        )

    def _blocks_of_columns(self, numbers, options):
        tokens = numbers["planes"] * max(numbers["rows"], numbers["prefix"])
        return _ceil_div(tokens, options.own) * numbers["column_count"] * self.groups

    def _tables(self, first_place):
        tables = self.tables[first_place * self.per_place :]
        return _three("table", tables[:: self.per_place]) | _three(
            "table", tables[self.per_place - 1 :: self.per_place], first=3
        )

    def attend(self, kernel, name, products, tokens, by_key=False, **tensors):
        """Launch an attention kernel; `tokens` are the tensors that it reads token by token, by parameter name."""
        tensors |= tokens
        tensors["on_q"] = self._on_logits("q", products)
        tensors["on_k"] = self._on_logits("k", products)
        self.launch(kernel, tensors, self._describe_attention, name, products, tokens, by_key)

    def _describe_attention(self, name, products, tokens, by_key):
        options = self.tile(name)
        of_query, of_key = (0, 0) if self.mask is None else self.mask.stride()[2:]
        of_own, of_other = (of_key, of_query) if by_key else (of_query, of_key)
        numbers = self.numbers | {
            "products_b": 0 if self.bias else products.stride(1),
            # If the heads share a bias, they all have the same products.
            "products_h": 0 if self.bias and self.groups == 1 else products.stride(2),
            "mask_own": of_own,
            "mask_other": of_other,
            "MASK": self._mask_kind(of_own, of_other),
        }
        for parameter, x in tokens.items():
            numbers |= _strides(parameter, x)
        planes = self.q.shape[0] * self.q.shape[1]
        blocks = _ceil_div(numbers["chunks"] * 16, options.own)
        return (planes * blocks,), options, numbers

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
        columns = self.sizes[1]
        channels = 1 if self.bias else self.q.shape[3]
        splits = self._splits()[1]
        partial = self.q.new_empty(
            splits, len(self.places), self.groups, columns + 1, self.size, channels, dtype=torch.float32
        )
        tensors = _three("x", x) | _three("products", products) | {"partial": partial}
        self.launch(kernels.gradient_kernel, tensors, self._describe_gradient, x)
        grads = self.tables[0].new_empty(sum(table.numel() for table in self.tables))
        self.launch(kernels.collect_kernel, {"partial": partial, "grads": grads}, self._describe_collect)
        return grads

    def _splits(self):
        """How the tables' gradients are computed: programs per split, splits, and blocks of tokens per split."""
        rows, columns, prefix = self.sizes[:3]
        options = self.tile("gradient")
        programs = _ceil_div(self.size, options.other) * (columns + (prefix > 0)) * self.groups
        planes = self.q.shape[0] * self.q.shape[1] // self.groups
        blocks = _ceil_div(planes * max(rows, prefix), options.own)
        splits = max(1, min(blocks, _SPLIT_PROGRAMS // (programs * len(self.places))))
        return programs, splits, _ceil_div(blocks, splits)

    def _describe_gradient(self, x):
        programs, splits, steps = self._splits()
        grid = programs, len(self.places), splits
        return grid, self.tile("gradient"), self.numbers_of_tables | _three_strides("x", x) | {"steps": steps}

    def _describe_collect(self):
        numbers = self.numbers_of_tables
        grid = numbers["buckets"] * self.per_place * self.groups, len(self.places)
        return grid, Tile(64, 16), numbers | {"splits": self._splits()[1]}


def _ceil_div(a, b):
    return -(-a // b)  # Triton's cdiv takes longer, since kernels may call it too


def _strides(name, x):
    """The strides of a tensor (…, B, H, L, D), by the names of a kernel's parameters."""
    b, h, token, _ = x.stride()[-4:]
    return {f"{name}_b": b, f"{name}_h": h, f"{name}_l": token}


def _three(name, tensors, first=0):
    """Tensors of up to three places, by the names of a kernel's parameters; the last one fills unused parameters."""
    return {f"{name}_{first + place}": tensors[min(place, len(tensors) - 1)] for place in range(3)}


def _three_strides(name, tensors):
    found = {}
    for key, x in _three(name, tensors).items():
        found |= _strides(key, x)
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
    """The output, the log-sum-exp of each row of logits, and the sums of weights for the term on values."""
    q, k, v = (_contiguous_channels(x) for x in (q, k, v))
    call = _Call("forward", (), q, k, v, tables, places, layout, sizes, bias, mask, seed, dropout_p)
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
    saved = grad, out, log_sums, sums
    call = _Call("backward", saved, q, k, v, tables, places, layout, sizes, bias, mask, seed, dropout_p)
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
    # The keys' kernel reads the deltas, which in half precision come from the queries' kernel.
    if q.dtype == torch.float32:
        call.attend(kernels.deltas_kernel, "deltas", products, inputs, **shared)
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
    def backward(ctx, grad) -> tuple[Tensor | None, ...]:
        if grad is not None and _is_batched(grad):
            raise RuntimeError(f"attention by rows cannot compute a batch of gradients at once; {_USE_COMPOSED}")
        saved = ctx.saved_tensors  # gradient checkpointing allows them to be read only once
        with torch.no_grad():
            grad_q, grad_k, grad_v, of_tables, *others = _differentiate(ctx, saved, grad, _backward)
        gradients = grad_q, grad_k, grad_v, *of_tables
        if torch.is_grad_enabled() and grad is not None:  # create_graph=True
            gradients = _FinalGradients.apply(gradients, grad, *saved[3:6], *saved[9:])
        return *gradients[:3], *others, *gradients[3:]


_USE_COMPOSED = "use PyTorch's operators instead, by IRPE_ATTENTION=composed in the environment"


def _is_batched(x):
    """Whether a tensor stands for several, under torch.vmap or for is_grads_batched."""
    return torch._C._functorch.is_batchedtensor(x) or torch._C._functorch.is_legacy_batchedtensor(x)


class _FinalGradients(torch.autograd.Function):
    """Gradients as functions of the tensors they depend on. Differentiating them raises an error."""

    @staticmethod
    def forward(ctx, gradients, *dependencies) -> tuple[Tensor, ...]:
        return tuple(x.clone() for x in gradients)

    @staticmethod
    def backward(ctx, *grads) -> None:
        raise RuntimeError(f"attention by rows has no second derivatives; {_USE_COMPOSED}")


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


def _differentiate(ctx, saved_tensors, grad, backward):
    """The gradients of `_forward`'s arguments: of q, k, v and (as a list) the tables, and None for the others."""
    *saved, layout, mask, seed = saved_tensors[:9]
    tables = list(saved_tensors[9:])
    if grad is None:
        return None, None, None, [None] * len(tables), *[None] * 7
    grads, of_tables = backward(
        grad, *saved, tables, ctx.places, layout, ctx.sizes, ctx.bias, mask, seed, ctx.dropout_p
    )
    grad_k, grad_q, grad_v = grads.unbind(0)
    of_tables = of_tables.split([table.numel() for table in tables])
    of_tables = [x.view(table.shape) for x, table in zip(of_tables, tables, strict=True)]
    return grad_q, grad_k, grad_v, of_tables, *[None] * 7


_register("rpe_ops::attention_by_rows", _forward).register_autograd(
    lambda ctx, grad, *_: _differentiate(ctx, ctx.saved_tensors, grad, torch.ops.rpe_ops.attention_by_rows_backward),
    setup_context=_save,
)
