"""torchvision's FCOS with a ResNet-FPN of any depth and width, as a small adapter to the protocol."""

from __future__ import annotations

from types import SimpleNamespace

from torch import Tensor
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator

from ..settings import DetectorSettings
from .backbones import resnet_fpn
from .protocol import Features, Targets
from .retinanet import STRIDES
from .torchvision_detector import OneStage, PyramidDetector


class TorchvisionFCOS(OneStage, PyramidDetector):
    """A torchvision FCOS behind the protocol.

    Its anchors are squares around the points of the grid. Deltas are the distances from the anchor's centre to the
    left, upper, right and lower side of the object, over the anchor's side; the head gives them after its ReLU.
    ``dense`` has one sigmoid per class, and the centerness logits as ``quality``.
    """

    activation = "sigmoid"

    def __init__(self, model: FCOS) -> None:
        super().__init__(model, STRIDES)

    def detect(self, images: Tensor) -> list[dict[str, Tensor]]:
        """The model's own detections."""
        return self._detect_per_level(images)

    def _losses(self, features: Features, targets: Targets, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        counts = [height * width for height, width, _ in self._grids(features)]
        return self.model.compute_loss(targets, outputs, self._all_anchors(features), counts)

    def _matches(self, anchors: Tensor, counts: list[int], targets: Targets) -> list[Tensor]:
        # torchvision's rule stands inside its loss and cannot be called alone. It ends by giving the matches to the
        # head: a head that gives them back makes it callable.
        matcher = SimpleNamespace(
            center_sampling_radius=self.model.center_sampling_radius,
            head=SimpleNamespace(compute_loss=lambda targets, outputs, anchors, matches: matches),
        )
        return FCOS.compute_loss(matcher, targets, {}, [anchors] * len(targets), counts)

    def _encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        return self.model.box_coder.encode(anchors, boxes)


def build(settings: DetectorSettings) -> TorchvisionFCOS:
    """Build a randomly initialised FCOS (torch's global generator).

    A level is responsible for objects whose farthest side is 4 to 8 anchor sides away, so its ranges scale with the
    pictures as the anchors do. At width 1 and 256 channels its names and shapes are torchvision's.

    Raises:
        ValueError: as in ``resnet_fpn``; ``channels`` not a multiple of 32, the groups of the head's GroupNorm.
    """
    if settings.channels % 32:
        raise ValueError(f"channels must be a multiple of 32 for fcos (its head's GroupNorm), got {settings.channels}")
    backbone = resnet_fpn(settings, first=2)
    finest = settings.anchors[0] * settings.scale / 4
    sizes = tuple((max(2, round(finest * 2**level)),) for level in range(len(STRIDES)))
    model = FCOS(
        backbone,
        settings.classes + 1,  # labels count from 1, and torchvision leaves column 0 untouched
        anchor_generator=AnchorGenerator(sizes, ((1.0,),) * len(sizes)),
        detections_per_img=settings.detections,
    )
    return TorchvisionFCOS(model)
