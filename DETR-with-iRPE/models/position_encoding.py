"""Absolute positions of the backbone's map: sines or learned."""

import math

import torch
from torch import nn

from util.runtime import UserError


class PositionEmbeddingSine(nn.Module):
    """Sines and cosines of the row and the column, counted over the unpadded part of the map.

    Args:
        num_pos_feats: channels of each axis; the result has twice as many, rows first.
        temperature: ratio of the longest to the shortest wavelength.
        normalize: measure positions as a share of the picture, times `scale`.
        scale: of normalised positions.
    """

    def __init__(self, num_pos_feats=64, temperature=10000, normalize=False, scale=2 * math.pi):
        super().__init__()
        self.num_pos_feats, self.temperature, self.normalize, self.scale = num_pos_feats, temperature, normalize, scale

    def forward(self, tensor_list):
        """NestedTensor with mask (B, H, W) → positions (B, 2·num_pos_feats, H, W), float32."""
        inside = ~tensor_list.mask
        return torch.cat([self._encode(inside, axis) for axis in (1, 2)], dim=-1).permute(0, 3, 1, 2)

    def _encode(self, inside, axis):
        position = inside.cumsum(axis, dtype=torch.float32)  # 1 for the first token
        if self.normalize:
            # not narrow(axis, -1, 1), which torch.onnx.export(..., dynamo=False) makes a slice of nothing
            last = position.narrow(axis, position.shape[axis] - 1, 1)
            position = position / (last + 1e-6) * self.scale
        pair = torch.arange(self.num_pos_feats // 2, dtype=torch.float32, device=inside.device)
        angle = position[..., None] / self.temperature ** (2 * pair / self.num_pos_feats)
        return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)  # (B, H, W, num_pos_feats)


class PositionEmbeddingLearned(nn.Module):
    """A vector for each of 50 rows and one for each of 50 columns, side by side (columns first)."""

    def __init__(self, num_pos_feats=256):
        super().__init__()
        self.row_embed = nn.Embedding(50, num_pos_feats)
        self.col_embed = nn.Embedding(50, num_pos_feats)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, tensor_list):
        """NestedTensor with mask (B, H, W) → positions (B, 2·num_pos_feats, H, W)."""
        batch, height, width = tensor_list.mask.shape
        limit = self.row_embed.num_embeddings
        if max(height, width) > limit:
            raise UserError(
                f"a map of {height}×{width} tokens is larger than the {limit}×{limit} learned positions: "
                "use --position_embedding sine or a smaller --short_side"
            )
        columns = self.col_embed.weight[None, :width].expand(height, -1, -1)
        rows = self.row_embed.weight[:height, None].expand(-1, width, -1)
        return torch.cat([columns, rows], dim=-1).permute(2, 0, 1).expand(batch, -1, -1, -1)
