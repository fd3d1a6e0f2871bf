"""`nn.MultiheadAttention` with image relative position encodings, computed by `irpe.rpe_attention`."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .irpe import RPEConfig, build_rpe, rpe_attention


def additive_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert a mask of any shape to a float mask of `dtype`, which attention adds to its logits.

    Args:
        mask: bool, with True where a key is hidden, or a float mask.
    Raises: ValueError for a mask of another dtype.
    """
    if mask.is_floating_point():
        return mask.to(dtype)
    if mask.dtype != torch.bool:
        raise ValueError(f"a mask is of {mask.dtype}; it must be bool (True hides the key) or float (to add)")
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


class RPEMultiheadAttention(nn.MultiheadAttention):
    """Self-attention over a map of tokens, with relative position encodings on queries, keys and values.

    The parameters have the names of those of `nn.MultiheadAttention`; `rpe_q`, `rpe_k` and `rpe_v` hold lookup tables.

    Args:
        *args, **kwargs: as for `nn.MultiheadAttention`.
        rpe_config: the relative position encodings; None for none.
    Raises: ValueError for `add_bias_kv` and `add_zero_attn`, which add keys without a position on the map, and for
        `kdim` and `vdim` other than `embed_dim`.
    """

    def __init__(self, *args: Any, rpe_config: RPEConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.bias_k is not None or self.add_zero_attn or self.in_proj_weight is None:
            raise ValueError(
                f"add_bias_kv, add_zero_attn, kdim={self.kdim} or vdim={self.vdim} is not supported: leave "
                f"them out; keys and values have embed_dim={self.embed_dim} channels, one for each token"
            )
        self.rpe_q, self.rpe_k, self.rpe_v = build_rpe(rpe_config, self.head_dim, self.num_heads)
        self.to(self.in_proj_weight)  # the lookup tables follow the `device` and `dtype` arguments
        # At inference, nn.TransformerEncoderLayer and nn.TransformerEncoder compute attention from the weights without
        # calling `forward`, unless this attribute claims that keys and values have other sizes than queries.
        self._qkv_same_embed_dim = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_qkv_same_embed_dim": False})  # modules pickled by older versions have True

    def _reset_parameters(self) -> None:
        self._qkv_same_embed_dim = self.in_proj_weight is not None  # if False, PyTorch initialises separate weights
        super()._reset_parameters()
        self._qkv_same_embed_dim = False

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        hw: tuple[int, int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute the attention, as `nn.MultiheadAttention` does for batches.

        Args:
            query, key, value: (B, L, C) with `batch_first`, otherwise (L, B, C). With relative position encodings, all
                three have the same length L.
            key_padding_mask: (B, L), bool with True on keys to ignore, or a float mask to add to the logits.
            need_weights: also return the attention weights, which is slower.
            attn_mask: (L, L) or (B·H, L, L), bool with True where a key is hidden, or a float mask.
            average_attn_weights: average the attention weights over the heads.
            is_causal: a hint that `attn_mask` is causal; it has no effect.
            hw: height and width of the map in tokens; None for a square map.
        Returns: the output, with the shape of `query`, and the attention weights: (B, L, L) if averaged, otherwise
            (B, H, L, L), or None without `need_weights`.
        Raises: ValueError if L is not the number of tokens of the map, and for other shapes or types of arguments.
        """
        self._check_inputs(query, key, value)
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is only a hint about attn_mask: give the causal attn_mask with it")
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (self.split_heads(x) for x in self.project(query, key, value))
        mask = self._merge_masks(key_padding_mask, attn_mask, q.dtype)
        out, weights = self._attend(q, k, v, mask, need_weights, hw)
        out = self.out_proj(out.transpose(1, 2).flatten(2))  # (B, L, C)
        if need_weights and average_attn_weights:
            weights = weights.mean(1)
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _check_inputs(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Raise ValueError for inputs that this module cannot attend to."""
        if query.is_nested or key.is_nested or value.is_nested:
            raise ValueError(
                "query, key or value is a nested tensor, from which the size of the map cannot be read: give a "
                "padded tensor with key_padding_mask (in nn.TransformerEncoder, set use_nested_tensor=False "
                "if it was built before its layers got this attention)"
            )
        shapes = [tuple(x.shape) for x in (query, key, value)]
        has_rpe = self.rpe_q is not None or self.rpe_k is not None or self.rpe_v is not None
        if any(len(shape) != 3 for shape in shapes) or (has_rpe and not shapes[0] == shapes[1] == shapes[2]):
            raise ValueError(
                f"query, key and value have shapes {shapes}: give batches, of three dimensions; relative "
                "positions are for self-attention on one map, so with them all must have the same shape"
            )

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        need_weights: bool,
        hw: tuple[int, int] | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The heads' outputs (B, H, L, D) and, with `need_weights`, their attention weights (B, H, L, L)."""
        height, width = hw or (None, None)
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            return rpe_attention(q, k, v, self.rpe_q, self.rpe_k, self.rpe_v, height, width, mask, dropout), None
        # With one-hot values, the output of attention is its weights.
        one_hot = torch.eye(k.shape[2], dtype=k.dtype, device=k.device).expand(*k.shape[:3], -1)
        weights = rpe_attention(q, k, one_hot, self.rpe_q, self.rpe_k, None, height, width, mask, dropout)
        out = torch.matmul(weights, v)
        if self.rpe_v is not None:
            out = out + self.rpe_v(weights, height, width)
        return out, weights

    def project(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Apply the input projections to queries, keys and values (B, L, C)."""
        c = self.embed_dim
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if query is key:  # as in DETR's encoder: a single product projects queries and keys
            q, k = F.linear(query, weight[: 2 * c], None if bias is None else bias[: 2 * c]).chunk(2, -1)
        else:
            q = F.linear(query, weight[:c], None if bias is None else bias[:c])
            k = F.linear(key, weight[c : 2 * c], None if bias is None else bias[c : 2 * c])
        v = F.linear(value, weight[2 * c :], None if bias is None else bias[2 * c :])
        return q, k, v

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, C) → (B, H, L, D)"""
        # After unflatten, torch.onnx.export(..., dynamo=False) would treat the batch size as fixed.
        return x.reshape(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def _merge_masks(
        self, key_padding_mask: torch.Tensor | None, attn_mask: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """The sum of both masks as a float mask that broadcasts to (B, H, L, L); None without masks."""
        mask = None
        if key_padding_mask is not None:
            mask = additive_mask(key_padding_mask, dtype)[:, None, None]  # (B, 1, 1, L)
        if attn_mask is not None:
            attn_mask = additive_mask(attn_mask, dtype)
            if attn_mask.dim() == 3:
                attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))
            mask = attn_mask if mask is None else mask + attn_mask
        return mask
