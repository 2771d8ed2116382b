"""Detectors for the harness: the protocol, and torchvision's detectors as small adapters to it."""

from .faster_rcnn import TorchvisionTwoStage, build
from .protocol import Dense, Detector, Features, HasDense, HasProposals, HasStages, Matched, Targets

__all__ = [
    "Dense",
    "Detector",
    "Features",
    "HasDense",
    "HasProposals",
    "HasStages",
    "Matched",
    "Targets",
    "TorchvisionTwoStage",
    "build",
]
