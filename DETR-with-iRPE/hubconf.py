"""torch.hub.load(FOLDER, name, source="local"): DETR and DETR with iRPE.

Every entry takes `pretrained` (load the released weights), `num_classes` (highest category id + 1) and
`return_postprocessor` (give (model, PostProcess) rather than the model), and returns the model in evaluation mode.
"""
from main import get_args_parser
from models import build_model
from util.checkpoint import load_weights
from util.runtime import cached_download, load_checkpoint

dependencies = ["torch", "torchvision", "scipy", "pycocotools"]

_DETR = "https://dl.fbaipublicfiles.com/detr/"
_IRPE = "https://github.com/wkcn/iRPE-model-zoo/releases/download/1.0/"


def _detr(flags, url, pretrained, num_classes, return_postprocessor):
    args = get_args_parser().parse_args([*flags, "--num_classes", str(num_classes), "--eval"])
    model, _, postprocessors = build_model(args)
    if pretrained:
        path = cached_download(url)
        load_weights(model, load_checkpoint(path), path)
    model.eval()
    return (model, postprocessors["bbox"]) if return_postprocessor else model


def detr_resnet50(pretrained=False, num_classes=91, return_postprocessor=False):
    """DETR with ResNet-50, 500 epochs: 42.0 AP on COCO val2017."""
    return _detr([], _DETR + "detr-r50-e632da11.pth", pretrained, num_classes, return_postprocessor)


def detr_resnet50_dc5(pretrained=False, num_classes=91, return_postprocessor=False):
    """DETR-DC5 with ResNet-50 (dilated last stage): 43.3 AP."""
    return _detr(["--dilation"], _DETR + "detr-r50-dc5-f0fb7ef5.pth", pretrained, num_classes, return_postprocessor)


def detr_resnet101(pretrained=False, num_classes=91, return_postprocessor=False):
    """DETR with ResNet-101: 43.5 AP."""
    return _detr(["--backbone", "resnet101"], _DETR + "detr-r101-2c7b67e5.pth", pretrained, num_classes,
                 return_postprocessor)


def detr_resnet101_dc5(pretrained=False, num_classes=91, return_postprocessor=False):
    """DETR-DC5 with ResNet-101: 44.9 AP."""
    return _detr(["--backbone", "resnet101", "--dilation"], _DETR + "detr-r101-dc5-a2e86def.pth", pretrained,
                 num_classes, return_postprocessor)


def detr_resnet50_rpe_19_product_ctx_1_k(pretrained=False, num_classes=91, return_postprocessor=False):
    """DETR with ResNet-50 and iRPE on keys, 7×7 buckets, 150 epochs: 40.9 AP."""
    return _detr(["--enc_rpe2d", "rpe-1.9-product-ctx-1-k"], _IRPE + "rpe-1.9-product-ctx-1-k.pth", pretrained,
                 num_classes, return_postprocessor)


def detr_resnet50_rpe_20_product_ctx_1_k(pretrained=False, num_classes=91, return_postprocessor=False):
    """DETR with ResNet-50 and iRPE on keys, 9×9 buckets, 150 epochs: 41.0 AP."""
    return _detr(["--enc_rpe2d", "rpe-2.0-product-ctx-1-k"], _IRPE + "rpe-2.0-product-ctx-1-k.pth", pretrained,
                 num_classes, return_postprocessor)


def detr_resnet50_rpe_20_product_ctx_1_k_300epochs(pretrained=False, num_classes=91, return_postprocessor=False):
    """DETR with ResNet-50 and iRPE on keys, 9×9 buckets, 300 epochs: 42.2 AP."""
    return _detr(["--enc_rpe2d", "rpe-2.0-product-ctx-1-k"], _IRPE + "rpe-2.0-product-ctx-1-k_300epochs.pth",
                 pretrained, num_classes, return_postprocessor)
