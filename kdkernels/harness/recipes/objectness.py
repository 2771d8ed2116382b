"""Mehta and Ozturk: Object detection at 200 Frames Per Second, ECCV workshops 2018, equations 4 to 6 and section 3.2.

Class and box terms of each anchor, scaled by the teacher's objectness, after feature-map NMS: of one object's anchors
only the best teaches. The paper's detector is YOLO, whose objectness is an output of its own; on these heads this is an
adaptation: objectness is 1 - background on SSDLite, the largest class on RetinaNet, and the largest class times
centerness on FCOS. FCOS's centerness itself is taught unscaled, as the paper's objectness is. The class term is the
KL of the head's kind, the box term smooth L1 to the teacher's deltas, summed over the four; the paper's "simple L1 or
L2" leaves both open.

Keys: ``classes``, ``boxes``, ``quality`` (weights), ``kernel_size``, ``class_agnostic`` (of the NMS), ``divisor``:
``anchors``, as published, or ``objectness``, the sum of what teaches (at least 1), which does not shrink with the map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..detectors.protocol import Dense
from ..fm_nms import fm_nms
from ..step import Step, head_kind
from .recipe import Recipe, Setup


@dataclass(frozen=True)
class Options:
    classes: float = 1.0
    boxes: float = 1.0
    quality: float = 1.0
    kernel_size: int = 3
    class_agnostic: bool = False
    divisor: Literal["anchors", "objectness"] = "anchors"


class Objectness(Recipe):
    name = "objectness"
    Options = Options
    scenes = {"divisor": "objectness"}
    needs_dense = True

    def __init__(self, options: Options, setup: Setup) -> None:
        super().__init__(options, setup)
        if head_kind(setup.student, setup.teacher) != "dense":
            raise ValueError("objectness: it scales every anchor's terms, of one stage, and these detectors have two")
        if options.kernel_size < 1 or options.kernel_size % 2 == 0:
            raise ValueError(f"objectness: kernel_size: expected an odd positive number, got {options.kernel_size}")
        self.classes = "temperature_kl" if setup.logits[0] == "softmax" else "binary_kl"
        self.terms[self.classes] = {"reduction": "sum", "loss_weight": options.classes}
        self.terms["bounded_regression"] = {
            "smooth_l1_weight": options.boxes,
            "bound_weight": 0.0,
            "reduction": "sum",
        }

    def inputs(self, step: Step) -> dict[str, Any]:
        mine, theirs = step.dense()
        weight = self.weights(step).flatten()
        rows = [x.flatten(0, 1) for x in (mine.logits, theirs.logits, mine.deltas, theirs.deltas)]
        return {
            "student_logits": rows[0],
            "teacher_logits": rows[1],
            "row_weight": weight,
            "student_deltas": rows[2],
            "teacher_deltas": rows[3],
            "target_deltas": rows[3],
            "delta_weight": weight,
        }

    def weights(self, step: Step) -> Tensor:
        """(N, A): what each anchor's terms are multiplied by, the divisor included."""

        def make() -> Tensor:
            _, teacher = step.dense()
            scale = objectness(teacher) * kept(teacher, self.options.kernel_size, self.options.class_agnostic)
            if self.options.divisor == "anchors":
                return scale / max(1, scale.numel())
            return scale / scale.sum().clamp(min=1)

        return step.once((id(self), "weights"), make)

    def extra(self, step: Step) -> dict[str, Tensor]:
        mine, theirs = step.dense()
        if mine.quality is None or self.options.quality == 0:
            return {}
        loss = F.binary_cross_entropy_with_logits(mine.quality.float(), theirs.quality.float().sigmoid())
        return {"quality": self.options.quality * loss}


def objectness(dense: Dense) -> Tensor:
    """(N, A) in [0, 1]: how sure a head is that an anchor holds an object. Without a graph."""
    logits = dense.logits.detach().float()
    if dense.activation == "softmax":
        return 1 - logits.softmax(-1)[..., 0]
    best = logits.sigmoid().amax(-1) if logits.shape[-1] else logits.new_zeros(logits.shape[:-1])
    return best if dense.quality is None else best * dense.quality.detach().float().sigmoid()


def kept(dense: Dense, kernel_size: int, class_agnostic: bool) -> Tensor:
    """(N, A), bool: what feature-map NMS leaves, level by level."""
    scores = objectness(dense)
    logits = dense.logits.detach()
    classes = (logits[..., 1:] if dense.activation == "softmax" else logits).argmax(-1)
    found = []
    sizes = [height * width * anchors for height, width, anchors in dense.grids]
    for grid, score, kind in zip(dense.grids, scores.split(sizes, 1), classes.split(sizes, 1), strict=True):
        maps = [x.unflatten(1, grid).permute(0, 3, 1, 2) for x in (score, kind)]
        keep = fm_nms(*maps, kernel_size=kernel_size, class_agnostic=class_agnostic)
        found.append(keep.permute(0, 2, 3, 1).flatten(1))
    return torch.cat(found, 1)
