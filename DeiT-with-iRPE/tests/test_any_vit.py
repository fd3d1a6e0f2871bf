"""iRPE from the command line, --rpe and --model-kwargs, in small versions of timm's ViTs."""

import pytest
import timm
import torch

import main
from checkpoint import with_model_flags
from conftest import parse
from runtime import Checkpoint, UserError, load_checkpoint

RPE = "rpe-1.9-product-ctx-1-qkv"
SMALL = ("patch_size=8", "embed_dim=48", "depth=2", "num_heads=2")
VITS = {
    "vit_small_patch14_reg4_dinov2": (),
    "deit3_small_patch16_224": (),
    "vit_base_patch16_clip_224": (),
    "vit_base_patch16_siglip_224": ("global_pool=avg",),
    "flexivit_small": (),
    "eva02_tiny_patch14_224": (),
    "vit_medium_patch16_rope_reg1_gap_256": (),
    "vit_small_patch16_dinov3": (),
}
EVA = "eva02_tiny_patch14_224"


def flags(data_path, model, *more):
    return [
        "--device",
        "cpu",
        "--data-set",
        "FOLDER",
        "--data-path",
        data_path,
        "--model",
        model,
        "--input-size",
        32,
        "--batch-size",
        8,
        "--num_workers",
        0,
        "--epochs",
        1,
        "--warmup-lr",
        1e-2,
        "--no-model-ema",
        *more,
    ]


def run(*arguments):
    return main.main(parse(*flags(*arguments)))


def refused(*arguments):
    """The one sentence with which the run fails."""
    with pytest.raises(UserError) as caught:
        run(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def tables(path):
    return {key: value for key, value in load_checkpoint(path)["model"].items() if "lookup_table" in key}


@pytest.fixture(scope="module")
def equipped(image_root, tmp_path_factory):
    """checkpoint.pth of an Eva with iRPE, trained for an epoch, and its last evaluation."""
    path = tmp_path_factory.mktemp("equipped")
    stats = run(image_root, EVA, "--rpe", RPE, "--model-kwargs", *SMALL, "--output_dir", path)
    return path / "checkpoint.pth", stats


@pytest.mark.parametrize("name", VITS)
def test_plain_weights_are_finetuned_with_irpe_and_evaluated_again(image_root, tmp_path, name):
    if not timm.is_model(name):
        pytest.skip(f"needs a timm with {name}, which {timm.__version__} has not")
    kwargs = ("--model-kwargs", *SMALL, *VITS[name])
    plain = run(image_root, name, *kwargs, "--output_dir", tmp_path / "plain")
    start = (*kwargs, "--rpe", RPE, "--finetune", tmp_path / "plain" / "checkpoint.pth")
    assert run(image_root, name, *start, "--eval") == pytest.approx(plain, abs=1e-5)  # tables of zeros change nothing

    trained = run(image_root, name, *start, "--output_dir", tmp_path / "rpe")
    learned = tables(tmp_path / "rpe" / "checkpoint.pth")
    assert len(learned) == 6 and all(learned[f"blocks.0.attn.rpe_{on}.lookup_table_weight"].any() for on in "qkv")
    assert run(image_root, name, "--eval", "--resume", tmp_path / "rpe" / "checkpoint.pth") == trained != plain


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", EVA])
def test_plain_weights_of_another_map_and_other_classes_start_a_model_with_irpe(tmp_path, capsys, name):
    options = dict(patch_size=8, embed_dim=48, depth=2, num_heads=2)
    torch.save(
        {"model": timm.create_model(name, img_size=64, num_classes=9, **options).state_dict()}, tmp_path / "plain.pth"
    )
    args = parse(*flags("", name, "--rpe", RPE, "--model-kwargs", *SMALL, "--finetune", tmp_path / "plain.pth"))
    model = main.build_model(args, nb_classes=3)
    assert model.patch_embed.grid_size == (4, 4) and model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    printed = capsys.readouterr().out
    assert "positions interpolated from 8×8 to 4×4" in printed and "lacks 6 tables" in printed
    assert "new head.bias, head.weight" in printed or "new head.weight, head.bias" in printed


def test_a_resumed_run_takes_the_model_flags_of_its_checkpoint(image_root, equipped, tmp_path):
    path, stats = equipped
    on = (image_root, EVA, "--epochs", 2, "--output_dir", tmp_path)
    (tmp_path / "checkpoint.pth").write_bytes(path.read_bytes())
    after = run(*on, "--resume", "auto")
    args = load_checkpoint(tmp_path / "checkpoint.pth")["args"]
    assert args.rpe == RPE and args.model_kwargs["embed_dim"] == 48 and after != stats
    said = run(*on, "--rpe", RPE, "--model-kwargs", *SMALL, "--resume", path)
    assert said == after


def test_flags_that_contradict_the_checkpoint_are_refused(image_root, equipped):
    resume = ("--eval", "--resume", equipped[0])
    assert f"was trained with --rpe {RPE}, not with rpe-1.9-product-ctx-1-k: leave it out" in refused(
        image_root, EVA, *resume, "--rpe", "rpe-1.9-product-ctx-1-k"
    )
    sentence = refused(image_root, EVA, *resume, "--model-kwargs", "depth=3")
    assert "was trained with --model-kwargs {" in sentence and "not with {'depth': 3}: leave it out" in sentence
    assert "belongs to another model" in refused(image_root, "vit_tiny_patch16_224", *resume)


def test_a_checkpoint_with_damaged_model_flags_is_refused(image_root, equipped, tmp_path):
    checkpoint = load_checkpoint(equipped[0])
    checkpoint["args"].model_kwargs = ["depth=2"]
    torch.save(checkpoint, tmp_path / "list.pth")
    assert "list.pth is damaged: its --model-kwargs is ['depth=2']" in refused(
        image_root, EVA, "--eval", "--resume", tmp_path / "list.pth"
    )
    with pytest.raises(UserError, match="is damaged"):  # as visualize_rpe.py, whose defaults are the checkpoint's
        with_model_flags(checkpoint["args"], Checkpoint("list.pth", checkpoint))


def test_an_image_size_that_differs_from_training_is_noted(image_root, tmp_path, capsys):
    kwargs = ("--rpe", RPE, "--model-kwargs", *SMALL, "pos_embed=none")
    run(image_root, "vit_tiny_patch16_224", *kwargs, "--output_dir", tmp_path)
    resume = ("--eval", "--resume", tmp_path / "checkpoint.pth")
    assert "note:" not in capsys.readouterr().out
    run(image_root, "vit_tiny_patch16_224", *resume, "--input-size", 48)
    assert "trained with --input-size 32, and this is with 48" in capsys.readouterr().out


def test_queries_keys_and_values_keep_autocasts_type():
    model = main.build_model(parse(*flags("", EVA, "--rpe", RPE, "--model-kwargs", *SMALL)), nb_classes=3)
    with torch.autocast("cpu", torch.bfloat16):
        parts = model.blocks[0].attn.project(torch.randn(2, 17, 48))
    assert {part.dtype for part in parts} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rpe-1.9-product-ctx-1", "it must have 6 parts separated by '-', of which the first is 'rpe', but has 5"),
        ("1.9-product-ctx-1-k", "of which the first is 'rpe', but has 5, beginning with '1.9'"),
        ("rpe-x-product-ctx-1-k", "ratio is 'x'"),
        ("rpe-0-product-ctx-1-k", "ratio is 0"),
        ("rpe-1.9-rows-ctx-1-k", "method is 'rows'"),
        ("rpe-1.9-product-con-1-k", "mode is 'con'"),
        ("rpe-1.9-product-ctx-2-k", "shared_head is '2'"),
        ("rpe-1.9-product-ctx-1-kq", "rpe_on is 'kq'"),
        ("rpe-1.9-product-bias-1-v", "a bias on values does not exist"),
    ],
)
def test_an_encoding_outside_the_grammar_is_refused(tmp_path, text, said):
    sentence = refused(tmp_path, EVA, "--rpe", text)
    assert sentence.startswith(f"--rpe {text}: ") and said in sentence and "rpe-{ratio}-{euc|quant" in sentence


@pytest.mark.parametrize(
    ("name", "kwargs", "said"),
    [
        ("deit_tiny_patch16_224_ctx_product_50_shared_k", (), "the name already has an encoding"),
        ("resnet18", (), "ResNet is neither a VisionTransformer nor an Eva of timm"),
        ("swin_tiny_patch4_window7_224", (), "SwinTransformer is neither a VisionTransformer nor an Eva of timm"),
        ("vit_tiny_patch16_224", ("patch_drop_rate=0.5",), "build it with patch_drop_rate=0"),
        (EVA, ("patch_drop_rate=0.5",), "build it with patch_drop_rate=0"),
        (EVA, ("patch_size=8", "dept=3"), "unexpected keyword argument 'dept'"),
        (
            "vit_tiny_patch16_224",
            ("embed_dim=50", "num_heads=7"),
            "--model vit_tiny_patch16_224 embed_dim=50 num_heads=7 cannot be built for 32 pixels: ",
        ),
        (EVA, ("depth=two",), "cannot be built"),
        (EVA, ("patch_size=0",), "cannot be built"),
        (EVA, ("norm_layer=none",), "cannot be built"),
        (EVA, ("img_size=64",), "--model-kwargs img_size=64 is set by --input-size"),
        (EVA, ("in_chans=1",), "--model-kwargs in_chans=1 is set by the images, which are RGB: leave it out"),
        ("vit_small_patch16_18x2_224", (), "a block's attention is None; equip_irpe knows timm's "),
        (EVA, ("patch_size=7",), "--input-size 32 is not a multiple of the 7 pixels"),
    ],
)
def test_a_model_that_cannot_be_equipped_or_built_is_refused_with_the_reason(image_root, name, kwargs, said):
    assert said in refused(image_root, name, "--rpe", RPE, "--model-kwargs", *kwargs)


def test_model_kwargs_without_a_key_are_refused(capsys):
    with pytest.raises(SystemExit):
        parse("--model-kwargs", "depth=3", "num_heads")
    assert "argument --model-kwargs: depth=3 num_heads is not key=value" in capsys.readouterr().err
