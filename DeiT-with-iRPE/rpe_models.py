"""DeiT with iRPE by name: deit_{size}_patch16_{res}_{mode}_{method}_{buckets}_{shared|unshared}_{where}.

`deit_small_patch16_224_ctx_product_50_shared_qk` is DeiT-small at 224×224 with contextual product encoding of 50
buckets, with tables shared across heads, on queries and keys. `parse_name` reads such a name and `create_model` builds
the model. Importing this module registers the nine names of the public implementation with timm. `model_cards.py` lists
and describes them.
"""

import difflib
import functools
import re
from dataclasses import dataclass
from typing import Any

import timm
from timm.models import generate_default_cfgs, register_model
from torch import nn

import models
from irpe import METHOD, RPEConfig, get_bucket_ids_2d, get_rpe_config
from rpe_vision_transformer import describes_equipped_weights, equip_irpe, rpe_text, set_architecture
from runtime import UserError

RELEASE_URL = "https://github.com/wkcn/iRPE-model-zoo/releases/download/1.0/"
RELEASED = (
    "deit_tiny_patch16_224_ctx_product_50_shared_k",
    "deit_small_patch16_224_ctx_product_50_shared_k",
    "deit_small_patch16_224_ctx_product_50_shared_qk",
    "deit_small_patch16_224_ctx_product_50_shared_qkv",
    "deit_base_patch16_224_ctx_product_50_shared_k",
    "deit_base_patch16_224_ctx_product_50_shared_qkv",
)
UNRELEASED = (
    "deit_small_patch16_224_ctx_euc_20_shared_k",
    "deit_small_patch16_224_ctx_quant_51_shared_k",
    "deit_small_patch16_224_ctx_cross_56_shared_k",
)

# The ratios behind the bucket counts in the published names.
PUBLISHED_RATIOS = {("euc", 20): 20, ("quant", 51): 33, ("cross", 56): 20, ("product", 50): 1.9}

GRAMMAR = (
    "deit_{tiny|small|base}_patch16_{resolution}_{bias|ctx}_{euc|quant|cross|product}_{buckets}_"
    "{shared|unshared}_{q|k|v|qk|kv|qv|qkv}"
)
_NAME = re.compile(
    r"deit_(tiny|small|base)_patch16_([0-9]{1,5})_(bias|ctx)_(euc|quant|cross|product)_([0-9]{1,5})_"
    r"(shared|unshared)_(q|k|v|qk|kv|qv|qkv)"
)


@dataclass(frozen=True)
class DeiTName:
    """What a name encodes: the size (tiny, small or base), the resolution in pixels, and the encoding."""

    size: str
    resolution: int
    rpe_config: RPEConfig


def count_used_buckets(method: str | METHOD, ratio: float, side: int = 14) -> int:
    """The number of buckets that a map of `side` × `side` tokens with a class token uses (cross: in both tables).

    For side=14, it is the number in a model's name.
    """
    tables = ("cross_rows", "cross_cols") if method == "cross" else (method,)
    return sum(
        len(get_bucket_ids_2d(table, side, side, 1, ratio, 2 * ratio, 8 * ratio)[0].unique()) for table in tables
    )


@functools.lru_cache
def _ratios(method: str) -> dict[int, float]:
    """{number of buckets: smallest ratio that uses that many}, among the ratios that `ratio_of` tries."""
    # 338 = 13² + 13² is the largest squared distance on the map, so larger ratios give the same buckets.
    steps = [step / 10 for step in range(1, 200)] + list(range(20, 339 if method == "quant" else 21))
    ratios = {}
    for ratio in steps:
        ratios.setdefault(count_used_buckets(method, ratio), ratio)
    return ratios


def ratio_of(method: str, buckets: int) -> float:
    """The ratio with which a method uses `buckets` buckets on a 14×14 map with a class token.

    It is the published ratio if there is one, else the smallest among 0.1, 0.2, ..., 20 (and, for quantization, the
    integers up to 338). Raises: ValueError that lists the numbers of buckets that the method can have.
    """
    if (method, buckets) in PUBLISHED_RATIOS:
        return PUBLISHED_RATIOS[method, buckets]
    if buckets not in _ratios(method):
        raise ValueError(
            f"no {method} mapping of a 14×14 map uses {buckets} buckets; "
            f"it can use {', '.join(map(str, sorted(_ratios(method))))}"
        )
    return _ratios(method)[buckets]


def parse_name(name: str) -> DeiTName:
    """The DeiTName that `name` encodes.

    Raises: ValueError for a name outside the grammar, a bias on values, a bucket count that the method cannot have or
        a resolution that patches of 16 pixels do not divide.
    """
    match = _NAME.fullmatch(name)
    if not match:
        raise ValueError(f"model name {name!r} is not of the form {GRAMMAR}")
    size, resolution, mode, method, buckets, shared, rpe_on = match.groups()
    resolution = int(resolution)
    if resolution % 16 or not resolution:
        raise ValueError(
            f"model name {name!r} asks for {resolution}×{resolution} pixels, "
            "which patches of 16 do not divide; use a multiple of 16"
        )
    try:
        ratio = ratio_of(method, int(buckets))
        config = get_rpe_config(ratio, method, mode, shared == "shared", skip=1, rpe_on=rpe_on)
    except ValueError as error:
        raise ValueError(f"model name {name!r}: {error}") from error
    return DeiTName(size, resolution, config)


def build_named(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The model of an iRPE name; kwargs are timm's (`num_classes`, `img_size`, `drop_rate`, `drop_path_rate`, ...).

    Raises: ValueError as `parse_name`; UserError if `pretrained` weights do not exist or cannot be downloaded.
    """
    parsed = parse_name(name)
    registered = name in default_cfgs
    from_saved_model = describes_equipped_weights(kwargs.get("pretrained_cfg"))
    if pretrained and not from_saved_model and name not in RELEASED:
        raise UserError(f"no weights were released for {name}; released are {', '.join(RELEASED)}")
    if not from_saved_model:
        kwargs["pretrained_cfg"] = default_cfgs[name].default if registered else _cfg(parsed.resolution)
    kwargs.setdefault("img_size", parsed.resolution)
    model = models.build_deit(
        f"deit_{parsed.size}_patch16_224", pretrained, parsed.rpe_config, f"{RELEASE_URL}{name}.pth", **kwargs
    )
    if registered:
        set_architecture(model, name)
    return model


def near_names(name: str) -> list[str]:
    """Up to four model names similar to `name` that timm knows, including those registered here."""
    return difflib.get_close_matches(name, timm.list_models(), 4)


def create_model(name: str, pretrained: bool = False, rpe_config: RPEConfig | None = None, **kwargs: Any) -> nn.Module:
    """A model by its name.

    Args:
        name: any valid iRPE name, a DeiT baseline, any other model of timm, or a model saved with
            `timm.models.save_for_hf`: `local-dir:FOLDER` or `hf-hub:OWNER/NAME`.
        pretrained: load the released or saved weights.
        rpe_config: from `irpe.get_rpe_config`, the encoding for a model whose name has none.
        kwargs: timm's (`num_classes`, `img_size`, ...).

    Raises: ValueError for an unknown name, with similar ones, or for two encodings; what `equip_irpe` raises; UserError
        if `pretrained` weights or a saved model cannot be read.
    """
    if ":" in name:
        return equip_irpe(_create_saved(name, pretrained, **kwargs), rpe_config)
    if name in models.__all__:
        return getattr(models, name)(pretrained, rpe_config, **kwargs)
    if _NAME.fullmatch(name):
        if rpe_config:
            raise ValueError("the name already has an encoding; leave out one of the two")
        return build_named(name, pretrained, **kwargs)
    if not timm.is_model(name):
        near = near_names(name)
        raise ValueError(
            f"model {name!r} is unknown; "
            + (f"did you mean {', '.join(near)}?" if near else f"names with iRPE are {GRAMMAR}")
        )
    if rpe_config is None:
        return timm.create_model(name, pretrained, **kwargs)
    try:
        return timm.create_model("vit_irpe", pretrained, base=name, rpe=rpe_text(rpe_config), **kwargs)
    except TypeError:
        # If iRPE does not support this model at all, that error is more helpful than one about an unknown argument.
        equip_irpe(timm.create_model(name), rpe_config)
        raise


def _create_saved(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    try:
        return timm.create_model(name, pretrained, **kwargs)
    except (AssertionError, KeyError, OSError, ValueError) as error:
        raise UserError(f"model {name} cannot be read: {str(error) or repr(error)}") from error


def _cfg(resolution: int, url: str = "") -> dict[str, Any]:
    return {
        **timm.get_pretrained_cfg("deit_base_patch16_224").to_dict(),
        "url": url,
        "hf_hub_id": None,
        "tag": None,
        "architecture": None,
        "input_size": (3, resolution, resolution),
        "crop_pct": 224 / 256,  # the accuracy of these models was measured with this; timm evaluates its DeiT with 0.9
    }


def _register(name: str) -> None:
    def model(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_named(name, pretrained, **kwargs)

    model.__name__ = model.__qualname__ = name
    model.__doc__ = f"{name}, as `parse_name` reads it. Arguments are timm's; `pretrained` loads the released weights."
    globals()[name] = register_model(model)


default_cfgs = generate_default_cfgs(
    {name: _cfg(224, f"{RELEASE_URL}{name}.pth" if name in RELEASED else "") for name in (*RELEASED, *UNRELEASED)}
)
for _name in (*RELEASED, *UNRELEASED):
    _register(_name)
