"""rpe_ops.attention equals its definition, with blocks of any size."""

import pytest
import rpe_ops
import torch
from rpe_ops import attention, attention_takes, blockwise
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# Number of tables on queries, keys and values (the cross method has two), and whether the heads share them.
PLACES = [((0, 1, 0), True), ((1, 0, 0), False), ((2, 2, 2), False), ((1, 0, 1), True), ((1, 1, 1), True)]


def make(places=(1, 1, 1), shared=True, batch=3, heads=2, length=11, channels=4, buckets=7, dtype=torch.float64):
    """Inputs (q, k, v, *tables) that need gradients, and a function that computes their attention."""
    generator = torch.Generator().manual_seed(length)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    shapes = [(channels, buckets)] * (places[0] + places[1]) + [(buckets, channels)] * places[2]
    inputs = [random(batch, heads, length, channels) for _ in range(3)]
    inputs += [random(*(() if shared else (heads,)), *shape) for shape in shapes]
    ids = [torch.randint(buckets, (length, length), generator=generator, dtype=torch.int32) for _ in shapes]

    def attend(q, k, v, *tables, function=attention, **options):
        pairs = iter(zip(ids, tables, strict=True))
        return function(q, k, v, *([next(pairs) for _ in range(count)] for count in places), **options)

    return inputs, attend


def by_definition(q, k, v, on_q, on_k, on_v, mask=None):
    """Attention with an explicit table entry for every pair of tokens."""
    heads = q.shape[1]
    logits = q @ k.transpose(2, 3) + (0 if mask is None else mask)
    for ids, table in on_k:
        logits = logits + torch.einsum("bhid,hdij->bhij", q, table.expand(heads, -1, -1)[:, :, ids])
    for ids, table in on_q:
        logits = logits + torch.einsum("bhjd,hdij->bhij", k, table.expand(heads, -1, -1)[:, :, ids])
    p = logits.softmax(3)
    return p @ v + sum(torch.einsum("bhij,hijd->bhid", p, table.expand(heads, -1, -1)[:, ids]) for ids, table in on_v)


def with_gradients(attend, inputs, **options):
    """The output and the gradients; the gradient of the output is not constant."""
    out = attend(*inputs, **options)
    return [out, *torch.autograd.grad((out * torch.arange(out.numel()).view_as(out).sin()).sum(), inputs)]


@pytest.mark.parametrize("block", [1, 100, 2 * 11 * 11, 500, 2**20])
@pytest.mark.parametrize(("places", "shared"), PLACES)
def test_equals_the_definition_for_any_block_size(block, places, shared, monkeypatch):
    monkeypatch.setattr(blockwise, "_BLOCK", block)
    inputs, attend = make(places, shared)
    hidden = torch.zeros(3, 1, 1, 11).masked_fill(
        torch.arange(11) >= torch.tensor([8, 11, 3])[:, None, None, None], -torch.inf
    )
    for mask in (None, hidden, torch.arange(121.0).view(11, 11).cos().double()):
        torch.testing.assert_close(
            with_gradients(attend, inputs, mask=mask), with_gradients(attend, inputs, mask=mask, function=by_definition)
        )


def test_allocates_no_tensor_as_large_as_the_logits(monkeypatch):
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(
                x.untyped_storage().nbytes()
                for x in pytree.tree_leaves(out)
                if isinstance(x, torch.Tensor) and x.is_floating_point()
            )
            return out

    monkeypatch.setattr(blockwise, "_BLOCK", 2**14)
    inputs, attend = make(batch=4, length=400, dtype=torch.float32)
    with Sizes():
        attend(*inputs).sum().backward()
    bytes_of_logits = 4 * 4 * 2 * 400 * 400
    assert max(sizes) < bytes_of_logits / 10


@pytest.mark.parametrize("block", [7, 20, 2**20])
def test_dropout_keeps_the_mean_and_backward_drops_the_same_weights(block, monkeypatch):
    monkeypatch.setattr(blockwise, "_BLOCK", block)

    def seeded(*inputs):
        torch.manual_seed(1)
        return attend(*inputs, dropout_p=0.3)

    inputs, attend = make(batch=2, length=4, channels=3)
    assert torch.autograd.gradcheck(seeded, inputs)
    inputs, attend = make((1, 1, 0), batch=1, length=400, channels=3, dtype=torch.float32)
    inputs = [x * 0.1 for x in inputs]  # Small logits give all keys similar weights.
    inputs[2] = torch.ones_like(inputs[2])
    out = seeded(*inputs)
    assert abs(out.mean() - 1) < 0.01 and out.std() > 0.01
    assert attend(*inputs, dropout_p=1.0).abs().max() == 0


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("places", [(1, 1, 1), (2, 2, 2)])
def test_second_derivatives_equal_finite_differences(dropout_p, places, monkeypatch):
    monkeypatch.setattr(blockwise, "_BLOCK", 20)
    (x, v, _, *tables), attend = make(places, batch=1, heads=1, length=4, channels=2, buckets=3)

    def seeded(x, v, *tables):
        torch.manual_seed(1)
        return attend(x, x, v, *tables, dropout_p=dropout_p)

    assert torch.autograd.gradgradcheck(seeded, (x, v, *tables))
    (grad,) = torch.autograd.grad(
        seeded(x, x, *tables).square().sum(), x, create_graph=True
    )  # k and v are the same tensor
    assert grad.requires_grad
    torch.testing.assert_close(grad, torch.autograd.grad(seeded(x, x, *tables).square().sum(), x)[0])


def test_autocast_around_backward_does_not_change_gradients():
    inputs, attend = make(dtype=torch.float32)
    expected = torch.autograd.grad(attend(*inputs).square().sum(), inputs)
    out = attend(*inputs).square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(torch.autograd.grad(out, inputs), expected)


def test_attention_takes_describes_the_accepted_calls_and_others_raise():
    (q, k, v, *_), _ = make((0, 0, 0))
    assert attention_takes(q, k, v) and attention_takes(q, k, v, torch.zeros(11))
    hooked = torch.nn.Sequential(torch.nn.Identity())
    assert attention_takes(q, k, v, None, [hooked])
    hooked[0].register_forward_hook(lambda *_: None)
    assert not attention_takes(q, k, v, None, [hooked])
    assert not attention_takes(q, k, v, torch.zeros(11, requires_grad=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert not attention_takes(q, k, v)
    for wrong in (
        (q, k[:, :, :5], v),
        (q.half(), k.half(), v.half()),
        (q, k, v.float()),
        [x.to("meta") for x in (q, k, v)],
    ):
        assert not attention_takes(*wrong)
        with pytest.raises(ValueError, match=r"rpe_ops.attention got q, k, v of .* it takes"):
            attention(*wrong)
    with pytest.raises(IndexError, match="7"):
        attention(q, k, v, on_k=[(torch.full((11, 11), 7, dtype=torch.int32), torch.zeros(4, 7).double())])
    assert rpe_ops.attention is attention
