"""Small detectors and pictures that the tests of the harness share. No test lives here."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.harness.data import ScenePictures, collate
from kdkernels.harness.detectors import TorchvisionFasterRCNN, build
from kdkernels.harness.settings import DetectorSettings, SceneSettings

SMALL = SceneSettings(train=12, val=6)


def detector(width: float = 0.25, seed: int = 0, **settings: object) -> TorchvisionFasterRCNN:
    """A small random detector."""
    torch.manual_seed(seed)
    return build(DetectorSettings(width=width, **settings))


def batch(count: int = 2, split: str = "train") -> tuple[Tensor, list[dict]]:
    """The first pictures of a split, as the training loop sees them."""
    pictures = ScenePictures(SceneSettings(train=count, val=count), split)
    images, targets = collate([pictures[index] for index in range(count)])
    return images.float() / 255, targets
