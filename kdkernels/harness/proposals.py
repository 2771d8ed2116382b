"""``shared_proposals``: the same boxes through both heads, with their labels and targets. Nothing else lives here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .teacher import FrozenTeacher


class SharedProposals(NamedTuple):
    """Rows of proposals through both heads; row i is the same box of the same picture in each field."""

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
    source: str = "teacher",
    labels: str = "truth",
    limit: int | None = None,
    with_truth: bool = False,
    iou: float = 0.5,
    box_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0),
) -> SharedProposals:
    """Send the teacher's proposals through both heads, so that every row compares the same box (DeFeat, Chen 2017).

    Labels are the proposals' own: matched here against the ground truth, never taken from what the student's sampler
    drew, whose rows would not correspond.

    Args:
        student: a detector with ``head``.
        teacher: a frozen teacher with ``proposals`` and ``head``.
        student_features, teacher_features: what each detector's ``features`` gave for the same pictures.
        targets: per picture ``boxes`` (n, 4) in the pixels of the pictures and ``labels`` (n,), from 1.
        source: whose proposals, ``"teacher"`` or ``"student"``.
        labels: ``"truth"``, or ``"teacher"``: a row's label is then the teacher's most likely class, and its target is
            what the teacher says, as for pictures without ground truth.
        limit: at most this many proposals of a picture, the best ones.
        with_truth: whether the ground-truth boxes of a picture follow its proposals, as in the training of a two-stage
            detector: then every object has a row.
        iou: overlap from which a proposal belongs to an object.
        box_weights: factors on the deltas (x, y, w, h); they must be those of both detectors' box coders.

    Raises:
        ValueError: the two heads differ in their number of classes, ``targets`` in its number of pictures, or an
            unknown ``source`` or ``labels``.
    """
    from torchvision.ops import box_iou

    if source not in ("teacher", "student"):
        raise ValueError(f"source: expected 'teacher' or 'student', got {source!r}")
    if labels not in ("truth", "teacher"):
        raise ValueError(f"labels: expected 'truth' or 'teacher', got {labels!r}")
    found = teacher.proposals(teacher_features) if source == "teacher" else student.proposals(student_features)
    proposals = [boxes[:limit] for boxes in found]
    if len(proposals) != len(targets):
        raise ValueError(f"targets is for {len(targets)} pictures, the teacher's features are for {len(proposals)}")
    if with_truth:
        proposals = [torch.cat([p, t["boxes"].to(p)]) for p, t in zip(proposals, targets, strict=True)]
    teacher_logits, teacher_all = teacher.head(teacher_features, proposals)
    student_logits, student_all = student.head(student_features, proposals)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student and teacher must have the same classes, got logits {tuple(student_logits.shape)} and "
            f"{tuple(teacher_logits.shape)}"
        )
    if labels == "teacher":
        label = teacher_logits.argmax(1)
        taught = gather_deltas(teacher_all, label)
        return SharedProposals(
            student_logits, teacher_logits, gather_deltas(student_all, label), taught, taught, label, proposals
        )
    matched, deltas = [], []
    for boxes, target in zip(proposals, targets, strict=True):
        truth = target["boxes"].to(boxes)
        if len(truth) == 0:
            matched.append(torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device))
            deltas.append(torch.zeros_like(boxes))
            continue
        overlap, index = box_iou(boxes, truth).max(dim=1)
        inside = overlap >= iou
        matched.append(torch.where(inside, target["labels"][index], 0))
        deltas.append(torch.where(inside[:, None], encode(boxes, truth[index], box_weights), 0.0))
    label = torch.cat(matched)
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
