"""What the adapters of torchvision's detectors share; each detector's own file says the rest.

The calls go to a model's own parts, in its own order. Its ``forward`` and its transform are never run: pictures arrive
as one tensor, already of the size that the detector gets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from .protocol import Dense, Features, Matched, Targets


class TorchvisionDetector(nn.Module):
    """A torchvision model with what every detector has: normalised pictures, levels, and the size of the pictures.

    Args:
        model: the torchvision model; its transform is asked for mean and standard deviation only.
        strides: nominal pixels per cell of each level, finest first; of the finest they are exact.
        channels: of each level.
    """

    def __init__(self, model: nn.Module, strides: Mapping[str, int], channels: Mapping[str, int]) -> None:
        super().__init__()
        self.model = model
        self.strides, self.channels = dict(strides), dict(channels)
        self._finest = next(iter(self.strides.values()))
        mean, std = model.transform.image_mean, model.transform.image_std
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The parts that can be inherited, frozen and loaded by name."""
        return {"backbone": self.model.backbone}

    @property
    def _anchor_generator(self) -> nn.Module:
        return self.model.anchor_generator

    def features(self, images: Tensor) -> Features:
        """The model's pyramid of ``images`` (N, 3, H, W) in [0, 1]; ValueError if H or W is no multiple of 32."""
        return self.model.backbone(self._normalised(images))

    def anchors(self, features: Features) -> list[Tensor]:
        """Boxes of each level's anchors."""
        with full_precision(features) as features:
            (boxes, *_) = self._anchor_generator(self._images(features), list(features.values()))
        return list(boxes.split([height * width * cell for height, width, cell in self._grids(features)]))

    def _normalised(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if height % 32 or width % 32:
            raise ValueError(f"images must have a height and width that are multiples of 32, got {height} x {width}")
        return (images - self.mean) / self.std

    def _images(self, features: Features) -> ImageList:
        """The form in which torchvision's parts ask for the size of the pictures; it holds no pixels."""
        first = next(iter(features.values()))
        count, _, height, width = first.shape
        size = (self._finest * height, self._finest * width)
        return ImageList(first.new_zeros(()).expand(count, 1, *size), [size] * count)

    def _grids(self, features: Features) -> list[tuple[int, int, int]]:
        cells = self._anchor_generator.num_anchors_per_location()
        sizes = [level.shape[-2:] for level in features.values()]
        return [(height, width, cell) for (height, width), cell in zip(sizes, cells, strict=True)]

    def _all_anchors(self, features: Features) -> list[Tensor]:
        """Anchors as the model's parts want them: one tensor per picture, here the same."""
        (first, *_) = features.values()
        return [torch.cat(self.anchors(features))] * len(first)

    def _needs(self, training: bool, method: str) -> None:
        if self.training != training:
            wanted, other = ("training", "eval") if training else ("eval", "training")
            raise RuntimeError(f"{method}() is for a detector in {wanted} mode, and this one is in {other} mode")


class PyramidDetector(TorchvisionDetector):
    """A torchvision model on a ResNet with a feature pyramid; backbone and neck can be called apart."""

    def __init__(self, model: nn.Module, strides: Mapping[str, int]) -> None:
        super().__init__(model, strides, dict.fromkeys(strides, model.backbone.out_channels))
        inside = model.backbone.stage_channels
        self.stage_strides = {str(i): self._finest * 2**i for i in range(len(inside))}
        self.stage_channels = dict(zip(self.stage_strides, inside, strict=True))

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The parts that can be inherited, frozen and loaded by name."""
        return {"backbone": self.model.backbone.body, "fpn": self.model.backbone.fpn}

    def stages(self, images: Tensor) -> Features:
        """The ResNet's stages that the pyramid reads."""
        return self.model.backbone.body(self._normalised(images))

    def neck(self, stages: Features) -> Features:
        """The pyramid of the stages."""
        return self.model.backbone.fpn(stages)


class HeadOutputs(Dense):
    """``Dense`` with what the model's head gave, in the model's own form: its losses are computed from that."""

    outputs: dict[str, Tensor]


class OneStage:
    """Dense predictions of a torchvision model whose ``head`` gives them; to be inherited with a detector's class."""

    activation: str
    model: nn.Module

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The parts that can be inherited, frozen and loaded by name."""
        return {**super().parts, "head": self.model.head}

    def losses(self, features: Features, targets: Targets, dense: Dense | None = None) -> dict[str, Tensor]:
        """The model's own losses, by its own names.

        Raises:
            RuntimeError: in eval mode.
            TypeError: ``dense`` is not what this detector's ``dense`` gave.
        """
        self._needs(True, "losses")
        if dense is not None and not hasattr(dense, "outputs"):
            raise TypeError("dense must be what this detector's dense() gave")
        with full_precision(features) as features:
            outputs = self._outputs(features) if dense is None else dense.outputs
            return self._losses(features, targets, outputs)

    def dense(self, features: Features) -> Dense:
        """The head's predictions; the column of the background, which a sigmoid head has but never trains, is cut."""
        with full_precision(features) as features:
            outputs = self._outputs(features)
            logits = outputs["cls_logits"]
            quality = outputs.get("bbox_ctrness")
            dense = HeadOutputs(
                logits if self.activation == "softmax" else logits[..., 1:],
                outputs["bbox_regression"],
                self.activation,
                self._grids(features),
                quality if quality is None else quality.squeeze(-1),
            )
        dense.outputs = outputs
        return dense

    @torch.no_grad()
    def matched(self, features: Features, targets: Targets) -> Matched:
        """Labels and deltas of every anchor, by the model's matcher and box coder."""
        with full_precision(features) as features:
            levels = self.anchors(features)
            anchors = torch.cat(levels)
            found = self._matches(anchors, [len(level) for level in levels], targets)
        rows = [self._targets_of(anchors, index, target) for index, target in zip(found, targets, strict=True)]
        return Matched(torch.stack([labels for labels, _ in rows]), torch.stack([deltas for _, deltas in rows]))

    def _outputs(self, features: Features) -> dict[str, Tensor]:
        return self.model.head(list(features.values()))

    def _matches(self, anchors: Tensor, counts: list[int], targets: Targets) -> list[Tensor]:
        """Of each picture, the index of each anchor's object, -1 for background, -2 between the thresholds."""
        nothing = torch.full((len(anchors),), -1, dtype=torch.int64, device=anchors.device)
        boxes = [target["boxes"] for target in targets]
        return [self.model.proposal_matcher(box_iou(b, anchors)) if len(b) else nothing for b in boxes]

    def _targets_of(self, anchors: Tensor, index: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        inside = index >= 0
        if not len(target["boxes"]):
            return torch.zeros_like(index), torch.zeros_like(anchors)
        labels = torch.where(inside, target["labels"][index.clamp(min=0)], -(index == -2).long())
        deltas = self._encode(target["boxes"][index.clamp(min=0)], anchors)
        return labels, torch.where(inside[:, None], deltas, 0.0)

    def _encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Deltas that lead from the anchors to the boxes."""
        return self.model.box_coder.encode_single(boxes, anchors)

    def _per_level(self, features: Features, outputs: dict[str, Tensor]) -> tuple[dict, list[list[Tensor]]]:
        """Outputs and anchors in the form that torchvision's one-stage detectors turn into detections."""
        counts = [height * width * cell for height, width, cell in self._grids(features)]
        split = {name: list(value.split(counts, dim=1)) for name, value in outputs.items()}
        return split, [self.anchors(features)] * len(outputs["cls_logits"])

    @torch.no_grad()
    def _detect_per_level(self, images: Tensor) -> list[dict[str, Tensor]]:
        self._needs(False, "detect")
        with full_precision(self.features(images)) as features:
            outputs = self._outputs(features)
            # Labels count from 1: column 0 exists, but stands for nothing, and an untrained head could find it.
            outputs["cls_logits"] = outputs["cls_logits"].clone()
            outputs["cls_logits"][..., 0] = -torch.inf
            split, anchors = self._per_level(features, outputs)
            return self.model.postprocess_detections(split, anchors, self._images(features).image_sizes)


@contextmanager
def full_precision(features: Features) -> Iterator[Features]:
    """Heads and boxes in float32 under autocast: a bfloat16 coordinate beyond 256 is off by pixels."""
    first = next(iter(features.values()))
    if not torch.is_autocast_enabled(first.device.type):
        yield features
        return
    with torch.autocast(first.device.type, enabled=False):
        yield {name: level.float() for name, level in features.items()}


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """``module`` in eval mode; each of its modules gets its own mode back."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
