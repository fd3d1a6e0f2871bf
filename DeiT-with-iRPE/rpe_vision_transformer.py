"""iRPE in timm's vision transformers: attention classes, `equip_irpe`, which puts them into a model, and `vit_irpe`.

`vit_irpe` is the name under which timm builds equipped models. `timm.models.save_for_hf` stores it with its arguments.
If this module has been imported, `timm.create_model("local-dir:FOLDER", pretrained=True)` loads such a model.
"""

import dataclasses
import decimal
import math
from collections.abc import Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from timm.models import eva as timm_eva
from timm.models import vision_transformer as timm_vit
from timm.models._builder import pretrained_cfg_for_features
from timm.models._features import FeatureGetterNet
from torch import nn

from irpe import RPEConfig, add_terms, build_rpe, parse_rpe, rpe_attention

__all__ = ["RPEAttention", "RPEAttentionRope", "RPEEvaAttention", "VisionTransformer", "equip_irpe", "rpe_text"]

AttentionRope = getattr(timm_eva, "AttentionRope", timm_eva.EvaAttention)  # timm 1.0.15 has only the latter


class MapSizes:
    """Remembers the height and width, in tokens, of each map; a forward hook of the patch embedding.

    The sizes are stored by number of tokens. An attention layer looks its map up by that number, even when gradient
    checkpointing calls it again after a map of another size. Two maps with the same number of tokens but different
    shapes share one entry, so they must not be in use at the same time: not in two threads, and not under gradient
    checkpointing, where this raises ValueError.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        # torch.compile treats these as constants: an entry that the first call adds would recompile the second one.
        grid_size = getattr(getattr(model, "patch_embed", None), "grid_size", None)
        self.by_tokens = {math.prod(grid_size): tuple(grid_size)} if grid_size else {}
        self.model = model

    def __call__(self, patch_embed: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        # With a dynamic image size the embedding returns (B, h, w, C), else (B, h·w, C) for the map it was built for.
        height, width = output.shape[1:3] if output.ndim == 4 else patch_embed.grid_size
        before = self.by_tokens.get(height * width, (height, width))
        if before != (height, width) and self.model.grad_checkpointing and torch.is_grad_enabled():
            raise ValueError(
                f"gradient checkpointing cannot tell maps of {before[0]}×{before[1]} and {height}×{width} tokens "
                "apart; switch it off, or use maps of one shape"
            )
        self.by_tokens[height * width] = height, width


class _Terms:
    """Adds iRPE to timm's self-attention classes, whose result does not change if `rpe_config` is None.

    Takes timm's arguments, and `rpe_config` from `irpe.get_rpe_config`. Input and output are (B, L, C) with
    L = skip + height·width; the map is square unless `equip_irpe` supplies its size.
    """

    def __init__(self, *args: Any, rpe_config: RPEConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.equip(rpe_config)

    def equip(self, rpe_config: RPEConfig | None, map_sizes: MapSizes | None = None) -> None:
        """Build the encoding with the device and dtype of this attention."""
        self.head_dim = self.proj.in_features // self.num_heads
        self.rpe_q, self.rpe_k, self.rpe_v = (
            rpe and rpe.to(self.proj.weight) for rpe in build_rpe(rpe_config, self.head_dim, self.num_heads)
        )
        self.map_sizes = map_sizes or MapSizes()
        self.skip = rpe_config.skip if rpe_config else 0

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        rope: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Self-attention with iRPE, (B, L, C) → (B, L, C).

        Args:
            attn_mask: broadcasts to (B, H, L, L); boolean (True: attend) or added to the logits.
            is_causal: attend to earlier tokens only.
            rope: timm's rotary embedding of the map's tokens, or None.
        """
        L = x.shape[1]
        q, k, v = self.project(x)
        if is_causal:
            attn_mask = torch.ones(L, L, dtype=torch.bool, device=x.device).tril()
        height, width = self.map_sizes.by_tokens.get(L - self.skip, (None, None))
        rpe_q, rpe_k = self.rpe_q, self.rpe_k
        if rope is not None:
            # The content logits use rotated queries and keys. The encoding uses them before rotation: otherwise a term
            # would depend on the position of the query (for rpe_q: of the key), not on content and offset alone.
            attn_mask, rpe_q, rpe_k = self.logit_terms(q, k, height, width, attn_mask), None, None
            q, k = self.rotate(q, rope).type_as(v), self.rotate(k, rope).type_as(v)
        out = rpe_attention(
            q, k, v, rpe_q, rpe_k, self.rpe_v, height, width, attn_mask, self.attn_drop.p if self.training else 0.0
        )
        out = out.transpose(1, 2).flatten(2)
        # The Eva class and newer releases of timm may normalise or gate the heads' output.
        if getattr(self, "norm", None) is not None:
            out = self.norm(out)
        if getattr(self, "gate", None) is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values of x (B, L, C) before any rotation, each (B, H, L, D)."""
        if self.qkv is None:
            heads = [project(x) for project in (self.q_proj, self.k_proj, self.v_proj)]
        elif getattr(self, "q_bias", None) is not None:  # EvaAttention, whose keys have no learned bias
            bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
            heads = F.linear(x, self.qkv.weight, bias).chunk(3, -1)
        else:
            heads = self.qkv(x).chunk(3, -1)
        # After unflatten, torch.onnx.export(..., dynamo=False) would treat the batch size as fixed.
        q, k, v = (part.reshape(*part.shape[:2], -1, self.head_dim).transpose(1, 2) for part in heads)
        if hasattr(self, "q_norm"):  # EvaAttention of timm 1.0.15 has none
            q, k = self.q_norm(q), self.k_norm(k)
        if k.shape[1] < self.num_heads:  # grouped-query attention: query heads share a head of keys and values
            k, v = (part.repeat_interleave(self.num_heads // part.shape[1], 1) for part in (k, v))
        return q, k, v

    def logit_terms(
        self, q: torch.Tensor, k: torch.Tensor, height: int | None, width: int | None, mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The sum of the terms on keys and queries and of the mask, to add to the logits; None without any of them."""
        terms = []
        if self.rpe_k is not None:
            terms.append(self.rpe_k(q * self.scale, height, width))
        if self.rpe_q is not None:
            terms.append(self.rpe_q(k * self.scale, height, width).transpose(-2, -1))
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -math.inf)
        if mask is not None:
            terms.append(mask)
        return add_terms(terms) if terms else None

    def rotate(self, x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        """Apply the rotary embedding to queries or keys (B, H, L, D), except to prefix tokens (no position)."""
        prefix = self.num_prefix_tokens
        half = {"half": True} if getattr(self, "rotate_half", False) else {}  # timm 1.0.15 has no such argument
        return torch.cat([x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], rope, **half)], 2)


class RPEAttention(_Terms, timm_vit.Attention):
    """timm's Attention with iRPE; see `_Terms`."""


class RPEEvaAttention(_Terms, timm_eva.EvaAttention):
    """timm's EvaAttention with iRPE; see `_Terms`."""


class RPEAttentionRope(_Terms, AttentionRope):
    """timm's AttentionRope with iRPE; see `_Terms`."""


_EQUIPPED = {timm_vit.Attention: RPEAttention, AttentionRope: RPEAttentionRope, timm_eva.EvaAttention: RPEEvaAttention}


def equip_irpe(model: nn.Module, rpe_config: RPEConfig | None) -> nn.Module:
    """Add iRPE to every block of a timm VisionTransformer or Eva, in place. Weights are kept; new tables are zero.

    Args:
        model: any `timm.models.vision_transformer.VisionTransformer` or `timm.models.eva.Eva`, with or without class,
            distillation and register tokens and rotary positions, whose blocks contain timm's `Attention`,
            `EvaAttention` or `AttentionRope`. Maps need not be square and, with `dynamic_img_size`, may vary in size.
        rpe_config: from `irpe.get_rpe_config`; its `skip` is replaced by the model's number of prefix tokens. None
            leaves the model as it is.

    Returns: the model. If timm built it by name, its architecture is now `vit_irpe`, so that timm can save and load it.
    Raises: TypeError for a model of another class, ValueError for one that drops patches or is already equipped.
    """
    if rpe_config is None:
        return model
    if not isinstance(model, (timm_vit.VisionTransformer, timm_eva.Eva)):
        raise TypeError(
            f"{type(model).__name__} is neither a VisionTransformer nor an Eva of timm, the two kinds that "
            "equip_irpe knows; give its own attention the modules of irpe.build_rpe and compute it with "
            "irpe.rpe_attention"
        )
    attentions = [getattr(block, "attn", None) for block in model.blocks]
    for attn in attentions:
        if isinstance(attn, _Terms):
            raise ValueError("the model already has iRPE; build a plain one and equip that")
        if type(attn) not in _EQUIPPED:
            raise TypeError(
                f"a block's attention is {attn and type(attn).__name__}; equip_irpe knows timm's "
                f"{', '.join(sorted(kind.__name__ for kind in _EQUIPPED))} only"
            )
    if getattr(model.patch_drop, "prob", 0):
        raise ValueError("the model drops patches, and iRPE needs the whole map; build it with patch_drop_rate=0")
    rpe_config = dataclasses.replace(rpe_config, skip=model.num_prefix_tokens)
    map_sizes = MapSizes(model)
    model.patch_embed.register_forward_hook(map_sizes)
    for attn in attentions:
        # The attention stays the same object, with its weights, hooks and mode.
        attn.__class__ = _EQUIPPED[type(attn)]
        attn.equip(rpe_config, map_sizes)
    if hasattr(model, "pretrained_cfg"):
        base = model.pretrained_cfg["architecture"]
        set_architecture(model, "vit_irpe", base=base, rpe=rpe_text(rpe_config))
    return model


class VisionTransformer(timm_vit.VisionTransformer):
    """timm's VisionTransformer with iRPE in every block, or without if `rpe_config` is None. Arguments are timm's."""

    def __init__(self, *args: Any, rpe_config: RPEConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        equip_irpe(self, rpe_config)


# --- timm's factory ---------------------------------------------------------------------------------------------------

# Arguments of timm's factory that concern the weights, not the model.
_WEIGHT_ARGUMENTS = ("pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "cache_dir")
# Arguments with which timm wraps a model for feature extraction.
_FEATURE_ARGUMENTS = ("features_only", "out_indices", "feature_cls")


@timm.models.register_model
def vit_irpe(pretrained: bool = False, *, base: str = "", rpe: str = "", **kwargs: Any) -> nn.Module:
    """Any timm model that `equip_irpe` accepts, with iRPE, for `timm.create_model("vit_irpe", base=..., rpe=...)`.

    Args:
        pretrained: load weights. If timm builds the model from a folder or a Hub repository, they are the ones saved
            there, otherwise timm's weights of `base`, with tables of zeros.
        base: timm's name of the model without iRPE, such as "vit_base_patch16_224".
        rpe: the encoding as `irpe.RPE_GRAMMAR` defines it, such as "rpe-1.9-product-ctx-1-k".
        kwargs: timm's, for `base`. With `features_only` the result is a `FeatureGetterNet`.
    Raises: ValueError if `base` or `rpe` is missing or wrong, and what `equip_irpe` raises.
    """
    if not base or not rpe:
        raise ValueError(
            f"vit_irpe needs base and rpe, as in base='vit_base_patch16_224', rpe='rpe-1.9-product-ctx-1-k', but base "
            f"is {base!r} and rpe is {rpe!r}; timm.models.save_for_hf of timm {timm.__version__} may need "
            "model_args=recorded_arguments(model) to write them"
        )
    features = pop_feature_arguments(kwargs)
    own_weights = pretrained and describes_equipped_weights(kwargs.get("pretrained_cfg"))
    model = timm.create_model(base, pretrained and not own_weights, **kwargs)
    record_arguments(model, **kwargs)
    equip_irpe(model, parse_rpe(rpe))
    if own_weights:
        load_equipped_weights(model, kwargs)
    return wrap_features(model, features)


def rpe_text(rpe_config: RPEConfig) -> str:
    """The string that `irpe.parse_rpe` parses to `rpe_config`, except for its `skip`."""
    ratio = f"{decimal.Decimal(repr(rpe_config.ratio)).normalize():f}"  # 20 for 20.0, and never an exponent
    mode = "ctx" if rpe_config.mode == "contextual" else "bias"
    return f"rpe-{ratio}-{rpe_config.method.value}-{mode}-{int(rpe_config.shared_head)}-{rpe_config.rpe_on}"


def set_architecture(model: nn.Module, architecture: str, **equipment: str) -> None:
    """Record the entry point from which timm can rebuild the model; `timm.models.save_for_hf` stores it.

    Args:
        equipment: `base` and `rpe` if the entry point is `vit_irpe`; the names of others include their encoding.
    """
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, "architecture": architecture}
    arguments = {name: value for name, value in recorded_arguments(model).items() if name not in ("base", "rpe")}
    model._model_args = arguments | equipment


def record_arguments(model: nn.Module, **arguments: Any) -> None:
    """Record the arguments from which timm can rebuild the model, except None, timm's default, and weight sources.

    timm's factory records its arguments in the same attribute, and `timm.models.save_for_hf` stores them. Releases of
    timm without that attribute store only the `model_args` of `save_for_hf`: pass it `recorded_arguments(model)`.
    """
    described = {
        name: value for name, value in arguments.items() if name not in _WEIGHT_ARGUMENTS and value is not None
    }
    model._model_args = recorded_arguments(model) | described


def recorded_arguments(model: nn.Module) -> dict[str, Any]:
    """The recorded arguments from which timm can rebuild the model."""
    return dict(getattr(model, "_model_args", {}))


def describes_equipped_weights(pretrained_cfg: Any) -> bool:
    """Whether timm loads a saved model: the weights of a `local-dir:` or `hf-hub:` model include the tables."""
    return isinstance(pretrained_cfg, dict) and pretrained_cfg.get("source") in ("local-dir", "hf-hub")


def load_equipped_weights(model: nn.Module, kwargs: dict[str, Any]) -> None:
    """Load the weights that `model.pretrained_cfg` names into an equipped model, as timm does for its own.

    Positions are interpolated to the model's map, and a head for another number of classes keeps its initial values.

    Args:
        kwargs: those of the entry point; `in_chans` and `cache_dir` are used.
    Raises: RuntimeError if the weights belong to another model.
    """
    module = timm_eva if isinstance(model, timm_eva.Eva) else timm_vit
    timm.models.load_pretrained(
        model,
        num_classes=model.num_classes,
        in_chans=kwargs.get("in_chans", 3),
        filter_fn=module.checkpoint_filter_fn,
        cache_dir=kwargs.get("cache_dir"),
    )


def pop_feature_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take timm's arguments for feature extraction out of `kwargs`; `wrap_features` applies them after equipping."""
    return {name: kwargs.pop(name) for name in _FEATURE_ARGUMENTS if name in kwargs}


def wrap_features(model: nn.Module, features: dict[str, Any]) -> nn.Module:
    """Apply `features_only`: a `FeatureGetterNet` that returns the maps of some blocks, each (B, C, h, w).

    Args:
        features: from `pop_feature_arguments`. `out_indices` are the indices of blocks or, as a single number n, the
            last n blocks; 3 by default, as in timm.
    Raises: ValueError for a `feature_cls` other than "getter", which timm uses for vision transformers.
    """
    if not features.get("features_only"):
        return model
    if features.get("feature_cls") not in (None, "getter", FeatureGetterNet):
        raise ValueError(f"feature_cls is {features['feature_cls']!r}; a vision transformer needs 'getter'")
    out_indices: int | Sequence[int] = features.get("out_indices", 3)
    wrapper = FeatureGetterNet(model, out_indices=out_indices)
    wrapper.pretrained_cfg = wrapper.default_cfg = pretrained_cfg_for_features(model.pretrained_cfg)
    return wrapper
