"""`model_cards.py --list` and `--describe` against the golden shapes, the released table and counts by hand."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import model_cards
import models
import rpe_models
from conftest import PROJECT
from irpe import piecewise_index
from runtime import UserError

MANIFESTS = json.loads((Path(__file__).parent / "golden" / "deit_manifest.json").read_text())
WIDTHS = {"tiny": 192, "small": 384, "base": 768}


def listed(pattern, capsys):
    """Rows of --list as {name: its other columns}."""
    model_cards.list_models(pattern)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    return {row[0]: row[1:] for row in rows if row[0].startswith("deit_")}


def described(name, capsys):
    model_cards.describe(name)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == name
    return {line[2:12].strip(): line[14:] for line in lines[1:] if line[2:12].strip()}, "\n".join(lines)


def macs_by_hand(name):
    """Multiply-accumulates of the convolution and every product of matrices in a ViT with iRPE."""
    width, side = WIDTHS[name.split("_")[1]], int(re.search(r"patch16_(\d+)", name)[1]) // 16
    prefix = 2 if "distilled" in name else 1
    tokens = side**2 + prefix
    block = 12 * tokens * width**2 + 2 * tokens**2 * width
    for key, shape in MANIFESTS.get(name, {}).items():
        if key.startswith("blocks.0.") and "lookup_table_weight" in key:
            buckets = shape[1] if "rpe_v" in key else shape[2]
            block += tokens * width * buckets
    return side**2 * 768 * width + 12 * block + prefix * width * 1000


@pytest.mark.parametrize("name", MANIFESTS)
def test_parameters_and_macs_are_those_counted_by_hand(name):
    model = model_cards.model_on_meta(name)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model_cards.count_parameters(model) == sum(torch.Size(shape).numel() for shape in MANIFESTS[name].values())
    assert model_cards.count_macs(model) == macs_by_hand(name)


def test_the_list_holds_every_model_with_its_released_numbers(capsys):
    rows = listed("", capsys)
    assert list(rows) == [*rpe_models.RELEASED, *rpe_models.UNRELEASED, *models.__all__]
    released = model_cards.released_numbers()
    for name, (parameters, macs, buckets, *accuracies) in rows.items():
        assert float(macs) == round(macs_by_hand(name) / 1e6)
        assert (buckets == "-") == (name in models.__all__) and buckets in (*name.split("_"), "-")
        if name in released:
            assert [float(parameters), *map(float, accuracies)] == [
                released[name][key] for key in ("params_m", "top1", "top5")
            ]
        else:
            assert accuracies == ["-", "-"]
    assert set(released) <= set(rpe_models.RELEASED)


@pytest.mark.parametrize(
    "pattern, names",
    [
        ("qkv", [name for name in rpe_models.RELEASED if "qkv" in name]),
        ("*_224", [f"deit_{s}{d}_patch16_224" for d in ("", "_distilled") for s in WIDTHS]),
        ("deit_tiny*_k", [rpe_models.RELEASED[0]]),
    ],
)
def test_a_pattern_is_a_part_of_a_name_or_a_glob(pattern, names):
    assert model_cards.matching(pattern) == names


def test_without_the_table_of_the_repository_the_list_has_no_released_results(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(model_cards, "NUMBERS", tmp_path / "released.json")
    model_cards.list_models("deit_tiny_patch16_224_ctx")
    assert re.search(r" 50 +- +-\n", capsys.readouterr().out)


def test_a_pattern_without_a_match_is_refused():
    with pytest.raises(UserError, match="'nothing'.*--describe"):
        model_cards.list_models("nothing")


@pytest.mark.parametrize("name", [name for name in MANIFESTS if "ctx" in name])
def test_a_description_shows_the_shapes_of_the_golden_tables(name, capsys):
    found, text = described(name, capsys)
    for key, shape in MANIFESTS[name].items():
        if key.startswith("blocks.0.") and "lookup_table" in key:
            assert f"{key.removeprefix('blocks.0.attn.')} {tuple(shape)} in each layer" in text
    assert found["buckets"].startswith(f"{name.split('_')[6]} used on a 14×14 map, {name.split('_')[6]} on this one")
    assert found["parameters"] == f"{sum(torch.Size(shape).numel() for shape in MANIFESTS[name].values()):,}"
    assert ("top-1" in found["released"]) == (name in model_cards.released_numbers())
    assert found["checkpoint"] == (
        f"{rpe_models.RELEASE_URL}{name}.pth" if name in rpe_models.RELEASED else "none released"
    )


def test_a_description_of_an_ablation_explains_every_part_of_its_name(capsys):
    found, text = described("deit_tiny_patch16_384_bias_cross_56_unshared_qk", capsys)
    g = {piecewise_index(torch.tensor(d), 20, 40, 160, torch.long).item() for d in range(-23, 24)}
    expected = {
        "model": "width 192, depth 12, 3 heads of 64",
        "image": "384×384 .* 24×24 tokens after 1 prefix",
        "method": "cross",
        "mode": "bias",
        "where": r"queries and keys \(qk\)",
        "heads": "unshared",
        "ratio": "20: alpha 20, beta 40, gamma 160",
        "buckets": f"56 used on a 14×14 map, {2 * (len(g) + 1)} on this one",
    }
    for what, words in expected.items():
        assert re.search(words, found[what]), what
    assert text.count("lookup_table_bias (3, 82)") == 4


@pytest.mark.parametrize("name, prefix", [("deit_small_patch16_224", 1), ("deit_base_distilled_patch16_384", 2)])
def test_a_baseline_is_described_without_an_encoding(name, prefix, capsys):
    found, _ = described(name, capsys)
    assert found["method"].startswith("none") and "ratio" not in found
    assert f"after {prefix} prefix" in found["image"] and found["checkpoint"].startswith("https://")


@pytest.mark.parametrize(
    "name, words",
    [
        (
            "deit_smal_patch16_224_ctx_product_50_shared_k",
            "did you mean deit_small_patch16_224_ctx_product_50_shared_k",
        ),
        ("deit_tiny_patch16_224_ctx_product_51_shared_k", "no product mapping .* 51 buckets"),
        ("deit_tiny_patch16_224_bias_product_50_shared_v", "a bias on values does not exist"),
        ("deit_tiny_patch16_100_ctx_product_50_shared_k", "100×100"),
        ("resnet50", "not of the form"),
        (f"deit_tiny_patch16_{'9' * 5000}_ctx_product_50_shared_k", "not of the form"),
        (f"deit_tiny_patch16_224_ctx_product_{'9' * 5000}_shared_k", "not of the form"),
        ("deit_tiny_patch16_٢٢٤_ctx_product_50_shared_k", "not of the form"),
    ],
)
def test_a_name_outside_the_grammar_is_refused_in_one_sentence(name, words):
    with pytest.raises(UserError, match=words) as refusal:
        model_cards.describe(name)
    assert "\n" not in str(refusal.value) and "vit_" not in str(refusal.value)


def test_the_command_works_from_any_folder_and_registers_its_models_once(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore:the extension rpe_ops", PROJECT / "model_cards.py", "--list", "*tiny*_k"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(f"^{rpe_models.RELEASED[0]} +5.76 +1276 +50 ", done.stdout, re.MULTILINE)
