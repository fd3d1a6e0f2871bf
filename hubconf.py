"""torch.hub.load(FOLDER, name, source="local"): every model of both codebases, as their own hubconf.py builds it.

A codebase is imported on the first request for one of its models or docstrings. The DeiT models therefore do not need
pycocotools, and DETR does not need timm.
"""

import functools
import importlib.util
import pathlib
import types
import typing

dependencies = ["torch", "torchvision"]

_DEIT = """
deit_tiny_patch16_224 deit_small_patch16_224 deit_base_patch16_224 deit_base_patch16_384
deit_tiny_distilled_patch16_224 deit_small_distilled_patch16_224
deit_base_distilled_patch16_224 deit_base_distilled_patch16_384
deit_tiny_patch16_224_ctx_product_50_shared_k
deit_small_patch16_224_ctx_product_50_shared_k
deit_small_patch16_224_ctx_product_50_shared_qk
deit_small_patch16_224_ctx_product_50_shared_qkv
deit_base_patch16_224_ctx_product_50_shared_k
deit_base_patch16_224_ctx_product_50_shared_qkv
deit_small_patch16_224_ctx_euc_20_shared_k
deit_small_patch16_224_ctx_quant_51_shared_k
deit_small_patch16_224_ctx_cross_56_shared_k
"""
_DETR = """
detr_resnet50 detr_resnet50_dc5 detr_resnet101 detr_resnet101_dc5
detr_resnet50_panoptic detr_resnet50_dc5_panoptic detr_resnet101_panoptic
detr_resnet50_rpe_19_product_ctx_1_k
detr_resnet50_rpe_20_product_ctx_1_k
detr_resnet50_rpe_20_product_ctx_1_k_300epochs
"""


@functools.cache
def _hubconf(folder: str) -> types.ModuleType:
    """The hubconf.py of the codebase in `folder`."""
    path = pathlib.Path(__file__).resolve().parent / folder / "hubconf.py"
    spec = importlib.util.spec_from_file_location(f"hubconf of {folder}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the models of {folder} need {error.name}, which is not installed: pip install -r requirements.txt",
            name=error.name,
        ) from error
    return module


class _Entry:
    # A hub entry that imports its codebase when it is called. A comment and no docstring: torch.hub.help prints the
    # instance's __doc__, which is that of the codebase's own entry.
    def __init__(self, folder: str, name: str) -> None:
        self._folder, self._name = folder, name

    def __call__(self, *args: typing.Any, **kwargs: typing.Any) -> typing.Any:
        return getattr(_hubconf(self._folder), self._name)(*args, **kwargs)

    @property
    def __doc__(self) -> str:
        return getattr(_hubconf(self._folder), self._name).__doc__


for _folder, _names in (("DeiT-with-iRPE", _DEIT), ("DETR-with-iRPE", _DETR)):
    globals().update({_name: _Entry(_folder, _name) for _name in _names.split()})
