"""Pictures at the size that is trained on: scaled, padded, mirrored, with their boxes, by torchvision's transforms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..extras import require

#: Grey of what is not picture. Padding comes before the detector's normalisation, so it cannot be 0 after it.
PADDING = 114
#: Batches are padded to multiples of this many pixels.
MULTIPLE = 32


@dataclass(frozen=True)
class Size:
    """How large pictures become; one of two forms.

    Args:
        square: the longer side becomes this long, and the rest of a square of this side, below and to the right, is
            padded with grey: batches all have one shape.
        shorter: the shorter side becomes this long, or the longer one ``longest`` where it would exceed that, as in
            torchvision's detection models; a batch is padded to its largest picture.
        longest: see ``shorter``.

    Raises:
        ValueError: both forms or neither, no positive size, or ``longest`` not above ``shorter``.
    """

    square: int | None = None
    shorter: int | None = None
    longest: int = 1333

    def __post_init__(self) -> None:
        if (self.square is None) == (self.shorter is None):
            raise ValueError(f"give square or shorter, and not both; got square={self.square}, shorter={self.shorter}")
        for name in ("square", "shorter"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a positive number of pixels, got {value!r}")
        if self.shorter is not None and self.longest <= self.shorter:
            raise ValueError(f"longest must be larger than shorter, got {self.longest} and {self.shorter}")


def placed(picture: Tensor, boxes: Tensor, size: Size) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Scale a picture, uint8 ``(3, H, W)``, and its boxes to ``size``; a square is padded as well.

    Returns:
        the picture, its boxes, and its height and width without the padding.
    """
    transforms = require("torchvision.transforms.v2.functional")
    height, width = picture.shape[-2:]
    longest = size.square or size.longest
    if size.square is not None or longest * min(height, width) < max(height, width):  # a line must not become nothing
        scale = longest / max(height, width)
        keywords = {"size": [max(1, round(height * scale)), max(1, round(width * scale))]}
    else:
        keywords = {"size": [size.shorter], "max_size": size.longest}
    picture = transforms.resize(picture, **keywords, antialias=True)
    boxes = transforms.resize(_on(boxes, height, width), **keywords).as_subclass(Tensor)
    height, width = picture.shape[-2:]
    if size.square is not None:
        picture = padded(picture, size.square, size.square)
    return picture, boxes, (height, width)


def padded(picture: Tensor, height: int, width: int) -> Tensor:
    """The picture in the upper left corner of a grey one."""
    missing = height - picture.shape[-2], width - picture.shape[-1]
    return picture if missing == (0, 0) else F.pad(picture, (0, missing[1], 0, missing[0]), value=PADDING)


def mirrored(picture: Tensor, target: dict) -> tuple[Tensor, dict]:
    """Swap left and right of the picture, not of its padding, and of its boxes; the target says ``mirrored``."""
    transforms = require("torchvision.transforms.v2.functional")
    height, width = target["size"]
    picture = picture.clone()
    picture[:, :height, :width] = transforms.horizontal_flip(picture[:, :height, :width])
    boxes = transforms.horizontal_flip(_on(target["boxes"], height, width)).as_subclass(Tensor)
    return picture, {**target, "boxes": boxes, "mirrored": True}


def stacked(pictures: list[Tensor]) -> Tensor:
    """One batch: padded to its largest picture, rounded up to a multiple of ``MULTIPLE``."""
    height, width = (max(picture.shape[side] for picture in pictures) for side in (-2, -1))
    height, width = (-(-side // MULTIPLE) * MULTIPLE for side in (height, width))
    return torch.stack([padded(picture, height, width) for picture in pictures])


def _on(boxes: Tensor, height: int, width: int) -> Tensor:
    kind = require("torchvision.tv_tensors").BoundingBoxes
    return kind(boxes.reshape(-1, 4), format="XYXY", canvas_size=(height, width))
