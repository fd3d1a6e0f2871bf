"""`nn.MultiheadAttention` whose core is `irpe.rpe_attention`."""
import math

import torch
import torch.nn.functional as F
from torch import nn

from .irpe import build_rpe, rpe_attention


def additive_mask(mask, dtype):
    """Mask to add to the logits, from a bool one (True hides the key) or a float one of any shape."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


class RPEMultiheadAttention(nn.MultiheadAttention):
    """Self-attention over a map of tokens, with relative positions on queries, keys and values.

    Parameters and their names are those of `nn.MultiheadAttention`, plus the tables of `rpe_q`, `rpe_k`, `rpe_v`.

    Args:
        embed_dim: channels of the tokens, a multiple of `num_heads`.
        num_heads: H.
        dropout: of the attention, in training.
        bias: whether the projections have one.
        batch_first: (B, L, C) rather than (L, B, C) in and out.
        rpe_config: `irpe.RPEConfig`; None for attention without relative positions.
    """

    def __init__(self, embed_dim, num_heads, dropout=0.0, bias=True, batch_first=False, rpe_config=None):
        super().__init__(embed_dim, num_heads, dropout, bias, batch_first=batch_first)
        self.rpe_q, self.rpe_k, self.rpe_v = build_rpe(rpe_config, self.head_dim, num_heads)

    def forward(self, query, key, value, key_padding_mask=None, attn_mask=None, hw=None):
        """Attend.

        Args:
            query, key, value: (B, L, C) with `batch_first`, else (L, B, C); one length L for all with rpe_config.
            key_padding_mask: (B, L), bool with True on keys to ignore, or float to add to the logits.
            attn_mask: (L, L) or (B·H, L, L), bool with True where a key is hidden, or float.
            hw: (height, width) of the map, in tokens; square if not given.
        Returns: (output of query's shape, None), as `nn.MultiheadAttention` without weights.
        Raises: ValueError if L does not fit the map.
        """
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (self.split_heads(x) for x in self.project(query, key, value))
        height, width = hw or (None, None)
        out = rpe_attention(q, k, v, self.rpe_q, self.rpe_k, self.rpe_v, height, width,
                            self._merge_masks(key_padding_mask, attn_mask, q),
                            self.dropout if self.training else 0.0)
        out = self.out_proj(out.transpose(1, 2).flatten(2))  # (B, L, C)
        return (out if self.batch_first else out.transpose(0, 1)), None

    def project(self, query, key, value):
        """Queries, keys and values (B, L, C) after the input projection."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if query is not key:
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            return map(F.linear, (query, key, value), weight.chunk(3), biases)
        c = self.embed_dim  # in the encoder queries and keys come from the same tokens: one product for both
        q, k = F.linear(query, weight[:2 * c], None if bias is None else bias[:2 * c]).chunk(2, -1)
        return q, k, F.linear(value, weight[2 * c:], None if bias is None else bias[2 * c:])

    def split_heads(self, x):
        """(B, L, C) → (B, H, L, D)"""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _merge_masks(self, key_padding_mask, attn_mask, q):
        mask = None
        if key_padding_mask is not None:
            mask = additive_mask(key_padding_mask, q.dtype)[:, None, None]  # (B, 1, 1, L)
        if attn_mask is not None:
            attn_mask = additive_mask(attn_mask, q.dtype)
            if attn_mask.dim() == 3:
                attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))
            mask = attn_mask if mask is None else mask + attn_mask
        return mask
