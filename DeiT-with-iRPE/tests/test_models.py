"""The named models against the golden numbers, and equip_irpe on other ViTs of timm."""

import copy
import json
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import models
import rpe_models
from fill import fill_state_dict, image
from irpe import get_rpe_config
from rpe_vision_transformer import RPEAttention, RPEAttentionRope, RPEEvaAttention, VisionTransformer, equip_irpe
from runtime import UserError

GOLDEN = Path(__file__).parent / "golden"
MANIFESTS = json.loads((GOLDEN / "deit_manifest.json").read_text())
TINY = "deit_tiny_patch16_224_ctx_product_50_shared_k"
# the table of released models: millions of parameters, millions of multiply-accumulates
TABLE = {
    "deit_tiny_patch16_224_ctx_product_50_shared_k": (5.76, 1284),
    "deit_small_patch16_224_ctx_product_50_shared_k": (22.09, 4659),
    "deit_small_patch16_224_ctx_product_50_shared_qk": (22.13, 4706),
    "deit_small_patch16_224_ctx_product_50_shared_qkv": (22.17, 4885),
    "deit_base_patch16_224_ctx_product_50_shared_k": (86.61, 17684),
    "deit_base_patch16_224_ctx_product_50_shared_qkv": (86.68, 18137),
}


def filled(name, **kwargs):
    model = rpe_models.create_model(name, **kwargs)
    model.load_state_dict(fill_state_dict(model.state_dict()))
    return model.eval()


# --- golden numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, operators",
    [
        (name, operators)
        for name in MANIFESTS
        for operators in (("rpe_ops", "torch") if "shared" in name else ("torch",))
    ],
    indirect=["operators"],
)
def test_keys_shapes_and_logits_equal_the_golden_ones(name, operators):
    model = filled(name)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == MANIFESTS[name]
    size = 384 if name.endswith("384") else 224
    with torch.no_grad():
        logits = model(image(2021, (2, 3, size, size))).numpy()
    golden = np.load(GOLDEN / "deit_logits.npz")[name]
    assert np.abs(logits - golden).max() <= 1e-4 * np.abs(golden).max()


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("name, gradients", json.loads((GOLDEN / "deit_grads.json").read_text()).items())
def test_gradients_equal_the_golden_ones(name, gradients):
    model = filled(name, drop_path_rate=0.0).train()
    model(image(2021, (2, 3, 224, 224))).square().mean().backward()
    parameters = dict(model.named_parameters())
    for key, (norm, *head) in gradients.items():
        # 1e-8 is for what is zero but for rounding: in the last block only the class token's query counts, and its
        # keys all lie in one bucket, whose term cancels in the softmax
        gradient = parameters[key].grad.flatten()
        assert gradient.double().norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-8), key
        assert (gradient[:8] - torch.tensor(head)).abs().max() <= 1e-3 * gradient.abs().max() + 1e-8, key


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("name, golden", json.loads((GOLDEN / "deit_steps.json").read_text()).items())
def test_training_steps_equal_the_golden_ones(name, golden):
    model = filled(name, drop_path_rate=0.0).train()
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
    sizes = {bool(group["weight_decay"]): len(group["params"]) for group in optimizer.param_groups}
    assert sizes == {True: golden["n_decay"], False: golden["n_no_decay"]}
    x, y = image(31, (4, 3, 224, 224)), torch.tensor([3, 141, 592, 653])
    for expected in golden["losses"]:
        loss = torch.nn.functional.cross_entropy(model(x), y, label_smoothing=0.1)
        assert loss.item() == pytest.approx(expected, rel=1e-4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    parameters = dict(model.named_parameters())
    for key, (norm, *_) in golden["after"].items():
        assert parameters[key].detach().double().norm().item() == pytest.approx(norm, rel=1e-3), key


@pytest.mark.parametrize("name", TABLE)
def test_parameters_and_macs_match_the_released_table(name):
    model = rpe_models.create_model(name).eval()
    millions, mmacs = TABLE[name]
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    counted = counter.get_total_flops() / 2 / 1e6
    if name.endswith("qkv"):  # a sum per bucket first takes fewer than the public L·L·D way
        assert 0.9 * mmacs < counted < mmacs
    else:
        assert counted == pytest.approx(mmacs, rel=0.01)


# --- names -----------------------------------------------------------------------------------------------------------


def test_published_names_have_their_published_ratios():
    for name in rpe_models.RELEASED + rpe_models.UNRELEASED:
        method, buckets = name.split("_")[5:7]
        config = rpe_models.parse_name(name).rpe_config
        assert rpe_models.count_used_buckets(method, config.ratio) == int(buckets)
        assert (config.skip, config.mode, config.shared_head) == (1, "contextual", True)
    assert {(m, r) for (m, _), r in rpe_models.PUBLISHED_RATIOS.items()} == {
        ("euc", 20),
        ("quant", 33),
        ("cross", 20),
        ("product", 1.9),
    }


@pytest.mark.parametrize("method", ["euc", "quant", "cross", "product"])
def test_every_ratio_found_for_a_count_uses_that_many_buckets(method):
    for buckets in list(rpe_models._ratios(method))[:12]:
        assert rpe_models.count_used_buckets(method, rpe_models.ratio_of(method, buckets)) == buckets


@pytest.mark.parametrize(
    "name, mode, shared, tables",
    [
        (
            "deit_tiny_patch16_224_bias_cross_56_unshared_qk",
            "bias",
            False,
            {"rpe_q.rp_rows", "rpe_q.rp_cols", "rpe_k.rp_rows", "rpe_k.rp_cols"},
        ),
        ("deit_tiny_patch16_384_ctx_product_82_unshared_v", "contextual", False, {"rpe_v"}),
        ("deit_tiny_patch16_32_ctx_euc_20_shared_qv", "contextual", True, {"rpe_q", "rpe_v"}),
    ],
)
def test_names_of_the_ablations_build_the_models_that_they_describe(name, mode, shared, tables):
    model, size = rpe_models.create_model(name, num_classes=7).eval(), int(name.split("_")[3])
    found = {key for key, _ in model.blocks[3].attn.named_parameters() if "lookup" in key}
    assert {key.rsplit(".", 1)[0] for key in found} == tables
    assert all(("bias" in key.rsplit(".", 1)[1]) == (mode == "bias") for key in found)
    table = next(p for key, p in model.blocks[0].attn.named_parameters() if "lookup" in key)
    assert len(table) == (1 if shared else 3)
    with torch.no_grad():
        assert model(torch.zeros(1, 3, size, size)).shape == (1, 7)


@pytest.mark.parametrize(
    "name, said",
    [
        ("deit_small_patch16_224_ctx_product_50_shared_kq", "deit_small_patch16_224_ctx_product_50_shared_k"),
        ("deit_smal_patch16_224", "deit_small_patch16_224"),
        ("resnet5", "resnet50"),
        ("deit_small_patch16_224_bias_product_50_shared_v", "bias on values"),
        ("deit_small_patch16_224_ctx_product_51_shared_k", "50, 82"),
        ("deit_small_patch16_230_ctx_product_50_shared_k", "multiple of 16"),
        ("zzz", "names with iRPE are"),
    ],
)
def test_an_unknown_name_is_refused_with_similar_names(name, said):
    with pytest.raises(ValueError, match="(?s)" + name) as error:
        rpe_models.create_model(name)
    assert said in str(error.value)


def test_timm_knows_the_nine_names():
    for name in rpe_models.RELEASED + rpe_models.UNRELEASED:
        assert timm.is_model(name)
    model = timm.create_model(TINY, num_classes=5, drop_path_rate=0.1, img_size=64)
    assert model.head.out_features == 5 and model.patch_embed.grid_size == (4, 4)
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    assert model.pretrained_cfg["url"].endswith(f"/1.0/{TINY}.pth")


def test_hub_has_all_names_and_loads_beside_other_modules_of_the_same_names(tmp_path):
    names = [*models.__all__, *rpe_models.RELEASED, *rpe_models.UNRELEASED]
    folder = str(Path(models.__file__).parent)
    for name in ("models", "runtime", "irpe"):
        (tmp_path / f"{name}.py").write_text("mine = True\n")
    code = (
        "import models, runtime, irpe, torch\n"
        f"torch.hub._get_cache_or_reload = lambda *args, **kwargs: {folder!r}\n"  # as if fetched from GitHub
        f"assert set({names}) <= set(torch.hub.list('owner/repository'))\n"
        f"net = torch.hub.load({folder!r}, {TINY!r}, source='local', num_classes=3)\n"
        "assert models.mine and runtime.mine and irpe.mine and net.head.out_features == 3\n"
        "assert not hasattr(net.blocks[0].attn, 'mine') and net(torch.zeros(1, 3, 224, 224)).shape == (1, 3)\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_initial_values_are_those_of_deit():
    model = rpe_models.create_model("deit_small_patch16_224_ctx_product_50_shared_qkv")
    for tensor in (model.cls_token, model.pos_embed, model.head.weight, model.blocks[3].mlp.fc1.weight):
        assert tensor.std().item() == pytest.approx(0.02, rel=0.15)
        assert tensor.abs().max() <= 2
    assert all(
        p.abs().max() == 0
        for key, p in model.named_parameters()
        if "lookup_table" in key or (key.endswith("bias") and "patch_embed" not in key)
    )


# --- released weights ------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache and no network."""

    def offline(url, *args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def test_pretrained_offline_names_the_url_and_the_path_of_the_file(hub):
    with pytest.raises(UserError) as error:
        timm.create_model(TINY, pretrained=True)
    assert f"https://github.com/wkcn/iRPE-model-zoo/releases/download/1.0/{TINY}.pth" in str(error.value)
    assert str(hub / f"{TINY}.pth") in str(error.value)
    with pytest.raises(UserError, match="deit_tiny_patch16_224-a1311bcf.pth"):
        models.deit_tiny_patch16_224(pretrained=True)


def test_pretrained_reads_the_cached_file_and_adapts_head_and_positions(hub):
    source = filled(TINY)
    torch.save({"model": source.state_dict()}, hub / f"{TINY}.pth")
    x = image(1, (1, 3, 224, 224))
    with torch.no_grad():
        torch.testing.assert_close(rpe_models.create_model(TINY, pretrained=True).eval()(x), source(x))
    other = rpe_models.create_model(TINY, pretrained=True, num_classes=10, img_size=288)
    assert other.head.out_features == 10 and other.pos_embed.shape[1] == 18 * 18 + 1
    torch.testing.assert_close(
        other.blocks[5].attn.rpe_k.lookup_table_weight, source.blocks[5].attn.rpe_k.lookup_table_weight
    )


def test_pretrained_refuses_the_file_of_another_model_and_names_without_release(hub):
    torch.save({"model": filled("deit_tiny_patch16_224").state_dict()}, hub / f"{TINY}.pth")
    with pytest.raises(UserError, match=r"belongs to another model \(12 missing .*rpe_k"):
        rpe_models.create_model(TINY, pretrained=True)
    with pytest.raises(UserError, match="no weights were released"):
        rpe_models.create_model(rpe_models.UNRELEASED[0], pretrained=True)


# --- equip_irpe ------------------------------------------------------------------------------------------------------

OTHERS = {
    "vit_small_patch16_224": {},
    "vit_small_patch14_reg4_dinov2": dict(img_size=(84, 112)),  # one class and four register tokens, oblong map
    "vit_base_patch16_gap_224": {},  # no prefix at all
    "deit_tiny_distilled_patch16_224": {},
    "vit_base_patch16_clip_224": dict(dynamic_img_size=True),
}
EVAS = {
    name: kwargs
    for name, kwargs in {
        "eva02_tiny_patch14_224": dict(dynamic_img_size=True),  # rotary positions along the axes
        "vit_small_patch16_dinov3": dict(img_size=(64, 96)),  # in another layout, with register tokens
        "vit_small_patch16_rope_mixed_224": {},  # learned ones, for each layer and head
    }.items()
    if timm.is_model(name)
}  # timm 1.0.15 lacks the last two
OTHERS |= EVAS


def brute_force_logits(model, x, height, width):
    """The equipped model's logits with each attention computed by loops over pairs, in place of irpe.py."""
    from test_irpe import brute_force_attention

    def attend(attn, x, rope):
        q, k, v = attn.project(x)
        rotated = (attn.rotate(q, rope), attn.rotate(k, rope)) if rope is not None else None
        out = brute_force_attention(
            q, k, v, (attn.rpe_q, attn.rpe_k, attn.rpe_v), height, width, model.num_prefix_tokens, rotated
        )
        return attn.proj(out.float().transpose(1, 2).flatten(2))

    model = copy.deepcopy(model)
    for block in model.blocks:
        block.attn.forward = lambda x, attn=block.attn, rope=None, **_: attend(attn, x, rope)
    return model(x)


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_an_equipped_vit_computes_what_it_did_and_agrees_with_brute_force(name):
    model = timm.create_model(name, **OTHERS[name]).eval().double()  # float32 rounds some logits by 1e-6
    patch = model.patch_embed.patch_size[0]
    x = image(1, (1, 3, *model.patch_embed.img_size)).double()
    plain = model(x)
    equip_irpe(model, get_rpe_config(rpe_on="qkv", shared_head=False))
    assert {attn.rpe_k.config.skip for attn in (b.attn for b in model.blocks)} == {model.num_prefix_tokens}
    assert (model(x) - plain).abs().max() <= 1e-12 * plain.abs().max()

    small = timm.create_model(name, **OTHERS[name] | dict(img_size=(2 * patch, 3 * patch)), depth=2).eval()
    equip_irpe(small, get_rpe_config(rpe_on="qkv", shared_head=False))
    small.load_state_dict(fill_state_dict(small.state_dict()))
    x = image(2, (1, 3, 2 * patch, 3 * patch))
    expected = brute_force_logits(small, x, 2, 3)
    assert (small(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (small(x) - small(x.flip(3))).abs().max() > 0.01 * expected.abs().max()


@torch.no_grad()
def test_an_equipped_vit_follows_the_image_size():
    config = get_rpe_config(rpe_on="qk")
    dynamic = equip_irpe(timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, depth=2), config).eval()
    fixed = equip_irpe(timm.create_model("vit_tiny_patch16_224", img_size=(64, 32), depth=2), config).eval()
    dynamic.load_state_dict(fill_state_dict(dynamic.state_dict()))
    resized = copy.deepcopy(dynamic)
    resized.dynamic_img_size = False
    x = image(3, (1, 3, 64, 32))
    weights = dynamic.state_dict()
    weights["pos_embed"] = timm.layers.resample_abs_pos_embed(weights["pos_embed"], (4, 2), (14, 14))
    fixed.load_state_dict(weights)
    torch.testing.assert_close(dynamic(x), fixed(x))
    assert dynamic(image(3, (1, 3, 224, 96))).isfinite().all()
    fixed.set_input_size(img_size=(32, 64))
    assert fixed(image(3, (1, 3, 32, 64))).isfinite().all()


def test_a_copied_model_records_its_own_map():
    config = get_rpe_config()
    model = equip_irpe(timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, depth=1), config).eval()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin(image(1, (1, 3, 32, 64)))
        model(image(1, (1, 3, 64, 32)))
    assert [m.blocks[0].attn.map_sizes.by_tokens[8] for m in (model, twin)] == [(4, 2), (2, 4)]


def test_gradient_checkpointing_keeps_maps_of_several_sizes_apart():
    config = get_rpe_config(rpe_on="qkv")
    model = equip_irpe(timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, depth=2), config)
    model.load_state_dict(fill_state_dict(model.state_dict()))

    def gradients(checkpointing):
        model.zero_grad()
        model.set_grad_checkpointing(checkpointing)
        losses = [model(image(5, (1, 3, *size))).square().mean() for size in ((32, 96), (64, 32))]
        sum(losses).backward()
        return [p.grad.clone() for key, p in model.named_parameters() if "lookup_table" in key]

    for a, b in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="gradient checkpointing cannot tell maps of 4×2 and 2×4 tokens apart"):
        model(image(5, (1, 3, 32, 64)))


def rotary(name, rpe_on="qkv", **kwargs):
    """A small equipped model of the Eva class with random weights, its first attention and the rotary embedding."""
    model = timm.create_model(name, **dict(img_size=64, patch_size=16, depth=2, embed_dim=96, num_heads=4) | kwargs)
    equip_irpe(model, get_rpe_config(rpe_on=rpe_on, shared_head=False))
    model.load_state_dict(fill_state_dict(model.state_dict()))
    rope = model.rope.get_embed((4, 4))
    return model.eval(), model.blocks[0].attn, rope[0] if rope.ndim == 4 else rope  # one for each layer, or for all


@pytest.mark.parametrize("name", EVAS)
@torch.no_grad()
def test_encodings_beside_rotary_positions_depend_on_offset_and_content_alone(name, monkeypatch):
    model, attn, rope = rotary(name, "qk")
    met = []
    monkeypatch.setattr(
        "rpe_vision_transformer.rpe_attention",
        lambda q, k, v, rpe_q, rpe_k, *args: met.extend((q @ k.mT, args[3])) or v,
    )
    prefix = model.num_prefix_tokens
    attn(image(1, (1, 1, 96)).expand(1, prefix + 16, 96), rope=rope)  # the same content everywhere
    products, terms = (logits[0, :, prefix:, prefix:] for logits in met)
    by_offset = {}
    for i, j in np.ndindex(16, 16):
        by_offset.setdefault((i // 4 - j // 4, i % 4 - j % 4), []).append(terms[:, i, j])
    for same in by_offset.values():
        torch.testing.assert_close(torch.stack(same), same[0].expand(len(same), -1), rtol=0, atol=1e-5)
    assert torch.stack([same[0] for same in by_offset.values()]).std(0).min() > 0.1
    assert products.std() > 0.01  # they are rotated


@pytest.mark.parametrize("name", EVAS)
@torch.no_grad()
def test_masks_hide_keys_from_rotary_attention_with_terms(name):
    model, attn, rope = rotary(name)
    length = model.num_prefix_tokens + 16
    x = image(2, (1, length, 96))
    other = torch.cat([x[:, :9], image(3, (1, length - 9, 96))], 1)
    seen = torch.arange(length).expand(length, -1) < 9
    added = torch.zeros(length, length).masked_fill(~seen, -torch.inf)
    for mask in (dict(attn_mask=seen), dict(attn_mask=added), dict(is_causal=True)):
        torch.testing.assert_close(attn(x, rope=rope, **mask)[:, :9], attn(other, rope=rope, **mask)[:, :9])
    torch.testing.assert_close(attn(x, rope=rope, attn_mask=seen), attn(x, rope=rope, attn_mask=added))
    assert (attn(x, rope=rope) - attn(other, rope=rope))[:, :9].abs().max() > 0.01


@pytest.mark.parametrize(
    ("equipped", "kwargs"),
    [
        (RPEAttention, dict(qkv_bias=True, qk_norm=True, scale_norm=True)),
        (RPEAttention, dict(gated=True)),
        (RPEEvaAttention, dict(qkv_fused=True)),
        (RPEEvaAttention, dict(qkv_fused=False)),
        (RPEEvaAttention, dict(qk_norm=True, gated=True)),
        (RPEAttentionRope, dict(qkv_fused=True, rotate_half=True)),
        (RPEAttentionRope, dict(qkv_fused=False, num_kv_heads=2)),
    ],
    ids=str,
)
@torch.no_grad()
def test_attention_of_every_layout_with_zero_tables_equals_timms(equipped, kwargs):
    kwargs = dict(dim=32, num_heads=4, norm_layer=torch.nn.LayerNorm, **kwargs)
    try:
        plain = equipped.__bases__[1](**kwargs).double()
    except TypeError as error:
        pytest.skip(f"needs a timm whose attention takes these arguments, not {timm.__version__}: {error}")
    attention = equipped(**kwargs, rpe_config=get_rpe_config(skip=1, rpe_on="qkv")).double()
    plain.load_state_dict(fill_state_dict(plain.state_dict()))
    assert all("lookup_table" in key for key in attention.load_state_dict(plain.state_dict(), strict=False)[0])
    x = image(1, (2, 10, 32)).double()
    places = {} if equipped is RPEAttention else dict(rope=image(2, (9, 16)).double())
    torch.testing.assert_close(attention(x, **places), plain(x, **places))


@pytest.mark.parametrize("name", EVAS)
def test_every_table_beside_rotary_positions_learns(name):
    model, _, _ = rotary(name, global_pool="avg")
    model(image(4, (2, 3, 64, 64))).square().mean().backward()
    gradients = [p.grad for key, p in model.named_parameters() if "lookup_table" in key]
    assert len(gradients) == 6 and all(gradient.any() for gradient in gradients)


def test_equip_irpe_refuses_models_that_it_cannot_equip():
    config = get_rpe_config()
    with pytest.raises(TypeError, match="ResNet"):
        equip_irpe(timm.create_model("resnet18"), config)
    with pytest.raises(TypeError, match="knows timm's Attention, "):
        block_fn = timm.models.vision_transformer.ParallelScalingBlock
        equip_irpe(timm.create_model("vit_tiny_patch16_224", block_fn=block_fn), config)
    with pytest.raises(ValueError, match="patch_drop_rate=0"):
        equip_irpe(timm.create_model("vit_tiny_patch16_224", patch_drop_rate=0.5), config)
    with pytest.raises(ValueError, match="already"):
        equip_irpe(rpe_models.create_model(TINY), config)


def test_attention_and_vision_transformer_accept_a_config_in_their_constructors():
    attention = RPEAttention(32, num_heads=2, qkv_bias=True, rpe_config=get_rpe_config(skip=1, rpe_on="qkv"))
    attention.load_state_dict(fill_state_dict(attention.state_dict()))
    x = image(1, (2, 10, 32))
    assert attention(x).shape == x.shape
    causal = attention(x, is_causal=True)
    later = torch.cat([x[:, :6], x[:, 6:] + 1], 1)
    torch.testing.assert_close(attention(later, is_causal=True)[:, :6], causal[:, :6])
    model = VisionTransformer(
        img_size=32, patch_size=16, embed_dim=32, depth=1, num_heads=2, num_classes=3, rpe_config=get_rpe_config()
    )
    assert isinstance(model.blocks[0].attn, RPEAttention) and model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize("wrapper", ["compile", "checkpointing"])
def test_a_wrapped_model_has_the_same_gradients(wrapper):
    model = filled("deit_tiny_patch16_32_ctx_product_50_shared_qkv", drop_path_rate=0.0, num_classes=5, depth=2).train()
    x, twin = image(4, (2, 3, 32, 32)), copy.deepcopy(model)
    model(x).square().mean().backward()
    if wrapper == "checkpointing":
        twin.set_grad_checkpointing()
        twin(x).square().mean().backward()
    else:
        torch.compile(twin, fullgraph=True, backend="aot_eager")(x).square().mean().backward()
    for (key, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() <= 1e-5 * a.grad.abs().max() + 1e-7, key
