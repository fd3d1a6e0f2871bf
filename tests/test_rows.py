"""Both codebases' golden tests with attention by rows of the map, under Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys

import pytest

from conftest import ROOT

# pytest, which also fails if nothing went through attention by rows
RUN = """
import sys, pytest
from rpe_ops import rows
calls, attention = [], rows.attention
rows.attention = lambda *args: calls.append(1) or attention(*args)
for key, tile in rows.TILES.items():  # the interpreter's time goes by tiles
    rows.TILES[key] = tile._replace(own=256, other=16 if "sums" in key[0] else 256)
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]) or not calls)
"""
needs_rows = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("triton", "rpe_ops"))), reason="needs Triton and rpe_ops"
)


def run(folder, *args):
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "IRPE_ATTENTION": "rows",
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(["tests", *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", *args],
        cwd=ROOT / folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@needs_rows
@pytest.mark.parametrize(
    "folder, tests, words",
    [
        ("DeiT-with-iRPE", "tests/test_models.py", "logits_equal and deit_tiny and product_50_shared_k-rpe_ops"),
        ("DETR-with-iRPE", "tests/test_golden.py", "rpe-2.0-product-ctx-1-k and (outputs or losses or gradients)"),
    ],
)
def test_a_codebase_equals_its_golden_numbers_with_attention_by_rows(folder, tests, words):
    done = run(folder, RUN, tests, "-k", words)
    assert done.returncode == 0, done.stdout


COMPILE = """
import torch
from rpe_ops import rows
import rpe_models
calls, attention = [], rows.attention
rows.attention = lambda *args: calls.append(1) or attention(*args)
from irpe import get_rpe_config
from rpe_vision_transformer import VisionTransformer
torch.manual_seed(0)
model = VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=3,
                          rpe_config=get_rpe_config(skip=1, rpe_on="qkv"))
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.2)
x = torch.randn(2, 3, 16, 16)

def gradients(function):
    return [*torch.autograd.grad(function(x).square().sum(), list(model.parameters()))]

torch.testing.assert_close(gradients(torch.compile(model, fullgraph=True, backend="aot_eager")), gradients(model),
                           rtol=1e-3, atol=1e-4)
assert len(calls) >= 4, calls
"""


@needs_rows
def test_a_compiled_model_has_the_same_gradients_in_one_graph():
    done = run("DeiT-with-iRPE", COMPILE)
    assert done.returncode == 0, done.stdout
