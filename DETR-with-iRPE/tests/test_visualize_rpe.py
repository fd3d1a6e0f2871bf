"""visualize_rpe.py on DETR's encoder; the maps themselves are tested where DeiT shares drawing.py."""
import sys

import pytest
import torch

import visualize_rpe
from conftest import COCO_SAMPLE, parse, small
from models import build_model
from models.rpe_attention.irpe import METHOD, get_bucket_ids_2d
from util.runtime import UserError


def checkpoint(path, coco, *flags, with_args=True):
    """A checkpoint of a small model, as training writes it."""
    torch.manual_seed(0)
    args = parse(*small(coco, "--num_classes", 5, "--enc_layers", 2, "--eval", *flags))
    model = build_model(args)[0].eval()
    torch.save({"model": model.state_dict(), **({"args": args} if with_args else {})}, path)
    return model


def draw(*flags):
    argv = [str(flag) for flag in flags]
    visualize_rpe.main(visualize_rpe.parser().parse_args(argv), argv)


def test_means_are_those_of_a_loop_over_pictures_layers_heads_and_tokens(coco, tmp_path):
    model, device = checkpoint(tmp_path / "x.pth", coco), torch.device("cpu")
    pictures = [torch.randn(3, 64, 96), torch.randn(3, 96, 160)]
    means, hw = visualize_rpe.mean_queries_and_keys(model, pictures, device)
    assert hw == (2, 3) and len(means) == 2
    layers, vectors = model.transformer.encoder.layers, {}

    def look(layer, inputs):
        (tokens, pos, *_), attention = inputs, layer.self_attn
        for token in (tokens + pos)[0]:
            for number, name in enumerate("qk"):
                for head in range(2):
                    rows = slice(16 * number + 8 * head, 16 * number + 8 * head + 8)
                    vector = attention.in_proj_weight[rows] @ token + attention.in_proj_bias[rows]
                    vectors.setdefault((layer, name, head), []).append(vector / 8 ** 0.5)

    for layer in layers:
        layer.register_forward_pre_hook(look)
    with torch.no_grad():
        for picture in pictures:
            model(picture[None])
    for layer, found in zip(layers, means, strict=True):
        for name in "qk":
            for head in range(2):
                expected = vectors[layer, name, head]
                assert len(expected) == 2 * 3 + 3 * 5
                torch.testing.assert_close(found[name][head], torch.stack(expected).mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("encoding, files", [("rpe-2.0-product-ctx-1-k", "k"), ("rpe-1.5-cross-ctx-0-qkv", "qkv")])
def test_a_trained_checkpoint_is_drawn_with_pictures_of_its_validation_set(coco, tmp_path, capsys, encoding, files):
    checkpoint(tmp_path / "x.pth", coco, "--enc_rpe2d", encoding)
    draw("--resume", tmp_path / "x.pth", "--output_dir", tmp_path / "out", "--layer", 0)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"rpe_{on}.png" for on in files}
    out = capsys.readouterr().out
    assert "on keys of 1 layer, from" in out and "mean over all queries" in out


def test_a_bias_needs_no_pictures_and_is_drawn_as_its_table(tmp_path, capsys):
    model = checkpoint(tmp_path / "x.pth", tmp_path / "not here", "--enc_rpe2d", "rpe-2.0-euc-bias-1-k", "--short_side",
                       320)
    draw("--resume", tmp_path / "x.pth", "--output_dir", tmp_path)
    ids, _ = get_bucket_ids_2d(METHOD.EUCLIDEAN, 10, 10, 0, 2.0, 4.0, 16.0)
    used = torch.cat([layer.self_attn.rpe_k.lookup_table_bias[0, ids.unique()]
                      for layer in model.transformer.encoder.layers])
    assert f"from {used.min().item():.3g} to {used.max().item():.3g} added to the logit" in capsys.readouterr().out


def test_a_file_without_flags_takes_them_from_the_command_line(coco, tmp_path):
    checkpoint(tmp_path / "x.pth", coco, with_args=False)
    common = ("--resume", tmp_path / "x.pth", "--output_dir", tmp_path)
    with pytest.raises(UserError, match="check --enc_rpe2d"):
        draw(*common)
    draw(*common, *small(coco)[2:], "--enc_layers", 2, "--image", next((coco / "val2017").iterdir()))
    assert (tmp_path / "rpe_k.png").is_file()


@pytest.mark.parametrize("flags, words", [
    ([], "--image FILE"), (["--layer", 2], "--layer 2 .*0 to 1"), (["--image", "none.png"], "none.png"),
    (["--enc_rpe2d", "rpe-2-x-ctx-1-k"], "'x'"), (["--enc_rpe2d", "rpe-2.0-product-ctx-1-q"], "another configuration"),
    (["--enc_rpe2d", ""], "check --enc_rpe2d"),
    (["--nheads", 0], "--nheads"), (["--resume", "none.pth"], "none.pth"), (["--output_dir", ""], "--output_dir")])
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    checkpoint("x.pth", tmp_path / "not here")
    with pytest.raises(UserError, match=words):
        draw("--resume", "x.pth", "--output_dir", "out", *flags)
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_a_sentence_says_what_to_install(coco, tmp_path, monkeypatch):
    checkpoint(tmp_path / "x.pth", coco)
    for name in ("matplotlib", "matplotlib.figure", "visualize"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        draw("--resume", tmp_path / "x.pth", "--output_dir", tmp_path)


@pytest.mark.skipif(not COCO_SAMPLE.is_dir(), reason="the sample of COCO is not here")
def test_real_pictures_of_several_sizes_are_averaged(tmp_path, capsys):
    checkpoint(tmp_path / "x.pth", COCO_SAMPLE)
    draw("--resume", tmp_path / "x.pth", "--output_dir", tmp_path)
    assert "mean over all queries" in capsys.readouterr().out
