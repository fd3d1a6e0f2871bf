"""Run the GPU check and its benchmarks without a GPU."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parents[1] / "benchmarks"))
import gpu  # noqa: E402
import operators  # noqa: E402


def test_gpu_check_runs_on_small_shapes_without_a_gpu(tmp_path):
    pytest.importorskip("triton")
    path = (
        f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # so that the script's `python` is this Python
    )
    done = subprocess.run(
        ["bash", TESTS / "gpu_check.sh", "--tiny", tmp_path / "result.txt"],
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = (tmp_path / "result.txt").read_text()
    assert result == done.stdout
    for text in (
        "passed, 0 failed",
        "DeiT-S, batch 1, bfloat16, compiled",
        "DETR encoder, 1x2",
        "rows k",
        "Tilings",
        "k   forward",
        "rows on k, kernels",
        "rows on qkv was not measured",
        "nothing failed",
    ):
        assert text in result, text


def measured(kernels, memory, wall):
    return gpu.Measurement(kernels, 100, [wall, wall], memory)


def test_goals_are_compared_with_the_ratios_to_the_plain_step(capsys):
    args = SimpleNamespace(tiny=False, models=["DeiT-S"], modes=gpu.MODES, type_name="float16")
    found = {}
    for mode in ("eager", "compiled"):
        for way, on, numbers in (
            ("plain", "", (20, 4000, 30)),
            ("composed", "k", (28, 5000, 40)),
            ("rows", "k", (22, 4080, 41)),
            ("rows", "qkv", (26, 4480, 38)),
        ):
            found[gpu.Subject("DeiT-S", way, on), mode] = measured(*numbers)
    gpu.compare_with_goals(gpu.report(found, args))
    lines = capsys.readouterr().out.splitlines()
    table = next(line for line in lines if line.startswith("  rows k "))
    assert table.split()[2:] == ["22.00", "1.10", "100", "41.00", "1.37", "4080", "1.02"]
    verdicts = [line.split(", ", 1)[1].split()[0] + " " + line.split()[-1] for line in lines if ": m" in line.lower()]
    assert verdicts == [
        "kernels met",
        "peak met",
        "eager MISSED",
        "compiled MISSED",
        "kernels met",
        "peak met",
        "compiled met",
    ]


def test_a_failing_model_sends_its_traceback():
    sent = []
    gpu.serve(SimpleNamespace(send=sent.append), gpu.Subject("DeiT-S", "plain", ""), SimpleNamespace(device="nothing"))
    ((kind, text),) = sent
    assert kind == "failed" and "Traceback" in text


def test_tilings_differ_in_one_field_from_the_current_one():
    rows = pytest.importorskip("rpe_ops.rows")
    tile = rows.Tile(64, 16, 4, 1)
    for fixed_other, others in ((True, {16}), (False, {16, 32, 64, 128})):
        tiles = gpu.variations(tile, fixed_other)
        assert tiles[0] == tile and len(set(tiles)) == len(tiles) and {other.other for other in tiles} == others
        assert all(sum(a != b for a, b in zip(tile, other, strict=True)) == 1 for other in tiles[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_operators_are_compared_with_sums_in_float64(dtype):
    ids, buckets = operators.product_ids(5, 6, 1, 1.9)
    functions = operators.contestants(1, 2, ids, buckets, "cpu", dtype)  # This call checks all functions.
    p = torch.full((1, 1, len(ids), len(ids)), 1.001).to(dtype)
    expected = operators.reference.rpe_bucket_sum(p.double(), ids, buckets)
    bound = operators.adding_error(p, ids, buckets, torch.float32)
    operators.check("right", operators.rpe_bucket_sum(p, ids, buckets), expected, bound)
    with pytest.raises(AssertionError, match="wrong is off by up to"):
        operators.check("wrong", operators.rpe_bucket_sum(p, ids, buckets) * 1.01, expected, bound)
    assert set(functions["backward"]) == {"rpe_ops", "gather", "flatten", "copy_"}
