"""A detector of one's own for ``python -m kdkernels train``, as a template: copy this file and change it.

``--model own_detector:build`` imports this module (it must be found on ``PYTHONPATH``, or lie in the current folder)
and calls ``build(classes=..., image_size=...)``. What comes back is an ``nn.Module`` with the five members of
``kdkernels.harness.detectors.Detector``: ``strides``, ``channels``, ``features``, ``losses`` and ``detect``. They are
enough for a student or a teacher of feature losses. ``dense``, ``matched`` and ``anchors`` below are what losses on the
predictions need besides (``HasDense``); leave them out if you do not want those.

The detector itself is a plain one: a few convolutions, three levels, one head for all of them, and at each cell the
classes and the distances to the four sides of the object that the cell's centre lies in.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms, clip_boxes_to_image, sigmoid_focal_loss

from kdkernels.harness.detectors import Dense, Matched


def build(*, classes: int, image_size: int) -> OwnDetector:
    """What the command line calls; pictures are about ``image_size`` pixels, and never smaller than 64."""
    return OwnDetector(classes, image_size)


def block(inside: int, outside: int) -> nn.Sequential:
    """Half the resolution."""
    return nn.Sequential(nn.Conv2d(inside, outside, 3, 2, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU())


class OwnDetector(nn.Module):
    """Three levels of plain convolutions, and a head that predicts one object per cell."""

    def __init__(self, classes: int, image_size: int, width: int = 32) -> None:
        super().__init__()
        # Finest level first, in both: pixels per cell, and channels.
        self.strides = {"fine": 8, "middle": 16, "coarse": 32}
        self.channels = dict.fromkeys(self.strides, width)
        self.classes = classes
        # The largest side of the objects that each level is to find.
        self.largest = (image_size / 5, image_size / 2.5, float("inf"))
        self.stem = nn.Sequential(block(3, width // 2), block(width // 2, width))
        self.blocks = nn.ModuleList(block(width, width) for _ in self.strides)
        self.tower = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
        self.predict = nn.Conv2d(width, classes + 4, 3, padding=1)
        nn.init.constant_(self.predict.bias[:classes], -4.0)  # nearly every cell is background

    # --- what every detector has

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Levels by name, finest first, of pictures (N, 3, H, W) in [0, 1]. Normalises them itself."""
        x = self.stem((images - 0.5) * 4)
        levels = {}
        for name, layer in zip(self.strides, self.blocks, strict=True):
            levels[name] = x = layer(x)
        return levels

    def losses(
        self, features: dict[str, Tensor], targets: list[dict[str, Tensor]], dense: Dense | None = None
    ) -> dict[str, Tensor]:
        """The detector's own losses, by names of your choice; their sum is trained.

        ``dense`` is there for losses on the predictions: what ``dense(features)`` gave, where that was asked before.
        """
        found, wanted = dense or self.dense(features), self.matched(features, targets)
        inside = wanted.labels > 0
        one_hot = F.one_hot(wanted.labels, self.classes + 1)[..., 1:].to(found.logits.dtype)
        count = inside.sum().clamp(min=1)
        return {
            "classes": sigmoid_focal_loss(found.logits, one_hot, reduction="sum") / count,
            "boxes": F.smooth_l1_loss(found.deltas[inside], wanted.deltas[inside], reduction="sum") / count,
        }

    @torch.no_grad()
    def detect(self, images: Tensor) -> list[dict[str, Tensor]]:
        """Boxes x1, y1, x2, y2 in pixels, scores, and labels from 1, of each picture."""
        features = self.features(images)
        found, anchors = self.dense(features), torch.cat(self.anchors(features))
        centres, stride = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
        results = []
        for logits, deltas in zip(found.logits.sigmoid(), found.deltas.clamp(min=0), strict=True):
            boxes = torch.cat([centres - deltas[:, :2] * stride, centres + deltas[:, 2:] * stride], dim=1)
            boxes = clip_boxes_to_image(boxes, images.shape[-2:])
            rows, columns = torch.nonzero(logits > 0.05, as_tuple=True)
            boxes, scores, labels = boxes[rows], logits[rows, columns], columns + 1
            keep = batched_nms(boxes, scores, labels, 0.5)[:100]
            results.append({"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]})
        return results

    # --- what losses on the predictions need besides

    def dense(self, features: dict[str, Tensor]) -> Dense:
        """One row per cell: picture by picture, level after level, row by row."""
        maps = [self.predict(self.tower(level)) for level in features.values()]
        rows = torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)
        grids = [(*level.shape[-2:], 1) for level in maps]
        return Dense(rows[..., : self.classes], rows[..., self.classes :], "sigmoid", grids)

    @torch.no_grad()
    def matched(self, features: dict[str, Tensor], targets: list[dict[str, Tensor]]) -> Matched:
        """Each cell's object: the smallest one that its centre lies in, if the cell's level is there for that size.

        Deltas are the distances to the left, upper, right and lower side, in strides.
        """
        levels = self.anchors(features)
        anchors = torch.cat(levels)
        centres, stride = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
        bounds = (0.0, *self.largest)
        low, high = (torch.cat([a.new_full((len(a), 1), bounds[i + k]) for i, a in enumerate(levels)]) for k in (0, 1))
        labels, deltas = [], []
        for target in targets:
            boxes = torch.cat([target["boxes"], anchors.new_zeros(1, 4)])  # the last one stands for the background
            side = (boxes[:, 2:] - boxes[:, :2]).amax(1)
            distances = torch.cat([centres[:, None] - boxes[:, :2], boxes[:, 2:] - centres[:, None]], dim=2)
            fits = (distances.amin(2) > 0) & (side > low) & (side <= high)
            area, index = torch.where(fits, (boxes[:, 2:] - boxes[:, :2]).prod(1), torch.inf).min(dim=1)
            index = torch.where(area.isinf(), len(boxes) - 1, index)
            labels.append(F.pad(target["labels"], (0, 1))[index])
            inside = (labels[-1] > 0)[:, None]
            deltas.append(torch.where(inside, distances[torch.arange(len(index)), index] / stride.repeat(1, 2), 0.0))
        return Matched(torch.stack(labels), torch.stack(deltas))

    def anchors(self, features: dict[str, Tensor]) -> list[Tensor]:
        """The cells themselves, in the order of ``dense``."""
        boxes = []
        for level, stride in zip(features.values(), self.strides.values(), strict=True):
            height, width = level.shape[-2:]
            y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            corner = torch.stack([x, y, x + 1, y + 1], dim=-1).reshape(-1, 4) * stride
            boxes.append(corner.to(level))
        return boxes
