"""torch.hub.load(FOLDER, name, source="local"): the eight DeiT baselines and the nine models with iRPE."""

import importlib.util
import pathlib

_FOLDER = pathlib.Path(__file__).resolve().parent
# This folder need not be on sys.path, so the helper is loaded from its file.
_spec = importlib.util.spec_from_file_location("codebase_import", _FOLDER / "codebase_import.py")
_codebase_import = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_codebase_import)
_models, _rpe_models = _codebase_import.import_modules(_FOLDER, "models", "rpe_models")

dependencies = ["torch", "torchvision", "timm"]

for _module, _names in ((_models, _models.__all__), (_rpe_models, _rpe_models.RELEASED + _rpe_models.UNRELEASED)):
    globals().update({_name: getattr(_module, _name) for _name in _names})
