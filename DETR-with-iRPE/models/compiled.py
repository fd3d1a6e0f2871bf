"""Which parts of a detector `--compile` compiles."""

import torch

from .rpe_attention.irpe import iRPE


def compile_detector(model):
    """Compile, in place, what can be compiled once for images of all sizes; the names of the weights stay.

    That is the backbone, the decoder, and the encoder: all of it without relative positions, and with them what follows
    the attention in each layer. The attention itself stays eager there, since the ids of its buckets are constants of
    a map's size and it would be compiled anew for every size. The projection, the heads and the masks stay eager too.

    Args:
        model: `DETR` or `DETRsegm`.
    """
    detector = getattr(model, "detr", model)
    transformer = detector.transformer
    detector.backbone[0].body.compile(dynamic=True)
    transformer.decoder.compile(dynamic=True)
    if not any(isinstance(module, iRPE) for module in transformer.encoder.modules()):
        transformer.encoder.compile(dynamic=True)
        return
    for layer in transformer.encoder.layers:
        layer.after_attention = torch.compile(layer.after_attention, dynamic=True)
