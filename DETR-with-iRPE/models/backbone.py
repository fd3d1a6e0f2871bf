"""The convolutional backbone: a torchvision ResNet, its map masked like the pictures."""

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
    """The stages of a ResNet as masked maps.

    Args:
        backbone: a torchvision ResNet.
        train_backbone: train layer2 to layer4; nothing otherwise.
        num_channels: of the last map.
        return_interm_layers: give the maps of all four stages (named "0" to "3"), not only the last (named "0").
    """

    def __init__(self, backbone, train_backbone, num_channels, return_interm_layers=False):
        super().__init__()
        trained = ("layer2", "layer3", "layer4") if train_backbone else ()
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_(name.startswith(trained))
        stages = [f"layer{i}" for i in range(1, 5)] if return_interm_layers else ["layer4"]
        self.body = IntermediateLayerGetter(backbone, {stage: str(i) for i, stage in enumerate(stages)})
        self.num_channels = num_channels

    def forward(self, tensor_list):
        """NestedTensor of pictures → dict from name to NestedTensor of the map."""
        maps = self.body(tensor_list.tensors)
        mask = tensor_list.mask[None].float()
        return {name: NestedTensor(x, F.interpolate(mask, size=x.shape[-2:]).bool()[0]) for name, x in maps.items()}


class Backbone(BackboneBase):
    """A ResNet by name.

    Args:
        name: resnet18, resnet34, resnet50 or resnet101.
        train_backbone: train it, up to what stays frozen (batch norm, conv1 and layer1).
        return_interm_layers: see `BackboneBase`.
        dilation: DC5: the last stage keeps its resolution and dilates its kernels (not for 18 and 34).
        last_stride: stride of the last stage; 1 keeps its resolution without dilation.
        pretrained: ImageNet weights from torchvision.
        frozen_norm: batch norm with fixed statistics, as pretrained weights need it. Otherwise it is an ordinary
            trainable one and, with `train_backbone`, the whole backbone trains, as random weights need it.
    Raises: UserError for an unknown name, dilation that the blocks cannot do, or weights that cannot be had.
    """

    def __init__(
        self,
        name,
        train_backbone,
        return_interm_layers=False,
        dilation=False,
        last_stride=2,
        pretrained=True,
        frozen_norm=True,
    ):
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

    def __init__(self, backbone, position_embedding):
        super().__init__(backbone, position_embedding)
        self.num_channels = backbone.num_channels

    def forward(self, tensor_list):
        """NestedTensor of pictures → maps (list of NestedTensor) and, in a list too, the last one's positions
        (B, C, H, W)."""
        maps = list(self[0](tensor_list).values())
        return maps, [self[1](maps[-1]).to(maps[-1].tensors.dtype)]


def build_backbone(args):
    """The backbone of the command line, with its position encoding.

    Weights come from torchvision unless a checkpoint brings them (`resume`, `frozen_weights`, `eval`) or
    `no_pretrained_backbone`. Training from random weights needs batch norm that adapts; a model that only runs, as a
    detector under masks that are learned, has it in the frozen form.
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
    learned = args.position_embedding in ("learned", "v3")  # else sine, or v2
    half = args.hidden_dim // 2
    return Joiner(backbone, PositionEmbeddingLearned(half) if learned else PositionEmbeddingSine(half, normalize=True))
