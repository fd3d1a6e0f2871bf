"""torch.hub.load(DIR, name, source="local"): the eight DeiT baselines and the nine models with iRPE."""
import models
import rpe_models

dependencies = ["torch", "torchvision", "timm"]

for _module, _names in ((models, models.__all__), (rpe_models, rpe_models.RELEASED + rpe_models.UNRELEASED)):
    globals().update({_name: getattr(_module, _name) for _name in _names})
