"""Absolute position encodings of the backbone's feature map: sinusoidal and learned."""

import math

import torch
from torch import nn

from util.misc import NestedTensor
from util.runtime import UserError


class PositionEmbeddingSine(nn.Module):
    """Sines and cosines of the row and column indices, which count the tokens that are not padding.

    Args:
        num_pos_feats: channels for each axis; the encoding has twice as many, rows first.
        temperature: ratio of the longest to the shortest wavelength.
        normalize: divide the indices by the height and width of the image, and multiply them by `scale`.
        scale: the normalised position of the last row and column, in radians.
    """

    def __init__(
        self,
        num_pos_feats: int = 64,
        temperature: float = 10000,
        normalize: bool = False,
        scale: float = 2 * math.pi,
    ) -> None:
        super().__init__()
        self.num_pos_feats = num_pos_feats
        self.temperature = temperature
        self.normalize = normalize
        self.scale = scale

    def forward(self, tensor_list: NestedTensor) -> torch.Tensor:
        """Encode the positions of a map with mask (B, H, W): (B, 2·num_pos_feats, H, W), float32."""
        inside = ~tensor_list.mask
        return torch.cat([self._encode(inside, axis) for axis in (1, 2)], dim=-1).permute(0, 3, 1, 2)

    def _encode(self, inside: torch.Tensor, axis: int) -> torch.Tensor:
        """Encode the indices along one axis of the mask `inside` (B, H, W): (B, H, W, num_pos_feats)."""
        position = inside.cumsum(axis, dtype=torch.float32)  # 1 for the first token
        if self.normalize:
            # torch.onnx.export(..., dynamo=False) would turn narrow(axis, -1, 1) into an empty slice.
            last = position.narrow(axis, position.shape[axis] - 1, 1)
            position = position / (last + 1e-6) * self.scale
        pair = torch.arange(self.num_pos_feats // 2, dtype=torch.float32, device=inside.device)
        angle = position[..., None] / self.temperature ** (2 * pair / self.num_pos_feats)
        return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)


class PositionEmbeddingLearned(nn.Module):
    """One learned vector for each of 50 rows and 50 columns, concatenated (columns first).

    Args:
        num_pos_feats: channels for each axis.
    """

    def __init__(self, num_pos_feats: int = 256) -> None:
        super().__init__()
        self.row_embed = nn.Embedding(50, num_pos_feats)
        self.col_embed = nn.Embedding(50, num_pos_feats)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, tensor_list: NestedTensor) -> torch.Tensor:
        """Encode the positions of a map with mask (B, H, W): (B, 2·num_pos_feats, H, W).

        Raises: UserError for a map with more than 50 rows or columns.
        """
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
