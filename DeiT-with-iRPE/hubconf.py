"""torch.hub.load(DIR, name, source="local"): the eight DeiT baselines and the nine models with iRPE."""

import importlib
import pathlib
import sys

dependencies = ["torch", "torchvision", "timm"]


def _import_siblings(*names):
    """Modules of this folder, also where the caller has imported others of the same common names (`models`, ...).

    Those are put aside for the while and come back; without them the folder's own stay importable.
    """
    folder = pathlib.Path(__file__).resolve().parent
    own = [path.stem for path in folder.glob("*.py") if path.stem != pathlib.Path(__file__).stem]
    aside = {
        name: sys.modules.pop(name)
        for name in own
        if name in sys.modules
        and pathlib.Path(getattr(sys.modules[name], "__file__", None) or ".").resolve().parent != folder
    }
    sys.path.insert(0, str(folder))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(folder))
        sys.modules.update(aside)


_models, _rpe_models = _import_siblings("models", "rpe_models")
for _module, _names in ((_models, _models.__all__), (_rpe_models, _rpe_models.RELEASED + _rpe_models.UNRELEASED)):
    globals().update({_name: getattr(_module, _name) for _name in _names})
