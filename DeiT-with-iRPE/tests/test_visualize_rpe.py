"""Maps of learned encodings against loops over pairs of tokens, and visualize_rpe.py on a checkpoint."""
import argparse

import pytest
import torch

import rpe_models
import visualize_rpe
from conftest import TINY, parse, small
from drawing import draw_offset_maps, offset_map, token_pairs
from irpe import build_rpe, get_rpe_config
from runtime import UserError

H, D, HEIGHT, WIDTH = 2, 4, 3, 4
POSITIONS = [(row, column) for row in range(HEIGHT) for column in range(WIDTH)]
# every valid combination on q and k, and v in contextual mode
CASES = [(method, mode, shared, on, skip) for method in ("euc", "quant", "cross", "product") for shared in (True, False)
         for mode, on, skip in (("bias", "q", 0), ("bias", "k", 1), ("ctx", "q", 2), ("ctx", "k", 1), ("ctx", "v", 1))]


def term(rpe, on, skip, mean):
    """(heads, L, L): what the module itself adds for each query and key, had every token the same vector."""
    length = skip + len(POSITIONS)
    if on == "v":  # the output of every query if all of its attention is on key j
        attention = torch.eye(length)[:, None].expand(-1, length, -1)  # (j, i, L)
        out = rpe(attention[:, None].expand(-1, H, -1, -1), HEIGHT, WIDTH)  # (j, H, i, D)
        return out.norm(dim=-1).permute(1, 2, 0)
    added = rpe(mean[None, :, None].expand(1, H, length, D), HEIGHT, WIDTH)[0]
    return added.transpose(1, 2) if on == "q" else added


@pytest.mark.parametrize("method, mode, shared, on, skip", CASES)
def test_a_map_holds_what_the_module_adds_for_every_pair(method, mode, shared, on, skip):
    torch.manual_seed(0)
    config = get_rpe_config(1.3, method, mode, shared, skip, on)
    rpe = dict(zip("qkv", build_rpe(config, D, H), strict=True))[on]
    for table in rpe.parameters():
        torch.nn.init.normal_(table)
    mean = torch.randn(H, D)
    with torch.no_grad():
        maps, added = offset_map(rpe, on, HEIGHT, WIDTH, mean), term(rpe, on, skip, mean)
    assert maps.shape[1:] == (2 * HEIGHT - 1, 2 * WIDTH - 1)
    assert len(maps) == (1 if shared and (mode == "bias" or on == "v") else H)
    for i, (row, column) in enumerate(POSITIONS):
        for j, (other_row, other_column) in enumerate(POSITIONS):
            found = maps[:, HEIGHT - 1 + other_row - row, WIDTH - 1 + other_column - column]
            torch.testing.assert_close(found.expand(H), added[:, skip + i, skip + j].expand(H), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("height, width", [(1, 1), (2, 5), (4, 3)])
def test_the_pair_of_an_offset_lies_on_the_map_and_has_it(height, width):
    query, key = token_pairs(height, width)
    for row in range(2 * height - 1):
        for column in range(2 * width - 1):
            (r, c), (r2, c2) = (divmod(tokens[row, column].item(), width) for tokens in (query, key))
            assert 0 <= r < height and 0 <= r2 < height
            assert (r2 - r, c2 - c) == (row - height + 1, column - width + 1)


def checkpoint(path, name, data_path=None, size=32, **entries):
    """A checkpoint of a small model with random tables, as training writes it if `data_path` is given."""
    torch.manual_seed(1)
    model = rpe_models.create_model(name, num_classes=3, img_size=size).eval()
    for key, parameter in model.named_parameters():
        if "lookup_table" in key:
            torch.nn.init.normal_(parameter)
    args = {"args": parse(*small(data_path, "--model", name, "--input-size", size))} if data_path else {}
    torch.save({"model": model.state_dict(), **args, **entries}, path)
    return model


def draw(*flags):
    visualize_rpe.main(visualize_rpe.parser().parse_args([str(flag) for flag in flags]))


def test_means_are_those_of_a_loop_over_blocks_heads_and_tokens(tmp_path):
    model = checkpoint(tmp_path / "x.pth", "deit_tiny_patch16_32_ctx_product_50_shared_qk", size=48)
    pictures = torch.randn(2, 3, 48, 48)
    means = visualize_rpe.mean_queries_and_keys(model, pictures)
    assert len(means) == len(model.blocks)
    with torch.no_grad():
        x = model._pos_embed(model.patch_embed(pictures))
        for block, found in list(zip(model.blocks, means, strict=True))[:3]:
            normed, layer = block.norm1(x), block.attn.qkv
            for number, name in enumerate("qk"):
                for head in range(3):
                    rows = slice(number * 192 + head * 64, number * 192 + (head + 1) * 64)
                    vectors = [layer.weight[rows] @ normed[picture, token] + layer.bias[rows]
                               for picture in range(2) for token in range(1, 10)]
                    torch.testing.assert_close(found[name][head], torch.stack(vectors).mean(0) / 8,
                                               rtol=1e-4, atol=1e-6)
            x = block(x)


def test_a_trained_checkpoint_is_drawn_with_pictures_of_its_validation_set(pictures, tmp_path, capsys):
    name = "deit_tiny_patch16_32_ctx_cross_56_unshared_qkv"
    checkpoint(tmp_path / "checkpoint.pth", name, pictures)
    draw("--resume", tmp_path / "checkpoint.pth", "--output_dir", tmp_path / "out", "--layer", 0, 11)
    out = capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"rpe_q.png", "rpe_k.png", "rpe_v.png"}
    for words in ("on queries of 2 layers", "mean over all keys", "on keys of 2 layers", "mean over all queries",
                  "on values of 2 layers", "norm"):
        assert words in out


def test_a_released_file_is_known_by_its_name_and_drawn_with_given_pictures(pictures, tmp_path, capsys):
    model = checkpoint(tmp_path / f"{TINY}.pth", TINY, size=224)
    torch.nn.init.zeros_(model.blocks[11].attn.rpe_k.lookup_table_weight)
    torch.save({"model": model.state_dict()}, tmp_path / f"{TINY}.pth")
    flags = ("--resume", tmp_path / f"{TINY}.pth", "--output_dir", tmp_path, "--image",
             *sorted((pictures / "val" / "ant").glob("*.png"))[:1])
    draw(*flags, "--layer", 3, -2)
    assert "on keys of 2 layers, from -" in capsys.readouterr().out
    draw(*flags, "--layer", -1)
    assert capsys.readouterr().out.rstrip().endswith("all zero, as before training")


def test_a_bias_needs_no_pictures(tmp_path, capsys):
    name = "deit_tiny_patch16_64_bias_product_50_unshared_k"
    model = checkpoint(tmp_path / f"{name}.pth", name, size=64)
    draw("--resume", tmp_path / f"{name}.pth", "--output_dir", tmp_path, "--layer", 5)
    maps = offset_map(model.blocks[5].attn.rpe_k, "k", 4, 4)
    assert f"from {maps.min().item():.3g} to {maps.max().item():.3g} added to the logit" in capsys.readouterr().out


@pytest.mark.parametrize("heads, layers", [(1, 12), (3, 12), (12, 2), (2, 1)])
def test_every_panel_shows_its_layer_and_head_on_one_scale_around_zero(heads, layers):
    maps = list(torch.randn(layers, heads, 5, 7) + 0.3)
    panels = [axes for axes in draw_offset_maps(maps, range(layers), "title", "unit", True).axes if axes.images]
    shown = torch.stack([torch.from_numpy(axes.images[0].get_array().data) for axes in panels])
    order = torch.stack(maps) if heads >= layers else torch.stack(maps).transpose(0, 1)
    torch.testing.assert_close(shown, order.flatten(0, 1))
    scales = {axes.images[0].get_clim() for axes in panels}
    (low, high), = scales
    assert low == -high and high <= shown.abs().max()
    assert (shown.abs() > high).float().mean() <= 0.005
    names = {panels[0].get_ylabel(), panels[0].get_title()} - {""}
    assert names == {"layer 0", "head 0"} - ({"head 0"} if heads == 1 else set())


@pytest.mark.parametrize("flags, words", [
    ([], "--image FILE"), (["--layer", 12], "--layer 12 .*0 to 11"), (["--image", "none.png"], "none.png"),
    (["--model", "deit_tiny_patch16_224"], "x.pth has iRPE's tables, but deit_tiny_patch16_224 has none: --model"),
    (["--model", "nothing"], "--model"),
    (["--model", "deit_tiny_patch16_224_ctx_euc_20_shared_k"], "another model"),
    (["--resume", "none.pth"], "none.pth"), (["--input-size", 64], "--input-size 32")])
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    checkpoint("x.pth", TINY, tmp_path / "not here")
    with pytest.raises(UserError, match=words):
        draw("--resume", "x.pth", "--output_dir", "out", *flags)
    assert not (tmp_path / "out").exists()


def test_a_file_of_unknown_model_asks_for_its_name(tmp_path):
    checkpoint(tmp_path / "x.pth", TINY, args=argparse.Namespace())
    with pytest.raises(UserError, match="x.pth cannot be drawn as x: .*--model says"):
        draw("--resume", tmp_path / "x.pth", "--output_dir", tmp_path)


@pytest.mark.parametrize("flags", [{"model": 5}, {"model": TINY, "input_size": "wide"}])
def test_flags_of_other_kinds_in_a_checkpoint_are_named(tmp_path, flags):
    checkpoint(tmp_path / "x.pth", TINY, args=argparse.Namespace(**flags))
    with pytest.raises(UserError, match="x.pth holds the flags --model (5|'deit_.*) and --input-size (None|'wide')"):
        draw("--resume", tmp_path / "x.pth", "--output_dir", tmp_path)


def test_a_file_without_irpe_has_nothing_to_draw(tmp_path):
    torch.save({"model": {"head.weight": torch.zeros(3, 192)}}, tmp_path / "deit_tiny_patch16_224.pth")
    with pytest.raises(UserError, match="deit_tiny_patch16_224 has no iRPE to draw"):
        draw("--resume", tmp_path / "deit_tiny_patch16_224.pth", "--output_dir", tmp_path)


@pytest.mark.parametrize(("low", "high"), [(3.8, 7.5), (2.0, 2.0)])
def test_norms_are_drawn_on_the_scale_of_their_own_values(low, high):
    maps = torch.linspace(low, high, 3 * 25).view(3, 5, 5)
    clim = draw_offset_maps([maps], [0], "title", "unit", False).axes[0].images[0].get_clim()
    assert clim == pytest.approx((low if low < high else 0, high))


def test_an_encoding_at_zero_is_drawn_too():
    figure = draw_offset_maps([torch.zeros(3, 5, 5)], [0], "title", "unit", True)
    assert figure.axes[0].images[0].get_clim() == (-1, 1)
