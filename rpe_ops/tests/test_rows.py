"""Attention by rows of the map: random cases, launches, memory, compilation, and the choice of this attention."""

import collections
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.checkpoint import checkpoint

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton, which PyTorch for CPUs lacks", allow_module_level=True)
import rpe_ops
from rows_cases import DEVICE, Case, excess, row_layout, tiles
from rpe_ops import blockwise, rows

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = {
    "dtype": torch.float32,
    "channels": 16,
    "batch": 1,
    "heads": 1,
    "map": (3, 3),
    "prefix": 1,
    "places": "qkv",
    "kind": "shared",
    "method": "product",
    "classes": 3,
    "mask": None,
    "dropout_p": 0.0,
    "size": 1.0,
    "together": True,
    "tiles": "large",
}


@pytest.fixture
def launches(monkeypatch):
    """Names of the launched kernels."""
    names, launch = [], rows._launch

    def record(kernel, *args):
        names.append(kernel.fn.__name__)
        with _disable_current_modes():  # The interpreter itself calls operators, which do not count.
            launch(kernel, *args)  # returns nothing, so that the next launch comes here too

    rows.forget_launches()
    monkeypatch.setattr(rows, "_launch", record)
    yield names
    rows.forget_launches()


@pytest.mark.parametrize(
    "fixed",
    [
        {
            "dtype": torch.float16,
            "channels": 48,
            "map": (3, 18),
            "prefix": 2,
            "kind": "heads",
            "heads": 2,
            "mask": "blind",
            "size": 4.0,
        },
        {
            "dtype": torch.bfloat16,
            "channels": 80,
            "map": (9, 2),
            "prefix": 0,
            "method": "cross",
            "dropout_p": 0.5,
            "mask": "padding",
        },
        {
            "dtype": torch.float32,
            "channels": 24,
            "map": (7, 5),
            "prefix": 5,
            "batch": 2,
            "mask": "full",
            "classes": 5,
            "together": False,
        },
        {
            "dtype": torch.float32,
            "kind": "bias",
            "heads": 2,
            "batch": 2,
            "places": "qk",
            "map": (2, 17),
            "mask": "full bool",
        },
        {"dtype": torch.float16, "places": "v", "map": (1, 7), "tiles": "usual", "mask": "bool"},
        {"dtype": torch.float32, "map": (1, 1), "prefix": 0, "tiles": "usual"},
        {"dtype": torch.float16, "channels": 128, "prefix": 16, "places": "kv"},
    ],
    ids=str,
)
def test_output_and_gradients_equal_the_definition(fixed):
    assert excess(Case(0, **SMALL | fixed)) <= 1


def test_weight_sums_are_correct_if_the_maximum_comes_last():
    case = Case(0, **SMALL | {"map": (4, 4), "mask": "full"})
    with torch.no_grad():
        case.mask = torch.full_like(case.mask, -300.0)  # far below the zero of padded logits
        case.mask[..., :9] = -torch.inf
        case.mask[..., -1] = 300.0
        case.mask[..., :6, -1] = -300.0
    assert excess(case) <= 1


@pytest.mark.parametrize("seed", range(4))
def test_random_cases_equal_the_definition(seed):
    assert excess(Case(1000 + seed, batch=1, map=(3, 5), tiles="large")) <= 1


def test_a_case_in_which_everything_is_zero_passes():
    case = Case(0, **SMALL | {"map": (1, 1), "prefix": 0, "places": "k", "dropout_p": 1.0})
    assert excess(case) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_of_values_with_a_large_mean(dtype):
    case = Case(0, **SMALL | {"dtype": dtype, "map": (5, 7)})
    with torch.no_grad():
        case.inputs[2] += 300
    if dtype != torch.float32:  # As in PyTorch's own attention, the rounded output limits the precision.
        assert excess(case) <= 1
        return
    kept = case.kept()
    exact, plain, found = (
        case.results(*x)
        for x in (
            (lambda *x: case.definition(*x, kept=kept), torch.float64),
            (lambda *x: case.definition(*x, kept=kept), dtype),
            (case.by_rows, dtype),
        )
    )
    for x, y, z in list(zip(exact, plain, found, strict=True))[1:]:
        assert (z - x).norm() < 3 * (y - x).norm() + 1e-6 * x.norm()


def test_results_are_the_same_in_every_run_and_for_any_batch(monkeypatch):
    case = Case(0, **SMALL | {"dtype": torch.float16, "batch": 2, "dropout_p": 0.1})
    first = case.results(case.by_rows, torch.float16)
    assert all(map(torch.equal, first, case.results(case.by_rows, torch.float16)))
    q, k, v, *tables = case.inputs
    case = Case(0, **SMALL | {"dtype": torch.float16, "batch": 2})
    whole = case.by_rows(q, k, v, *tables)
    assert torch.equal(whole[1:], case.by_rows(q[1:], k[1:], v[1:], *tables))


def test_results_do_not_depend_on_strides():
    case = Case(0, **SMALL | {"mask": "padding"})
    expected = case.results(case.by_rows, torch.float32)
    transposed(case)
    assert case.inputs[0].stride(3) != 1
    torch.testing.assert_close(case.results(case.by_rows, torch.float32), expected)
    out = case.by_rows(*case.inputs)
    grads = [
        torch.autograd.grad(out, case.inputs, weight, retain_graph=True)
        for weight in (torch.ones_like(out), torch.ones((), device=DEVICE).expand_as(out))
    ]
    assert all(map(torch.equal, *grads))


def test_saves_no_tensor_as_large_as_the_logits_for_backward():
    case = Case(0, **SMALL | {"map": (12, 12), "heads": 1, "places": "qkv"})
    kept = {}
    keep = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.data_ptr(), x), lambda x: x)
    with tiles("large"), keep:
        case.by_rows(*case.inputs)
    assert kept and max(x.numel() for x in kept.values()) < 145 * 145 / 2


class Operators(TorchDispatchMode):
    """Records the operators that would launch work on a GPU."""

    quiet = (
        "view",
        "as_strided",
        "detach",
        "empty",
        "unbind",
        "split",
        "select",
        "slice",
        "expand",
        "transpose",
        "permute",
        "attention_by_rows",
        "alias",
        "t.",
        "unsqueeze",
        "squeeze",
        "new_empty",
        "_unsafe_view",
        "reshape",
    )

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.")
        if not name.removeprefix("rpe_ops.").startswith(self.quiet):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


FORWARD = ["product_kernel", "forward_kernel"]
BACKWARD = [
    "product_kernel",
    "queries_kernel",
    "keys_kernel",
    "adjoint_kernel",
    "gradient_kernel",
    "collect_kernel",
]
BACKWARD_FLOAT32 = ["product_kernel", "deltas_kernel", *BACKWARD[1:]]


@pytest.mark.parametrize(
    ("fixed", "forward", "backward"),
    [
        ({"places": "k"}, FORWARD, BACKWARD),
        ({"places": "q"}, FORWARD, BACKWARD),
        ({"places": "qk"}, FORWARD, BACKWARD),
        ({"places": "qkv"}, [*FORWARD, "adjoint_kernel"], BACKWARD),
        ({"places": "qkv", "method": "cross", "mask": "padding"}, [*FORWARD, "adjoint_kernel"], BACKWARD),
        ({"places": "k", "method": "cross", "kind": "heads", "mask": "bool"}, FORWARD, BACKWARD),
        ({"places": "v"}, ["forward_kernel", "adjoint_kernel"], [*BACKWARD[:3], *BACKWARD[4:]]),
        ({"dtype": torch.float32, "places": "k"}, FORWARD, BACKWARD_FLOAT32),
        ({"places": "qk", "kind": "bias"}, FORWARD, [*BACKWARD[:3], *BACKWARD[4:]]),
    ],
    ids=str,
)
def test_a_call_launches_the_expected_kernels_and_nothing_else(fixed, forward, backward, launches):
    case = Case(0, **SMALL | {"dtype": torch.float16} | fixed)
    with torch.no_grad():
        case.inputs[3:] = [table.float().requires_grad_() for table in case.inputs[3:]]  # Like autocast.
    with Operators() as operators, tiles("large"):
        out = case.by_rows(*case.inputs)
        seen = list(launches)
        torch.autograd.grad(out, case.inputs, out.detach())
    assert (seen, launches[len(seen) :], operators.seen) == (forward, backward, [])


@pytest.fixture
def arguments(monkeypatch):
    """What is launched, without running: kernel, grid, tile, what it was prepared for, and the arguments."""
    launched = []

    def record(kernel, grid, options, arguments):
        prepared_for = [(x.dtype, x.data_ptr() % 16) for x in arguments if isinstance(x, torch.Tensor)]

        def again(*arguments):
            launched.append((kernel.fn.__name__, grid, options, prepared_for, arguments))

        again(*arguments)
        return again

    rows.forget_launches()
    monkeypatch.setattr(rows, "_launch", record)
    yield launched
    rows.forget_launches()


def misaligned(x):
    """A tensor of the same values and strides that does not begin at a multiple of 16 bytes."""
    memory = torch.empty(x.untyped_storage().nbytes() // x.element_size() + 1, dtype=x.dtype, device=x.device)
    return memory.as_strided(x.shape, x.stride(), 1).copy_(x)


def transposed(case):
    """The case with inputs of the same values whose last two axes are swapped in memory."""
    case.inputs = [x.detach().transpose(-2, -1).contiguous().transpose(-2, -1).requires_grad_() for x in case.inputs]
    return case


def test_calls_that_differ_in_anything_share_no_launches(arguments):
    variants = [
        {},
        *({"mask": mask} for mask in ("padding", "bool", "full", "full bool")),
        *({"places": places} for places in ("q", "k", "v", "qk")),
        *({"dropout_p": dropout_p} for dropout_p in (0.1, 0.5)),
        *({"map": size} for size in ((2, 5), (5, 2), (1, 9))),
        *({"kind": kind, "places": "qk"} for kind in ("heads", "bias")),
        {"method": "cross"},
        {"prefix": 0},
        {"classes": 2},
        {"dtype": torch.bfloat16},
        {"batch": 2},
        {"heads": 3},
        {"channels": 24},
        {"together": False},
    ]
    cases = [Case(0, **SMALL | {"heads": 2} | variant) for variant in variants]
    cases.append(transposed(Case(0, **SMALL | {"heads": 2})))
    for i in range(6):  # q, k, v and the tables, each alone
        for change in (misaligned, lambda x: x.transpose(-2, -1).contiguous().transpose(-2, -1)):
            cases.append(Case(0, **SMALL | {"heads": 2}))
            cases[-1].inputs[i] = change(cases[-1].inputs[i].detach()).requires_grad_()
    cases.append(Case(0, **SMALL | {"heads": 2, "dtype": torch.float16}))
    cases[-1].inputs[3:] = [table.detach().float().requires_grad_() for table in cases[-1].inputs[3:]]
    cases.append(Case(0, **SMALL | {"heads": 2, "mask": "full"}))
    cases[-1].mask = misaligned(cases[-1].mask)
    cases.append(Case(0, **SMALL | {"heads": 2, "mask": "full"}))
    cases[-1].mask = cases[-1].mask.half()
    cases.append(Case(0, **SMALL | {"heads": 2}))
    cases[-1].map_and_kind = misaligned(cases[-1].map_and_kind[0]), *cases[-1].map_and_kind[1:]

    def launched(case, before=lambda: None):
        arguments.clear()
        before()
        out = case.by_rows(*case.inputs)
        ones = torch.ones_like(out)
        for grad in (ones, ones.contiguous(), misaligned(ones)):
            before()
            out.backward(grad, retain_graph=True)
        return [
            (*launch, [(x.shape, x.stride()) if isinstance(x, torch.Tensor) else x for x in values])
            for *launch, values in arguments
        ]

    expected = [launched(case, rows.forget_launches) for case in cases]
    for _ in range(2):
        assert [launched(case) for case in cases] == expected


def test_repeated_launches_get_the_tensors_of_their_call(arguments):
    case = Case(0, **SMALL | {"mask": "full", "dropout_p": 0.1})
    used, kept = [], []
    for _ in range(2):
        case.inputs = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in case.inputs]
        case.mask = case.mask.clone()
        arguments.clear()
        out = case.by_rows(*case.inputs)
        grads = torch.autograd.grad(out, case.inputs, torch.ones_like(out))
        used.append({x.untyped_storage().data_ptr() for *_, values in arguments for x in values if torch.is_tensor(x)})
        for x in (*case.inputs, case.mask, out, *grads):
            assert x.untyped_storage().data_ptr() in used[-1]
        kept += [values for *_, values in arguments]  # so that the next call's tensors have other addresses
    layout = case.map_and_kind[0].untyped_storage().data_ptr()
    assert used[0] & used[1] - {0} == {layout}  # 0 is the address of an empty tensor
    assert rows._known_launches.cache_info().currsize == 2  # the forward and the backward pass


def small_case():
    return Case(0, **SMALL | {"dtype": torch.float32, "places": "qkv", "dropout_p": 0.0})


def test_gradient_checkpointing_changes_nothing():
    case = small_case()
    results = []
    for out in (case.by_rows(*case.inputs), checkpoint(case.by_rows, *case.inputs, use_reentrant=False)):
        results.append((out, *torch.autograd.grad(out.square().sum(), case.inputs)))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_second_derivatives_raise_an_error_that_names_the_alternative():
    case = small_case()
    gradients = torch.autograd.grad(case.by_rows(*case.inputs).sum(), case.inputs, create_graph=True)
    expected = torch.autograd.grad(case.by_rows(*case.inputs).sum(), case.inputs)
    gradients[-1].mul_(2).div_(2)  # The gradients may be changed in place.
    for gradient, same in zip(gradients, expected, strict=True):
        assert torch.equal(gradient, same)
        with pytest.raises(
            RuntimeError, match="no second derivatives; use PyTorch's operators.*IRPE_ATTENTION=composed"
        ):
            torch.autograd.grad(gradient.sum(), case.inputs, retain_graph=True)


def test_a_batch_of_gradients_raises_an_error_that_names_the_alternative():
    case = small_case()
    out = case.by_rows(*case.inputs)
    with pytest.raises(RuntimeError, match="batch of gradients at once; use PyTorch's operators"):
        torch.autograd.grad(out, case.inputs, torch.ones(2, *out.shape), is_grads_batched=True, retain_graph=True)
    with pytest.raises(RuntimeError, match="batch of gradients at once; use PyTorch's operators"):
        torch.vmap(lambda grad: torch.autograd.grad(out, case.inputs, grad, retain_graph=True)[0])(
            torch.ones(2, *out.shape)
        )


def test_an_undefined_gradient_gives_undefined_gradients():
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    case = small_case()
    out = Stop.apply(case.by_rows(*case.inputs))
    assert torch.autograd.grad(out.sum(), case.inputs, allow_unused=True) == (None,) * len(case.inputs)


def test_dropout_has_its_probability_and_differs_from_call_to_call():
    case = Case(0, **SMALL | {"batch": 2, "heads": 3, "map": (8, 8), "prefix": 0, "dropout_p": 0.3})
    with tiles("large"):
        kept = case.kept() > 0
    assert kept.sum().item() == pytest.approx(0.7 * kept.numel(), abs=5 * (0.21 * kept.numel()) ** 0.5)
    planes = kept.flatten(0, 1).flatten(1).double()
    correlations = torch.corrcoef(torch.cat([planes, planes.roll(1, 1)]))
    assert correlations.fill_diagonal_(0).abs().max() < 5 / 64  # between planes and between neighbouring weights
    case = Case(0, **SMALL | {"places": "k", "dropout_p": 0.5})
    outs = [case.by_rows(*case.inputs) for _ in range(2)]
    case.dropout_p = 1.0
    assert not torch.equal(*outs) and case.by_rows(*case.inputs).abs().max() == 0


@pytest.mark.parametrize("places", ["k", "qkv"])
def test_the_operators_pass_opcheck(places):
    case = Case(0, **SMALL | {"map": (2, 2), "mask": "padding", "places": places})
    q, k, v, *tables = (x.detach().requires_grad_() for x in case.inputs)
    layout, sizes, bias = case.map_and_kind
    seed = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    inputs = [tables, places, layout, list(sizes), bias, case.mask, seed, 0.1]
    # test_aot_dispatch_dynamic runs the traced kernels, which do not run in the interpreter.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.rpe_ops.attention_by_rows.default, [q, k, v, *inputs], test_utils=tests)
    saved = [x.detach() for x in torch.ops.rpe_ops.attention_by_rows(q, k, v, *inputs)]
    inputs[0] = [x.detach() for x in tables]
    torch.library.opcheck(
        torch.ops.rpe_ops.attention_by_rows_backward.default,
        [saved[0], *saved, q.detach(), k.detach(), v.detach(), *inputs],
        test_utils=("test_schema", "test_faketensor"),
    )


def test_autocast_casts_the_inputs_to_its_type():
    case = Case(0, **SMALL | {"map": (2, 2)})
    expected = case.by_rows(*case.inputs)
    with torch.autocast(DEVICE, torch.float16):
        out = case.by_rows(*case.inputs)
        grads = torch.autograd.grad(out.float().sum(), case.inputs)
    assert out.dtype == torch.float16 and {grad.dtype for grad in grads} == {torch.float32}
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=2e-2)


def test_rows_take_describes_the_accepted_calls(monkeypatch):
    q, table = torch.zeros(1, 2, 5, 8, device=DEVICE), torch.zeros(1, 8, 50, device=DEVICE)
    take = rpe_ops.rows_take
    monkeypatch.setattr(blockwise, "rows", rows)
    monkeypatch.setattr(blockwise, "ATTENTION", "composed")
    assert not take(q, q, q, [table], 1)
    monkeypatch.setattr(blockwise, "ATTENTION", "rows")
    monkeypatch.setattr(blockwise, "_IS_CHOSEN", True)
    assert all(take(x, x, x, [table], 1) for x in (q, q.half(), q.bfloat16()))
    assert not take(q, q, q, [table], 1, torch.zeros(5, device=DEVICE, requires_grad=True))
    hooked = torch.nn.Sequential(torch.nn.Identity())
    assert take(q, q, q, [table], 1, None, [hooked])
    hooked[0].register_forward_hook(lambda *_: None)
    assert not take(q, q, q, [table], 1, None, [hooked])
    for wrong in (
        (q, q[:, :, :3], q),
        (q, q, q[..., :4]),
        [torch.zeros(1, 1, 3, 129, device=DEVICE).half()] * 3,
        [q.double()] * 3,
        [q[:0]] * 3,
    ):
        assert not take(*wrong, [table], 1)
    for wrong in (torch.zeros(1, 7, 50), torch.zeros(3, 8, 50), torch.zeros(3, 50)):  # Their channels or heads differ.
        assert not take(q, q, q, [wrong.to(DEVICE)], 1)
    for x, taken in (
        (torch.empty(1, 2, 2, 1, device="meta").as_strided((1, 2, 2, 1), (1, 2**31 - 2, 1, 1)), True),
        (torch.empty(1, 2, 2, 1, device="meta").as_strided((1, 2, 2, 1), (1, 2**31 - 1, 1, 1)), False),
        (torch.empty(3, 1, 1, 1, device="meta").as_strided((3, 1, 1, 1), (2**40, 1, 1, 1)), True),
    ):
        assert rows._has_short_offsets(x) == taken
    wide = torch.zeros(1, device=DEVICE).expand(2**16, 2**16).expand(1, 1, -1, -1)
    assert take(q, q, q, [table], 1, wide)
    assert not take(
        q, q, q, [table], 1, torch.empty(1, 1, 2, 2, device="meta").as_strided((1, 1, 2, 2), (0, 0, 2**31, 1))
    )
    assert not take(q, q.half(), q, [table], 1)
    assert not take(q, q, q, [table], 17) and not take(q, q, q, [table, table.half()], 1)


@pytest.mark.parametrize(("capability", "taken"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_rows_take_calls_on_recent_gpus_only(capability, taken, monkeypatch):
    monkeypatch.setattr(rows, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode():
        q, table = torch.empty(1, 2, 5, 8, device="cuda"), torch.empty(1, 8, 50, device="cuda")
        on_cpu = torch.empty(1, 2, 5, 8)
        assert rows.takes(q, q, q, [table], 1) == taken
        with monkeypatch.context() as amd:
            amd.setattr(torch.version, "hip", "6.4")
            assert not rows.takes(q, q, q, [table], 1)
        assert not rows.takes(on_cpu, on_cpu, on_cpu, [table], 1)


def test_methods_that_mix_rows_and_columns_have_no_layout():
    mixed = torch.arange(9)[:, None] ** 2 % 3 + torch.zeros(1, 9, dtype=torch.long)
    with pytest.raises(ValueError, match="do not follow each other"):
        row_layout(mixed[None], 0, 9)


def test_columns_are_the_axis_that_needs_less_padding():
    index = torch.arange(-33, 34).clamp(-3, 3) + 3
    for height, width, expected in (
        (25, 34, (34, 25, 0, 7, 1, 34)),
        (34, 25, (34, 25, 0, 7, 25, 1)),
        (14, 14, (14, 14, 0, 7, 14, 1)),
    ):
        rows_of, columns = (index[34 - size : 33 + size] for size in (height, width))
        assert row_layout((rows_of[:, None] * 7 + columns)[None], 0, 49)[1] == expected


def test_irpe_attention_in_the_environment_selects_the_attention():
    def run(before="pass", **choice):
        environment = {name: value for name, value in os.environ.items() if name != "IRPE_ATTENTION"} | choice
        code = (
            f"import rpe_ops, sys, torch; {before}; x = torch.zeros(1, 1, 4, 16); found = 'triton' in sys.modules; "
            "taken = rpe_ops.rows_take(x, x, x, [torch.zeros(1, 16, 4)], 0); "
            "print(rpe_ops.ATTENTION, found, 'triton' in sys.modules, taken)"
        )
        environment["TRITON_INTERPRET"] = "1"
        return subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, **CAPTURED)

    no_triton = "rpe_ops.blockwise._can_import_rows = False"
    broken_triton = "sys.modules['triton.language'] = None"
    assert run().stdout == "rows False False False\n"  # Triton is imported only for a call on a GPU.
    assert run(IRPE_ATTENTION="composed").stdout == "composed False False False\n"
    assert run(IRPE_ATTENTION="rows").stdout == "rows False True True\n"
    assert run(no_triton, IRPE_ATTENTION="rows").stdout == "rows False False False\n"  # as with PyTorch for CPUs
    assert "halted" in run(broken_triton, IRPE_ATTENTION="rows").stderr  # An error, since the user asked for rows.
    forced = "rpe_ops.blockwise.ON_CUDA; rpe_ops.blockwise._IS_CHOSEN = False; import sys"
    on_gpu = run(f"{forced}; {broken_triton}; print(rpe_ops.blockwise._import_rows())")
    assert on_gpu.stdout == "False\nrows False False False\n"
    assert "IRPE_ATTENTION is 'fused'; it must be composed or rows" in run(IRPE_ATTENTION="fused").stderr


CAPTURED = {"capture_output": True, "text": True}


@pytest.mark.parametrize("chosen", [True, False])
def test_float32_is_computed_by_rows_only_if_the_user_asks_for_it(chosen, monkeypatch):
    monkeypatch.setattr(blockwise, "ATTENTION", "rows")
    monkeypatch.setattr(blockwise, "_IS_CHOSEN", chosen)
    monkeypatch.setattr(rows, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with FakeTensorMode():
        q, table = torch.empty(1, 2, 5, 8, device="cuda"), torch.empty(1, 8, 50, device="cuda")
        assert rpe_ops.rows_take(q.half(), q.half(), q.half(), [table], 1)
        assert rpe_ops.rows_take(q, q, q, [table], 1) == chosen
        torch.set_autocast_enabled("cuda", True)
        try:
            assert rpe_ops.rows_take(q, q, q, [table], 1)
        finally:
            torch.set_autocast_enabled("cuda", False)
        meta = torch.empty(1, 2, 5, 8, device="meta")
        assert not rpe_ops.rows_take(meta, meta, meta, [table], 1)


def in_benchmarks(code):
    """The output of this code in the folder benchmarks/, with Triton's compiler instead of its interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=BENCHMARKS, env=environment, check=True, capture_output=True, text=True
    ).stdout


def test_maps_of_all_sizes_use_the_same_compiled_kernels():
    made = in_benchmarks("""
import torch, rows_ptxas
for size in ((14, 14), (25, 34), (1, 40), (20, 3)):
    launches = rows_ptxas.launches(torch.float16, 64, "qkv", True, 0.1, *size)
    print({name: rows_ptxas.specialised(kernel, arguments) for name, (kernel, _, arguments) in launches.items()})
""").splitlines()
    assert len(made) == 4 and len(set(made)) == 1


@pytest.mark.parametrize(("arch", "dtype", "places"), [(80, "float32", "qkv"), (90, "float16", "k")])
def test_kernels_compile_without_spilled_registers(arch, dtype, places):
    case = (arch, dtype, 64, places, False)
    lines = in_benchmarks(f"import rows_ptxas; print(*rows_ptxas.measure({case}), sep='\\n')").splitlines()
    assert len(lines) == (8 if dtype == "float32" else 7) and all(int(line.split()[-2]) == 0 for line in lines), lines


REPEAT = """
import torch, triton
from rpe_ops import rows
from rows_launches import Driver
from rows_ptxas import row_layout

launched = []

def describe(argument):
    return (argument.shape, argument.stride(), argument.dtype) if isinstance(argument, torch.Tensor) else argument

def record(name, function, grid, arguments):
    launched.append((name, function, grid, [describe(argument) for argument in arguments]))

triton.runtime.driver.set_active(Driver(record))
index = torch.arange(-2, 3).clamp(-1, 1) + 1
layout, sizes = row_layout((index[:, None] * 3 + index)[None], 1, 10)
tables = [[torch.randn(1, *shape, requires_grad=True)] for shape in ((16, 10), (16, 10), (10, 16))]

def step(offset):
    memory = torch.randn(2 * 10 * 3 * 2 * 16 + offset, requires_grad=True)
    q, k, v = memory[offset:].view(2, 10, 3, 2, 16).permute(2, 0, 3, 1, 4)
    launched.clear()
    rows.attention(q, k, v, *tables, layout, sizes, False).sum().backward()
    return list(launched)

launch = rows._launch
through_triton = []
rows._launch = lambda *args: through_triton.append(1) or launch(*args)
first, second, unaligned, third = step(0), step(0), step(1), step(0)
print(len(first), first == second == third, len(through_triton))
# Numbers and grids are the same if the tensors are not aligned to 16 bytes, but other compiled kernels read them.
print([x[0::2] for x in first] == [x[0::2] for x in unaligned])
print([x[2:] for x in first] == [x[2:] for x in unaligned], *(x[1] == y[1] for x, y in zip(first, unaligned)))
"""


def test_repeated_launches_pass_the_same_arguments_to_the_same_compiled_kernels():
    counts, same, differences = in_benchmarks(REPEAT).splitlines()
    assert counts == "10 True 20" and same == "True"
    assert differences.split()[0] == "True" and differences.split().count("False") >= 4


def test_kernels_of_a_bias_compile_in_half_precision():
    made = in_benchmarks("""
import torch, rows_ptxas
for name, (kernel, tile, arguments) in rows_ptxas.launches(torch.float16, 64, "qk", True, 0.0, bias=True).items():
    rows_ptxas.compiled(kernel, tile, arguments, 90)
    print(name)
""").split()
    assert made == ["product", "forward", "queries", "keys", "gradient", "collect"]


def test_kernels_compile_with_the_types_of_torch_compile():
    """torch.compile passes floats as float64, and makes every integer 1 a constant."""
    made = in_benchmarks("""
import torch, triton, rows_ptxas
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
for name, (kernel, tile, arguments) in rows_ptxas.launches(torch.float16, 64, "qkv", True, 0.1).items():
    types, constants, aligned = rows_ptxas.specialised(kernel, arguments)
    ones = {name: 1 for name, value in arguments.items() if type(value) is int and value == 1}
    types |= {name: "fp64" for name, kind in types.items() if kind == "fp32"} | dict.fromkeys(ones, "constexpr")
    program = triton.compile(ASTSource(kernel, types, constants | ones, aligned), target=GPUTarget("cuda", 90, 32))
    print(name, program.asm["ptx"].count("mul.f64"))
""").splitlines()
    assert len(made) == 7 and all(line.endswith(" 0") for line in made), made


COMPILE = """
import collections, json, torch, triton
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from triton.backends.compiler import GPUTarget
from rpe_ops import rows
from rows_ptxas import row_layout

class Driver:  # It stands in for a GPU's driver. torch.compile needs its target to find the tensors a kernel writes to.
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

triton.runtime.driver.set_active(Driver())

def capture(graph, _):
    seen = []
    for node in graph.graph.nodes:
        if "triton_kernel_wrapper" in str(node.target):
            kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            while not isinstance(getattr(kernel, "__name__", None), str):
                kernel = kernel.fn
            seen.append((kernel.__name__, sorted(node.kwargs["tensors_to_clone"])))
        elif node.op == "call_function":
            seen.append((str(node.target), []))
    print(json.dumps(seen))
    outputs, = graph.graph.find_nodes(op="output")
    outputs = [x.meta["val"] if isinstance(x, torch.fx.Node) else x for x in outputs.args[0]]
    def run(inputs):  # It computes nothing, because there is no GPU.
        return [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) if isinstance(x, torch.Tensor) else x
                for x in outputs]
    run._boxed_call = True
    return run

index = torch.arange(-2, 3).clamp(-1, 1) + 1
layout, sizes = row_layout((index[:, None] * 3 + index)[None], 1, 10)
x = torch.randn(2, 10, 3, 2, 16, requires_grad=True)
tables = [[torch.randn(1, *shape, requires_grad=True)] for shape in ((16, 10), (16, 10), (10, 16))]
mask = torch.ones(2, 1, 1, 10, dtype=torch.bool)

def step(x, tables, layout, mask):
    return rows.attention(*x.permute(2, 0, 3, 1, 4), *tables, layout, sizes, False, mask, 0.1)

backend = aot_autograd(fw_compiler=capture, partition_fn=min_cut_rematerialization_partition)
torch.compile(step, fullgraph=True, backend=backend)(x, tables, layout, mask).sum().backward()
"""


def test_torch_compile_knows_the_kernels_and_the_tensors_they_write_to():
    forward, backward = (json.loads(line) for line in in_benchmarks(COMPILE).splitlines())
    kernels = [
        [(name, changed) for name, changed in graph if name.endswith("_kernel")] for graph in (forward, backward)
    ]
    assert [name for name, _ in kernels[0]] == [*FORWARD, "adjoint_kernel"]
    assert [name for name, _ in kernels[1]] == BACKWARD_FLOAT32
    assert [changed for _, changed in kernels[0]] == [["products"], ["log_sums", "maxima", "out", "sums"], ["x"]]
    assert [changed for _, changed in kernels[1]] == [
        ["products"],
        ["deltas"],
        ["grads", "sums"],
        ["grads", "sums"],
        ["x"],
        ["partial"],
        ["grads"],
    ]
    others = collections.Counter(name for graph in (forward, backward) for name, _ in graph)
    # PyTorch 2.11 cannot compile a view of bool as another type.
    unwanted = "clone", "copy", "zero", "full", "cat", "view.dtype"
    assert not [name for name in others if any(word in name for word in unwanted)]
