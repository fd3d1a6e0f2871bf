"""DETR's transformer. The encoder's self-attention takes image relative position encodings."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from .rpe_attention.irpe import RPEConfig
from .rpe_attention.multihead_attention import RPEMultiheadAttention, additive_mask


class EncoderLayer(nn.TransformerEncoderLayer):
    """`nn.TransformerEncoderLayer` with absolute positions added to queries and keys, and with iRPE.

    Args:
        d_model, nhead, dim_feedforward, dropout, norm_first: as for `nn.TransformerEncoderLayer`.
        rpe_config: the relative position encodings; None for none.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int,
        dropout: float,
        norm_first: bool,
        rpe_config: RPEConfig | None,
    ) -> None:
        super().__init__(d_model, nhead, dim_feedforward, dropout, batch_first=True, norm_first=norm_first)
        self.self_attn = RPEMultiheadAttention(d_model, nhead, dropout, batch_first=True, rpe_config=rpe_config)

    def forward(self, src: torch.Tensor, pos: torch.Tensor, padding: torch.Tensor, hw: tuple[int, int]) -> torch.Tensor:
        """Encode.

        Args:
            src: tokens (B, L, C).
            pos: position encoding (B, L, C).
            padding: float mask (B, L) to add to the logits, −∞ on the padding.
            hw: height and width of the map, whose product is L.
        Returns: tokens (B, L, C).
        """
        x = self.norm1(src) if self.norm_first else src
        query = x + pos
        attended, _ = self.self_attn(query, query, x, key_padding_mask=padding, need_weights=False, hw=hw)
        return self.after_attention(src, attended)

    def after_attention(self, src: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Apply the residual connection of the attention, the feed-forward block and the norms; all (B, L, C)."""
        src = src + self.dropout1(attended)
        if not self.norm_first:
            src = self.norm1(src)
        x = self.norm2(src) if self.norm_first else src
        src = src + self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(x)))))
        return src if self.norm_first else self.norm2(src)


class DecoderLayer(nn.TransformerDecoderLayer):
    """`nn.TransformerDecoderLayer` with positions added to the queries and keys of both attentions."""

    def __init__(self, d_model: int, nhead: int, dim_feedforward: int, dropout: float, norm_first: bool) -> None:
        super().__init__(d_model, nhead, dim_feedforward, dropout, batch_first=True, norm_first=norm_first)

    def forward(
        self,
        tgt: torch.Tensor,
        query_pos: torch.Tensor,
        memory: torch.Tensor,
        keys: torch.Tensor,
        padding: torch.Tensor,
    ) -> torch.Tensor:
        """Decode.

        Args:
            tgt: object tokens (B, Q, C).
            query_pos: the object queries' position encoding (B, Q, C).
            memory: the encoder's output (B, L, C).
            keys: `memory` plus its position encoding (B, L, C).
            padding: float mask (B, L) to add to the logits, −∞ on the padding.
        Returns: object tokens (B, Q, C).
        """

        def self_attention(x: torch.Tensor) -> torch.Tensor:
            query = x + query_pos
            return self.self_attn(query, query, x, need_weights=False)[0]

        def cross_attention(x: torch.Tensor) -> torch.Tensor:
            return self.multihead_attn(x + query_pos, keys, memory, key_padding_mask=padding, need_weights=False)[0]

        def feed_forward(x: torch.Tensor) -> torch.Tensor:
            return self.linear2(self.dropout(self.activation(self.linear1(x))))

        tgt = self._residual(tgt, self.norm1, self.dropout1, self_attention)
        tgt = self._residual(tgt, self.norm2, self.dropout2, cross_attention)
        return self._residual(tgt, self.norm3, self.dropout3, feed_forward)

    def _residual(
        self, x: torch.Tensor, norm: nn.Module, dropout: nn.Module, block: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Apply a block with its residual connection; the norm comes before the block or after the sum."""
        if self.norm_first:
            return x + dropout(block(norm(x)))
        return norm(x + dropout(block(x)))


class Encoder(nn.Module):
    """A stack of encoder layers, with an optional norm after the last."""

    def __init__(self, layers: Sequence[EncoderLayer], norm: nn.Module | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(self, src: torch.Tensor, pos: torch.Tensor, padding: torch.Tensor, hw: tuple[int, int]) -> torch.Tensor:
        """Encode tokens (B, L, C); see `EncoderLayer.forward`."""
        for layer in self.layers:
            src = layer(src, pos, padding, hw)
        return src if self.norm is None else self.norm(src)


class Decoder(nn.Module):
    """A stack of decoder layers. The same norm follows each of them."""

    def __init__(self, layers: Sequence[DecoderLayer], norm: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(
        self, query_pos: torch.Tensor, memory: torch.Tensor, pos: torch.Tensor, padding: torch.Tensor
    ) -> torch.Tensor:
        """Decode, starting from tokens of zeros.

        Args:
            query_pos, memory, padding: as for `DecoderLayer.forward`.
            pos: position encoding of `memory` (B, L, C).
        Returns: the normed object tokens of every layer (layers, B, Q, C).
        """
        tgt = torch.zeros_like(query_pos)
        keys = memory + pos
        outputs = []
        for layer in self.layers:
            tgt = layer(tgt, query_pos, memory, keys, padding)
            outputs.append(self.norm(tgt))
        return torch.stack(outputs)


class Transformer(nn.Module):
    """An encoder over the tokens of a feature map, and a decoder over the object queries.

    Args:
        d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, dropout: as for `nn.Transformer`.
        normalize_before: put layer norm before each block, and one more after the encoder.
        rpe_config: the relative position encodings of the encoder's attention; None for none.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        normalize_before: bool = False,
        rpe_config: RPEConfig | None = None,
    ) -> None:
        super().__init__()
        shape = (d_model, nhead, dim_feedforward, dropout, normalize_before)
        self.encoder = Encoder(
            [EncoderLayer(*shape, rpe_config) for _ in range(num_encoder_layers)],
            nn.LayerNorm(d_model) if normalize_before else None,
        )
        self.decoder = Decoder([DecoderLayer(*shape) for _ in range(num_decoder_layers)], nn.LayerNorm(d_model))
        self.d_model = d_model
        self.nhead = nhead
        # This includes iRPE's lookup tables: they start Xavier-uniform in DETR, and at zero in DeiT.
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self, src: torch.Tensor, mask: torch.Tensor, query_embed: torch.Tensor, pos_embed: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode a feature map and decode the object queries.

        Args:
            src: feature map (B, C, H, W).
            mask: (B, H, W), bool, True on the padding.
            query_embed: object queries (Q, C).
            pos_embed: position encoding of the map (B, C, H, W).
        Returns: the object tokens of every decoder layer (layers, B, Q, C), and the encoder's output as a map
            (B, C, H, W).
        """
        height, width = src.shape[-2:]
        tokens = src.flatten(2).transpose(1, 2)  # (B, H·W, C)
        pos = pos_embed.flatten(2).transpose(1, 2)
        padding = additive_mask(mask.flatten(1), tokens.dtype)
        memory = self.encoder(tokens, pos, padding, (height, width))
        queries = query_embed.to(tokens.dtype).expand(src.shape[0], -1, -1)
        outputs = self.decoder(queries, memory, pos, padding)
        return outputs, memory.transpose(1, 2).unflatten(2, (height, width))
