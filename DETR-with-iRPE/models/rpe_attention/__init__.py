"""Multi-head attention with the image relative position encoding of `irpe.py`."""

from .multihead_attention import RPEMultiheadAttention

__all__ = ["RPEMultiheadAttention"]
