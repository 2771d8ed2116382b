"""What a step of distillation adds to a detector's own losses: adapter, shared proposals, and the recipe of losses.

The losses are the library's objective. A recipe for other detectors or other losses is another class with the call of
``Recipe``; ``Adapter`` and ``shared_proposals`` are public and work with any detector of the harness's protocol.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import kdkernels as kd

from .settings import RecipeSettings
from .teacher import FrozenTeacher


class Adapter(nn.Module):
    """A 1 x 1 convolution per pyramid level, from the student's channels to the teacher's.

    Only levels whose channels differ get one, unless ``always``; other levels pass through as they are, so an adapter
    between equal pyramids has no parameters. Give its parameters to the optimiser together with the student's.

    Args:
        student, teacher: channels of every level (an int), or of each level (a sequence).
        levels: number of levels, where both are ints.
        always: a convolution on every level, equal channels or not.

    Raises:
        ValueError: the two sequences, or ``levels``, disagree in length; a level count is missing.
    """

    def __init__(
        self,
        student: int | Sequence[int],
        teacher: int | Sequence[int],
        levels: int | None = None,
        *,
        always: bool = False,
    ) -> None:
        super().__init__()
        lengths = {len(side) for side in (student, teacher) if not isinstance(side, int)}
        lengths |= {levels} if levels is not None else set()
        if len(lengths) != 1:
            raise ValueError(f"student, teacher and levels must agree in one number of levels, got {sorted(lengths)}")
        (count,) = lengths
        pairs = zip(*([side] * count if isinstance(side, int) else side for side in (student, teacher)), strict=True)
        self.levels = nn.ModuleList(
            nn.Conv2d(inside, outside, 1) if always or inside != outside else nn.Identity() for inside, outside in pairs
        )

    def forward(self, features: Mapping[str, Tensor] | Sequence[Tensor]) -> Any:
        """Adapt every level; a mapping comes back as a dict with its names, a sequence as a list."""
        values = list(features.values()) if isinstance(features, Mapping) else list(features)
        if len(values) != len(self.levels):
            raise ValueError(f"features has {len(values)} levels, the adapter was built for {len(self.levels)}")
        adapted = [level(value) for level, value in zip(self.levels, values, strict=True)]
        return dict(zip(features, adapted, strict=True)) if isinstance(features, Mapping) else adapted


class SharedProposals(NamedTuple):
    """Rows of the teacher's proposals through both heads; row i is the same box of the same picture in each field."""

    student_logits: Tensor  #: (K, classes + 1), with a graph
    teacher_logits: Tensor  #: (K, classes + 1)
    student_deltas: Tensor  #: (K, 4), the deltas of the row's label; with a graph
    teacher_deltas: Tensor  #: (K, 4)
    target_deltas: Tensor  #: (K, 4), from proposal to the ground-truth box it matches; 0 for background
    labels: Tensor  #: int64 (K,), 0 for background
    proposals: list[Tensor]  #: the boxes, one tensor per picture

    @property
    def foreground(self) -> Tensor:
        """bool (K,): the rows that match an object."""
        return self.labels > 0


def shared_proposals(
    student: Any,
    teacher: FrozenTeacher,
    student_features: Any,
    teacher_features: Any,
    targets: list[dict[str, Tensor]],
    *,
    limit: int | None = None,
    iou: float = 0.5,
    box_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0),
) -> SharedProposals:
    """Send the teacher's proposals through both heads, so that every row compares the same box (DeFeat, Chen 2017).

    Labels are the teacher's proposals' own: matched here against the ground truth, never taken from what the student's
    sampler drew, whose rows would not correspond.

    Args:
        student: a detector with ``head``.
        teacher: a frozen teacher with ``proposals`` and ``head``.
        student_features, teacher_features: what each detector's ``features`` gave for the same pictures.
        targets: per picture ``boxes`` (n, 4) in the pixels of the pictures and ``labels`` (n,), from 1.
        limit: at most this many proposals of a picture, the best ones.
        iou: overlap from which a proposal belongs to an object.
        box_weights: factors on the deltas (x, y, w, h); they must be those of both detectors' box coders.

    Raises:
        ValueError: the two heads differ in their number of classes, or ``targets`` in its number of pictures.
    """
    from torchvision.ops import box_iou

    proposals = [boxes[:limit] for boxes in teacher.proposals(teacher_features)]
    if len(proposals) != len(targets):
        raise ValueError(f"targets is for {len(targets)} pictures, the teacher's features are for {len(proposals)}")
    teacher_logits, teacher_all = teacher.head(teacher_features, proposals)
    student_logits, student_all = student.head(student_features, proposals)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student and teacher must have the same classes, got logits {tuple(student_logits.shape)} and "
            f"{tuple(teacher_logits.shape)}"
        )
    labels, deltas = [], []
    for boxes, target in zip(proposals, targets, strict=True):
        truth = target["boxes"].to(boxes)
        if len(truth) == 0:
            labels.append(torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device))
            deltas.append(torch.zeros_like(boxes))
            continue
        overlap, index = box_iou(boxes, truth).max(dim=1)
        inside = overlap >= iou
        labels.append(torch.where(inside, target["labels"][index], 0))
        deltas.append(torch.where(inside[:, None], encode(boxes, truth[index], box_weights), 0.0))
    label = torch.cat(labels)
    return SharedProposals(
        student_logits,
        teacher_logits,
        gather_deltas(student_all, label),
        gather_deltas(teacher_all, label),
        torch.cat(deltas),
        label,
        proposals,
    )


def gather_deltas(deltas: Tensor, labels: Tensor) -> Tensor:
    """The four deltas of each row's label from ``(K, 4 * classes)``; ``(K, 4)`` (class-agnostic) as it is."""
    if deltas.shape[1] == 4:
        return deltas
    index = labels[:, None, None].expand(-1, 1, 4)
    return deltas.unflatten(1, (-1, 4)).gather(1, index).squeeze(1)


def encode(boxes: Tensor, truth: Tensor, weights: Sequence[float]) -> Tensor:
    """Deltas that turn ``boxes`` into ``truth`` (R-CNN's parametrisation): shifts over size, logs of size ratios."""
    size, wanted = boxes[:, 2:] - boxes[:, :2], truth[:, 2:] - truth[:, :2]
    shift = ((truth[:, :2] + truth[:, 2:]) - (boxes[:, :2] + boxes[:, 2:])) / 2 / size
    return torch.cat([shift, (wanted / size).log()], dim=1) * boxes.new_tensor(weights)


class Recipe(nn.Module):
    """The distillation losses of one step: masked MSE and Pearson on the pyramid, decoupled KL and bound on the heads.

    Args:
        teacher: the frozen teacher; it stays out of this module's parameters and state.
        adapter: from the student's channels to the teacher's.
        settings: weights and temperatures.
        base_size: boxes whose side (root of the area) is below twice this many pixels mark the finest level; each
            doubling is one level up (``kd.masks``). Small pictures want a small one, or every box lands on that level.
    """

    def __init__(self, teacher: FrozenTeacher, adapter: Adapter, settings: RecipeSettings, base_size: float) -> None:
        super().__init__()
        self.teacher, self.adapter, self.settings, self.base_size = teacher, adapter, settings, base_size
        self.objective = kd.DetectionDistillationLoss(
            pearson={"loss_weight": settings.pearson},
            masked_mse={"foreground_weight": settings.mse_foreground, "background_weight": settings.mse_background},
            decoupled_kl={
                "foreground_weight": settings.kl_foreground,
                "background_weight": settings.kl_background,
                "foreground_temperature": settings.foreground_temperature,
                "background_temperature": settings.background_temperature,
            },
            # Smooth L1 is already among the detector's own losses. The divisor stays the number of all rows, as in
            # torchvision's box loss.
            bounded_regression={
                "margin": settings.margin,
                "bound_weight": settings.bound,
                "smooth_l1_weight": 0.0,
                "gate": "row",
            },
        )

    def forward(self, student: Any, features: Any, images: Tensor, targets: list[dict]) -> kd.DistillationResult:
        """The objective; ``features`` are the student's, computed once for all losses."""
        wanted = self.teacher.features(images)
        rows = shared_proposals(student, self.teacher, features, wanted, targets, limit=self.settings.proposals)
        return self.objective(**self.inputs(features, wanted, rows, targets))

    def inputs(self, features: Any, wanted: Any, rows: SharedProposals, targets: list[dict]) -> dict[str, Any]:
        """What the objective compares, from what student and teacher have made of the pictures."""
        adapted, wanted = list(self.adapter(features).values()), list(wanted.values())
        sizes = [tuple(level.shape[-2:]) for level in wanted]
        strides = [4 * 2**level for level in range(len(sizes))]
        masks = kd.masks.ground_truth_masks(
            [target["boxes"] for target in targets], sizes, strides, base_size=self.base_size
        )
        return {
            "student_features": adapted,
            "teacher_features": wanted,
            "masks": masks,
            "student_logits": rows.student_logits,
            "teacher_logits": rows.teacher_logits,
            "foreground": rows.foreground,
            "student_deltas": rows.student_deltas,
            "teacher_deltas": rows.teacher_deltas,
            "target_deltas": rows.target_deltas,
            "delta_weight": rows.foreground.float(),  # only rows with an object have a target
        }
