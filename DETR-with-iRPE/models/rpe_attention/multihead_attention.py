"""`nn.MultiheadAttention` whose core is `irpe.rpe_attention`."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .irpe import build_rpe, rpe_attention


def additive_mask(mask, dtype):
    """Mask to add to the logits, from a bool one (True hides the key) or a float one of any shape."""
    if mask.is_floating_point():
        return mask.to(dtype)
    if mask.dtype != torch.bool:
        raise ValueError(f"a mask is of {mask.dtype}; it must be bool (True hides the key) or float (to add)")
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


class RPEMultiheadAttention(nn.MultiheadAttention):
    """Self-attention over a map of tokens, with relative positions on queries, keys and values.

    Parameters and their names are those of `nn.MultiheadAttention`, plus the tables of `rpe_q`, `rpe_k`, `rpe_v`.

    Args:
        *args, **kwargs: of `nn.MultiheadAttention`.
        rpe_config: `irpe.RPEConfig`; None for attention without relative positions.
    Raises: ValueError for add_bias_kv or add_zero_attn, whose keys have no place on a map, and for another kdim or
        vdim than embed_dim.
    """

    def __init__(self, *args, rpe_config=None, **kwargs):
        super().__init__(*args, **kwargs)
        if self.bias_k is not None or self.add_zero_attn or self.in_proj_weight is None:
            raise ValueError(
                f"add_bias_kv, add_zero_attn, kdim={self.kdim} or vdim={self.vdim} is asked for: leave "
                f"them out; keys and values have embed_dim={self.embed_dim} channels, one for each token"
            )
        self.rpe_q, self.rpe_k, self.rpe_v = build_rpe(rpe_config, self.head_dim, self.num_heads)
        self.to(self.in_proj_weight)  # tables go where device and dtype put the rest
        # For inference, nn.TransformerEncoderLayer and nn.TransformerEncoder compute attention from the weights without
        # calling `forward`, unless the attention says that its keys and values have another size.
        self._qkv_same_embed_dim = False

    def __setstate__(self, state):
        super().__setstate__({**state, "_qkv_same_embed_dim": False})  # it was True in what older code pickled

    def _reset_parameters(self):
        self._qkv_same_embed_dim = self.in_proj_weight is not None  # which weights PyTorch is to fill
        super()._reset_parameters()
        self._qkv_same_embed_dim = False

    def forward(
        self,
        query,
        key,
        value,
        key_padding_mask=None,
        need_weights=True,
        attn_mask=None,
        average_attn_weights=True,
        is_causal=False,
        *,
        hw=None,
    ):
        """Attend, as `nn.MultiheadAttention` on batches.

        Args:
            query, key, value: (B, L, C) with `batch_first`, else (L, B, C); one length L for all with rpe_config.
            key_padding_mask: (B, L), bool with True on keys to ignore, or float to add to the logits.
            need_weights: give the weights too; without them it is faster.
            attn_mask: (L, L) or (B·H, L, L), bool with True where a key is hidden, or float.
            average_attn_weights: give the mean weights of the heads.
            is_causal: a hint that attn_mask is causal; changes nothing.
            hw: (height, width) of the map, in tokens; square if not given.
        Returns: (output of query's shape, the weights that it used, (B, L, L) or of each head (B, H, L, L); None
            without need_weights).
        Raises: ValueError if L does not fit the map, or arguments have shapes or types other than these.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            raise ValueError(
                "query, key or value is a nested tensor, which does not tell the map's size; give a "
                "padded one with key_padding_mask (in nn.TransformerEncoder, set use_nested_tensor=False "
                "if it was built before its layers got this attention)"
            )
        shapes = [tuple(x.shape) for x in (query, key, value)]
        encoded = self.rpe_q or self.rpe_k or self.rpe_v
        if any(len(shape) != 3 for shape in shapes) or (encoded and not shapes[0] == shapes[1] == shapes[2]):
            raise ValueError(
                f"query, key and value have shapes {shapes}: give batches, of three dimensions; relative "
                "positions are for self-attention on one map, so with them all are of one shape"
            )
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is only a hint about attn_mask: give the causal attn_mask with it")
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (self.split_heads(x) for x in self.project(query, key, value))
        out, weights = self._attend(q, k, v, self._merge_masks(key_padding_mask, attn_mask, q), need_weights, hw)
        out = self.out_proj(out.transpose(1, 2).flatten(2))  # (B, L, C)
        if need_weights and average_attn_weights:
            weights = weights.mean(1)
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _attend(self, q, k, v, mask, need_weights, hw):
        """(B, H, L, D), and (B, H, L, L) or None."""
        hw, dropout = hw or (None, None), self.dropout if self.training else 0.0
        if not need_weights:
            return rpe_attention(q, k, v, self.rpe_q, self.rpe_k, self.rpe_v, *hw, mask, dropout), None
        every_key = torch.eye(k.shape[2], dtype=k.dtype, device=k.device).expand(*k.shape[:3], -1)
        weights = rpe_attention(q, k, every_key, self.rpe_q, self.rpe_k, None, *hw, mask, dropout)
        out = torch.matmul(weights, v)
        return (out if self.rpe_v is None else out + self.rpe_v(weights, *hw)), weights

    def project(self, query, key, value):
        """Queries, keys and values (B, L, C) after the input projection."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if query is not key:
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            return map(F.linear, (query, key, value), weight.chunk(3), biases)
        c = self.embed_dim  # in the encoder queries and keys come from the same tokens: one product for both
        q, k = F.linear(query, weight[: 2 * c], None if bias is None else bias[: 2 * c]).chunk(2, -1)
        return q, k, F.linear(value, weight[2 * c :], None if bias is None else bias[2 * c :])

    def split_heads(self, x):
        """(B, L, C) → (B, H, L, D)"""
        # not unflatten, after which torch.onnx.export(..., dynamo=False) takes the batch size for fixed
        return x.reshape(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

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
