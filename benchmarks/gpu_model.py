"""A calculation, no measurement: the least time that attention could take on a GPU, from shapes alone.

`python benchmarks/gpu_model.py` adds up, for the kernels of a layer's forward and backward pass in half precision, what
each must move and multiply. A kernel takes at least the longer of its bytes at the memory's speed and its operations at
the tensor cores'. Everything is read and written once per kernel, from memory even where a cache would hold it; only
the block of pairs that goes from a fused kernel to the bucket sum is also counted as if L2 kept it. Launches, softmax,
look-ups and what real kernels lose are not counted.
"""
from dataclasses import dataclass

GPUS = {"A100": (2.039e12, 312e12), "H100": (3.35e12, 989e12)}  # bytes and half-precision operations a second
BYTES, WIDE = 2, 4
LAYERS, WIDTH = 12, 384  # of DeiT-S


@dataclass
class Layer:
    """An attention: pictures, heads, tokens, channels of a head, buckets; `on` names the places of its tables."""
    batch: int
    heads: int
    length: int
    channels: int
    buckets: int = 50
    on: str = ""

    def __post_init__(self):
        planes = self.batch * self.heads
        self.tokens = planes * self.length * self.channels * BYTES  # a (B, H, L, D)
        self.products = planes * self.length * self.buckets * BYTES
        self.pairs = planes * self.length ** 2 * BYTES
        self.tile = 2 * planes * self.length ** 2 * self.channels  # operations of a product over all pairs
        self.table = 2 * planes * self.length * self.channels * self.buckets  # of a product with a table
        self.in_logits = len(self.on.replace("v", ""))
        self.on_v = "v" in self.on


def plain(x):
    """FlashAttention: [(bytes, operations)] of its kernels, forward, then backward."""
    return [(4 * x.tokens, 2 * x.tile)], [(2 * x.tokens, 0), (7 * x.tokens, 5 * x.tile)]


def around(x):
    """What every contextual encoding needs beside the pairs: the scaled queries and the products with tables."""
    scale, product = (2 * x.tokens, 0), (x.tokens + x.products, x.table)
    added, gradient = (3 * x.tokens, 0), (2 * x.tokens + x.products, x.table)
    places = x.in_logits + x.on_v
    return [scale] + [product] * places + [added] * x.on_v, \
        [scale] + [product, gradient] * places + [added] * x.in_logits


def fused(x, in_l2=False):
    """rpe_ops' kernels, with their block of pairs in memory or in L2."""
    read = x.in_logits * x.products
    pairs = 0 if in_l2 else x.pairs
    sums = (pairs + x.products, 0)
    before, after = around(x)
    forward = [(4 * x.tokens + read + pairs * x.on_v, (2 + x.on_v) * x.tile)] + [sums] * x.on_v
    read += x.on_v * x.products
    queries = (5 * x.tokens + read + pairs * ("k" in x.on), 5 * x.tile)  # two of them for the deltas
    keys = (6 * x.tokens + read + pairs * ("q" in x.on), 4 * x.tile)
    return before + forward, after + [queries, keys] + [sums] * x.in_logits + [(2 * x.products, 0)] * x.on_v


def composed(x):
    """PyTorch's operators and rpe_ops' two, with tensors of pairs in memory."""
    before, after = around(x)
    gathered, summed = (x.products + x.pairs, 0), (x.products + x.pairs, 0)
    sums = [(3 * x.pairs, 0)] * (x.in_logits - 1)  # of the terms
    copies = [(2 * x.pairs, 0)] if x.length % 8 else []  # PyTorch aligns the mask of its attention
    if not x.on_v:
        forward, backward = plain(x)
        forward, backward = [(forward[0][0] + x.pairs, forward[0][1])], \
            [backward[0], (backward[1][0] + 2 * x.pairs, backward[1][1])]
        return before + [gathered] * x.in_logits + sums + copies + forward, backward + copies + [summed] * x.in_logits \
            + after
    wide = x.pairs // BYTES * WIDE  # autocast's softmax has its result in float32
    product = (2 * x.tokens + x.pairs, x.tile)
    forward = [product] + sums + [(3 * x.pairs, 0)] * (x.in_logits > 0) + [(x.pairs + wide, 0), (wide + x.pairs, 0)]
    forward += [product, (wide + x.products, 0)]
    backward = [product] * 4 + [(x.products + wide, 0), (x.pairs + 2 * wide, 0), (2 * wide + x.pairs, 0)]
    return before + [gathered] * x.in_logits + forward, backward + [summed] * x.in_logits + after


def bound(kernels, gpu):
    """Seconds that the kernels of both directions take at least."""
    bandwidth, operations = GPUS[gpu]
    return sum(max(moved / bandwidth, computed / operations) for way in kernels for moved, computed in way)


def rest_of_step(batch, length, gpu):
    """Seconds of a DeiT-S training step without its attention: linear layers, norms, residuals and activations."""
    tokens = batch * length
    linear = 3 * 2 * tokens * 12 * WIDTH ** 2
    # passes over (tokens, width) that no product hides: two norms, two residuals, GELU on four times the width; the
    # backward pass makes about twice as many
    moved = 3 * (2 * 2 + 2 * 3 + 2 * 4) * tokens * WIDTH * BYTES
    return LAYERS * bound([[(0, linear), (moved, 0)]], gpu)


def report(name, shape, gpu, step):
    """Lines of the table for one shape on one GPU; with `step` also of whole training steps of DeiT-S."""
    base = bound(plain(Layer(*shape)), gpu)
    rest = rest_of_step(shape[0], shape[2], gpu) if step else 0
    print(f"{name:24}{gpu:6}plain    {'':5}{base * 1e6:9.0f} us")
    for on in ("k", "qkv"):
        layer = Layer(*shape, on=on)
        for way, kernels in (("composed", composed(layer)), ("fused", fused(layer)), ("fused, L2", fused(layer, True))):
            seconds = bound(kernels, gpu)
            ratio = (rest + LAYERS * seconds) / (rest + LAYERS * base)
            print(f"{'':30}{way:10}{on:4}{seconds * 1e6:9.0f} us{seconds / base:7.2f} x plain"
                  + (f"{ratio:8.2f} x the whole step" if step else ""))


def main():
    print("Calculated from shapes, not measured: least times of attention, forward and backward")
    for gpu in GPUS:
        for length in (197, 577):
            report(f"DeiT-S, 128 x {length}", (128, 6, length, 64), gpu, step=True)
        for length in (850, 1400):
            report(f"DETR, 2 x {length}", (2, 8, length, 32), gpu, step=False)


if __name__ == "__main__":
    main()
