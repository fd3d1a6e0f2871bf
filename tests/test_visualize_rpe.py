"""Maps of learned encodings against loops over pairs of tokens, and tools/visualize_rpe.py on checkpoints of both
codebases, whose modules have the same names: each has a process of its own."""

import argparse
import contextlib
import io
import json
import multiprocessing
import re
import runpy
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import visualize_rpe
from PIL import Image
from torch import nn

from conftest import PATIENCE, ROOT
from irpe import build_rpe, get_bucket_ids_2d, get_rpe_config, rpe_attention

H, D, HEIGHT, WIDTH = 2, 4, 3, 4
POSITIONS = [(row, column) for row in range(HEIGHT) for column in range(WIDTH)]
# every valid combination on q and k, and v in contextual mode
CASES = [
    (method, mode, shared, on, skip)
    for method in ("euc", "quant", "cross", "product")
    for shared in (True, False)
    for mode, on, skip in (("bias", "q", 0), ("bias", "k", 1), ("ctx", "q", 2), ("ctx", "k", 1), ("ctx", "v", 1))
]
PROGRAM = ROOT / "tools" / "visualize_rpe.py"


def random_terms(*config):
    terms = build_rpe(get_rpe_config(*config), D, H)
    for parameter in (parameter for term in terms if term for parameter in term.parameters()):
        nn.init.normal_(parameter)
    return terms


def added(rpe, on, skip, mean):
    """(heads, L, L): what the module itself adds for each query and key, had every token the same vector."""
    length = skip + len(POSITIONS)
    if on == "v":  # the output of every query if all of its attention is on key j
        attention = torch.eye(length)[:, None].expand(-1, length, -1)  # (j, i, L)
        out = rpe(attention[:, None].expand(-1, H, -1, -1), HEIGHT, WIDTH)  # (j, H, i, D)
        return out.norm(dim=-1).permute(1, 2, 0)
    logits = rpe(mean[None, :, None].expand(1, H, length, D), HEIGHT, WIDTH)[0]
    return logits.transpose(1, 2) if on == "q" else logits


@pytest.mark.parametrize("method, mode, shared, on, skip", CASES)
def test_a_map_holds_what_the_module_adds_for_every_pair(method, mode, shared, on, skip):
    torch.manual_seed(0)
    rpe = random_terms(1.3, method, mode, shared, skip, on)["qkv".index(on)]
    mean = torch.randn(H, D)
    with torch.no_grad():
        maps, expected = visualize_rpe.offset_map(rpe, HEIGHT, WIDTH, mean), added(rpe, on, skip, mean)
    assert maps.shape[1:] == (2 * HEIGHT - 1, 2 * WIDTH - 1)
    assert len(maps) == (1 if shared and (mode == "bias" or on == "v") else H)
    for i, (row, column) in enumerate(POSITIONS):
        for j, (other_row, other_column) in enumerate(POSITIONS):
            found = maps[:, HEIGHT - 1 + other_row - row, WIDTH - 1 + other_column - column]
            torch.testing.assert_close(found.expand(H), expected[:, skip + i, skip + j].expand(H), rtol=1e-5, atol=1e-6)


class Layer(nn.Module):
    """One attention with a prefix token, whose queries, keys and values are an image's pixels."""

    def __init__(self):
        super().__init__()
        self.rpe_q, self.rpe_k, self.rpe_v = random_terms(1.3, "cross", "ctx", False, 1, "qkv")

    def forward(self, images):
        tokens = nn.functional.pad(images.flatten(2), (1, 0), value=99.0)
        q, k, v = tokens.unflatten(1, (3, H, D)).transpose(3, 4).unbind(1)
        return rpe_attention(q, k, v, self.rpe_q, self.rpe_k, self.rpe_v, *images.shape[2:])


def test_means_are_those_of_the_scaled_vectors_of_all_tokens_but_the_prefix():
    torch.manual_seed(0)
    layer, images = Layer(), [torch.randn(3 * H * D, 3, 4), torch.randn(3 * H * D, 5, 2)]
    means, size = visualize_rpe.mean_inputs(layer, [layer.rpe_q, layer.rpe_k, layer.rpe_v], images)
    q, k, _ = torch.cat([image.flatten(1) for image in images], 1).mean(1).div(D**0.5).view(3, H, D)
    assert size == (3, 4) and set(means) == {layer.rpe_q, layer.rpe_k}
    torch.testing.assert_close(means[layer.rpe_q], k)
    torch.testing.assert_close(means[layer.rpe_k], q)


@pytest.mark.parametrize("heads, layers", [(1, 4), (2, 3), (4, 2), (1, 1)])
def test_every_panel_shows_its_layer_and_head_on_one_scale_around_zero(heads, layers):
    maps = list(torch.randn(layers, heads, 15, 17) + 0.3)
    panels = [axes for axes in visualize_rpe.draw_offset_maps(maps, "title", "unit", True).axes if axes.images]
    shown = torch.stack([torch.from_numpy(axes.images[0].get_array().data) for axes in panels])
    order = torch.stack(maps) if heads >= layers else torch.stack(maps).transpose(0, 1)
    torch.testing.assert_close(shown, order.flatten(0, 1))
    ((low, high),) = {axes.images[0].get_clim() for axes in panels}
    assert low == -high and 0 < (shown.abs() > high).float().mean() <= 0.005
    names = {panels[0].get_ylabel(), panels[0].get_title()} - {""}
    assert names == {"layer 0", "head 0"} - ({"head 0"} if heads == 1 else set())


def test_norms_are_drawn_from_their_smallest_value_and_zeros_in_the_middle_of_the_colours():
    def limits(maps, signed):
        return visualize_rpe.draw_offset_maps([maps], "title", "unit", signed).axes[0].images[0].get_clim()

    assert limits(torch.linspace(3.8, 7.5, 3 * 25).view(3, 5, 5), False) == pytest.approx((3.8, 7.5), abs=0.02)
    assert limits(torch.zeros(3, 5, 5), True) == (-1, 1)


# The program


def draw(*flags):
    """(exit status, standard output, standard error) of the program."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["visualize_rpe.py", *map(str, flags)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(PROGRAM), run_name="__main__")
        return 0, out.getvalue(), err.getvalue()
    except SystemExit as error:
        return error.code, out.getvalue(), err.getvalue()
    finally:
        sys.argv = argv


def draw_quickly(*flags):
    """As `draw`, but the figures are empty files: drawing the 36 maps of a DeiT takes seconds."""
    with mock.patch("drawing.save", lambda figure, path: Path(path).touch()):
        return draw(*flags)


def save(path, model, args, attention):
    """Write a checkpoint with random tables, and with `attention` given, queries and keys that are the same everywhere.

    Args:
        args: of main.py, None for a file without them.
        attention: beginning of the names of weight and bias that project all tokens to queries, keys and values.
    Returns: the state dict, as arrays, by which a process can send it to another one.
    """
    torch.manual_seed(1)
    weights = model.state_dict()
    for key, value in weights.items():
        if "lookup_table" in key or (attention and key.endswith(f"{attention}bias")):
            value.normal_()
        elif attention and key.endswith(f"{attention}weight"):
            value.zero_()
    torch.save({"model": weights} | ({"args": args} if args else {}), path)
    return {key: value.numpy() for key, value in weights.items()}


def save_deit(path, name, side, data_path, has_args=True, is_constant=True):
    from main import get_args_parser
    from rpe_models import create_model

    args = argparse.ArgumentParser(parents=[get_args_parser()]).parse_args(
        ["--model", name, "--input-size", str(side), "--data-set", "FOLDER", "--data-path", str(data_path)]
    )
    return save(
        path,
        create_model(name, num_classes=3, img_size=side),
        args if has_args else None,
        "qkv." if is_constant else "",
    )


DETR_FLAGS = [
    "--backbone",
    "resnet18",
    "--no_pretrained_backbone",
    "--hidden_dim",
    "16",
    "--nheads",
    "2",
    "--enc_layers",
    "2",
    "--dec_layers",
    "1",
    "--dim_feedforward",
    "16",
    "--num_queries",
    "5",
]


def save_detr(path, encoding, side, data_path, has_args=True, is_constant=True, flags=()):
    sys.path.insert(0, str(ROOT / "DETR-with-iRPE"))
    from main import get_args_parser
    from models import build_model

    args = argparse.ArgumentParser(parents=[get_args_parser()]).parse_args(
        [
            *DETR_FLAGS,
            *flags,
            "--enc_rpe2d",
            encoding,
            "--short_side",
            str(side),
            "--coco_path",
            str(data_path),
            "--num_classes",
            "5",
            "--eval",
        ]
    )
    return save(path, build_model(args)[0], args if has_args else None, "in_proj_" if is_constant else "")


SAVE, DRAW = {"deit": save_deit, "detr": save_detr}, {"deit": draw_quickly, "detr": draw}


@pytest.fixture(scope="module")
def inside():
    """Calls a function in the process that has a codebase's modules."""
    with contextlib.ExitStack() as stack:
        processes = {
            codebase: stack.enter_context(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")))
            for codebase in SAVE
        }
        yield lambda codebase, function, *args: processes[codebase].submit(function, *args).result(timeout=PATIENCE)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A validation set of three images, in the forms of both codebases."""
    root, random = tmp_path_factory.mktemp("data"), np.random.RandomState(0)
    coco = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "ant"}]}
    for number, (height, width) in enumerate([(64, 96), (90, 70), (80, 80)], start=1):
        image = Image.fromarray(random.randint(0, 255, (height, width, 3)).astype(np.uint8))
        for path in (root / "val" / f"class{number}" / "x.png", root / "val2017" / f"{number}.png"):
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
        coco["images"].append({"id": number, "file_name": f"{number}.png", "height": height, "width": width})
        coco["annotations"].append(
            {"id": number, "image_id": number, "category_id": 1, "bbox": [1, 2, 30, 40], "area": 1200, "iscrowd": 0}
        )
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(coco))
    return root


def expected_ranges(weights, heads, ids):
    """{figure: (smallest, largest) value} by the paper's formula, of a model whose tokens share their queries and keys.

    `ids` are the buckets of product that pairs on the map use.
    """
    ranges = {}
    for number, on in enumerate("qkv"):
        values = []
        tables = {key: table for key, table in weights.items() if f"rpe_{on}.lookup_table" in key}
        for key, table in tables.items():
            if on == "v":  # (H', buckets, D)
                values.append(np.linalg.norm(table, axis=-1)[:, ids])
            elif table.ndim == 2:
                values.append(table[:, ids])
            else:
                attention = key.partition("rpe_")[0]
                bias = weights.get(f"{attention}qkv.bias", weights.get(f"{attention}in_proj_bias"))
                vectors = bias.reshape(3, heads, -1)[1 - number]  # on queries it meets keys, on keys queries
                values.append((vectors[:, :, None] * vectors.shape[-1] ** -0.5 * table).sum(1)[:, ids])
        if values:
            ranges[f"rpe_{on}.png"] = np.min(values), np.max(values)
    return ranges


def printed_ranges(out):
    return {
        Path(path).name: (float(low), float(high))
        for path, low, high in re.findall(r"^(\S+): from (\S+) to (\S+) ", out, re.MULTILINE)
    }


def used(ratio, height, width, method="product"):
    return get_bucket_ids_2d(method, height, width, 0, ratio, 2 * ratio, 8 * ratio)[0].unique().numpy()


@pytest.mark.parametrize(
    "codebase, encoding, side, heads, ids",
    [
        ("deit", "deit_tiny_patch16_48_ctx_product_50_unshared_qkv", 48, 3, used(1.9, 3, 3)),
        ("detr", "rpe-2.0-product-ctx-0-qkv", 64, 2, used(2.0, 2, 3)),
    ],
)  # 64 × 96 pixels is the size of the first image
def test_a_trained_checkpoint_is_drawn_with_images_of_its_validation_set(
    inside, data, tmp_path, codebase, encoding, side, heads, ids
):
    weights = inside(codebase, SAVE[codebase], tmp_path / "x.pth", encoding, side, data)
    status, out, err = inside(
        codebase, DRAW[codebase], "--resume", tmp_path / "x.pth", "--output_dir", tmp_path / "new" / "out"
    )
    assert status == 0, err
    expected = expected_ranges(weights, heads, ids)
    assert printed_ranges(out) == {name: pytest.approx(values, rel=6e-3) for name, values in expected.items()}
    assert {path.name for path in (tmp_path / "new" / "out").iterdir()} == set(expected) and len(expected) == 3
    for words in ("mean over all keys", "mean over all queries", "norm"):
        assert words in out


@pytest.mark.parametrize(
    "codebase, encoding, side",
    [("deit", "deit_tiny_patch16_48_ctx_cross_56_shared_k", 48), ("detr", "rpe-2.0-cross-ctx-1-k", 64)],
)
def test_given_images_are_preprocessed_like_those_of_the_validation_set(
    inside, data, tmp_path, codebase, encoding, side
):
    inside(codebase, SAVE[codebase], tmp_path / "x.pth", encoding, side, data, True, False)
    flags = "--resume", tmp_path / "x.pth", "--output_dir", tmp_path
    images = sorted((data / "val2017").iterdir())
    of_the_set, all_given, one_given = (
        printed_ranges(inside(codebase, DRAW[codebase], *flags, *more)[1])
        for more in ((), ("--image", *images), ("--image", images[0]))
    )
    assert of_the_set == all_given != one_given and of_the_set


@pytest.mark.parametrize(
    "codebase, encoding, side, ids, more",
    [
        ("deit", "deit_tiny_patch16_64_bias_product_50_unshared_k", 64, used(1.9, 4, 4), []),
        ("detr", "rpe-2.0-euc-bias-1-k", 320, used(2.0, 10, 10, "euc"), [True, False, ["--masks"]]),
    ],
)
def test_a_bias_needs_no_images_and_is_drawn_as_its_table(inside, tmp_path, codebase, encoding, side, ids, more):
    weights = inside(codebase, SAVE[codebase], tmp_path / "x.pth", encoding, side, tmp_path / "not here", *more)
    status, out, err = inside(codebase, DRAW[codebase], "--resume", tmp_path / "x.pth", "--output_dir", tmp_path)
    expected = expected_ranges(weights, 0, ids)
    assert printed_ranges(out) == {"rpe_k.png": pytest.approx(expected["rpe_k.png"], rel=6e-3)}, err
    assert out.endswith("added to the logit\n")


@pytest.mark.parametrize(
    "codebase, encoding, side, heads, ids, flags",
    [
        ("deit", "deit_tiny_patch16_224_ctx_product_50_shared_k", 224, 3, used(1.9, 14, 14), []),
        (
            "detr",
            "rpe-2.0-product-ctx-1-k",
            64,
            2,
            used(2.0, 2, 3),
            [*DETR_FLAGS, "--short_side", "64", "--enc_rpe2d", "rpe-2.0-product-ctx-1-k"],
        ),
    ],
)
def test_a_file_without_flags_takes_them_from_its_name_or_from_the_command_line(
    inside, data, tmp_path, codebase, encoding, side, heads, ids, flags
):
    weights = inside(codebase, SAVE[codebase], tmp_path / f"{encoding}.pth", encoding, side, None, False)
    status, out, err = inside(
        codebase,
        DRAW[codebase],
        "--resume",
        tmp_path / f"{encoding}.pth",
        "--output_dir",
        tmp_path,
        "--image",
        data / "val2017" / "1.png",
        *flags,
    )
    expected = expected_ranges(weights, heads, ids)
    assert printed_ranges(out) == {"rpe_k.png": pytest.approx(expected["rpe_k.png"], rel=6e-3)}, err


DEIT, DETR = ("deit", "deit_tiny_patch16_32_ctx_product_50_shared_k", 32), ("detr", "rpe-2.0-product-ctx-1-k", 64)


@pytest.mark.parametrize(
    "checkpoint, flags, words",
    [
        (DEIT, [], "--image FILE .*--data-path"),
        (DETR, [], "--image FILE .*--coco_path"),
        (DEIT, ["--image", "none.png"], "none.png"),
        (DETR, ["--image", "none.png"], "none.png"),
        (DEIT, ["--model", "deit_tiny_patch16_224"], "another model: 12 unexpected"),
        (DEIT, ["--model", "none"], "--model"),
        (DEIT, ["--input-size", 64], "--input-size 32"),
        (DETR, ["--nheads", 0], "--nheads"),
        (DETR, ["--enc_rpe2d", "rpe-2-x-ctx-1-k"], "'x'"),
        (DETR, ["--enc_rpe2d", "rpe-2.0-product-ctx-1-q"], "another configuration"),
        (DEIT, ["--resume", "none.pth"], "none.pth"),
        (DEIT, ["--nonsense"], "--nonsense"),
        (("deit", "deit_tiny_patch16_224", 32), [], "x.pth, deit_tiny_patch16_224, has no iRPE"),
        (("detr", "", 64), [], "x.pth, DETR.* has no iRPE"),
    ],
)
def test_a_mistake_is_reported_in_one_sentence(inside, tmp_path, checkpoint, flags, words):
    codebase, *rest = checkpoint
    inside(codebase, SAVE[codebase], tmp_path / "x.pth", *rest, tmp_path / "not here")
    status, out, err = inside(
        codebase, DRAW[codebase], "--resume", tmp_path / "x.pth", "--output_dir", tmp_path / "out", *flags
    )
    assert status in (1, 2) and out == "" and re.fullmatch(f"error: .*{words}.*\n", err)
    assert not (tmp_path / "out").exists()
