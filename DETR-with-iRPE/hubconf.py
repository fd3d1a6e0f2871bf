"""torch.hub.load(FOLDER, name, source="local"): DETR and DETR with iRPE.

Every entry takes `pretrained` (load the released weights), `num_classes` (highest category id + 1) and
`return_postprocessor` (give (model, PostProcess) rather than the model), and returns the model in evaluation mode.
"""
import importlib
import pathlib
import sys


def _import_siblings(*names):
    """Modules of this folder, also where the caller has imported others of the same common names (`models`, ...).

    Those are put aside for the while, with what lies in them, and come back; without them the folder's own stay
    importable.
    """
    folder = pathlib.Path(__file__).resolve().parent
    own = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    foreign = {name for name in own - {pathlib.Path(__file__).stem} if name in sys.modules and not pathlib.Path(
        getattr(sys.modules[name], "__file__", None) or "/").resolve().is_relative_to(folder)}

    def take():
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in foreign}

    aside = take()
    sys.path.insert(0, str(folder))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(folder))
        take()
        sys.modules.update(aside)


_main, _models, _checkpoint, _runtime = _import_siblings("main", "models", "util.checkpoint", "util.runtime")

dependencies = ["torch", "torchvision", "scipy", "pycocotools"]

_DETR = "https://dl.fbaipublicfiles.com/detr/"
_IRPE = "https://github.com/wkcn/iRPE-model-zoo/releases/download/1.0/"


def _detr(flags, url, pretrained, num_classes, return_postprocessor):
    args = _main.get_args_parser().parse_args([*flags, "--num_classes", str(num_classes), "--eval"])
    model, _, postprocessors = _models.build_model(args)
    if pretrained:
        _checkpoint.load_weights(model, _runtime.load_checkpoint(url), url)
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
