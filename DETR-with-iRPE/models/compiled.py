"""The parts of a detector that `--compile` compiles."""

import torch
from torch import nn

from .rpe_attention.irpe import iRPE


def compile_detector(model: nn.Module) -> None:
    """Compile in place the parts that need only one compilation for images of all sizes. Weights keep their names.

    These parts are the backbone, the decoder and the encoder. An encoder with relative positions is compiled except for
    its attention: the bucket ids are constants that depend on the map's size, so every new size would trigger a
    compilation. The input projection, the prediction heads and the mask head stay eager too.

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
