"""Compare attention by rows with its definition in float64, in random cases: `python tests/rows_cases.py --cases 600`.

Without a GPU, Triton's interpreter runs the kernels (TRITON_INTERPRET=1). A case passes if the error of the output and
of every gradient is at most the sum of two bounds: the type's tolerance times the largest value, and twice the error of
the definition computed in the case's type.
"""

import argparse
import concurrent.futures
import contextlib
import multiprocessing
import os
import random
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
import numpy as np
import triton  # The import reads TRITON_INTERPRET.
import triton.language as tl
from rpe_ops import reference, rows
from triton.runtime import interpreter

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "DeiT-with-iRPE"))
from irpe import row_layout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # relative to the largest value
MAPS = [(1, 1), (1, 7), (3, 3), (7, 5), (3, 18), (6, 7), (9, 2), (2, 17), (3, 16)]


def _fix_interpreter():
    """Make the interpreter multiply bfloat16 correctly: Triton 3.8's multiplies the bits as integers."""
    create_dot = interpreter.InterpreterBuilder.create_dot

    def wide(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: create_dot(self, wide(a), wide(b), *rest)


_fix_interpreter()


class Case:
    """Random inputs of one call, determined by a seed. Keyword arguments fix single options."""

    def __init__(self, seed, **fixed):
        choose, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.options = {
            "dtype": choose.choice(list(TOLERANCE)),
            "channels": choose.choice([16, 24, 32, 48, 64, 80, 96, 128]),
            "batch": choose.randint(1, 2),
            "heads": choose.choice([1, 1, 2, 3]),
            "map": choose.choice(MAPS),
            "prefix": choose.choice([0, 1, 2, 5]),
            "places": choose.choice(["k", "q", "v", "qk", "kv", "qv", "qkv"]),
            "kind": choose.choice(["shared", "heads", "bias"]),
            "method": choose.choice(["product", "cross"]),
            "classes": choose.choice([1, 2, 3, 3, 5, 7]),
            "mask": choose.choice([None, "padding", "bool", "full", "full bool", "blind"]),
            "dropout_p": choose.choice([0.0, 0.0, 0.1, 0.5]),
            "size": choose.choice([0.3, 1.0, 4.0]),
            "together": choose.random() < 0.5,
            # The interpreter takes about the same time for every tile, so large ones are faster.
            "tiles": choose.choice(["usual", "large", "large", "large"]),
        } | fixed
        vars(self).update(self.options)
        if self.kind == "bias":
            self.places = self.options["places"] = self.places.replace("v", "") or "k"
        height, width = self.map
        self.length = height * width + self.prefix
        shape = self.batch, self.heads, self.length, self.channels
        if self.together:  # As in a transformer, q, k and v are views of one tensor.
            x = self._random(self.batch, self.length, 3, *shape[1::2]).permute(2, 0, 3, 1, 4)
        else:
            x = self._random(3, *shape)
        q, k, v = x.unbind(0)
        offset_ids = self._offset_ids(2 * height - 1, 2 * width - 1)
        layout, sizes = row_layout(offset_ids, self.prefix, self.buckets)
        self.map_and_kind = layout.to(DEVICE), sizes, self.kind == "bias"
        self.ids = self._ids(offset_ids)
        self.inputs = [q * self.size, k, v, *(self._table(place) for place in self.places for _ in self.ids)]
        self.inputs = [x.detach().requires_grad_() for x in self.inputs]
        self.mask = self._mask()

    def _offset_ids(self, height, width):
        """Ids of all offsets. As in iRPE, consecutive offsets form a class."""
        rows, columns = (
            torch.randint(self.classes, (n,), generator=self.generator).sort().values[:, None] for n in (height, width)
        )
        if self.method == "product":
            self.buckets = self.classes**2 + (self.prefix > 0)
            return (rows * self.classes + columns.T)[None]
        self.buckets = self.classes + (self.prefix > 0)
        return torch.stack([rows.expand(-1, width), columns.T.expand(height, -1)])

    def _ids(self, offset_ids):
        """The ids of each table, (tables, L, L)."""
        height, width = self.map
        row, column = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
        ids = offset_ids[:, row[:, None] - row + height - 1, column[:, None] - column + width - 1]
        return torch.nn.functional.pad(ids, (self.prefix, 0, self.prefix, 0), value=self.buckets - 1).to(DEVICE)

    def _random(self, *shape):
        return torch.randn(*shape, generator=self.generator).to(DEVICE, self.dtype)

    def _table(self, place):
        heads = self.heads if self.kind == "heads" or self.kind == "bias" and self.batch == 2 else 1
        if self.kind == "bias":
            return self._random(heads, self.buckets)
        return self._random(heads, *((self.buckets, self.channels) if place == "v" else (self.channels, self.buckets)))

    def _mask(self):
        if self.mask is None:
            return None
        if self.mask == "full":
            return self._random(self.batch, self.heads, self.length, self.length)
        lengths = torch.randint(1, self.length + 1, (self.batch, 1, 1, 1), generator=self.generator)
        hidden = torch.arange(self.length) >= lengths
        if self.mask == "blind":  # The mask hides all keys from some queries.
            hidden = hidden | (torch.arange(self.length)[:, None] % 3 == 1)
        if self.mask == "full bool":
            hidden = torch.rand(self.batch, 1, self.length, self.length, generator=self.generator) < 0.5
        hidden = hidden.to(DEVICE)
        if "bool" in self.mask:
            return ~hidden
        return torch.zeros_like(hidden, dtype=self.dtype).masked_fill(hidden, -torch.inf)

    def kept(self):
        """The factors (B, H, L, L) by which dropout multiplies the attention weights when the seed is 1.

        All logits are equal, and each key has its own channel, so that the output consists of the weights.
        """
        nothing = torch.zeros(self.batch, self.heads, self.length, self.length, device=DEVICE)
        if not self.dropout_p:
            return nothing + 1
        parts = []
        for start in range(0, self.length, 128):
            keys = torch.zeros(self.batch, self.heads, self.length, 128, device=DEVICE)
            keys[:, :, start : start + 128] += torch.eye(128, device=DEVICE)[: self.length - start]
            table = torch.zeros(1, self.buckets, device=DEVICE)
            torch.manual_seed(1)
            parts.append(
                rows.attention(
                    keys * 0,
                    keys * 0,
                    keys,
                    [],
                    [table] * len(self.ids),
                    [],
                    *self.map_and_kind[:2],
                    True,
                    None,
                    self.dropout_p,
                )
            )
        return torch.cat(parts, 3)[..., : self.length].double() * self.length

    def by_rows(self, q, k, v, *tables, **options):
        """The tested call."""
        tables = iter(tables)
        of_places = [[next(tables) for _ in self.ids] if place in self.places else [] for place in "qkv"]
        return rows.attention(q, k, v, *of_places, *self.map_and_kind, self.mask, self.dropout_p)

    def definition(self, q, k, v, *tables, kept):
        """The paper's attention (Eq. 12 to 14), operator by operator; `kept` comes from `self.kept`."""
        scale, tables = self.channels**-0.5, iter(tables)
        logits, on_values = q * scale @ k.transpose(2, 3), []
        for place in self.places:
            for ids in self.ids:
                table = next(tables)
                x = {"q": k, "k": q, "v": None}[place]
                if place == "v":
                    on_values.append((ids, table))
                    continue
                products = (
                    table[None, :, None].expand(len(x), -1, len(ids), -1)
                    if self.kind == "bias"
                    else (x * scale @ table)
                )
                products = products.expand(-1, self.heads, -1, -1)
                term = reference.rpe_index(products, ids)
                logits = logits + (term.transpose(2, 3) if place == "q" else term)
        if self.mask is not None:
            mask = (
                self.mask.to(logits.dtype)
                if self.mask.dtype != torch.bool
                else (torch.zeros_like(self.mask, dtype=logits.dtype).masked_fill(~self.mask, -torch.inf))
            )
            fully_masked = mask.amax(-1, keepdim=True) == -torch.inf
            logits, kept = logits + mask.masked_fill(fully_masked, 0), kept.masked_fill(fully_masked, 0)
        attn = logits.softmax(3) * kept.to(logits.dtype)
        out = attn @ v
        for ids, table in on_values:
            out = out + reference.rpe_bucket_sum(attn, ids, self.buckets) @ table
        return out

    def results(self, function, dtype, **options):
        """Output and gradients in float64; the gradient of the output is not constant."""
        torch.manual_seed(1)
        out = function(*(x.to(dtype) for x in self.inputs), **options)
        weight = torch.arange(out.numel(), device=DEVICE, dtype=torch.float64).view_as(out).sin()
        weight = weight.to(self.dtype).to(dtype)  # the same numbers in all types
        return [x.detach().double() for x in (out, *torch.autograd.grad((out * weight).sum(), self.inputs))]


@contextlib.contextmanager
def tiles(size):
    """The usual tiles, or in the interpreter the largest ones that it supports."""
    usual = dict(rows.TILES)
    if size == "large" and rows.INTERPRETED:
        rows.TILES.update(
            {key: tile._replace(own=256, other=16 if "sums" in key[0] else 256) for key, tile in usual.items()}
        )
    try:
        yield
    finally:
        rows.TILES.update(usual)


def excess(case):
    """The largest ratio of an error to its bound. The case passes if it is at most 1."""
    kept = case.kept()
    exact = case.results(case.definition, torch.float64, kept=kept)
    plain = case.results(case.definition, case.dtype, kept=kept)
    with tiles(case.tiles):
        found = case.results(case.by_rows, case.dtype)
    worst = 0.0
    for x, y, z in zip(exact, plain, found, strict=True):
        # Gradients of logits are differences of dot products of vectors as large as the output. They may cancel, for
        # example if there is only one key. Gradients of keys and tables are products of these and the queries.
        size = max(x.abs().max().item(), exact[0].abs().max().item() * case.channels**0.5 * max(case.size, 1.0))
        allowed = TOLERANCE[case.dtype] * size + 2 * (y - x).abs().max().item()
        error = (z - x).abs().max().item()
        worst = max(worst, _ratio(error, allowed))
    return worst


def _ratio(error, allowed):
    """How large the error is compared to what is allowed. NaN counts as infinite, and so does any error if none is."""
    if error == 0:  # If dropout drops all weights, everything is zero.
        return 0.0
    return error / allowed if error == error and allowed > 0 else float("inf")


def examine(seed, fixed):
    """(excess, type, printed line) of a case."""
    torch.set_num_threads(1)
    case = Case(seed, **fixed)
    value = excess(case)
    options = ", ".join(f"{name} {value}".replace("torch.", "") for name, value in case.options.items())
    return value, case.dtype, f"{seed:5}{value:7.3f}  {options}"


def main(args):
    print(
        f"Triton {triton.__version__} {'on a GPU' if DEVICE == 'cuda' else 'interpreted'}, {args.cases} cases from "
        f"seed {args.seed}; each line begins with the seed and the largest ratio of an error to its bound"
    )
    fixed = {"map": tuple(args.map), "batch": 1, "heads": 1} if args.map else {}
    seeds = range(args.seed, args.seed + args.cases)
    failed, worst = 0, dict.fromkeys(TOLERANCE, 0.0)
    with concurrent.futures.ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        for value, dtype, line in pool.map(examine, seeds, [fixed] * len(seeds)):
            failed += not value <= 1
            worst[dtype] = max(worst[dtype], value)
            if not value <= 1 or not args.quiet:
                print(line, flush=True)
    print(
        f"{args.cases - failed} passed, {failed} failed; largest ratios: "
        + ", ".join(f"{str(dtype)[6:]} {value:.3f}" for dtype, value in worst.items())
    )
    sys.exit(failed > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument(
        "--map", type=int, nargs=2, help="use this height and width in all cases, with one head and image"
    )
    parser.add_argument("--quiet", action="store_true", help="print only failed cases and the summary")
    main(parser.parse_args())
