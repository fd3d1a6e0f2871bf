"""iRPE in timm's vision transformers: one attention class, and one function that puts it into a model."""
import dataclasses

import torch
from timm.models import vision_transformer as timm_vit

from irpe import build_rpe, rpe_attention

__all__ = ["RPEAttention", "VisionTransformer", "equip_irpe"]


class MapSizes:
    """Height and width, in tokens, of the maps that a model has worked on; a forward hook of its patch embedding.

    They are kept by their number of tokens, by which an attention finds its own even when gradient checkpointing
    calls it again after a map of another size. Maps with as many tokens but of another shape take each other's place:
    they must not be at work at the same time, in two threads or, which is refused, under gradient checkpointing.
    """

    def __init__(self, model=None):
        self.by_tokens = {}
        self.model = (model,)

    def __call__(self, patch_embed, inputs, output):
        # with a dynamic picture size the embedding returns (B, h, w, C), else (B, h·w, C) for the map it was built for
        height, width = output.shape[1:3] if output.ndim == 4 else patch_embed.grid_size
        before = self.by_tokens.get(height * width, (height, width))
        if before != (height, width) and self.model[0].grad_checkpointing and torch.is_grad_enabled():
            raise ValueError(f"maps of {before[0]}×{before[1]} and {height}×{width} tokens under gradient "
                             "checkpointing, which could not tell them apart; switch it off, or use one shape")
        self.by_tokens[height * width] = height, width


class RPEAttention(timm_vit.Attention):
    """timm's self-attention with the terms of `rpe_config`; without one it computes what timm's does.

    Takes timm's arguments, and `rpe_config` from `irpe.get_rpe_config`. Input and output are (B, L, C) with
    L = skip + height·width; the map is square unless `equip_irpe` tells its size.
    """

    def __init__(self, *args, rpe_config=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.equip(rpe_config)

    def equip(self, rpe_config, map_sizes=None):
        """Build the encoding, on the device and in the type of this attention."""
        weight = self.qkv.weight
        self.rpe_q, self.rpe_k, self.rpe_v = (
            rpe and rpe.to(weight) for rpe in build_rpe(rpe_config, self.head_dim, self.num_heads))
        self.map_sizes = map_sizes or MapSizes()
        self.num_prefix_tokens = rpe_config.skip if rpe_config else 0

    def forward(self, x, attn_mask=None, is_causal=False):
        B, L, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, L, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if is_causal:
            attn_mask = torch.ones(L, L, dtype=torch.bool, device=x.device).tril()
        height, width = self.map_sizes.by_tokens.get(L - self.num_prefix_tokens, (None, None))
        out = rpe_attention(q, k, v, self.rpe_q, self.rpe_k, self.rpe_v, height, width, attn_mask,
                            self.attn_drop.p if self.training else 0.0)
        out = out.transpose(1, 2).reshape(B, L, self.num_heads * self.head_dim)
        # newer releases of timm may scale or gate the heads' output
        if getattr(self, "norm", None) is not None:
            out = self.norm(out)
        if getattr(self, "gate", None) is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


def equip_irpe(model, rpe_config):
    """Put iRPE into every block of a timm VisionTransformer, in place, its weights kept; the new tables are zero.

    Args:
        model: any `timm.models.vision_transformer.VisionTransformer` (class, distillation, register tokens or none)
            whose blocks hold timm's `Attention`. Maps may be oblong and, with `dynamic_img_size`, change.
        rpe_config: from `irpe.get_rpe_config`; its `skip` is replaced by the model's number of prefix tokens. None
            leaves the model as it is.
    Returns: the model.
    Raises: TypeError for a model of another kind, ValueError for one that drops patches or is already equipped.
    """
    if rpe_config is None:
        return model
    if not isinstance(model, timm_vit.VisionTransformer):
        raise TypeError(f"{type(model).__name__} is not a timm VisionTransformer; give its own attention the modules "
                        "of irpe.build_rpe and compute it with irpe.rpe_attention")
    attentions = [getattr(block, "attn", None) for block in model.blocks]
    for attn in attentions:
        if isinstance(attn, RPEAttention):
            raise ValueError("the model already has iRPE; build a plain one and equip that")
        if type(attn) is not timm_vit.Attention:
            raise TypeError(f"a block's attention is {type(attn).__name__}; equip_irpe knows timm's Attention only")
    if getattr(model.patch_drop, "prob", 0):
        raise ValueError("the model drops patches, and iRPE needs the whole map; build it with patch_drop_rate=0")
    rpe_config = dataclasses.replace(rpe_config, skip=model.num_prefix_tokens)
    map_sizes = MapSizes(model)
    model.patch_embed.register_forward_hook(map_sizes)
    for attn in attentions:
        # the attention stays the object it was, with its weights, hooks and mode
        attn.__class__ = RPEAttention
        attn.equip(rpe_config, map_sizes)
    return model


class VisionTransformer(timm_vit.VisionTransformer):
    """timm's VisionTransformer with iRPE in every block, or without if `rpe_config` is None. Arguments are timm's."""

    def __init__(self, *args, rpe_config=None, **kwargs):
        super().__init__(*args, **kwargs)
        equip_irpe(self, rpe_config)
