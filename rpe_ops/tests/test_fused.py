"""Fused attention: random cases against the definition, and what a case alone does not show."""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton, which PyTorch for CPUs has not", allow_module_level=True)
from fused_cases import DEVICE, Case, definition, excess
from rpe_ops import attention_takes, blockwise, fused

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def chosen(monkeypatch):
    """IRPE_ATTENTION=fused."""
    monkeypatch.setattr(blockwise, "ATTENTION", "fused")
    monkeypatch.setattr(blockwise, "fused", fused, raising=False)


def attend(q, k, v, *pairs, function=fused.attention, dropout_p=0.0, mask=None):
    """Attention of a case with a table in each place."""
    return function(q, k, v, *([(ids, table)] for ids, table in pairs), mask, dropout_p)


@pytest.mark.parametrize("fixed", [
    {"dtype": torch.float32, "channels": 48, "length": 37, "kind": "heads", "mask": "blind", "dropout_p": 0.1},
    {"dtype": torch.float16, "channels": 32, "length": 70, "kind": "shared", "mask": "padding", "size": 4.0},
    {"dtype": torch.bfloat16, "channels": 96, "length": 33, "kind": "shared", "mask": None, "dropout_p": 0.5},
    {"dtype": torch.float16, "channels": 128, "length": 65, "kind": "bias", "mask": "full", "buckets": 300},
    {"dtype": torch.float32, "channels": 64, "length": 1, "kind": "shared", "mask": None, "workspace": 1},
])
@pytest.mark.parametrize("places", [[0, 1, 0], [2, 2, 2]])
def test_output_and_gradients_equal_the_definition(fixed, places):
    assert excess(Case(0, places=places, batch=2, heads=2, **fixed)) <= 1


def test_gradients_keep_their_digits_where_values_have_much_in_common():
    case = Case(0, dtype=torch.float32, channels=32, places=[1, 1, 0], kind="shared", batch=1, heads=2, length=40,
                mask=None, size=1.0)
    with torch.no_grad():
        case.inputs[2] += 300
    kept = torch.ones(1, 2, 40, 40, dtype=torch.float64, device=DEVICE)
    exact, plain, found = (case.results(*x) for x in (
        (lambda *x, **_: definition(*x, kept=kept), torch.float64),
        (lambda *x, **_: definition(*x, kept=kept), torch.float32),
        (lambda *x, **_: fused.attention(*x, dropout_p=0.0), torch.float32)))
    for x, y, z in list(zip(exact, plain, found, strict=True))[1:]:
        assert (z - x).norm() < 3 * (y - x).norm() + 1e-6 * x.norm()


@pytest.mark.parametrize("seed", range(8))
def test_random_cases_equal_the_definition(seed):
    assert excess(Case(1000 + seed)) <= 1


def test_results_are_the_same_in_every_run_and_for_any_workspace(monkeypatch):
    case = Case(0, dtype=torch.float16, places=[1, 1, 1], kind="shared", batch=2, heads=2, length=40, mask=None)
    first = case.results(fused.attention, torch.float16, dropout_p=0.1)
    monkeypatch.setattr(fused, "_WORKSPACE", 3 * 40 * 40)
    assert all(map(torch.equal, first, case.results(fused.attention, torch.float16, dropout_p=0.1)))


def test_nothing_as_large_as_the_logits_is_kept_for_the_backward_pass():
    case = Case(0, dtype=torch.float32, channels=8, buckets=5, places=[1, 1, 1], kind="shared", length=100, mask=None)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.data_ptr(), x), lambda x: x):
        attend(*case.inputs[:3], *zip(case.ids, case.inputs[3:], strict=True))
    assert kept and max(x.numel() for x in kept.values()) < case.batch * case.heads * 100 * 100 / 4


def test_dropout_keeps_each_place_with_its_probability_and_draws_anew_for_every_call():
    case = Case(0, dtype=torch.float32, batch=2, heads=3, length=64, dropout_p=0.3, places=[0, 0, 0])
    kept = case.kept() > 0
    assert kept.sum().item() == pytest.approx(0.7 * kept.numel(), abs=5 * (0.21 * kept.numel()) ** 0.5)
    planes = kept.flatten(0, 1).flatten(1).double()
    correlations = torch.corrcoef(torch.cat([planes, planes.roll(1, 1)]))
    assert correlations.fill_diagonal_(0).abs().max() < 5 / 64  # of planes, and of neighbours
    q = torch.zeros(1, 1, 8, 4, device=DEVICE)
    outs = [fused.attention(q, q, q + 1, [], [], [], None, p) for p in (0.3, 0.3, 1.0)]
    assert not torch.equal(*outs[:2]) and outs[2].abs().max() == 0


def test_the_operators_pass_opcheck():
    case = Case(0, dtype=torch.float32, channels=4, buckets=3, places=[1, 1, 1], kind="shared", batch=1, heads=2,
                length=5, mask="padding")
    q, k, v, *tables = case.inputs
    ids = [[x] for x in case.ids]
    seed = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    inputs = [*(x.detach().requires_grad_() for x in (q, k, v, k @ tables[0], q @ tables[1])), *ids, 3,
              case.mask.expand(1, 2, 5, 5), seed, 0.1]
    torch.library.opcheck(torch.ops.rpe_ops.fused_attention.default, inputs)
    saved = [x.detach() for x in (*torch.ops.rpe_ops.fused_attention(*inputs), *inputs[:5])]
    torch.library.opcheck(torch.ops.rpe_ops.fused_attention_backward.default, [*saved, *inputs[5:]],
                          test_utils=("test_schema", "test_faketensor"))


def test_a_second_derivative_is_refused():
    case = Case(0, dtype=torch.float32, channels=4, places=[0, 1, 0], kind="shared", length=3, mask=None)
    q, k, v, table = case.inputs
    out = fused.attention(q, k, v, [], [(case.ids[0], table)], [], None, 0.0)
    grad, = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="fused_attention_backward"):
        grad.sum().backward()


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_it_computes_the_same_in_one_graph(chosen, autocast):
    case = Case(0, dtype=torch.float32, channels=16, buckets=5, places=[1, 1, 1], kind="shared", batch=1, heads=2,
                length=9, mask=None, size=1.0)

    def step(*inputs):
        with torch.autocast(DEVICE, torch.float16, enabled=autocast):
            assert attention_takes(*inputs[:3])
            return attend(*inputs[:3], *zip(case.ids, inputs[3:], strict=True), function=blockwise.attention)

    def results(function):
        out = function(*case.inputs)
        return [out, *torch.autograd.grad(out.float().square().sum(), case.inputs)]

    expected = results(step)
    assert expected[0].dtype == (torch.float16 if autocast else torch.float32)
    torch.testing.assert_close(results(torch.compile(step, fullgraph=True, backend="aot_eager")), expected)
    exact = case.results(lambda *x, **_: attend(*x[:3], *(y[0] for y in x[3:6]), function=blockwise.attention),
                         torch.float32)[0]
    torch.testing.assert_close(expected[0].double(), exact, rtol=0, atol=5e-2)


def test_it_says_which_calls_it_takes(chosen):
    q = torch.zeros(1, 2, 5, 8, device=DEVICE)
    assert all(attention_takes(x, x, x) for x in (q, q.half(), q.bfloat16()))
    assert not attention_takes(q, q, q, torch.zeros(5, device=DEVICE, requires_grad=True))
    for wrong in ((q, q[:, :, :3], q), (q, q, q[..., :4]), [torch.zeros(1, 1, 3, 129, device=DEVICE).half()] * 3,
                  [q[:0]] * 3):
        assert not fused.takes(*wrong)


def test_the_choice_is_read_from_the_environment():
    def say(before="pass", **choice):
        environment = {name: value for name, value in os.environ.items() if name != "IRPE_ATTENTION"} | choice
        code = (f"{before}; import rpe_ops, sys, torch; print(rpe_ops.ATTENTION, 'triton' in sys.modules); "
                "rpe_ops.attention_takes(*torch.zeros(3, 1, 1, 2, 4))")
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    assert say().stdout == "composed False\n"
    assert say(IRPE_ATTENTION="fused").stdout == "fused True\n"
    without_triton = say("import importlib.util; importlib.util.find_spec = lambda name: None", IRPE_ATTENTION="fused")
    assert without_triton.stdout == "fused False\n" and without_triton.returncode == 0  # as PyTorch for CPUs is
    assert "IRPE_ATTENTION is 'flash'; it must be composed or fused" in say(IRPE_ATTENTION="flash").stderr


def in_benchmarks(code):
    """What Python prints there, not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, env=environment, check=True,
                          capture_output=True, text=True).stdout


def test_maps_of_all_sizes_share_their_kernels():
    made = in_benchmarks("""
import torch, fused_ptxas
for length in (16, 37, 64, 200):
    launches = fused_ptxas.launches(torch.float16, 64, (1, 1, 1), True, 0.1, length)
    print({name: fused_ptxas.specialised(*launch) for name, launch in launches.items()})
""").splitlines()
    assert len(made) == 4 and len(set(made)) == 1


@pytest.mark.parametrize("arch", [80, 90])
def test_it_compiles_without_spilled_registers(arch):
    code = f"import fused_ptxas; print(*fused_ptxas.measure(({arch}, 'float16', 64, 'qkv', True)), sep='\\n')"
    out = in_benchmarks(code)
    rows = [line.split() for line in out.splitlines()]
    assert len(rows) == 3 and all(int(row[-3]) <= 255 and int(row[-2]) == 0 for row in rows), out

