"""Detections side by side: validation pictures with the boxes that each detector finds. Only this picture is here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import collate, to_device
from ..extras import require
from .drawing import box, most_objects, pyplot, shortened, show

RIGHT, WRONG, MISSED = "#56B4E9", "#E69F00", "#FFFFFF"
#: More pictures than this beside each other are too small.
COLUMNS = 6


@torch.no_grad()
def detections(
    path: Path,
    detectors: Mapping[str, nn.Module],
    val: Any,
    device: torch.device,
    *,
    count: int | None = None,
    score: float = 0.3,
) -> None:
    """Draw validation pictures with the ground truth and the boxes that each detector finds.

    A box is right where it overlaps an object of its class with an IoU of at least .5 that no better one found before;
    objects without one are missed. Each picture has a line of its own, or, with many detectors, several.

    Args:
        path: of the PNG.
        detectors: by name, any number.
        val: validation pictures.
        count: of pictures; default: 4, or 2 where each takes several lines.
        score: boxes below it are not shown.

    Raises:
        ValueError: no detector, no picture, a ``score`` outside [0, 1], a ``count`` below 1.
    """
    if not detectors:
        raise ValueError("detectors: expected at least one")
    if not 0 <= score <= 1:
        raise ValueError(f"score: expected a number in [0, 1], got {score}")
    columns = min(COLUMNS, 1 + len(detectors))
    lines = math.ceil((1 + len(detectors)) / columns)
    chosen = most_objects(val, count if count is not None else 4 if lines == 1 else 2)
    plt = pyplot()
    side = 3.4 if lines == 1 else 2.6
    figure, grid = plt.subplots(
        lines * len(chosen), columns, figsize=(side * columns, (side + 0.35) * lines * len(chosen) + 0.7),
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for place, index in enumerate(chosen):
        pictures, targets = collate([val[index]])  # apart: each in its own size
        images, (truth,) = to_device(pictures, targets, device)
        truth = {name: truth[name].cpu() for name in ("boxes", "labels")}
        cells = itertools.chain.from_iterable(grid[lines * place : lines * (place + 1)])
        for axes, name in itertools.zip_longest(cells, [None, *detectors], fillvalue=""):
            if name == "":
                axes.set_visible(False)
                continue
            show(axes, pictures[0])
            if name is None:
                _truth(axes, truth, val.category_names)
                continue
            detector = detectors[name]
            detector.eval()
            _found(axes, name, detector.detect(images)[0], truth, val.category_names, score)
    handles = [
        _handle(RIGHT, "right: class and place (IoU at least .5), with its score"),
        _handle(WRONG, "wrong class or place", dashed=True),
        _handle(MISSED, "object that was missed", dashed=True),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=11)
    figure.suptitle(
        f"Validation pictures: the ground truth, and what each detector finds with a score of {score:g} or more"
    )
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _truth(axes: Any, truth: dict[str, Tensor], names: list[str]) -> None:
    axes.set_title(f"ground truth\n{len(truth['labels'])} objects", fontsize=10)
    for corners, label in zip(truth["boxes"].tolist(), truth["labels"].tolist(), strict=True):
        box(axes, corners, MISSED, text=names[label - 1])


def _found(
    axes: Any, name: str, found: dict[str, Tensor], truth: dict[str, Tensor], names: list[str], score: float
) -> None:
    found = _best_at_each_place({key: value.cpu() for key, value in found.items()}, score)
    right, missed = judged(found, truth)
    for corners in truth["boxes"][missed].tolist():
        box(axes, corners, MISSED, dashed=True)
    rows = zip(found["boxes"].tolist(), found["labels"].tolist(), found["scores"].tolist(), right.tolist(), strict=True)
    for corners, label, value, good in rows:
        text = f"{names[label - 1]}  {value:.2f}"
        box(axes, corners, RIGHT if good else WRONG, dashed=not good, text=text)
    numbers = f"{int(right.sum())} right, {int((~right).sum())} wrong, {int(missed.sum())} missed"
    axes.set_title(f"{shortened(name, 30)}\n{numbers}", fontsize=10)


def judged(found: dict[str, Tensor], truth: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Which detections, best score first, are right, and which objects are missed."""
    overlaps = require("torchvision.ops").box_iou(found["boxes"], truth["boxes"])
    overlaps = torch.where(found["labels"][:, None] == truth["labels"][None], overlaps, 0.0)
    right = torch.zeros(len(overlaps), dtype=torch.bool)
    missed = torch.ones(overlaps.shape[1], dtype=torch.bool)
    for index in range(len(overlaps) if overlaps.shape[1] else 0):
        best, place = torch.where(missed, overlaps[index], 0.0).max(0)
        if best >= 0.5:
            right[index], missed[place] = True, False
    return right, missed


def _best_at_each_place(found: dict[str, Tensor], score: float) -> dict[str, Tensor]:
    """Detections of at least ``score``, one label for each place: two labels on one box cannot be read."""
    keep = require("torchvision.ops").nms(found["boxes"], found["scores"], 0.5)
    keep = keep[found["scores"][keep] >= score]
    return {name: value[keep] for name, value in found.items()}


def _handle(colour: str, label: str, *, dashed: bool = False) -> Any:
    patch = require("matplotlib.patches").Patch  # on grey, where white is seen
    return patch(facecolor="#606060", edgecolor=colour, label=label, linewidth=2, linestyle="--" if dashed else "-")
