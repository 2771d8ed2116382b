"""Detectors for the harness: the protocol, torchvision's detectors as small adapters to it, and one's own by name.

The adapters are imported on use, so that everything else here works without torchvision.
"""

import importlib
from typing import Any

from ..extras import require
from .cost import Cost, cost
from .kinds import KINDS, build, check_detector, load_model, parse, settings_of
from .protocol import Dense, Detector, Features, HasDense, HasProposals, HasStages, Matched, Targets
from .transfer import freeze, inherit, part_of
from .weights import LeftOut, load_weights

_ADAPTERS = {
    "TorchvisionFasterRCNN": "faster_rcnn",
    "TorchvisionRetinaNet": "retinanet",
    "TorchvisionFCOS": "fcos",
    "TorchvisionSSDLite": "ssdlite",
}

__all__ = [
    "KINDS",
    "Cost",
    "Dense",
    "Detector",
    "Features",
    "HasDense",
    "HasProposals",
    "HasStages",
    "LeftOut",
    "Matched",
    "Targets",
    "TorchvisionFCOS",
    "TorchvisionFasterRCNN",
    "TorchvisionRetinaNet",
    "TorchvisionSSDLite",
    "build",
    "check_detector",
    "cost",
    "freeze",
    "inherit",
    "load_model",
    "load_weights",
    "parse",
    "part_of",
    "settings_of",
]


def __getattr__(name: str) -> Any:
    if name not in _ADAPTERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require("torchvision", "the detectors")
    return getattr(importlib.import_module(f".{_ADAPTERS[name]}", __name__), name)
