"""Equipped models in timm's own functions: saving and loading, feature extraction, a new head, checkpointing."""

import json
import subprocess
import sys

import huggingface_hub
import pytest
import timm
import torch
from timm.models import _hub
from timm.models._features import FeatureGetterNet
from timm.models._hub import save_for_hf  # timm.models exports it from a later release on

import models
import rpe_models
from conftest import PROJECT, TINY
from fill import fill_state_dict
from irpe import METHOD, get_rpe_config, parse_rpe
from rpe_vision_transformer import equip_irpe, recorded_arguments, rpe_text
from runtime import UserError

NAMES = (*rpe_models.RELEASED, *rpe_models.UNRELEASED)
RPE = "rpe-1.9-product-ctx-1-qkv"
SMALL = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=2, num_classes=5)
VITS = {
    "vit_small_patch14_reg4_dinov2": {},
    "vit_base_patch16_siglip_224": {"global_pool": "avg"},
    "deit_tiny_distilled_patch16_224": {},
    "eva02_tiny_patch14_224": {},
    "vit_medium_patch16_rope_reg1_gap_256": {},
    "vit_small_patch16_dinov3": {},
}
# The releases of timm before this function write only the arguments that save_for_hf gets.
RECORDS_ARGUMENTS = hasattr(timm.models, "get_model_args")
pytestmark = pytest.mark.skipif(
    not _hub.has_hf_hub(), reason=f"timm {timm.__version__} does not work with this huggingface_hub"
)
needs_local_dir = pytest.mark.skipif(
    not hasattr(_hub, "load_model_config_from_path"), reason=f"timm {timm.__version__} has no local-dir:"
)


def filled(model):
    """The model in evaluation mode with reproducible weights, none of them zero."""
    model.load_state_dict(fill_state_dict(model.state_dict()))
    return model.eval()


def build(name, rpe="", **kwargs):
    if not timm.is_model(name) and name.startswith("vit"):
        pytest.skip(f"needs a timm with {name}, which {timm.__version__} has not")
    return filled(rpe_models.create_model(name, rpe_config=parse_rpe(rpe) if rpe else None, **kwargs))


def save(model, folder):
    options = {} if RECORDS_ARGUMENTS else {"model_args": recorded_arguments(model)}
    save_for_hf(model, folder, safe_serialization=True, **options)
    return json.loads((folder / "config.json").read_text())


def images(side=32):
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(4))


def assert_same_model(loaded, model, side=32):
    assert type(loaded) is type(model)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(images(side)), model(images(side)), rtol=0, atol=0)


# --- save_for_hf and local-dir: ---------------------------------------------------------------------------------------


@needs_local_dir
@pytest.mark.parametrize("name", NAMES)
def test_every_named_model_round_trips_under_its_own_name(tmp_path, name):
    model = build(name, depth=1, num_classes=7, img_size=32)
    assert save(model, tmp_path)["architecture"] == name
    assert_same_model(timm.create_model(f"local-dir:{tmp_path}", pretrained=True), model)


@needs_local_dir
@pytest.mark.parametrize("name", models.__all__)
def test_every_baseline_round_trips_with_and_without_irpe(tmp_path, name):
    for rpe, architecture in (("", name), (RPE, "vit_irpe")):
        model = build(name, rpe, depth=1, num_classes=7, img_size=32)
        config = save(model, tmp_path / architecture)
        assert config["architecture"] == architecture
        assert_same_model(timm.create_model(f"local-dir:{tmp_path / architecture}", pretrained=True), model)


@needs_local_dir
@pytest.mark.parametrize(
    "name", ["deit_tiny_patch16_32_bias_euc_20_unshared_qk", "deit_tiny_patch16_64_ctx_cross_56_shared_kv"]
)
def test_a_name_of_the_grammar_that_is_not_registered_round_trips(tmp_path, name):
    model = build(name, depth=1)
    assert save(model, tmp_path)["architecture"] == "vit_irpe"
    assert_same_model(timm.create_model(f"local-dir:{tmp_path}", pretrained=True), model, int(name.split("_")[3]))


@needs_local_dir
@pytest.mark.parametrize("name", VITS)
def test_any_vit_with_an_encoding_round_trips(tmp_path, name):
    model = build(name, RPE, **SMALL, **VITS[name])
    config = save(model, tmp_path)
    assert config["architecture"] == "vit_irpe"
    assert config["model_args"]["base"] == name and config["model_args"]["rpe"] == RPE
    assert_same_model(timm.create_model(f"local-dir:{tmp_path}", pretrained=True), model)


@needs_local_dir
def test_a_model_that_the_user_equipped_round_trips_with_two_files_alone(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    filled(equip_irpe(model, parse_rpe(RPE)))
    config = save(model, tmp_path / "saved")
    if not RECORDS_ARGUMENTS:
        pytest.skip(f"timm {timm.__version__} does not record the arguments of its own models")
    assert config["architecture"] == "vit_irpe"
    for file in ("irpe.py", "rpe_vision_transformer.py"):
        (tmp_path / file).write_bytes((PROJECT / file).read_bytes())
    code = (
        "import rpe_vision_transformer, timm, torch\n"
        "model = timm.create_model('local-dir:saved', pretrained=True)\n"
        "torch.save(model.state_dict(), 'weights.pth')\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=True)
    weights = torch.load(tmp_path / "weights.pth", weights_only=True)
    assert weights.keys() == model.state_dict().keys()
    assert all(weights[key].equal(value) for key, value in model.state_dict().items())


@needs_local_dir
def test_a_saved_model_loads_again_after_loading(tmp_path):
    model = build("deit_tiny_patch16_224", RPE, depth=1, img_size=32)
    save(model, tmp_path / "first")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'first'}", pretrained=True)
    save(loaded, tmp_path / "second")
    assert_same_model(timm.create_model(f"local-dir:{tmp_path / 'second'}", pretrained=True), model)


@needs_local_dir
@pytest.mark.parametrize("name, rpe", [(TINY, ""), ("eva02_tiny_patch14_224", RPE)])
def test_a_saved_model_adapts_to_another_head_and_another_map(tmp_path, name, rpe):
    model = build(name, rpe, depth=1, img_size=32, patch_size=8, num_classes=5)
    save(model, tmp_path)
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3, img_size=48)
    assert other.head.out_features == 3 and other.patch_embed.grid_size == (6, 6)
    for key, value in model.state_dict().items():
        if "lookup_table" in key:
            assert other.state_dict()[key].equal(value)


@needs_local_dir
def test_without_pretrained_a_saved_model_starts_from_initial_values(tmp_path):
    save(build(TINY, depth=1, img_size=32), tmp_path)
    model = timm.create_model(f"local-dir:{tmp_path}")
    assert not model.blocks[0].attn.rpe_k.lookup_table_weight.any()


@needs_local_dir
def test_weights_of_another_model_in_the_folder_are_refused(tmp_path):
    save(build(TINY, depth=1, img_size=32), tmp_path)
    save_for_hf(build("deit_tiny_patch16_224", depth=1, img_size=32), tmp_path / "plain", safe_serialization=True)
    (tmp_path / "plain" / "model.safetensors").replace(tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"Missing key.*rpe_k\.lookup_table_weight"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


@needs_local_dir
def test_create_model_of_this_project_loads_a_folder_and_names_one_that_is_missing(tmp_path):
    model = build(TINY, depth=1, img_size=32)
    save(model, tmp_path / "saved")
    assert_same_model(rpe_models.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True), model)
    with pytest.raises(UserError, match=r"model local-dir:.*nothing cannot be read: Config file not found"):
        rpe_models.create_model(f"local-dir:{tmp_path / 'nothing'}", pretrained=True)


def test_a_copied_model_keeps_what_timm_saves(tmp_path):
    from timm.utils import ModelEmaV3

    average = ModelEmaV3(build("deit_tiny_patch16_224", RPE, depth=1, img_size=32)).module
    config = save(average, tmp_path)
    assert config["architecture"] == "vit_irpe" and config["model_args"]["rpe"] == RPE


@pytest.mark.parametrize("name, rpe", [(TINY, ""), ("vit_tiny_patch16_224", RPE), ("eva02_tiny_patch14_224", RPE)])
@pytest.mark.parametrize("prefix", ["hf-hub", "hf_hub"])
def test_a_repository_of_the_hub_loads_from_the_cache(tmp_path, monkeypatch, name, rpe, prefix):
    """The cache is laid out as huggingface_hub leaves it after a download; the network is switched off."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--someone--some-model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    model = build(name, rpe, depth=1, img_size=32, patch_size=8)
    folder = repository / "snapshots" / ("0" * 40)
    save_for_hf(model, folder, safe_serialization="both", model_args=recorded_arguments(model))
    loaded = timm.create_model(f"{prefix}:someone/some-model", pretrained=True, cache_dir=str(tmp_path))
    assert_same_model(loaded, model)


# --- vit_irpe ---------------------------------------------------------------------------------------------------------


def test_vit_irpe_builds_what_create_model_builds():
    torch.manual_seed(0)
    expected = rpe_models.create_model("vit_tiny_patch16_224", rpe_config=parse_rpe(RPE), **SMALL)
    torch.manual_seed(0)
    model = timm.create_model("vit_irpe", base="vit_tiny_patch16_224", rpe=RPE, **SMALL)
    assert_same_model(model, expected.eval())


@pytest.mark.parametrize("arguments", [{}, {"base": "vit_tiny_patch16_224"}, {"rpe": RPE}])
def test_vit_irpe_asks_for_what_is_missing(arguments):
    with pytest.raises(ValueError, match="vit_irpe needs base and rpe"):
        timm.create_model("vit_irpe", **arguments)


@pytest.mark.parametrize("ratio", [1.9, 20, 0.1, 1e-7, 123456789.0, 2 / 3])
@pytest.mark.parametrize("method", ["euc", METHOD.CROSS])
@pytest.mark.parametrize("mode, rpe_on", [("ctx", "qkv"), ("bias", "qk"), ("contextual", "v")])
def test_the_text_of_an_encoding_is_parsed_to_the_same_encoding(ratio, method, mode, rpe_on):
    config = get_rpe_config(ratio, method, mode, ratio > 1, rpe_on=rpe_on)
    assert parse_rpe(rpe_text(config)) == config


# --- feature extraction, a new head, checkpointing --------------------------------------------------------------------


@pytest.fixture(params=VITS)
def vit(request):
    return build(request.param, RPE, **SMALL, **VITS[request.param])


@torch.no_grad()
def outputs_of_blocks(model, x):
    """What the model's blocks return in a plain forward pass, and what the pass returns."""
    found = []
    hooks = [block.register_forward_hook(lambda _, inputs, output: found.append(output)) for block in model.blocks]
    result = model(x)
    for hook in hooks:
        hook.remove()
    return found, result


def as_map(tokens, model):
    """(B, L, C) → (B, C, h, w), without the prefix tokens."""
    height, width = model.patch_embed.grid_size
    return tokens[:, model.num_prefix_tokens :].transpose(1, 2).unflatten(2, (height, width))


@torch.no_grad()
def test_forward_intermediates_returns_the_outputs_of_the_blocks(vit):
    expected, result = outputs_of_blocks(vit, images())
    final, maps = vit.forward_intermediates(images())
    torch.testing.assert_close(maps, [as_map(tokens, vit) for tokens in expected], rtol=0, atol=0)
    torch.testing.assert_close(vit.forward_head(final), result, rtol=0, atol=0)


@torch.no_grad()
def test_forward_intermediates_follows_a_map_of_another_size():
    model = build("vit_tiny_patch16_224", RPE, **SMALL, dynamic_img_size=True)
    x = images()[..., :16]
    expected, _ = outputs_of_blocks(model, x)
    maps = model.forward_intermediates(x, indices=[1], intermediates_only=True)
    assert maps[0].shape == (2, 48, 4, 2)
    torch.testing.assert_close(maps[0].flatten(2).transpose(1, 2), expected[1][:, model.num_prefix_tokens :])


@needs_local_dir
@pytest.mark.parametrize("name, rpe", [(TINY, ""), *((name, RPE) for name in VITS)])
@torch.no_grad()
def test_features_only_returns_the_maps_of_the_blocks(tmp_path, name, rpe):
    model = build(name, rpe, **SMALL, **VITS.get(name, {}))
    save(model, tmp_path)
    features = timm.create_model(
        f"local-dir:{tmp_path}", pretrained=True, features_only=True, out_indices=(0, -1)
    ).eval()
    assert isinstance(features, FeatureGetterNet) and features.feature_info.channels() == [48, 48]
    expected, _ = outputs_of_blocks(model, images())
    torch.testing.assert_close(
        features(images()), [as_map(expected[0], model), as_map(expected[2], model)], rtol=0, atol=0
    )


@torch.no_grad()
def test_features_only_follows_timms_defaults_and_prunes_the_blocks_that_it_does_not_need():
    for name, rpe in ((TINY, ""), ("deit_tiny_patch16_224", RPE), ("vit_tiny_patch16_224", RPE)):
        config = parse_rpe(rpe) if rpe else None
        features = rpe_models.create_model(name, rpe_config=config, features_only=True, **SMALL).eval()
        assert [feature.shape for feature in features(images())] == [(2, 48, 4, 4)] * 3
        one = rpe_models.create_model(name, rpe_config=config, features_only=True, out_indices=[0], **SMALL).eval()
        assert len(one.model.blocks) == 1 and one.model.blocks[0].attn.rpe_k is not None
        with pytest.raises(ValueError, match="feature_cls is 'fx'; a vision transformer needs 'getter'"):
            rpe_models.create_model(name, rpe_config=config, features_only=True, feature_cls="fx", **SMALL)


@torch.no_grad()
def test_reset_classifier_changes_the_head_alone(vit):
    before = vit.forward_features(images())
    vit.reset_classifier(9)
    assert vit(images()).shape == (2, 9) and vit.num_classes == 9
    torch.testing.assert_close(vit.forward_features(images()), before, rtol=0, atol=0)
    vit.reset_classifier(0)
    torch.testing.assert_close(vit(images()), vit.forward_head(before, pre_logits=True), rtol=0, atol=0)


@needs_local_dir
def test_a_model_with_a_new_head_round_trips(tmp_path, vit):
    vit.reset_classifier(9)
    save(filled(vit), tmp_path)
    assert_same_model(timm.create_model(f"local-dir:{tmp_path}", pretrained=True), vit)


def test_gradient_checkpointing_changes_no_gradient(vit):
    def gradients(enable):
        vit.zero_grad()
        vit.set_grad_checkpointing(enable)
        calls = []
        hook = vit.blocks[0].attn.register_forward_hook(lambda *_: calls.append(None))
        loss = vit(images()).square().mean()
        loss.backward()
        hook.remove()
        assert len(calls) == (2 if enable else 1)  # checkpointing computes the block again
        return loss, {key: parameter.grad.clone() for key, parameter in vit.named_parameters()}

    vit.train()
    for result, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(result, expected)
