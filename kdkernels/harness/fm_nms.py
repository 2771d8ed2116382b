"""``fm_nms``: which cells of a teacher's map teach, where several say the same (Mehta and Ozturk 2018, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor


def fm_nms(
    objectness: Tensor, classes: Tensor | None = None, *, kernel_size: int = 3, class_agnostic: bool = False
) -> Tensor:
    """Among the candidates of one class in each neighbourhood of cells, keep the one with the highest objectness.

    A candidate (a, y, x) is kept if no candidate (a', y', x') of the same class with ``|y - y'|`` and ``|x - x'|`` at
    most ``kernel_size // 2`` has a higher objectness, or an equal one and a smaller place in (a, y, x)'s order. So a
    window slides over the map, all anchors of its cells together; borders are no candidates, and a tie has one winner.
    The result is a factor on the objectness: the paper sets the losers' to 0 so that one object is not taught several
    times.

    Args:
        objectness: (N, A, H, W), real; a NaN loses to everything.
        classes: the same shape, int64: each candidate's class, e.g. the teacher's most likely one.
        kernel_size: side of the neighbourhood in cells, odd.
        class_agnostic: whether all candidates are of one class; then ``classes`` may be None.

    Returns a bool tensor of the same shape, True for what is kept. No gradient, no host synchronisation.

    Raises:
        ValueError: shapes that are not (N, A, H, W) or differ, a ``kernel_size`` that is not odd, missing classes.
    """
    if objectness.dim() != 4:
        raise ValueError(f"objectness: expected shape (N, A, H, W), got {tuple(objectness.shape)}")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size: expected an odd positive number, got {kernel_size}")
    if class_agnostic:
        classes = torch.zeros_like(objectness, dtype=torch.int64)
    if classes is None:
        raise ValueError("classes: needed unless class_agnostic=True")
    if classes.shape != objectness.shape:
        raise ValueError(f"classes: expected shape {tuple(objectness.shape)}, got {tuple(classes.shape)}")
    objectness = objectness.detach().nan_to_num(nan=-torch.inf)
    count, height, width = objectness.shape[1:]
    reach = kernel_size // 2
    place = torch.arange(count * height * width, device=objectness.device).view(count, height, width)
    keep = torch.ones_like(objectness, dtype=torch.bool)
    for dy in range(-min(reach, height - 1), min(reach, height - 1) + 1):
        for dx in range(-min(reach, width - 1), min(reach, width - 1) + 1):
            here = (slice(max(0, -dy), height - max(0, dy)), slice(max(0, -dx), width - max(0, dx)))
            there = (slice(max(0, dy), height - max(0, -dy)), slice(max(0, dx), width - max(0, -dx)))
            own, kind = objectness[(..., *here)], classes[(..., *here)]
            for other in range(count):
                rival, of = objectness[(..., *there)][:, other, None], classes[(..., *there)][:, other, None]
                earlier = place[(..., *there)][other] < place[(..., *here)]
                beaten = (rival > own) | ((rival == own) & earlier)
                keep[(..., *here)] &= ~(beaten & (of == kind))
    return keep
