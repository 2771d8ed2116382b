"""``Rescaled``: a detector that sees its pictures at another size, behind the same protocol. Only that class here."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .protocol import Dense, Features, Matched, Targets


class Rescaled(nn.Module):
    """A detector whose pictures are scaled by ``scale`` first (Chen et al. 2017: a student of half-size pictures).

    Everything outside stays in the pixels of the pictures as they are: boxes, proposals, anchors and detections are
    scaled on their way in and out, and a level's stride is that of the detector divided by ``scale``. So the level that
    has stride 4 in a half-size picture pairs with a teacher's level of stride 8. Deltas are ratios and stay.

    Raises:
        ValueError: ``scale`` is not a positive number.
    """

    def __init__(self, detector: nn.Module, scale: float) -> None:
        super().__init__()
        if not scale > 0:
            raise ValueError(f"scale: expected a positive number, got {scale}")
        self.detector, self.scale = detector, scale
        for name in ("strides", "stage_strides"):
            if hasattr(detector, name):
                setattr(self, name, {key: stride / scale for key, stride in getattr(detector, name).items()})
        for name in ("channels", "stage_channels", "parts"):
            if hasattr(detector, name):
                setattr(self, name, getattr(detector, name))
        for name in ("stages", "neck", "proposals", "head", "dense", "matched", "anchors"):
            if hasattr(detector, name):
                setattr(self, name, getattr(self, f"_{name}"))

    def features(self, images: Tensor) -> Features:
        """Of the scaled pictures."""
        return self.detector.features(self._images(images))

    def losses(self, features: Features, targets: Targets, **dense: Any) -> dict[str, Tensor]:
        """With boxes in the pixels of the pictures as they are."""
        return self.detector.losses(features, self._targets(targets), **dense)

    def detect(self, images: Tensor) -> list[dict[str, Tensor]]:
        """Boxes in the pixels of the pictures as they are."""
        found = self.detector.detect(self._images(images))
        return [{**one, "boxes": one["boxes"] / self.scale} for one in found]

    def _stages(self, images: Tensor) -> Features:
        return self.detector.stages(self._images(images))

    def _neck(self, stages: Features) -> Features:
        return self.detector.neck(stages)

    def _proposals(self, features: Features) -> list[Tensor]:
        return [boxes / self.scale for boxes in self.detector.proposals(features)]

    def _head(self, features: Features, proposals: list[Tensor]) -> tuple[Tensor, Tensor]:
        return self.detector.head(features, [boxes * self.scale for boxes in proposals])

    def _dense(self, features: Features) -> Dense:
        return self.detector.dense(features)

    def _matched(self, features: Features, targets: Targets) -> Matched:
        return self.detector.matched(features, self._targets(targets))

    def _anchors(self, features: Features) -> list[Tensor]:
        return [boxes / self.scale for boxes in self.detector.anchors(features)]

    def _images(self, images: Tensor) -> Tensor:
        return F.interpolate(images, scale_factor=self.scale, mode="bilinear", antialias=True, align_corners=False)

    def _targets(self, targets: Targets) -> list[dict[str, Any]]:
        return [{**target, "boxes": target["boxes"] * self.scale} for target in targets]
