"""torchvision's Faster R-CNN with a ResNet-FPN of any depth and width, as a small adapter to the protocol."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import MultiScaleRoIAlign

from ..settings import DetectorSettings
from .backbones import resnet_fpn
from .protocol import Dense, Features, Matched, Targets
from .torchvision_detector import PyramidDetector, evaluating, full_precision


class TorchvisionFasterRCNN(PyramidDetector):
    """A torchvision Faster R-CNN behind the protocol.

    ``dense``, ``matched`` and ``anchors`` are the RPN's: one sigmoid per anchor, deltas as shifts over the anchor's
    size and logs of size ratios, without factors; ``matched`` has label -1 where the best IoU lies between the RPN's
    two thresholds.
    """

    def __init__(self, model: FasterRCNN) -> None:
        super().__init__(model, dict(zip(("0", "1", "2", "3", "pool"), (4, 8, 16, 32, 64), strict=True)))

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The parts that can be inherited, frozen and loaded by name."""
        return {**super().parts, "rpn": self.model.rpn, "roi_heads": self.model.roi_heads}

    @property
    def _anchor_generator(self) -> nn.Module:
        return self.model.rpn.anchor_generator

    def losses(self, features: Features, targets: Targets, dense: Dense | None = None) -> dict[str, Tensor]:
        """The model's own four losses, by its own names; RuntimeError in eval mode."""
        self._needs(True, "losses")
        rpn = self.model.rpn
        logits, deltas, _, grids, _ = self.dense(features) if dense is None else dense
        with full_precision(features) as features:
            sizes, anchors = self._images(features).image_sizes, self._all_anchors(features)
            # The steps of the RPN's own forward behind its head, which is not run twice where dense is given.
            boxes = rpn.box_coder.decode(deltas.detach().reshape(-1, 4), anchors).view_as(deltas)
            counts = [height * width * cell for height, width, cell in grids]
            proposals, _ = rpn.filter_proposals(boxes, logits, sizes, counts)
            labels, truth = rpn.assign_targets_to_anchors(anchors, targets)
            wanted = rpn.box_coder.encode(truth, anchors)
            objectness, regression = rpn.compute_loss(logits, deltas.reshape(-1, 4), labels, wanted)
            _, losses = self.model.roi_heads(features, proposals, sizes, targets)
        return {"loss_objectness": objectness, "loss_rpn_box_reg": regression, **losses}

    @torch.no_grad()
    def proposals(self, features: Features) -> list[Tensor]:
        """The RPN's boxes, as many in training mode as in eval mode."""
        with full_precision(features) as features, evaluating(self.model.rpn):
            return self.model.rpn(self._images(features), features)[0]

    def head(self, features: Features, proposals: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits and deltas of ``proposals``; the deltas have torchvision's factors 10, 10, 5, 5."""
        heads = self.model.roi_heads
        with full_precision(features) as features:
            pooled = heads.box_roi_pool(features, proposals, self._images(features).image_sizes)
            return heads.box_predictor(heads.box_head(pooled))

    @torch.no_grad()
    def detect(self, images: Tensor) -> list[dict[str, Tensor]]:
        """The model's own detections."""
        self._needs(False, "detect")
        with full_precision(self.features(images)) as features:
            sizes = self._images(features).image_sizes
            return self.model.roi_heads(features, self.proposals(features), sizes)[0]

    def dense(self, features: Features) -> Dense:
        """The RPN's objectness and deltas."""
        with full_precision(features) as features:
            logits, deltas = concat_box_prediction_layers(*self.model.rpn.head(list(features.values())))
        count = len(next(iter(features.values())))
        return Dense(logits.view(count, -1, 1), deltas.view(count, -1, 4), "sigmoid", self._grids(features), None)

    @torch.no_grad()
    def matched(self, features: Features, targets: Targets) -> Matched:
        """The RPN's labels and deltas of every anchor, by its own matcher and box coder, before it samples."""
        anchors = self._all_anchors(features)
        labels, boxes = self.model.rpn.assign_targets_to_anchors(anchors, targets)
        labels, deltas = torch.stack(labels).long(), torch.stack(self.model.rpn.box_coder.encode(boxes, anchors))
        return Matched(labels, torch.where((labels > 0)[..., None], deltas, 0.0))


def build(settings: DetectorSettings) -> TorchvisionFasterRCNN:
    """Build a randomly initialised Faster R-CNN (torch's global generator); ValueError as in ``resnet_fpn``."""
    backbone = resnet_fpn(settings, first=1)
    sizes = tuple((round(side * settings.scale),) for side in settings.anchors)
    model = FasterRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(sizes, (settings.ratios,) * len(sizes)),
        rpn_pre_nms_top_n_train=settings.proposals_before_nms,
        rpn_pre_nms_top_n_test=settings.proposals_before_nms,
        rpn_post_nms_top_n_train=settings.proposals,
        rpn_post_nms_top_n_test=settings.proposals,
        rpn_batch_size_per_image=settings.rpn_batch,
        # One sample per bin: with 7 x 7 bins of 2 x 2 samples RoIAlign's backward alone is 37 % of a step.
        box_roi_pool=MultiScaleRoIAlign(
            ["0", "1", "2", "3"], settings.pooled, sampling_ratio=1, canonical_scale=settings.canonical_scale
        ),
        box_head=TwoMLPHead(settings.channels * settings.pooled**2, settings.hidden),
        box_predictor=FastRCNNPredictor(settings.hidden, settings.classes + 1),
        box_batch_size_per_image=settings.box_batch,
        box_detections_per_img=settings.detections,
    )
    return TorchvisionFasterRCNN(model)
