"""torchvision's RetinaNet with a ResNet-FPN of any depth and width, as a small adapter to the protocol."""

from __future__ import annotations

from torch import Tensor
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator

from ..settings import DetectorSettings
from .backbones import resnet_fpn
from .protocol import Features, Targets
from .torchvision_detector import OneStage, PyramidDetector

STRIDES = {"0": 8, "1": 16, "2": 32, "p6": 64, "p7": 128}


class TorchvisionRetinaNet(OneStage, PyramidDetector):
    """A torchvision RetinaNet behind the protocol.

    ``dense`` has one sigmoid per class. Deltas are shifts over the anchor's size and logs of size ratios, without
    factors. ``matched`` has label -1 where the best IoU lies between the matcher's two thresholds.
    """

    activation = "sigmoid"

    def __init__(self, model: RetinaNet) -> None:
        super().__init__(model, STRIDES)

    def detect(self, images: Tensor) -> list[dict[str, Tensor]]:
        """The model's own detections."""
        return self._detect_per_level(images)

    def _losses(self, features: Features, targets: Targets, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.model.compute_loss(targets, outputs, self._all_anchors(features))


def build(settings: DetectorSettings) -> TorchvisionRetinaNet:
    """Build a randomly initialised RetinaNet (torch's global generator); ValueError as in ``resnet_fpn``.

    At width 1, 256 channels and ratios of three values its names and shapes are torchvision's.
    """
    backbone = resnet_fpn(settings, first=2)
    sides = [side * settings.scale for side in settings.anchors]
    sizes = tuple(tuple(max(2, round(side * 2 ** (third / 3))) for third in range(3)) for side in sides)
    model = RetinaNet(
        backbone,
        settings.classes + 1,  # labels count from 1, and torchvision leaves column 0 untouched
        anchor_generator=AnchorGenerator(sizes, (settings.ratios,) * len(sizes)),
        detections_per_img=settings.detections,
    )
    return TorchvisionRetinaNet(model)
