"""Heat maps of pyramid levels, teacher and students side by side, as in PKD's figure 1. Only this picture is here."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdkernels as kd

from ..data import collate, to_device
from ..step import Pair, pair_levels
from .drawing import box, most_objects, pyplot, shortened, show

TRUTH = "#FFFFFF"


def heat_map(level: Tensor) -> Tensor:
    """One picture's level ``(C, H, W)`` as a map ``(H, W)``: at each cell the largest value over the channels, scaled
    so that the map's lowest is 0 and its highest 255. A constant map is 0; cells that are not finite stay so.

    Raises:
        ValueError: another shape, or nothing in it.
    """
    if level.ndim != 3 or level.numel() == 0:
        raise ValueError(f"level: expected a shape (C, H, W) with values, got {tuple(level.shape)}")
    largest = level.detach().float().cpu().amax(0)
    finite = largest[largest.isfinite()]
    if not len(finite):
        return largest
    low, high = finite.min(), finite.max()
    return (largest - low) * (255 / (high - low) if high > low else 0.0)


@torch.no_grad()
def features(
    path: Path,
    teacher: nn.Module,
    students: Mapping[str, nn.Module],
    val: Any,
    device: torch.device,
    *,
    base_size: float | None = None,
    count: int = 2,
) -> None:
    """Draw the pyramid levels that teacher and students share, as heat maps, for a few validation pictures.

    A line per detector and a column per level; beside them the picture with its ground truth. The cells that the
    ground-truth masks mark at a level are outlined. Under a student's map is its correlation with the teacher's. The
    levels are the detectors' own, before a recipe's adapter.

    Args:
        path: of the PNG.
        teacher, students: detectors, students by name.
        val: validation pictures; those with the most objects are shown.
        base_size: of ``kd.masks``, as in the run.
        count: of pictures.

    Raises:
        ValueError: no student, no picture, students with other levels than the first, no level in common with the
            teacher's, a ``count`` below 1.
    """
    pairs = _pairs(teacher, students)
    first = next(iter(pairs.values()))
    chosen = most_objects(val, count)
    plt = pyplot()
    lines, columns = 1 + len(students), len(first)
    heights = [1.9 * lines] * len(chosen) + [0.7]
    figure = plt.figure(figsize=(1.75 * (columns + 0.6 * lines) + 1.2, sum(heights) + 0.6), layout="constrained")
    *blocks, last = figure.subfigures(len(heights), 1, height_ratios=heights)
    for block, index in zip(blocks, chosen, strict=True):
        pictures, targets = collate([val[index]])  # apart: each in its own size
        images, targets = to_device(pictures, targets, device)
        grid = block.add_gridspec(lines, 1 + columns, width_ratios=[0.6 * lines, *[1] * columns])
        axes = block.add_subplot(grid[:, 0])
        show(axes, pictures[0])
        axes.set_title("picture and ground truth", fontsize=10)
        for corners, label in zip(targets[0]["boxes"].tolist(), targets[0]["labels"].tolist(), strict=True):
            box(axes, corners, TRUTH, text=val.category_names[label - 1])
        wanted = _levels(teacher, images)
        sizes = [tuple(wanted[pair.teacher].shape[-2:]) for pair in first]
        masks = kd.masks.ground_truth_masks(
            [targets[0]["boxes"]], sizes, [pair.stride for pair in first], base_size=base_size, batch_size=1
        )
        truth = [heat_map(wanted[pair.teacher][0]) for pair in first]
        for line, name in enumerate(["teacher", *students]):
            found = wanted if line == 0 else _levels(students[name], images)
            for column in range(columns):
                axes = block.add_subplot(grid[line, 1 + column])
                pair = first[column] if line == 0 else pairs[name][column]
                shown = truth[column] if line == 0 else heat_map(found[pair.student][0])
                height, width = shown.shape
                extent = (0, width * pair.stride, height * pair.stride, 0)
                image = axes.imshow(shown.numpy(), cmap="viridis", vmin=0, vmax=255, extent=extent)
                _outline(axes, masks[column][0].cpu(), pair.stride)
                axes.set(xticks=[], yticks=[], xlim=(0, images.shape[-1]), ylim=(images.shape[-2], 0))
                if line == 0:
                    axes.set_title(f"{pair.name}: {height} x {width} cells", fontsize=10)
                else:
                    axes.set_xlabel(_similar(shown, truth[column]), fontsize=8, labelpad=2)
                if column == 0:
                    # Broken behind a plus sign, too.
                    words = textwrap.wrap(shortened(name, 60).replace("+", "+ "), 18)
                    axes.set_ylabel("\n".join(words).replace("+ ", "+"), fontsize=9)
    axes = last.add_subplot()
    last.colorbar(image, cax=axes, orientation="horizontal")
    axes.set_box_aspect(0.025)
    axes.set_xlabel("largest value over the channels, each map scaled by itself", fontsize=10)
    figure.suptitle(
        "Features of teacher and students by pyramid level. r: correlation of the student's map with the teacher's.\n"
        "Outlined: what the level's ground-truth mask marks; an object belongs to one level, by its size.",
        fontsize=12,
    )
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _pairs(teacher: nn.Module, students: Mapping[str, nn.Module]) -> dict[str, list[Pair]]:
    """The levels that each student shares with the teacher, which must be the same for all."""
    if not students:
        raise ValueError("students: expected at least one")
    found = {name: pair_levels(student, teacher) for name, student in students.items()}
    wanted = [pair.stride for pair in next(iter(found.values()))]
    for name, pairs in found.items():
        if [pair.stride for pair in pairs] != wanted:
            raise ValueError(
                f"students: {name!r} shares levels of strides {[pair.stride for pair in pairs]} with the teacher, the "
                f"first one {wanted}"
            )
    return found


def _levels(detector: nn.Module, images: Tensor) -> Mapping[str, Tensor]:
    detector.eval()
    return detector.features(images)


def _similar(mine: Tensor, theirs: Tensor) -> str:
    """The correlation of two maps; the student's is brought to the teacher's size as in training."""
    if theirs.numel() == 1:
        return "r: one cell"
    if mine.shape != theirs.shape:
        mine = F.interpolate(mine[None, None], size=theirs.shape, mode="bilinear", align_corners=False)[0, 0]
    value = torch.corrcoef(torch.stack([mine.flatten(), theirs.flatten()]))
    return f"r = {float(value[0, 1]):.2f}" if value.isfinite().all() else "r: none"


def _outline(axes: Any, mask: Tensor, stride: float) -> None:
    """The borders of the cells that a mask ``(H, W)`` marks."""
    marked = F.pad(mask > 0, (1, 1, 1, 1))
    across = (marked[1:-1, 1:] != marked[1:-1, :-1]).nonzero() * stride  # row, column of a border to the left
    along = (marked[1:, 1:-1] != marked[:-1, 1:-1]).nonzero() * stride
    # A dark rim, so that it is seen on bright cells too.
    for colour, width in (("black", 2.6), (TRUTH, 1.2)):
        if len(across):
            axes.vlines(across[:, 1], across[:, 0], across[:, 0] + stride, colors=colour, linewidth=width)
            axes.hlines(along[:, 0], along[:, 1], along[:, 1] + stride, colors=colour, linewidth=width)
