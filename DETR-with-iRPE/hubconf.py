"""torch.hub.load(FOLDER, name, source="local"): DETR, and DETR with iRPE.

Every entry returns the model in evaluation mode and takes

- `pretrained`: load the released weights;
- `num_classes`: the highest category id + 1;
- `return_postprocessor`: return (model, postprocessor) instead of the model. The postprocessor is `PostProcess`, and
  `PostProcessPanoptic` for panoptic models;
- `threshold` (panoptic models only): drop queries whose most probable class has a lower probability.
"""

import collections.abc
import importlib.util
import pathlib
import typing

import torch
from torch import nn

_FOLDER = pathlib.Path(__file__).resolve().parent
# This folder need not be on sys.path, so the helper is loaded from its file.
_spec = importlib.util.spec_from_file_location("codebase_import", _FOLDER / "codebase_import.py")
_codebase_import = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_codebase_import)
_main, _models, _checkpoint, _runtime = _codebase_import.import_modules(
    _FOLDER, "main", "models", "util.checkpoint", "util.runtime"
)

dependencies = ["torch", "torchvision", "scipy", "pycocotools"]

_DETR = "https://dl.fbaipublicfiles.com/detr/"
_IRPE = "https://github.com/wkcn/iRPE-model-zoo/releases/download/1.0/"


def _build(
    flags: tuple[str, ...], url: str, pretrained: bool, num_classes: int
) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The model that main.py builds from `flags`, and its postprocessors by name."""
    args = _main.get_args_parser().parse_args([*flags, "--num_classes", str(num_classes), "--eval"])
    model, _, postprocessors = _models.build_model(args)
    if pretrained:
        cached = f"{torch.hub.get_dir()}/checkpoints/{url.rpartition('/')[2]}"
        _checkpoint.load_weights(
            model,
            _runtime.load_checkpoint(url),
            url,
            classes_cure="leave num_classes out for the released model, or pretrained for one of other classes",
            model_cure=f"remove {cached} to download the file again",
        )
    return model.eval(), postprocessors


def _detector(description: str, url: str, *flags: str) -> collections.abc.Callable[..., typing.Any]:
    """A hub entry for a detector: `description` is its docstring, `flags` are those of main.py."""

    def entry(
        pretrained: bool = False, num_classes: int = 91, return_postprocessor: bool = False
    ) -> nn.Module | tuple[nn.Module, nn.Module]:
        model, postprocessors = _build(flags, url, pretrained, num_classes)
        return (model, postprocessors["bbox"]) if return_postprocessor else model

    entry.__doc__ = description
    return entry


def _panoptic(description: str, url: str, *flags: str) -> collections.abc.Callable[..., typing.Any]:
    """A hub entry for a panoptic model, as `_detector`."""

    def entry(
        pretrained: bool = False, num_classes: int = 250, threshold: float = 0.85, return_postprocessor: bool = False
    ) -> nn.Module | tuple[nn.Module, nn.Module]:
        panoptic = ("--masks", "--dataset_file", "coco_panoptic")
        model, postprocessors = _build(panoptic + flags, url, pretrained, num_classes)
        postprocessors["panoptic"].threshold = threshold
        return (model, postprocessors["panoptic"]) if return_postprocessor else model

    entry.__doc__ = description
    return entry


detr_resnet50 = _detector("DETR with ResNet-50, 500 epochs: 42.0 AP on COCO val2017.", _DETR + "detr-r50-e632da11.pth")
detr_resnet50_dc5 = _detector(
    "DETR-DC5 with ResNet-50 (dilated last stage): 43.3 AP.", _DETR + "detr-r50-dc5-f0fb7ef5.pth", "--dilation"
)
detr_resnet101 = _detector(
    "DETR with ResNet-101: 43.5 AP.", _DETR + "detr-r101-2c7b67e5.pth", "--backbone", "resnet101"
)
detr_resnet101_dc5 = _detector(
    "DETR-DC5 with ResNet-101: 44.9 AP.", _DETR + "detr-r101-dc5-a2e86def.pth", "--backbone", "resnet101", "--dilation"
)
detr_resnet50_rpe_19_product_ctx_1_k = _detector(
    "DETR with ResNet-50 and iRPE on keys, 7×7 buckets, 150 epochs: 40.9 AP.",
    _IRPE + "rpe-1.9-product-ctx-1-k.pth",
    "--enc_rpe2d",
    "rpe-1.9-product-ctx-1-k",
)
detr_resnet50_rpe_20_product_ctx_1_k = _detector(
    "DETR with ResNet-50 and iRPE on keys, 9×9 buckets, 150 epochs: 41.0 AP.",
    _IRPE + "rpe-2.0-product-ctx-1-k.pth",
    "--enc_rpe2d",
    "rpe-2.0-product-ctx-1-k",
)
detr_resnet50_rpe_20_product_ctx_1_k_300epochs = _detector(
    "DETR with ResNet-50 and iRPE on keys, 9×9 buckets, 300 epochs: 42.2 AP.",
    _IRPE + "rpe-2.0-product-ctx-1-k_300epochs.pth",
    "--enc_rpe2d",
    "rpe-2.0-product-ctx-1-k",
)
detr_resnet50_panoptic = _panoptic(
    "DETR with ResNet-50 and a mask head: 43.4 PQ on COCO val2017.", _DETR + "detr-r50-panoptic-00ce5173.pth"
)
detr_resnet50_dc5_panoptic = _panoptic(
    "DETR-DC5 with ResNet-50 and a mask head: 44.6 PQ.", _DETR + "detr-r50-dc5-panoptic-da08f1b1.pth", "--dilation"
)
detr_resnet101_panoptic = _panoptic(
    "DETR with ResNet-101 and a mask head: 45.1 PQ.",
    _DETR + "detr-r101-panoptic-40021d53.pth",
    "--backbone",
    "resnet101",
)
