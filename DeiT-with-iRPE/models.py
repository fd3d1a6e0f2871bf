"""The DeiT baselines: timm's own models, started as DeiT starts them and, on request, with iRPE in every block."""

import timm
import torch
from timm.models import deit as timm_deit
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from rpe_vision_transformer import equip_irpe
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


def load_pretrained(model, url):
    """Load a released file into `model`: from torch.hub's cache, else downloaded.

    Positions are interpolated to the model's map and a head for another number of classes keeps its initial values.

    Raises: UserError when the file can be neither found nor fetched, or belongs to another model.
    """
    weights, own = checkpoint_filter_fn(model_weights(load_checkpoint(url), url), model), model.state_dict()
    for key, value in own.items():
        if key.startswith("head") and key in weights and weights[key].shape != value.shape:
            weights[key] = value
    if differences := key_differences(own, weights):
        raise UserError(
            f"{url} belongs to another model ({differences}): remove what is in "
            f"{torch.hub.get_dir()}/checkpoints to have it fetched anew"
        )
    model.load_state_dict(weights)


def build_deit(name, pretrained=False, rpe_config=None, url=None, **kwargs):
    """timm's DeiT of that name with DeiT's initial values, plus iRPE.

    Args:
        name: a baseline's name, without an encoding.
        pretrained: load the released weights, from `url` or, if None, from where timm knows them.
        rpe_config: from `irpe.get_rpe_config`, or None; its `skip` is set to the model's prefix tokens.
        kwargs: timm's (`num_classes`, `img_size`, `drop_rate`, `drop_path_rate`, ...).
    """
    model = getattr(timm_deit, name)(**kwargs)
    if not isinstance(model, VisionTransformer):
        raise ValueError(f"features_only makes a {type(model).__name__} of {name}; use model.forward_intermediates()")
    if model.cls_token is not None:
        torch.nn.init.trunc_normal_(model.cls_token, std=0.02)  # timm starts it at 1e-6, DeiT does not
    equip_irpe(model, rpe_config)
    if pretrained:
        load_pretrained(model, url or timm.get_pretrained_cfg(name).url)
    return model


def _baseline(name):
    def model(pretrained=False, rpe_config=None, **kwargs):
        return build_deit(name, pretrained, rpe_config, **kwargs)

    model.__name__ = model.__qualname__ = name
    model.__doc__ = (
        f"timm's {name}; with `rpe_config`, iRPE in every block; with `pretrained`, the released weights "
        "of the plain model. Other arguments are timm's."
    )
    return model


globals().update({name: _baseline(name) for name in __all__})
