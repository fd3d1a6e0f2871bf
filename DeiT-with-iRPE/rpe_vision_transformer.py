"""iRPE in timm's vision transformers: attention classes, and one function that puts them into a model."""

import dataclasses
import math

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from timm.models import eva as timm_eva
from timm.models import vision_transformer as timm_vit

from irpe import add_terms, build_rpe, rpe_attention

__all__ = ["RPEAttention", "RPEAttentionRope", "RPEEvaAttention", "VisionTransformer", "equip_irpe"]

AttentionRope = getattr(timm_eva, "AttentionRope", timm_eva.EvaAttention)  # timm 1.0.15 has only the latter


class MapSizes:
    """Height and width, in tokens, of the maps that a model has worked on; a forward hook of its patch embedding.

    They are kept by their number of tokens, by which an attention finds its own even when gradient checkpointing
    calls it again after a map of another size. Maps with as many tokens but of another shape take each other's place:
    they must not be at work at the same time, in two threads or, which is refused, under gradient checkpointing.
    """

    def __init__(self, model=None):
        # torch.compile takes these for constants: if the first call entered the map, the second would compile anew
        grid_size = getattr(getattr(model, "patch_embed", None), "grid_size", None)
        self.by_tokens = {math.prod(grid_size): tuple(grid_size)} if grid_size else {}
        self.model = (model,)

    def __call__(self, patch_embed, inputs, output):
        # with a dynamic picture size the embedding returns (B, h, w, C), else (B, h·w, C) for the map it was built for
        height, width = output.shape[1:3] if output.ndim == 4 else patch_embed.grid_size
        before = self.by_tokens.get(height * width, (height, width))
        if before != (height, width) and self.model[0].grad_checkpointing and torch.is_grad_enabled():
            raise ValueError(
                f"maps of {before[0]}×{before[1]} and {height}×{width} tokens under gradient "
                "checkpointing, which could not tell them apart; switch it off, or use one shape"
            )
        self.by_tokens[height * width] = height, width


class _Terms:
    """What timm's kinds of self-attention share as soon as they have iRPE; without one they compute what timm's do.

    Takes timm's arguments, and `rpe_config` from `irpe.get_rpe_config`. Input and output are (B, L, C) with
    L = skip + height·width; the map is square unless `equip_irpe` tells its size.
    """

    def __init__(self, *args, rpe_config=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.equip(rpe_config)

    def equip(self, rpe_config, map_sizes=None):
        """Build the encoding, on the device and in the type of this attention."""
        self.head_dim = self.proj.in_features // self.num_heads
        self.rpe_q, self.rpe_k, self.rpe_v = (
            rpe and rpe.to(self.proj.weight) for rpe in build_rpe(rpe_config, self.head_dim, self.num_heads)
        )
        self.map_sizes = map_sizes or MapSizes()
        self.skip = rpe_config.skip if rpe_config else 0

    def forward(self, x, attn_mask=None, is_causal=False, rope=None):
        L = x.shape[1]
        q, k, v = self.project(x)
        if is_causal:
            attn_mask = torch.ones(L, L, dtype=torch.bool, device=x.device).tril()
        height, width = self.map_sizes.by_tokens.get(L - self.skip, (None, None))
        rpe_q, rpe_k = self.rpe_q, self.rpe_k
        if rope is not None:
            # Rotated queries and keys make the content's logits; the terms meet the plain ones, as a term of rotated
            # ones would depend on where the query (on queries: the key) is, and not on the offset and content alone.
            attn_mask, rpe_q, rpe_k = self.logit_terms(q, k, height, width, attn_mask), None, None
            q, k = self.rotate(q, rope).type_as(v), self.rotate(k, rope).type_as(v)
        out = rpe_attention(
            q, k, v, rpe_q, rpe_k, self.rpe_v, height, width, attn_mask, self.attn_drop.p if self.training else 0.0
        )
        out = out.transpose(1, 2).flatten(2)
        # newer releases of timm, and the Eva class, may scale or gate the heads' output
        if getattr(self, "norm", None) is not None:
            out = self.norm(out)
        if getattr(self, "gate", None) is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def project(self, x):
        """Plain queries, keys and values of (B, L, C), each (B, H, L, D)."""
        if self.qkv is None:
            heads = [project(x) for project in (self.q_proj, self.k_proj, self.v_proj)]
        elif getattr(self, "q_bias", None) is not None:  # EvaAttention, whose keys have no bias to learn
            bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))  # added in F.linear, which autocast knows
            heads = F.linear(x, self.qkv.weight, bias).chunk(3, -1)
        else:
            heads = self.qkv(x).chunk(3, -1)
        # not unflatten, after which torch.onnx.export(..., dynamo=False) takes the batch size for fixed
        q, k, v = (part.reshape(*part.shape[:2], -1, self.head_dim).transpose(1, 2) for part in heads)
        if hasattr(self, "q_norm"):  # EvaAttention of timm 1.0.15 has none
            q, k = self.q_norm(q), self.k_norm(k)
        if k.shape[1] < self.num_heads:  # grouped: several heads of queries share one of keys and values
            k, v = (part.repeat_interleave(self.num_heads // part.shape[1], 1) for part in (k, v))
        return q, k, v

    def logit_terms(self, q, k, height, width, mask):
        """The terms on keys and queries and the mask, added up for the logits; None if there are none of them."""
        terms = []
        if self.rpe_k is not None:
            terms.append(self.rpe_k(q * self.scale, height, width))
        if self.rpe_q is not None:
            terms.append(self.rpe_q(k * self.scale, height, width).transpose(-2, -1))
        if mask is not None:
            boolean = mask.dtype == torch.bool
            terms.append(torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -math.inf) if boolean else mask)
        return add_terms(terms) if terms else None

    def rotate(self, x, rope):
        """Queries or keys (B, H, L, D) turned by their positions on the map; the prefix tokens have none."""
        prefix = self.num_prefix_tokens
        half = {"half": True} if getattr(self, "rotate_half", False) else {}  # which timm 1.0.15 does not know
        return torch.cat([x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], rope, **half)], 2)


class RPEAttention(_Terms, timm_vit.Attention):
    """timm's Attention with iRPE; see `_Terms`."""


class RPEEvaAttention(_Terms, timm_eva.EvaAttention):
    """timm's EvaAttention with iRPE; see `_Terms`."""


class RPEAttentionRope(_Terms, AttentionRope):
    """timm's AttentionRope with iRPE; see `_Terms`."""


_EQUIPPED = {timm_vit.Attention: RPEAttention, AttentionRope: RPEAttentionRope, timm_eva.EvaAttention: RPEEvaAttention}


def equip_irpe(model, rpe_config):
    """Put iRPE into every block of a timm VisionTransformer or Eva, in place, its weights kept; new tables are zero.

    Args:
        model: any `timm.models.vision_transformer.VisionTransformer` or `timm.models.eva.Eva` (class, distillation,
            register tokens or none; rotary positions stay) whose blocks hold timm's `Attention`, `EvaAttention` or
            `AttentionRope`. Maps may be oblong and, with `dynamic_img_size`, change.
        rpe_config: from `irpe.get_rpe_config`; its `skip` is replaced by the model's number of prefix tokens. None
            leaves the model as it is.
    Returns: the model.
    Raises: TypeError for a model of another kind, ValueError for one that drops patches or is already equipped.
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
        # the attention stays the object it was, with its weights, hooks and mode
        attn.__class__ = _EQUIPPED[type(attn)]
        attn.equip(rpe_config, map_sizes)
    return model


class VisionTransformer(timm_vit.VisionTransformer):
    """timm's VisionTransformer with iRPE in every block, or without if `rpe_config` is None. Arguments are timm's."""

    def __init__(self, *args, rpe_config=None, **kwargs):
        super().__init__(*args, **kwargs)
        equip_irpe(self, rpe_config)
