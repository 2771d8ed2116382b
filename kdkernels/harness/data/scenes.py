"""Small detection scenes composed from the real handwritten digits and the two photographs that scikit-learn ships.

A scene is a crop of a photograph with one to five digits pasted on it, each with a tight box. Everything follows from
``SceneSettings``: the same settings give the same pixels. Training and validation share neither a digit nor a column of
a photograph. Only the composition lives here; the dataset around it is :mod:`kdkernels.harness.data`.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..extras import require
from ..settings import SceneSettings

#: Pixels with less than this share of a digit's ink are outside its box.
INK = 0.3
#: Photographs are dimmed to this share and digits are bright, so that a few hundred steps are enough to learn them.
DIM = 0.6
SPLITS = ("train", "val")


def digit_indices(split: str) -> np.ndarray:
    """Indices into ``sklearn.datasets.load_digits()`` that belong to a split: 80 % train, 20 % val, disjoint."""
    count = len(_sources()[1])
    order = np.random.default_rng(2020).permutation(count)
    cut = int(0.8 * count)
    return order[:cut] if split == "train" else order[cut:]


def background_columns(width: int, split: str) -> tuple[int, int]:
    """First column and the one after the last of a photograph that a split may crop from: disjoint strips."""
    cut = int(0.7 * width)
    return (0, cut) if split == "train" else (cut, width)


def compose(settings: SceneSettings, split: str) -> tuple[Tensor, list[dict]]:
    """Compose one split.

    Returns:
        pictures, uint8 ``(n, 3, S, S)``, and one dict per picture with ``boxes`` (float32 ``(k, 4)``, pixels
        x1, y1, x2, y2) and ``labels`` (int64 ``(k,)``, digit + 1: 0 is the background).
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    count = getattr(settings, split)
    size = settings.image_size
    pictures = torch.empty(count, 3, size, size, dtype=torch.uint8)
    targets = []
    for index in range(count):
        # One generator per picture, so that a shorter set is the beginning of a longer one.
        rng = np.random.default_rng([settings.seed, SPLITS.index(split), index])
        picture, target = _scene(settings, split, rng)
        pictures[index] = picture
        targets.append(target)
    return pictures, targets


def draw_digit(ink: Tensor, height: int, width: int) -> Tensor:
    """Enlarge an 8 x 8 digit (bicubic) to ``height`` x ``width``, and crop it to the rows and columns that hold ink.

    Returns the share of ink per pixel, in [0, 1]; each border row and column holds a pixel of at least ``INK``.
    """
    large = F.interpolate(F.pad(ink, (1, 1, 1, 1))[None, None], size=(height, width), mode="bicubic")
    large = (1.5 * large[0, 0]).clamp(0, 1)  # half-inked rims count: the 8 x 8 digits are blurred already
    rows = torch.nonzero((large >= INK).any(dim=1))
    columns = torch.nonzero((large >= INK).any(dim=0))
    return large[int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]


def _scene(settings: SceneSettings, split: str, rng: np.random.Generator) -> tuple[Tensor, dict]:
    picture = _background(settings.image_size, split, rng)
    boxes: list[tuple[int, int, int, int]] = []
    labels: list[int] = []
    wanted = int(rng.integers(settings.objects[0], settings.objects[1] + 1))
    for _ in range(20 * wanted):
        if len(boxes) == wanted:
            break
        alpha, digit = _digit(settings, split, rng)
        height, width = alpha.shape
        left = int(rng.integers(0, settings.image_size - width + 1))
        top = int(rng.integers(0, settings.image_size - height + 1))
        box = (left, top, left + width, top + height)
        if any(_iou(box, other) > settings.max_iou for other in boxes):
            continue
        _paste(picture, alpha, left, top, rng)
        boxes.append(box)
        labels.append(digit + 1)
    noise = rng.standard_normal(picture.shape, dtype=np.float32) * np.float32(settings.noise)
    picture = ((picture + torch.from_numpy(noise)).clamp(0, 1) * 255).round().to(torch.uint8)
    target = {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }
    return picture, target


def _digit(settings: SceneSettings, split: str, rng: np.random.Generator) -> tuple[Tensor, int]:
    _, digits, labels = _sources()
    index = int(rng.choice(digit_pool(split)))
    # The side is the ink's, 8 cells and a fringe; the pad of one cell on each side that draw_digit adds comes on top.
    side = rng.uniform(*settings.side) * 1.17
    height = round(side)
    width = round(side * rng.uniform(*settings.aspect))
    return draw_digit(digits[index], height, width), int(labels[index])


def _paste(picture: Tensor, alpha: Tensor, left: int, top: int, rng: np.random.Generator) -> None:
    """Blend a digit into the picture in one bright colour."""
    height, width = alpha.shape
    below = picture[:, top : top + height, left : left + width]
    ink = torch.from_numpy(rng.uniform(0.75, 1.0, size=3).astype(np.float32))[:, None, None]
    below.lerp_(ink.expand_as(below), alpha.expand_as(below))


def _background(size: int, split: str, rng: np.random.Generator) -> Tensor:
    photographs, _, _ = _sources()
    photograph = photographs[int(rng.integers(len(photographs)))]
    _, rows, columns = photograph.shape
    first, end = background_columns(columns, split)
    side = int(rng.integers(96, min(rows, end - first) + 1))
    top = int(rng.integers(0, rows - side + 1))
    left = first + int(rng.integers(0, end - first - side + 1))
    crop = photograph[None, :, top : top + side, left : left + side]
    crop = F.interpolate(crop, size=(size, size), mode="bilinear", antialias=True)[0] * DIM
    return crop.flip(-1) if rng.random() < 0.5 else crop.contiguous()


@functools.lru_cache(maxsize=2)
def digit_pool(split: str) -> np.ndarray:
    """``digit_indices``, computed once."""
    return digit_indices(split)


@functools.lru_cache(maxsize=1)
def _sources() -> tuple[list[Tensor], Tensor, np.ndarray]:
    """Photographs as float ``(3, H, W)`` in [0, 1], digits as ``(1797, 8, 8)`` in [0, 1], and their labels."""
    datasets = require("sklearn.datasets", "the scenes")
    photographs = [
        torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        for image in datasets.load_sample_images().images
    ]
    digits = datasets.load_digits()
    return photographs, torch.from_numpy(digits.images).float() / 16, digits.target


def _iou(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return shared / (area - shared)
