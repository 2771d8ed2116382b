"""What the recipes of one step share: pairs of levels, masks, rows of logits. Each is computed once, when first asked
for. No loss lives here; a recipe that needs something new of student and teacher gets it as a method of ``Step``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import kdkernels as kd

from .detectors.protocol import Dense, Matched, Targets
from .proposals import SharedProposals, shared_proposals
from .teacher import FrozenTeacher

T = TypeVar("T")
Levels = Mapping[str, Tensor]


class Pair(NamedTuple):
    """A level of the student and the level of the teacher with the same stride."""

    name: str  #: P3 for stride 8, ...; C3 for a stage of the backbone; by number where the stride is no power of two
    student: str
    teacher: str
    stride: float
    channels: tuple[int, int]


def pair_levels(student: Any, teacher: Any, kind: str = "features") -> list[Pair]:
    """Levels (``"features"``) or stages (``"stages"``) of two detectors that have the same stride, finest first.

    So P2 to P6 of a two-stage detector meet P3 to P7 of a one-stage one at P3 to P6 (PKD's heterogeneous pairs), and a
    student of half-size pictures meets its teacher one level up.

    Raises:
        ValueError: a detector without stages, or no common stride.
    """
    attributes = ("strides", "channels") if kind == "features" else ("stage_strides", "stage_channels")
    for side, detector in (("student", student), ("teacher", teacher)):
        if not all(hasattr(detector, name) for name in attributes):
            raise ValueError(f"the {side} ({type(detector).__name__}) has no {' and '.join(attributes)}")
    strides, other = (dict(getattr(x, attributes[0])) for x in (student, teacher))
    for side, found in (("student", strides), ("teacher", other)):
        if len(set(found.values())) < len(found):
            raise ValueError(f"levels are paired by stride, and two of the {side}'s have the same: {found}")
    widths, wide = (dict(getattr(x, attributes[1])) for x in (student, teacher))
    pairs = []
    for mine, stride in strides.items():
        for theirs, wanted in other.items():
            if stride == wanted:
                pairs.append(
                    Pair(_level_name(stride, kind, len(pairs)), mine, theirs, stride, (widths[mine], wide[theirs]))
                )
    if not pairs:
        raise ValueError(
            f"no level of the student has the stride of a level of the teacher: {list(strides.values())} and "
            f"{list(other.values())}"
        )
    return pairs


def _level_name(stride: float, kind: str, place: int) -> str:
    power = math.log2(stride)
    return f"{'P' if kind == 'features' else 'C'}{int(power)}" if power == int(power) else f"level{place}"


class Matching(NamedTuple):
    """Paired levels as the losses take them: by name, of equal size."""

    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    sizes: list[tuple[int, int]]
    strides: list[float]


class ClassRows(NamedTuple):
    """Rows of class logits of both sides, and what belongs to them."""

    student: Tensor  #: (K, C), with a graph
    teacher: Tensor  #: (K, C)
    labels: Tensor  #: int64 (K,): 0 background, -1 not trained on
    average: float | Tensor  #: what a loss divides the sum over rows by


@dataclass
class Step:
    """One batch of one training step. Boxes are in the pixels of ``images``.

    features, stages: the student's, with their graph; stages where a recipe needs them.
    base_size: of ``kd.masks``.
    limit: at most so many proposals of a picture.
    index: the step's number, from 0; steps: of the whole run; epoch_steps: of one round through the pictures.
    unlabeled: whether the pictures have no ground truth.
    found: what was computed for this step. kept: what holds for all steps with pictures of this size.
    """

    student: nn.Module
    teacher: FrozenTeacher
    images: Tensor
    targets: Targets
    features: Levels
    stages: Levels | None = None
    base_size: float | None = None
    limit: int | None = None
    index: int = 0
    steps: int = 1
    epoch_steps: int = 1
    unlabeled: bool = False
    found: dict[Hashable, Any] = field(default_factory=dict)
    kept: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` gives, computed at the first call with this key."""
        if key not in self.found:
            self.found[key] = make()
        return self.found[key]

    @property
    def teacher_stages(self) -> Levels:
        return self.once("teacher stages", lambda: self.teacher.stages(self.images))

    @property
    def teacher_features(self) -> Levels:
        if self.stages is None:
            return self.once("teacher features", lambda: self.teacher.features(self.images))
        return self.once("teacher features", lambda: self.teacher.neck(self.teacher_stages))

    def prefetch(self, keys: Iterable[Hashable]) -> None:
        """Compute what another step of the same recipes was asked for of the detectors' heads."""
        for key in keys:
            if isinstance(key, tuple) and key[0] == "rows":
                self.rows(*key[1:])
            elif key in ("dense", "matched"):
                getattr(self, key)()

    def cut(self) -> tuple[Step, list[tuple[Tensor, Tensor]]]:
        """This step off the student's graph: what its heads and its backbone gave are leaves, which the losses'
        backward fills. Returns it, and each tensor with its leaf.
        """
        leaves: dict[int, tuple[Tensor, Tensor]] = {}

        def leaf(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.requires_grad:
                return value
            return leaves.setdefault(id(value), (value, value.detach().requires_grad_()))[1]

        kept = {
            key: pytree.tree_map(leaf, value)
            for key, value in self.found.items()
            if key in ("student dense", "teacher dense", "matched", "teacher features", "teacher stages")
            or key[0] == "rows"
        }
        stages = None if self.stages is None else pytree.tree_map(leaf, dict(self.stages))
        step = replace(self, features=pytree.tree_map(leaf, dict(self.features)), stages=stages, found=kept)
        return step, list(leaves.values())

    def matching(self, pairs: list[Pair], adapter: nn.Module | None = None, kind: str = "features") -> Matching:
        """The pairs' levels, the student's through its adapter, and brought to the teacher's size where grids differ
        (bilinear: a documented copy).
        """

        def make() -> Matching:
            mine, theirs = (
                (self.features, self.teacher_features) if kind == "features" else (self.stages, self.teacher_stages)
            )
            levels = [mine[pair.student] for pair in pairs]
            levels = levels if adapter is None else adapter(levels)
            student, teacher = {}, {}
            for pair, level in zip(pairs, levels, strict=True):
                wanted = theirs[pair.teacher]
                if level.shape[-2:] != wanted.shape[-2:]:
                    level = F.interpolate(level, size=wanted.shape[-2:], mode="bilinear", align_corners=False)
                student[pair.name], teacher[pair.name] = level, wanted
            return Matching(
                student, teacher, [tuple(x.shape[-2:]) for x in teacher.values()], [pair.stride for pair in pairs]
            )

        return self.once(("matching", tuple(pairs), id(adapter), kind), make)

    def masks(self, matching: Matching, kind: str, assign: str = "scale", threshold: float = 0.5) -> dict[str, Tensor]:
        """Masks of the levels of ``matching``, by name: "gt", "gaussian", "fine" or "all"."""

        def make() -> dict[str, Tensor]:
            if kind == "all":
                return dict(zip(matching.teacher, kd.masks.all_ones(list(matching.teacher.values())), strict=True))
            boxes = [target["boxes"] for target in self.targets]
            how: dict[str, Any] = {"assign": assign, "base_size": self.base_size, "batch_size": len(boxes)}
            if kind == "fine":
                drawn = kd.masks.fine_grained_masks(
                    boxes, self._anchors(matching), matching.sizes, matching.strides, threshold=threshold, **how
                )
            else:
                draw = kd.masks.ground_truth_masks if kind == "gt" else kd.masks.gaussian_masks
                drawn = draw(boxes, matching.sizes, matching.strides, **how)
            return dict(zip(matching.teacher, drawn, strict=True))

        return self.once(("masks", kind, assign, threshold, tuple(matching.teacher), tuple(matching.sizes)), make)

    def masked(
        self, pairs: list[Pair], adapter: nn.Module | None, kind: str, threshold: float = 0.5
    ) -> dict[str, dict[str, Tensor]]:
        """Paired levels and their masks as the objective takes them."""
        matching = self.matching(pairs, adapter)
        masks = self.masks(matching, kind, threshold=threshold)
        return {"student_features": matching.student, "teacher_features": matching.teacher, "masks": masks}

    def _anchors(self, matching: Matching) -> list[Tensor]:
        """The teacher's anchors of the levels of a matching."""
        features = self.teacher_features
        anchors = dict(zip(features, self.teacher.anchors(features), strict=True))
        kept = {pair.name: anchors[pair.teacher] for pair in pair_levels(self.student, self.teacher.detector)}
        return [kept[name] for name in matching.teacher]

    def rows(self, source: str = "teacher", with_truth: bool = False, labels: str = "truth") -> SharedProposals:
        """Proposals through both heads."""
        return self.once(
            ("rows", source, with_truth, labels),
            lambda: shared_proposals(
                self.student,
                self.teacher,
                self.features,
                self.teacher_features,
                self.targets,
                source=source,
                labels=labels,
                limit=self.limit,
                with_truth=with_truth,
            ),
        )

    def heads(self, source: str = "teacher", with_truth: bool = False) -> dict[str, Tensor]:
        """Rows of proposals as the objective takes them. Only rows with an object have a target of their deltas."""

        def make() -> dict[str, Tensor]:
            rows = self.rows(source, with_truth)
            return {
                "student_logits": rows.student_logits,
                "teacher_logits": rows.teacher_logits,
                "foreground": rows.foreground,
                "target": rows.labels,
                "student_deltas": rows.student_deltas,
                "teacher_deltas": rows.teacher_deltas,
                "target_deltas": rows.target_deltas,
                "delta_weight": rows.foreground.float(),
            }

        return self.once(("heads", source, with_truth), make)

    @property
    def student_dense(self) -> Dense:
        """The student's dense predictions, on all of its levels."""
        return self.once("student dense", lambda: self.student.dense(self.features))

    @property
    def teacher_dense(self) -> Dense:
        """The teacher's."""
        return self.once("teacher dense", lambda: self.teacher.dense(self.teacher_features))

    def dense(self) -> tuple[Dense, Dense]:
        """The dense predictions of student and teacher, on the levels that both have, with the same anchors.

        Raises:
            ValueError: the two differ in anchors, classes or activation.
        """

        def make() -> tuple[Dense, Dense]:
            mine = self._common(self.student_dense, self.features, "student")
            theirs = self._common(self.teacher_dense, self.teacher_features, "teacher")
            if (mine.logits.shape, *mine[2:4]) != (theirs.logits.shape, *theirs[2:4]):
                raise ValueError(
                    "dense predictions are compared anchor by anchor, and those of student and teacher differ: "
                    f"logits {tuple(mine.logits.shape)} ({mine.activation}) on {mine.grids}, and "
                    f"{tuple(theirs.logits.shape)} ({theirs.activation}) on {theirs.grids}"
                )
            return mine, theirs

        return self.once("dense", make)

    def _common(self, dense: Dense, features: Levels, side: str) -> Dense:
        """The part of dense predictions that lies on paired levels."""
        kept = [getattr(pair, side) for pair in self._dense_pairs()]
        if kept == list(features):
            return dense
        grids = [grid for grid, name in zip(dense.grids, features, strict=True) if name in kept]
        split = [height * width * cell for height, width, cell in dense.grids]

        def of_levels(x: Tensor) -> Tensor:
            parts = zip(x.split(split, 1), features, strict=True)
            return torch.cat([part for part, name in parts if name in kept], 1)

        quality = None if dense.quality is None else of_levels(dense.quality)
        return Dense(of_levels(dense.logits), of_levels(dense.deltas), dense.activation, grids, quality)

    def _dense_pairs(self) -> list[Pair]:
        """Pairs of levels whose anchors are the same boxes, to a tenth of their side."""
        key = ("dense pairs", tuple(x.shape[-2:] for x in [*self.features.values(), *self.teacher_features.values()]))
        if key not in self.kept:
            self.kept[key] = self._find_dense_pairs()
        return self.kept[key]

    def _find_dense_pairs(self) -> list[Pair]:
        pairs = pair_levels(self.student, self.teacher.detector)
        if not (hasattr(self.student, "anchors") and hasattr(self.teacher.detector, "anchors")):
            return pairs
        mine = dict(zip(self.features, self.student.anchors(self.features), strict=True))
        theirs = dict(zip(self.teacher_features, self.teacher.anchors(self.teacher_features), strict=True))
        agreeing = [pair for pair in pairs if _same_boxes(mine[pair.student], theirs[pair.teacher])]
        if not agreeing:
            raise ValueError(
                "dense predictions are compared anchor by anchor, and no level of the student has the teacher's "
                "anchors (their number, sides and ratios)"
            )
        return agreeing

    def matched(self) -> Matched:
        """The ground truth of the dense predictions' anchors; all 0 where pictures have none."""

        def make() -> Matched:
            found = self.student.matched(self.features, self.targets)
            whole = Dense(found.labels[..., None], found.deltas, "", self.student_dense.grids)
            kept = self._common(whole, self.features, "student")
            return Matched(kept.logits[..., 0], kept.deltas)

        return self.once("matched", make)

    def class_rows(self, source: str = "teacher") -> ClassRows:
        """Class logits row by row: of the proposals of two stages, of all anchors of one.

        A loss divides by the number of proposals; for anchors, most of which are background, by the number of those
        with an object, at least 1, which is what the detectors' own losses divide by.
        """
        if hasattr(self.student, "head"):
            rows = self.rows(source)
            return ClassRows(rows.student_logits, rows.teacher_logits, rows.labels, float(max(1, len(rows.labels))))

        def make() -> ClassRows:
            mine, theirs = self.dense()
            labels = self.matched().labels.flatten()
            average = (labels > 0).sum().clamp(min=1).to(torch.float32)
            return ClassRows(mine.logits.flatten(0, 1), theirs.logits.flatten(0, 1), labels, average)

        return self.once("class rows", make)


def _same_boxes(mine: Tensor, theirs: Tensor) -> bool:
    if mine.shape != theirs.shape:
        return False
    side = (theirs[:, 2:] - theirs[:, :2]).amax(1, keepdim=True)
    return bool(((mine - theirs).abs() <= 0.1 * side).all())


def head_kind(student: Any, teacher: Any) -> str:
    """``"proposals"`` for two detectors of two stages, ``"dense"`` for two of one.

    Raises:
        ValueError: the two are not of the same kind, or have no class logits that the harness can ask for.
    """
    kinds = [
        "proposals" if hasattr(x, "head") else "dense" if hasattr(x, "dense") else "none" for x in (student, teacher)
    ]
    if kinds[0] == kinds[1] != "none":
        return kinds[0]
    names = {"proposals": "logits of proposals", "dense": "logits of anchors", "none": "no logits"}
    raise ValueError(
        "class logits are compared row by row, which takes two detectors of the same kind; the student "
        f"({type(student).__name__}) gives {names[kinds[0]]}, the teacher ({type(teacher).__name__}) {names[kinds[1]]}"
    )
