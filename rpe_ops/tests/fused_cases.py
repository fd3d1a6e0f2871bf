"""Random cases of fused attention against its definition in float64: `python tests/fused_cases.py --cases 600`.

Without a GPU Triton's interpreter runs the kernels (TRITON_INTERPRET=1). A case passes if no result, output or
gradient, is further from the definition than a bound: that of the type, in parts of the largest value, and twice what
the definition itself errs when it is computed in the case's type.
"""
import argparse
import os
import random
import sys

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
import numpy as np
import triton  # reads the environment
import triton.language as tl
from rpe_ops import fused, reference
from triton.runtime import interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # of the largest value


def _mend_interpreter():
    """Triton 3.8's interpreter keeps bfloat16 as its bits, and multiplies those."""
    create_dot = interpreter.InterpreterBuilder.create_dot

    def wide(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: create_dot(self, wide(a), wide(b), *rest)


_mend_interpreter()


class Case:
    """Inputs of one call, drawn from a seed; anything can be fixed."""

    def __init__(self, seed, **fixed):
        choose, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.options = {
            "dtype": choose.choice(list(TOLERANCE)), "channels": choose.choice([1, 20, 32, 48, 64, 96, 128]),
            "batch": choose.randint(1, 2), "heads": choose.randint(1, 3),
            "length": choose.choice([1, choose.randint(2, 31), choose.randint(32, 80)]),
            "places": [choose.randint(0, 2) for _ in "qkv"], "kind": choose.choice(["shared", "heads", "bias"]),
            "buckets": choose.choice([2, 50, 82, 300]), "mask": choose.choice([None, "padding", "full", "blind"]),
            "dropout_p": choose.choice([0.0, 0.0, 0.1, 0.5]), "size": choose.choice([0.3, 1.0, 4.0]),
            "together": choose.random() < 0.5, "workspace": choose.choice([1, 5000, 2 ** 24])} | fixed
        vars(self).update(self.options)
        if self.kind == "bias":
            self.places = [*self.places[:2], 0]
        shape = self.batch, self.heads, self.length, self.channels
        if self.together:  # as a transformer has them, in one tensor of tokens
            x = self._random(self.batch, self.length, 3, *shape[1::2]).permute(2, 0, 3, 1, 4)
        else:
            x = self._random(3, *shape)
        q, k, v = x.unbind(0)
        self.inputs = [q * self.size, k, v, *(self._table(place) for place, n in zip("qkv", self.places, strict=True)
                                              for _ in range(n))]
        self.inputs = [x.detach().requires_grad_() for x in self.inputs]
        self.ids = [torch.randint(self.buckets, (self.length,) * 2, generator=self.generator, dtype=torch.int32)
                    .to(DEVICE) for _ in range(sum(self.places))]
        self.mask = self._mask()

    def _random(self, *shape):
        return torch.randn(*shape, generator=self.generator).to(DEVICE, self.dtype)

    def _table(self, place):
        if self.kind == "bias":
            return self._random(1, self.heads, 1, self.buckets)
        shape = (self.buckets, self.channels) if place == "v" else (self.channels, self.buckets)
        return self._random(*((self.heads,) if self.kind == "heads" else ()), *shape)

    def _mask(self):
        if self.mask is None:
            return None
        if self.mask == "full":
            return self._random(self.batch, self.heads, self.length, self.length)
        lengths = torch.randint(1, self.length + 1, (self.batch, 1, 1, 1), generator=self.generator).to(DEVICE)
        hidden = torch.arange(self.length, device=DEVICE) >= lengths
        if self.mask == "blind":  # some queries see nothing
            hidden = hidden | (torch.arange(self.length, device=DEVICE)[:, None] % 3 == 1)
        return torch.zeros_like(hidden, dtype=self.dtype).masked_fill(hidden, -torch.inf)

    def kept(self):
        """What dropout multiplies the weights of the next call by: weights of equal logits, a key to a bucket."""
        shape = self.batch, self.heads, self.length, 16
        key = torch.arange(self.length, dtype=torch.int32, device=DEVICE).expand(self.length, -1)
        nothing = torch.zeros(shape, device=DEVICE)
        none = nothing[..., :0]
        torch.manual_seed(1)
        seed = torch.randint(2 ** 62, (1,), device=DEVICE)
        _, weights, _ = torch.ops.rpe_ops.fused_attention(nothing, nothing, nothing, none, none, [], [], [key],
                                                          self.length, None, seed, self.dropout_p)
        return (weights * self.length).double()

    def results(self, function, dtype, **options):
        """Output and gradients, for a gradient of the output that is no constant."""
        inputs = [x.to(dtype) for x in self.inputs]
        pairs = iter(zip(self.ids, inputs[3:], strict=True))
        terms = [[next(pairs) for _ in range(n)] for n in self.places]
        torch.manual_seed(1)
        out = function(*inputs[:3], *terms, self.mask if self.mask is None else self.mask.to(dtype), **options)
        weight = torch.arange(out.numel(), device=DEVICE, dtype=torch.float64).view_as(out).sin()
        weight = weight.to(self.dtype).to(dtype)  # the same numbers for every type
        return [x.detach().double() for x in (out, *torch.autograd.grad((out * weight).sum(), self.inputs))]


def definition(q, k, v, on_q, on_k, on_v, mask, kept):
    """Attention of the paper (Eq. 12 to 14), operator by operator; `kept` as `Case.kept` returns it."""
    logits = q @ k.transpose(2, 3)
    for ids, table in on_k:
        logits = logits + reference.rpe_index(_products(q, table), ids)
    for ids, table in on_q:
        logits = logits + reference.rpe_index(_products(k, table), ids.t()).transpose(2, 3)
    if mask is not None:
        blind = mask.amax(-1, keepdim=True) == -torch.inf
        logits, kept = logits + mask.masked_fill(blind, 0), kept.masked_fill(blind, 0)
    attn = logits.softmax(3) * kept.to(logits.dtype)
    out = attn @ v
    for ids, table in on_v:
        out = out + reference.rpe_bucket_sum(attn, ids, table.shape[-2]) @ table
    return out


def _products(x, table):
    return table.expand(*x.shape[:3], -1) if table.dim() == 4 else x @ table


def excess(case):
    """The largest error of a case in parts of what is allowed: it passes if that is at most 1."""
    kept = case.kept() if case.dropout_p else torch.ones(case.batch, case.heads, case.length, case.length,
                                                         device=DEVICE)
    exact = case.results(definition, torch.float64, kept=kept)
    plain = case.results(definition, case.dtype, kept=kept)
    workspace, fused._WORKSPACE = fused._WORKSPACE, case.workspace
    try:
        found = case.results(fused.attention, case.dtype, dropout_p=case.dropout_p)
    finally:
        fused._WORKSPACE = workspace
    worst = 0.0
    for x, y, z in zip(exact, plain, found, strict=True):
        # gradients of logits are differences of products of vectors like the output, and may cancel, as with one key;
        # those of keys and tables are these times queries
        size = max(x.abs().max().item(), exact[0].abs().max().item() * case.channels ** 0.5 * max(case.size, 1.0))
        allowed = TOLERANCE[case.dtype] * size + 2 * (y - x).abs().max().item()
        error = (z - x).abs().max().item()
        worst = max(worst, error / allowed if error == error else float("inf"))
    return worst


def main(args):
    print(f"Triton {triton.__version__} {'on a GPU' if DEVICE == 'cuda' else 'interpreted'}, {args.cases} cases from "
          f"seed {args.seed}; the largest error of every case in parts of what is allowed")
    failed, worst = 0, dict.fromkeys(TOLERANCE, 0.0)
    for seed in range(args.seed, args.seed + args.cases):
        case = Case(seed, **({"length": args.length, "batch": 1, "heads": 1} if args.length else {}))
        value = excess(case)
        failed += not value <= 1
        worst[case.dtype] = max(worst[case.dtype], value)
        said = ", ".join(f"{name} {str(x).removeprefix('torch.')}" for name, x in case.options.items())
        print(f"{seed:5}{value:7.3f}{'' if value <= 1 else ' FAILED'}  {said}", flush=True)
    print(f"{args.cases - failed} passed, {failed} failed; largest: "
          + ", ".join(f"{str(dtype)[6:]} {value:.3f}" for dtype, value in worst.items()))
    sys.exit(failed > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--length", type=int, help="of every case, of one head of one picture")
    main(parser.parse_args())
