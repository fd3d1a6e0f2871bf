"""DETR's transformer; the encoder's attention knows relative positions on the map."""

import torch
from torch import nn

from .rpe_attention.multihead_attention import RPEMultiheadAttention, additive_mask


class EncoderLayer(nn.TransformerEncoderLayer):
    """`nn.TransformerEncoderLayer` with absolute positions on queries and keys, and relative ones by `rpe_config`."""

    def __init__(self, d_model, nhead, dim_feedforward, dropout, norm_first, rpe_config):
        super().__init__(d_model, nhead, dim_feedforward, dropout, batch_first=True, norm_first=norm_first)
        self.self_attn = RPEMultiheadAttention(d_model, nhead, dropout, batch_first=True, rpe_config=rpe_config)

    def forward(self, src, pos, padding, hw):
        """Tokens (B, L, C) → the same shape; `pos` (B, L, C), `padding` (B, L) to add to logits, `hw` the map."""
        x = self.norm1(src) if self.norm_first else src
        positioned = x + pos
        return self.after_attention(src, self.self_attn(positioned, positioned, x, padding, False, hw=hw)[0])

    def after_attention(self, src, attended):
        """What follows the attention: its residual, the feed-forward block and the norms; all (B, L, C)."""
        src = src + self.dropout1(attended)
        if not self.norm_first:
            src = self.norm1(src)
        x = self.norm2(src) if self.norm_first else src
        src = src + self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(x)))))
        return src if self.norm_first else self.norm2(src)


class DecoderLayer(nn.TransformerDecoderLayer):
    """`nn.TransformerDecoderLayer` with positions on queries and keys of both attentions."""

    def __init__(self, d_model, nhead, dim_feedforward, dropout, norm_first):
        super().__init__(d_model, nhead, dim_feedforward, dropout, batch_first=True, norm_first=norm_first)

    def forward(self, tgt, query_pos, memory, keys, padding):
        """Object tokens (B, Q, C) → the same shape; `keys` is `memory` (B, L, C) with its positions added."""
        tgt = self._residual(tgt, self.norm1, self.dropout1, lambda x: self._self_attend(x + query_pos, x))
        tgt = self._residual(
            tgt,
            self.norm2,
            self.dropout2,
            lambda x: self.multihead_attn(x + query_pos, keys, memory, key_padding_mask=padding, need_weights=False)[0],
        )
        return self._residual(
            tgt, self.norm3, self.dropout3, lambda x: self.linear2(self.dropout(self.activation(self.linear1(x))))
        )

    def _self_attend(self, positioned, x):
        return self.self_attn(positioned, positioned, x, need_weights=False)[0]

    def _residual(self, x, norm, dropout, block):
        if self.norm_first:
            return x + dropout(block(norm(x)))
        return norm(x + dropout(block(x)))


class Encoder(nn.Module):
    def __init__(self, layers, norm):
        super().__init__()
        self.layers, self.norm = nn.ModuleList(layers), norm

    def forward(self, src, pos, padding, hw):
        for layer in self.layers:
            src = layer(src, pos, padding, hw)
        return src if self.norm is None else self.norm(src)


class Decoder(nn.Module):
    def __init__(self, layers, norm):
        super().__init__()
        self.layers, self.norm = nn.ModuleList(layers), norm

    def forward(self, query_pos, memory, pos, padding):
        """Every layer's tokens, each through the one final norm: (layers, B, Q, C)."""
        tgt, keys, outputs = torch.zeros_like(query_pos), memory + pos, []
        for layer in self.layers:
            tgt = layer(tgt, query_pos, memory, keys, padding)
            outputs.append(self.norm(tgt))
        return torch.stack(outputs)


class Transformer(nn.Module):
    """Encoder over the map's tokens and decoder over the object queries.

    Args:
        d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, dropout: as in `nn.Transformer`.
        normalize_before: layer norm before each block, and one more after the encoder.
        rpe_config: `irpe.RPEConfig` for the encoder's attention, or None.
    """

    def __init__(
        self,
        d_model=512,
        nhead=8,
        num_encoder_layers=6,
        num_decoder_layers=6,
        dim_feedforward=2048,
        dropout=0.1,
        normalize_before=False,
        rpe_config=None,
    ):
        super().__init__()
        shape = (d_model, nhead, dim_feedforward, dropout, normalize_before)
        self.encoder = Encoder(
            [EncoderLayer(*shape, rpe_config) for _ in range(num_encoder_layers)],
            nn.LayerNorm(d_model) if normalize_before else None,
        )
        self.decoder = Decoder([DecoderLayer(*shape) for _ in range(num_decoder_layers)], nn.LayerNorm(d_model))
        self.d_model, self.nhead = d_model, nhead
        # this reaches the encoding's tables too: in DETR, unlike DeiT, they start Xavier-uniform
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, src, mask, query_embed, pos_embed):
        """Attend.

        Args:
            src, pos_embed: map and its positions, (B, C, H, W).
            mask: (B, H, W), True on padding.
            query_embed: (Q, C).
        Returns: tokens of every decoder layer (layers, B, Q, C) and the encoder's map (B, C, H, W).
        """
        height, width = src.shape[-2:]
        tokens, pos = (x.flatten(2).transpose(1, 2) for x in (src, pos_embed))  # (B, H·W, C)
        padding = additive_mask(mask.flatten(1), tokens.dtype)
        memory = self.encoder(tokens, pos, padding, (height, width))
        queries = query_embed.to(tokens.dtype).expand(src.shape[0], -1, -1)
        outputs = self.decoder(queries, memory, pos, padding)
        return outputs, memory.transpose(1, 2).unflatten(2, (height, width))
