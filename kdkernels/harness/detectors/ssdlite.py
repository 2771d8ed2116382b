"""torchvision's SSDLite on MobileNetV3-large, as a small adapter to the protocol."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.models.detection.ssd import SSD

from ..settings import DetectorSettings
from .backbones import check, mobile_norm
from .protocol import Features, Targets
from .torchvision_detector import OneStage, TorchvisionDetector, full_precision


class TorchvisionSSDLite(OneStage, TorchvisionDetector):
    """A torchvision SSDLite behind the protocol: six levels, of the backbone and of the blocks behind it.

    ``dense`` has a softmax over the background (class 0) and the classes. Deltas are shifts over the default box's
    size, times 10, and logs of size ratios, times 5. The default boxes are shares of the picture and scale with it.
    Up to 512 pixels the coarsest level is one cell, so that BatchNorm needs two pictures or more in training.
    """

    activation = "softmax"

    def __init__(self, model: SSD) -> None:
        inside = [block[0][0].in_channels for block in model.head.classification_head.module_list]
        strides = {str(level): 16 * 2**level for level in range(len(inside))}
        super().__init__(model, strides, dict(zip(strides, inside, strict=True)))
        self._batch_norm = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())

    def features(self, images: Tensor) -> Features:
        """The model's levels of ``images`` (N, 3, H, W) in [0, 1].

        Raises:
            ValueError: H or W is no multiple of 32; one picture alone in training, where BatchNorm needs two.
        """
        if self.training and self._batch_norm and len(images) == 1 and max(images.shape[-2:]) <= 512:
            raise ValueError("images must be at least 2 to train ssdlite at this size: its coarsest level is one cell")
        return super().features(images)

    @torch.no_grad()
    def detect(self, images: Tensor) -> list[dict[str, Tensor]]:
        """The model's own detections."""
        self._needs(False, "detect")
        with full_precision(self.features(images)) as features:
            sizes = self._images(features).image_sizes
            return self.model.postprocess_detections(self._outputs(features), self._all_anchors(features), sizes)

    def _losses(self, features: Features, targets: Targets, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        anchors = self._all_anchors(features)
        counts = [height * width * cell for height, width, cell in self._grids(features)]
        return self.model.compute_loss(targets, outputs, anchors, self._matches(anchors[0], counts, targets))


def build(settings: DetectorSettings) -> TorchvisionSSDLite:
    """Build a randomly initialised SSDLite (torch's global generator) by torchvision's own builder.

    ``width`` multiplies the channels of MobileNetV3; the blocks behind it keep torchvision's 512 to 128. The head has
    torchvision's default boxes: ``depth``, ``channels``, ``anchors`` and ``ratios`` play no part.

    Raises:
        ValueError: unknown norm, a width that is not positive, or ``image_size`` not a positive multiple of 32.
    """
    check(settings)
    model = ssdlite320_mobilenet_v3_large(
        weights=None,
        weights_backbone=None,
        num_classes=settings.classes + 1,
        norm_layer=mobile_norm(settings.norm),
        width_mult=settings.width,
        detections_per_img=settings.detections,
    )
    return TorchvisionSSDLite(model)
