"""The convolutional backbone: a torchvision ResNet whose feature maps carry the padding mask of the images."""

import argparse

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models as vision_models
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FrozenBatchNorm2d

from util.misc import NestedTensor
from util.runtime import UserError, load_checkpoint

from .position_encoding import PositionEmbeddingLearned, PositionEmbeddingSine

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")


class BackboneBase(nn.Module):
    """The stages of a ResNet as masked feature maps.

    Args:
        backbone: a torchvision ResNet.
        train_backbone: whether to train layer2 to layer4. The other layers are always frozen.
        num_channels: channels of the last feature map.
        return_interm_layers: return the maps of all four stages (named "0" to "3") instead of the last (named "0").
    """

    def __init__(
        self, backbone: nn.Module, train_backbone: bool, num_channels: int, return_interm_layers: bool = False
    ) -> None:
        super().__init__()
        trained = ("layer2", "layer3", "layer4") if train_backbone else ()
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_(name.startswith(trained))
        stages = [f"layer{i}" for i in range(1, 5)] if return_interm_layers else ["layer4"]
        self.body = IntermediateLayerGetter(backbone, {stage: str(i) for i, stage in enumerate(stages)})
        self.num_channels = num_channels

    def forward(self, tensor_list: NestedTensor) -> dict[str, NestedTensor]:
        """Compute the feature maps of a batch of images, by name; each mask is resized (nearest) to its map."""
        maps = self.body(tensor_list.tensors)
        mask = tensor_list.mask[None].float()
        return {name: NestedTensor(x, F.interpolate(mask, size=x.shape[-2:]).bool()[0]) for name, x in maps.items()}


class Backbone(BackboneBase):
    """A ResNet by name.

    Args:
        name: resnet18, resnet34, resnet50 or resnet101.
        train_backbone: whether to train it; batch norm, conv1 and layer1 stay frozen.
        return_interm_layers: see `BackboneBase`.
        dilation: DC5, which replaces the stride of the last stage with dilation (not for resnet18 and resnet34).
        last_stride: stride of the last stage; 1 keeps the resolution without dilation.
        pretrained: load torchvision's ImageNet weights.
        frozen_norm: use batch norm with fixed statistics, which pretrained weights need. Otherwise batch norm is
            trainable and, with `train_backbone`, so is the whole backbone, which random weights need.
    Raises: UserError for an unknown name, for dilation with blocks that do not support it, and for weights that cannot
        be downloaded.
    """

    def __init__(
        self,
        name: str,
        train_backbone: bool,
        return_interm_layers: bool = False,
        dilation: bool = False,
        last_stride: int = 2,
        pretrained: bool = True,
        frozen_norm: bool = True,
    ) -> None:
        if name not in RESNETS:
            raise UserError(f"--backbone {name} is not known: choose from {', '.join(RESNETS)}")
        if dilation and name in ("resnet18", "resnet34"):
            raise UserError(
                f"--dilation needs the bottleneck blocks of resnet50 or resnet101; for {name} "
                "--last_stride 1 gives the same resolution"
            )
        resnet = getattr(vision_models, name)(
            weights=None,
            replace_stride_with_dilation=[False, False, dilation],
            norm_layer=FrozenBatchNorm2d if frozen_norm else nn.BatchNorm2d,
        )
        if last_stride == 1:
            for module in resnet.layer4[0].modules():
                if isinstance(module, nn.Conv2d):
                    module.stride = (1, 1)
        if pretrained:
            url = vision_models.get_model_weights(name)["IMAGENET1K_V1"].url
            resnet.load_state_dict(load_checkpoint(url))
        super().__init__(resnet, train_backbone, resnet.fc.in_features, return_interm_layers)
        if train_backbone and not frozen_norm:
            self.body.requires_grad_(True)


class Joiner(nn.Sequential):
    """A backbone followed by its position encoding."""

    def __init__(self, backbone: BackboneBase, position_embedding: nn.Module) -> None:
        super().__init__(backbone, position_embedding)
        self.num_channels = backbone.num_channels

    def forward(self, tensor_list: NestedTensor) -> tuple[list[NestedTensor], list[torch.Tensor]]:
        """Compute the feature maps of a batch of images.

        Returns: the maps, and a list whose only item is the position encoding (B, C, H, W) of the last map.
        """
        maps = list(self[0](tensor_list).values())
        return maps, [self[1](maps[-1]).to(maps[-1].tensors.dtype)]


def build_backbone(args: argparse.Namespace) -> Joiner:
    """Build the backbone and the position encoding that the command line selects.

    The weights are torchvision's, unless a checkpoint provides them (`resume`, `frozen_weights`, `eval`) or
    `no_pretrained_backbone` is set. A backbone that trains from random weights needs trainable batch norm. A backbone
    that is not trained, for example while a mask head is trained on a frozen detector, has frozen batch norm.
    """
    fixed = args.eval or args.frozen_weights
    backbone = Backbone(
        args.backbone,
        args.lr_backbone > 0,
        args.masks,
        args.dilation,
        args.last_stride,
        pretrained=not (args.no_pretrained_backbone or args.resume or fixed),
        frozen_norm=bool(fixed or not args.no_pretrained_backbone),
    )
    learned = args.position_embedding in ("learned", "v3")  # otherwise "sine" or "v2"
    half = args.hidden_dim // 2
    return Joiner(backbone, PositionEmbeddingLearned(half) if learned else PositionEmbeddingSine(half, normalize=True))
