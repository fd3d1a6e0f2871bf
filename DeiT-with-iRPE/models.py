"""The DeiT baselines: timm's own models with DeiT's initialisation and, optionally, with iRPE in every block."""

from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.models import deit as timm_deit
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn

from irpe import RPEConfig
from rpe_vision_transformer import (
    describes_equipped_weights,
    equip_irpe,
    load_equipped_weights,
    pop_feature_arguments,
    record_arguments,
    wrap_features,
)
from runtime import UserError, key_differences, load_checkpoint, model_weights

__all__ = [
    f"deit_{variant}"
    for variant in (
        "tiny_patch16_224",
        "small_patch16_224",
        "base_patch16_224",
        "base_patch16_384",
        "tiny_distilled_patch16_224",
        "small_distilled_patch16_224",
        "base_distilled_patch16_224",
        "base_distilled_patch16_384",
    )
]


def load_pretrained(model: nn.Module, url: str) -> None:
    """Load a released checkpoint into `model`, from torch.hub's cache or else from its URL.

    Positions are interpolated to the model's map, and a head for another number of classes keeps its initial values.

    Raises: UserError if the file cannot be found or downloaded, or belongs to another model.
    """
    weights, own = checkpoint_filter_fn(model_weights(load_checkpoint(url), url), model), model.state_dict()
    for key, value in own.items():
        if key.startswith("head") and key in weights and weights[key].shape != value.shape:
            weights[key] = value
    if differences := key_differences(own, weights):
        raise UserError(
            f"{url} belongs to another model ({differences}): delete its file in "
            f"{torch.hub.get_dir()}/checkpoints to download it again"
        )
    model.load_state_dict(weights)


def build_deit(
    name: str, pretrained: bool = False, rpe_config: RPEConfig | None = None, url: str | None = None, **kwargs: Any
) -> nn.Module:
    """Build timm's DeiT of that name with DeiT's initialisation, plus iRPE.

    Args:
        name: a baseline's name, without an encoding.
        pretrained: load weights. If timm builds the model from a folder or a Hub repository, they are the ones saved
            there, otherwise the released ones.
        rpe_config: from `irpe.get_rpe_config`, or None; its `skip` is set to the model's prefix tokens.
        url: address of the released weights; if None, the one that timm knows.
        kwargs: timm's (`num_classes`, `img_size`, `drop_rate`, `drop_path_rate`, ...). With `features_only` the
            result is a `FeatureGetterNet`.
    """
    features = pop_feature_arguments(kwargs)
    model = getattr(timm_deit, name)(**kwargs)
    if model.cls_token is not None:
        torch.nn.init.trunc_normal_(model.cls_token, std=0.02)  # timm initialises it with a standard deviation of 1e-6
    record_arguments(model, **kwargs)
    equip_irpe(model, rpe_config)
    if pretrained and describes_equipped_weights(kwargs.get("pretrained_cfg")):
        load_equipped_weights(model, kwargs)
    elif pretrained:
        load_pretrained(model, url or timm.get_pretrained_cfg(name).url)
    return wrap_features(model, features)


def _baseline(name: str) -> Callable[..., nn.Module]:
    def model(pretrained: bool = False, rpe_config: RPEConfig | None = None, **kwargs: Any) -> nn.Module:
        return build_deit(name, pretrained, rpe_config, **kwargs)

    model.__name__ = model.__qualname__ = name
    model.__doc__ = (
        f"timm's {name}; with `rpe_config`, iRPE in every block; with `pretrained`, the released weights "
        "of the plain model. Other arguments are timm's."
    )
    return model


globals().update({name: _baseline(name) for name in __all__})
