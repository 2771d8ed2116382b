"""torchvision's Faster R-CNN with a ResNet-FPN of any depth and width, as a small adapter to the protocol."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from ..extras import require
from ..settings import DetectorSettings
from .protocol import Features, Targets

require("torchvision", "the detectors")

from torchvision.models.detection import FasterRCNN  # noqa: E402  (after the import that explains itself)
from torchvision.models.detection.anchor_utils import AnchorGenerator  # noqa: E402
from torchvision.models.detection.backbone_utils import BackboneWithFPN  # noqa: E402
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead  # noqa: E402
from torchvision.models.detection.image_list import ImageList  # noqa: E402
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1  # noqa: E402
from torchvision.ops import MultiScaleRoIAlign  # noqa: E402

BLOCKS = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
}


class NarrowResNet(nn.Sequential):
    """torchvision's ResNet stages from its own blocks at any width, without the classifier, randomly initialised."""

    def __init__(self, depth: int, width: float) -> None:
        block, counts = BLOCKS[depth]
        stem = max(8, round(64 * width))
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv1=nn.Conv2d(3, stem, 7, stride=2, padding=3, bias=False),
            bn1=nn.BatchNorm2d(stem),
            relu=nn.ReLU(inplace=True),
            maxpool=nn.MaxPool2d(3, stride=2, padding=1),
        )
        channels = stem
        stage_channels = []
        for stage, count in enumerate(counts):
            planes = stem * 2**stage
            blocks = []
            for index in range(count):
                stride = 2 if index == 0 and stage > 0 else 1
                outside = planes * block.expansion
                shortcut = None
                if stride != 1 or channels != outside:
                    shortcut = nn.Sequential(conv1x1(channels, outside, stride), nn.BatchNorm2d(outside))
                blocks.append(block(channels, planes, stride, shortcut))
                channels = outside
            layers[f"layer{stage + 1}"] = nn.Sequential(*blocks)
            stage_channels.append(channels)
        super().__init__(layers)
        self.stage_channels = stage_channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class TorchvisionTwoStage(nn.Module):
    """A torchvision Faster R-CNN behind the protocol: the calls go to its own parts, in its own order."""

    def __init__(self, model: FasterRCNN) -> None:
        super().__init__()
        self.model = model
        self.strides = dict(zip(("0", "1", "2", "3", "pool"), (4, 8, 16, 32, 64), strict=True))
        self.channels = dict.fromkeys(self.strides, model.backbone.out_channels)
        mean, std = model.transform.image_mean, model.transform.image_std
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def features(self, images: Tensor) -> Features:
        return self.model.backbone((images - self.mean) / self.std)

    def losses(self, features: Features, targets: Targets) -> dict[str, Tensor]:
        images = self._images(features)
        proposals, losses = self.model.rpn(images, features, targets)
        _, head_losses = self.model.roi_heads(features, proposals, images.image_sizes, targets)
        return {**losses, **head_losses}

    def proposals(self, features: Features) -> list[Tensor]:
        if self.training:
            raise RuntimeError("proposals() is for a detector in eval mode; in training mode losses() makes them")
        return self.model.rpn(self._images(features), features)[0]

    def head(self, features: Features, proposals: list[Tensor]) -> tuple[Tensor, Tensor]:
        heads = self.model.roi_heads
        pooled = heads.box_roi_pool(features, proposals, self._images(features).image_sizes)
        return heads.box_predictor(heads.box_head(pooled))

    @torch.no_grad()
    def detect(self, images: Tensor) -> list[dict[str, Tensor]]:
        features = self.features(images)
        sizes = self._images(features).image_sizes
        return self.model.roi_heads(features, self.proposals(features), sizes)[0]

    def _images(self, features: Features) -> ImageList:
        """The form in which torchvision's parts ask for the size of the pictures; it holds no pixels."""
        first = next(iter(features.values()))
        count, _, height, width = first.shape
        size = (4 * height, 4 * width)
        return ImageList(first.new_zeros(()).expand(count, 1, *size), [size] * count)


def build(settings: DetectorSettings) -> TorchvisionTwoStage:
    """Build a randomly initialised detector (torch's global generator); nothing is downloaded.

    Raises:
        ValueError: unknown depth, or ``image_size`` not a multiple of 32.
    """
    if settings.depth not in BLOCKS:
        raise ValueError(f"depth must be one of {sorted(BLOCKS)}, got {settings.depth}")
    if settings.image_size % 32 or settings.image_size <= 0:
        raise ValueError(f"image_size must be a positive multiple of 32, got {settings.image_size}")
    body = NarrowResNet(settings.depth, settings.width)
    names = {f"layer{stage + 1}": str(stage) for stage in range(4)}
    backbone = BackboneWithFPN(body, names, body.stage_channels, settings.channels)
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
    return TorchvisionTwoStage(model)
