"""The parts of the detector, compared with simpler implementations."""

import argparse
import filecmp
import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from conftest import PROJECT, parse, small
from fill import fill_state_dict, image
from models import build_model, parse_enc_rpe2d
from models.backbone import Backbone
from models.detr import SetCriterion
from models.matcher import HungarianMatcher
from models.position_encoding import PositionEmbeddingLearned, PositionEmbeddingSine
from models.rpe_attention import RPEMultiheadAttention
from models.rpe_attention.irpe import get_rpe_config
from util import runtime
from util.box_ops import box_cxcywh_to_xyxy, generalized_box_iou
from util.checkpoint import load_weights
from util.misc import NestedTensor, nested_tensor_from_tensor_list
from util.runtime import UserError


def tiny(*flags):
    """A small detector with deterministic weights in evaluation mode."""
    model, criterion, postprocessors = build_model(parse(*small("unused", "--num_classes", 7, "--eval", *flags)))
    model.load_state_dict(fill_state_dict(model.state_dict()))
    return model.eval(), criterion, postprocessors


# Of both codebases, so that a module that only one of them has is found too.
RUNTIME = sorted(
    {
        path.name
        for folder in (PROJECT / "util", PROJECT.parent / "DeiT-with-iRPE")
        for path in folder.glob("runtime/*.py")
    }
)


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ("models/rpe_attention/irpe.py", "irpe.py"),
        *((f"util/runtime/{name}", f"runtime/{name}") for name in RUNTIME),
        ("run_with_submitit.py", "run_with_submitit.py"),
        ("util/images.py", "images.py"),
        ("tests/fill.py", "tests/fill.py"),
        ("codebase_import.py", "codebase_import.py"),
    ],
)
def test_files_shared_with_deit_are_identical(here, there):
    original = PROJECT.parent / "DeiT-with-iRPE" / there
    if not original.is_file():
        pytest.skip("needs DeiT-with-iRPE beside this folder")
    assert filecmp.cmp(PROJECT / here, original, shallow=False)


# ---------------------------------------------------------------------------------------------------------------------
# --enc_rpe2d

VALID = [
    f"rpe-{ratio}-{method}-{mode}-{shared}-{on}"
    for ratio, method, mode, shared, on in itertools.product(
        ("1.9", "20"),
        ("euc", "quant", "cross", "product"),
        ("bias", "ctx"),
        "01",
        ("q", "k", "v", "qk", "kv", "qv", "qkv"),
    )
    if not (mode == "bias" and "v" in on)
]


def test_every_valid_encoding_is_parsed():
    assert len(VALID) == 2 * 4 * 2 * (3 + 7)
    for text in VALID:
        _, ratio, method, mode, shared, on = text.split("-")
        config = parse_enc_rpe2d(text)
        assert (config.ratio, config.method.value, config.mode[:3], config.shared_head, config.rpe_on, config.skip) == (
            float(ratio),
            method,
            {"bias": "bia", "ctx": "con"}[mode],
            shared == "1",
            on,
            0,
        )
    assert parse_enc_rpe2d("") is None


@pytest.mark.parametrize("method", ["euc", "quant", "cross", "product"])
@pytest.mark.parametrize(("mode", "on"), [("ctx", "qkv"), ("bias", "qk")])
def test_every_mapping_runs_in_the_encoder_and_learns(method, mode, on):
    model, _, _ = tiny("--enc_rpe2d", f"rpe-2.0-{method}-{mode}-0-{on}")
    model([image(1, (3, 70, 100))])["pred_logits"].square().sum().backward()
    tables = [p for name, p in model.named_parameters() if "lookup_table" in name]
    assert len(tables) == len(on) * (2 if method == "cross" else 1)
    assert all(table.grad.abs().max() > 0 for table in tables)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("rpe-x-product-ctx-1-k", "ratio is 'x'"),
        ("rpe-2.0-prod-ctx-1-k", "'prod'"),
        ("rpe-2.0-product-con-1-k", "'con'"),
        ("rpe-2.0-product-ctx-2-k", "shared_head is '2'"),
        ("rpe-2.0-product-ctx-1-kq", "'kq'"),
        ("rpe-2.0-product-bias-1-v", "bias"),
        ("rpe-2.0-product-ctx-1", "but has 5"),
        ("irpe-2.0-product-ctx-1-k", "rpe"),
        ("rpe--2-product-ctx-1-k", "but has 7"),
        ("rpe-0-product-ctx-1-k", "ratio"),
        ("rpe-nan-product-ctx-1-k", "ratio"),
    ],
)
def test_error_for_an_invalid_encoding_names_its_part_and_the_grammar(text, part):
    with pytest.raises(UserError) as caught:
        parse_enc_rpe2d(text)
    assert part in str(caught.value) and "rpe-{ratio}-{euc|quant|cross|product}" in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Attention and transformer

MASKS = {
    "nothing": {},
    "padding": {"key_padding_mask": torch.arange(6) >= torch.tensor([[4], [6]])},
    "pairs": {"attn_mask": torch.ones(6, 6, dtype=torch.bool).triu(1), "is_causal": True},
    "heads": {"attn_mask": image(4, (8, 6, 6)), "key_padding_mask": image(5, (2, 6))},
}


@pytest.mark.parametrize("rpe_on", [None, "qkv"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
def test_attention_without_encoding_or_with_tables_of_zeros_equals_pytorchs(rpe_on, batch_first, masks):
    config = rpe_on and get_rpe_config(2.0, "product", "ctx", shared_head=False, skip=0, rpe_on=rpe_on)
    theirs = nn.MultiheadAttention(16, 4, batch_first=batch_first, dtype=torch.float64)
    ours = RPEMultiheadAttention(16, 4, batch_first=batch_first, dtype=torch.float64, rpe_config=config)  # tables are 0
    theirs.load_state_dict(fill_state_dict(theirs.state_dict()))
    ours.load_state_dict(theirs.state_dict(), strict=False)
    x, y, value = (image(seed, (2, 6, 16) if batch_first else (6, 2, 16)).double() for seed in (1, 2, 3))
    masks = {
        name: mask.double() if name != "is_causal" and mask.is_floating_point() else mask
        for name, mask in masks.items()
    }
    for key, named in itertools.product((x, y), ({}, {"need_weights": False}, {"average_attn_weights": False})):
        found, expected = (
            attention(x, key, value, **masks, **named, **where)
            for attention, where in ((ours, {"hw": (2, 3)}), (theirs, {}))
        )
        torch.testing.assert_close(found, expected)


def loop_over_queries(attention, x, hidden, ids):
    """The output and the weights of each head, computed by loops from the formula."""
    q, k, v = (attention.split_heads(y) for y in attention.project(x, x, x))
    (batch, heads, length, channels), weights = q.shape, torch.zeros(*q.shape[:3], q.shape[2], dtype=x.dtype)
    scale, out = channels**-0.5, torch.zeros_like(x)
    for b, h, i in itertools.product(range(batch), range(heads), range(length)):
        logits = torch.stack(
            [
                scale * q[b, h, i] @ (k[b, h, j] + attention.rpe_k.lookup_table_weight[h, :, ids[i, j]])
                + scale * k[b, h, j] @ attention.rpe_q.lookup_table_weight[h, :, ids[j, i]]
                if not hidden[b, j]
                else torch.tensor(-math.inf, dtype=x.dtype)
                for j in range(length)
            ]
        )
        weights[b, h, i] = p = logits.softmax(0)
        out[b, i, channels * h : channels * (h + 1)] = sum(
            p[j] * (v[b, h, j] + attention.rpe_v.lookup_table_weight[h, ids[i, j]]) for j in range(length)
        )
    return attention.out_proj(out), weights


def test_attention_with_encoding_equals_a_loop_over_queries_and_so_do_its_weights():
    config = get_rpe_config(2.0, "product", "ctx", shared_head=False, skip=0, rpe_on="qkv")
    attention = RPEMultiheadAttention(8, 2, batch_first=True, dtype=torch.float64, rpe_config=config)
    attention.load_state_dict(fill_state_dict(attention.state_dict()))
    x, hidden = image(5, (2, 6, 8)).double(), torch.arange(6) >= torch.tensor([[5], [6]])
    expected, weights = loop_over_queries(attention, x, hidden, attention.rpe_k.bucket_ids(6, "cpu", 3, 2))
    for named, seen in (
        ({"need_weights": False}, None),
        ({"average_attn_weights": False}, weights),
        ({}, weights.mean(1)),
    ):
        found = attention(x, x, x, key_padding_mask=hidden, hw=(3, 2), **named)
        torch.testing.assert_close(found, (expected, seen))


def test_attention_weights_in_training_are_those_after_dropout():
    config = get_rpe_config(2.0, "product", "ctx", shared_head=False, skip=0, rpe_on="qkv")
    attention = RPEMultiheadAttention(8, 2, dropout=0.5, batch_first=True, rpe_config=config).train()
    attention.load_state_dict(fill_state_dict(attention.state_dict()))
    x = image(5, (3, 6, 8))
    out, weights = attention(x, x, x, average_attn_weights=False, hw=(3, 2))
    assert 0.2 < (weights == 0).float().mean() < 0.8
    v = attention.split_heads(list(attention.project(x, x, x))[2])
    mixed = weights @ v + attention.rpe_v(weights, 3, 2)
    torch.testing.assert_close(out, attention.out_proj(mixed.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"add_bias_kv": True}, "add_bias_kv"),
        ({"add_zero_attn": True}, "add_zero_attn"),
        ({"kdim": 4}, "kdim=4"),
        ({"vdim": 4}, "vdim=4"),
    ],
)
def test_attention_rejects_arguments_that_add_keys_without_a_position(arguments, words):
    with pytest.raises(ValueError, match=words):
        RPEMultiheadAttention(8, 2, **arguments)


@pytest.mark.parametrize(
    ("shapes", "arguments", "words"),
    [
        ([(4, 8)] * 3, {}, r"\(4, 8\).*three dimensions"),
        ([(4, 1, 8), (5, 1, 8), (5, 1, 8)], {}, r"\(5, 1, 8\).*same shape"),
        ([(4, 1, 8)] * 3, {"is_causal": True}, "give the causal attn_mask"),
        ([(4, 1, 8)] * 3, {"key_padding_mask": torch.ones(1, 4).long()}, "int64.*bool"),
        ([(4, 1, 8)] * 3, {"hw": (3, 2)}, "3×2"),
    ],
)
def test_attention_refuses_inputs_that_it_would_misread(shapes, arguments, words):
    attention = RPEMultiheadAttention(8, 2, rpe_config=get_rpe_config(skip=0))
    with pytest.raises(ValueError, match=words):
        attention(*map(torch.zeros, shapes), **arguments)


@pytest.mark.parametrize("flags", [(), ("--pre_norm",), ("--enc_rpe2d", "rpe-2.0-product-ctx-1-qkv")])
def test_padding_does_not_change_the_results(flags):
    model, _, _ = tiny(*flags)
    pixels = image(1, (3, 64, 96))
    maps = NestedTensor(torch.zeros(1, 3, 128, 160), torch.ones(1, 128, 160, dtype=torch.bool))
    maps.tensors[0, :, :64, :96], maps.mask[0, :64, :96] = pixels, False
    src, pos = image(2, (1, 16, 4, 5)), image(3, (1, 16, 4, 5))
    mask = torch.ones(1, 4, 5, dtype=torch.bool)
    mask[:, :2, :3] = False
    other = torch.where(mask[:, None], src + 100, src)
    run = model.transformer
    first, second = (run(x, mask, model.query_embed.weight, pos)[0] for x in (src, other))
    torch.testing.assert_close(first, second)
    alone = run(src[..., :2, :3], mask[:, :2, :3], model.query_embed.weight, pos[..., :2, :3])[0]
    torch.testing.assert_close(first, alone)
    assert model(maps)["pred_boxes"].shape == (1, 5, 4)


def test_tables_of_the_encoding_start_xavier_uniform():
    torch.manual_seed(0)
    model, _, _ = build_model(parse("--eval", "--enc_rpe2d", "rpe-2.0-product-ctx-1-k"))
    table = model.transformer.encoder.layers[0].self_attn.rpe_k.lookup_table_weight
    bound = math.sqrt(6 / (32 * 81 + 1 * 81))  # fans of a (1, 32, 81) tensor
    assert 0.9 * bound < table.abs().max() <= bound


def test_build_model_accepts_the_arguments_in_released_checkpoints():
    released = json.loads((PROJECT / "tests" / "golden" / "cli_detr.json").read_text())
    args = argparse.Namespace(**{flag["dest"]: flag["default"] for flag in released})
    args.eval, args.enc_rpe2d = True, "rpe-1.9-product-ctx-1-k"
    model, criterion, _ = build_model(args)
    assert model.class_embed.out_features == 92 and criterion.num_classes == 91


# ---------------------------------------------------------------------------------------------------------------------
# Positions, backbone, input


def test_sine_positions_equal_the_formula():
    mask = torch.ones(1, 3, 4, dtype=torch.bool)
    mask[:, :2, :3] = False
    found = PositionEmbeddingSine(4, normalize=True)(NestedTensor(torch.zeros(1, 1, 3, 4), mask))
    for row, column in itertools.product(range(2), range(3)):
        y, x = ((i + 1) / (n + 1e-6) * 2 * math.pi for i, n in ((row, 2), (column, 3)))
        expected = [f(p / 10000 ** (2 * pair / 4)) for p in (y, x) for pair in (0, 1) for f in (math.sin, math.cos)]
        np.testing.assert_allclose(found[0, :, row, column], expected, atol=1e-6)


def test_learned_positions_are_a_column_and_a_row_and_end_at_50():
    positions = PositionEmbeddingLearned(3)
    found = positions(NestedTensor(None, torch.zeros(2, 4, 5, dtype=torch.bool)))
    expected = torch.cat([positions.col_embed.weight[2], positions.row_embed.weight[1]])
    assert torch.equal(found[1, :, 1, 2], expected) and found.shape == (2, 6, 4, 5)
    with pytest.raises(UserError, match="50×50"):
        positions(NestedTensor(None, torch.zeros(1, 4, 51, dtype=torch.bool)))


def test_nested_tensors_lists_and_batches_give_the_same_detections():
    model, _, _ = tiny()
    batch = image(3, (2, 3, 64, 96))
    with torch.no_grad():
        results = [model(x)["pred_boxes"] for x in (batch, list(batch), nested_tensor_from_tensor_list(list(batch)))]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    with pytest.raises(ValueError, match="channels, height, width"):
        nested_tensor_from_tensor_list([torch.zeros(3, 4)])


@pytest.mark.parametrize(("flags", "stride"), [((), 32), (("--last_stride", 1), 16)])
def test_last_stride_determines_the_size_of_the_map(flags, stride):
    model, _, _ = tiny(*flags)
    maps, positions = model.backbone(nested_tensor_from_tensor_list([torch.zeros(3, 64, 96)]))
    assert maps[-1].tensors.shape == (1, 512, 64 // stride, 96 // stride)
    assert maps[-1].mask.shape[1:] == positions[-1].shape[2:] == maps[-1].tensors.shape[2:]


def test_dilation_keeps_the_resolution_and_needs_bottleneck_blocks():
    backbone = Backbone("resnet50", True, return_interm_layers=True, dilation=True, pretrained=False)
    maps = backbone(nested_tensor_from_tensor_list([torch.zeros(3, 64, 64)]))
    shapes = [tuple(x.tensors.shape[1:]) for x in maps.values()]
    assert shapes == [(256, 16, 16), (512, 8, 8), (1024, 4, 4), (2048, 4, 4)]
    with pytest.raises(UserError, match="--last_stride 1"):
        Backbone("resnet18", True, dilation=True, pretrained=False)
    with pytest.raises(UserError, match="resnet50, resnet101"):
        Backbone("resnet49", True, pretrained=False)


def test_a_backbone_with_random_weights_is_trained_completely_and_loads_with_frozen_norms():
    flags = small("unused", "--num_classes", 7)
    trained, _, _ = build_model(parse(*flags))
    assert all(p.requires_grad for p in trained.parameters())
    trained.train()
    trained(image(1, (2, 3, 64, 64)))  # updates the running statistics
    frozen, _, _ = build_model(parse(*flags, "--eval"))
    names = {name for name, p in frozen.named_parameters() if not p.requires_grad}
    assert names == {
        f"backbone.0.body.{name}"
        for name in frozen.backbone[0].body.state_dict()
        if name.startswith(("conv1", "layer1")) and "conv" in name
    }
    load_weights(frozen, {"model": trained.state_dict()}, "x")
    load_weights(trained, {"model": frozen.state_dict()}, "x")
    pixels = image(2, (1, 3, 64, 96))
    torch.testing.assert_close(
        frozen.eval()(pixels)["pred_logits"], trained.eval()(pixels)["pred_logits"], rtol=1e-4, atol=1e-5
    )


# ---------------------------------------------------------------------------------------------------------------------
# Matching and losses


def predictions(seed, layers, queries, classes=5, batch=2):
    return image(seed, (layers, batch, queries, classes + 1)), image(seed + 1, (layers, batch, queries, 4)).sigmoid()


def objects(seed, *counts, classes=5):
    random = np.random.RandomState(seed)
    return [
        {
            "labels": torch.from_numpy(random.randint(0, classes, n)),
            "boxes": torch.from_numpy(random.uniform(0.2, 0.6, (n, 4)).astype(np.float32)),
        }
        for n in counts
    ]


def pair_cost(logits, boxes, target, query, obj):
    corners = [box_cxcywh_to_xyxy(x[None]) for x in (boxes[query], target["boxes"][obj])]
    return (
        5 * (boxes[query] - target["boxes"][obj]).abs().sum()
        - logits[query].softmax(0)[target["labels"][obj]]
        - 2 * generalized_box_iou(*corners)[0, 0]
    ).item()


@pytest.mark.parametrize(("queries", "count"), [(4, 3), (3, 4), (4, 0)])
def test_matching_is_the_cheapest_of_all_assignments(queries, count):
    logits, boxes = predictions(queries, 1, queries, batch=1)
    (target,) = objects(3, count)
    ((query, obj),) = HungarianMatcher(1, 5, 2)({"pred_logits": logits[0], "pred_boxes": boxes[0]}, [target])
    assert len(query) == min(queries, count)
    cost = [[pair_cost(logits[0, 0], boxes[0, 0], target, q, o) for o in range(count)] for q in range(queries)]
    size = min(queries, count)
    best = min(
        sum(cost[q][o] for q, o in zip(qs, os, strict=True))
        for qs in itertools.permutations(range(queries), size)
        for os in itertools.combinations(range(count), size)
    )
    assert sum(cost[q][o] for q, o in zip(query, obj, strict=True)) == pytest.approx(best, abs=1e-5)


def criterion_of(classes=5):
    weights = {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}
    return SetCriterion(classes, HungarianMatcher(1, 5, 2), weights, 0.1)


def outputs_of(logits, boxes):
    layers = [{"pred_logits": x, "pred_boxes": y} for x, y in zip(logits, boxes, strict=True)]
    return {**layers[-1], "aux_outputs": layers[:-1]}


def test_losses_of_several_layers_equal_those_of_each_layer_alone():
    logits, boxes = predictions(8, 3, 6)
    targets, criterion = objects(9, 2, 4), criterion_of()
    together = criterion(outputs_of(logits, boxes), targets)
    for i, suffix in enumerate(("_0", "_1", "")):
        alone = criterion({"pred_logits": logits[i], "pred_boxes": boxes[i]}, targets)
        for name in ("loss_ce", "loss_bbox", "loss_giou", "cardinality_error"):
            torch.testing.assert_close(together[name + suffix], alone[name])


def test_perfect_predictions_have_zero_losses():
    targets = objects(4, 3, 1)
    logits, boxes = torch.full((2, 3, 6), -30.0), torch.full((2, 3, 4), 0.5)
    for i, target in enumerate(targets):
        n = len(target["labels"])
        logits[i, range(n), target["labels"]] = 30.0
        logits[i, n:, 5] = 30.0
        boxes[i, :n] = target["boxes"]
    losses = criterion_of()({"pred_logits": logits, "pred_boxes": boxes}, targets)
    assert all(abs(value) < 1e-5 for value in losses.values()), losses


def test_a_batch_without_objects_has_finite_losses_and_gradients_for_all_outputs():
    logits, boxes = (x.requires_grad_() for x in predictions(1, 2, 4))
    losses = criterion_of()(outputs_of(logits, boxes), objects(1, 0, 0))
    (losses["loss_ce"] + losses["loss_bbox"] + losses["loss_ce_0"]).backward()
    assert all(torch.isfinite(value) for value in losses.values())
    assert losses["loss_bbox"] == losses["loss_giou"] == 0 and losses["class_error"] == 100
    assert logits.grad.abs().max() > 0 and torch.equal(boxes.grad, torch.zeros_like(boxes))


def test_predictions_that_are_not_finite_give_a_loss_that_is_not_finite():
    logits, boxes = predictions(1, 2, 4)
    logits[0, 0, 0, 0] = math.nan
    losses = criterion_of()(outputs_of(logits, boxes), objects(1, 2, 1))
    assert not torch.isfinite(losses["loss_ce_0"]) and torch.isfinite(losses["loss_ce"])


def test_matcher_and_criterion_copy_from_the_device_once(monkeypatch):
    copies = []
    for name in ("cpu", "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "nonzero"):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda self, *args, _name=name, _method=method, **kwargs: (
                copies.append(_name),
                _method(self, *args, **kwargs),
            )[1],
        )
    logits, boxes = predictions(2, 6, 10)
    criterion_of()(outputs_of(logits, boxes), objects(3, 4, 2))
    assert [name for name in copies if name != "numpy"] == ["cpu"]  # numpy() is called on the copy on the CPU


def test_boxes_are_counted_over_all_ranks_in_training_within_the_step_timeout(monkeypatch):
    groups, training_group = [], object()
    monkeypatch.setattr(runtime, "all_reduce_sum", lambda count, group=None: groups.append(group) or count)
    monkeypatch.setattr(runtime, "get_world_size", lambda: 1)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    criterion = criterion_of().train()
    criterion.training_group = training_group
    criterion(outputs_of(*predictions(2, 2, 4)), objects(3, 2, 1))
    assert groups and set(groups) == {training_group}
