"""What the harness asks of a detector. A detector of your own needs the first part; the rest opens more recipes.

Pictures are float32 ``(N, 3, H, W)`` in [0, 1], H and W multiples of the coarsest stride that the detector wants; boxes
are x1, y1, x2, y2 in their pixels, labels count from 1. Only declarations live here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

Features = Mapping[str, Tensor]
Targets = list[dict[str, Tensor]]


@runtime_checkable
class Detector(Protocol):
    """What every recipe of feature losses needs. An ``nn.Module``."""

    strides: Mapping[str, int]  #: pixels per cell of each level that ``features`` gives, finest first
    channels: Mapping[str, int]  #: of each level

    def features(self, images: Tensor) -> Features:
        """Pyramid levels by name, finest first, each ``(N, C, H, W)``. Normalises the pictures itself."""

    def losses(self, features: Features, targets: Targets) -> dict[str, Tensor]:
        """The detector's own training losses from features computed before; in training mode."""

    def detect(self, images: Tensor) -> list[dict[str, Tensor]]:
        """``boxes``, ``scores`` and ``labels`` of each picture; in eval mode, without a graph."""


@runtime_checkable
class HasStages(Protocol):
    """A detector whose backbone and neck can be called apart: ``features(x)`` is ``neck(stages(x))``."""

    stage_strides: Mapping[str, int]
    stage_channels: Mapping[str, int]

    def stages(self, images: Tensor) -> Features:
        """The backbone's stages by name, finest first."""

    def neck(self, stages: Features) -> Features:
        """The pyramid of the stages."""


@runtime_checkable
class HasProposals(Protocol):
    """A detector of two stages."""

    def proposals(self, features: Features) -> list[Tensor]:
        """Proposals of each picture, ``(n, 4)``, best first, without a graph; in eval mode or in training mode alike,
        as many as in evaluation."""

    def head(self, features: Features, proposals: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Class logits ``(K, classes + 1)``, class 0 the background, and deltas ``(K, 4 (classes + 1))`` or
        ``(K, 4)``; rows follow the proposals, picture after picture."""


class Dense(NamedTuple):
    """One prediction per anchor: a one-stage detector's head, or the first stage of a two-stage one (its RPN).

    Anchors go picture by picture, level after level, finest first; within a level row by row, cell by cell, and the
    anchors of a cell follow each other. A is their number in a picture.
    """

    logits: Tensor  #: (N, A, K), with a graph
    deltas: Tensor  #: (N, A, 4), as the head gives them, with a graph
    activation: str  #: "softmax" (class 0 is the background) or "sigmoid" (no background); an RPN has one sigmoid logit
    grids: list[tuple[int, int, int]]  #: (H, W, anchors per cell) of each level
    quality: Tensor | None = None  #: (N, A), FCOS's centerness logits


class Matched(NamedTuple):
    """What each anchor should have found."""

    labels: Tensor  #: int64 (N, A): 1 to the number of classes (an RPN: 1), 0 background, -1 not trained on
    deltas: Tensor  #: (N, A, 4), the deltas that lead from the anchor to its object; 0 where there is none


@runtime_checkable
class HasDense(Protocol):
    """A detector with dense predictions."""

    def losses(self, features: Features, targets: Targets, dense: Dense | None = None) -> dict[str, Tensor]:
        """As :meth:`Detector.losses`; ``dense``, where given, is what ``dense(features)`` gave, and the head is not run
        a second time."""

    def dense(self, features: Features) -> Dense:
        """The dense head's predictions; in training mode and in eval mode alike."""

    def matched(self, features: Features, targets: Targets) -> Matched:
        """The ground truth of ``dense``'s anchors, by the detector's own rules, without its random sampling."""

    def anchors(self, features: Features) -> list[Tensor]:
        """Boxes of each level's anchors, ``(H * W * anchors per cell, 4)``, in pixels, in ``dense``'s order."""
