"""What a step of distillation adds to a detector's own losses: recipes together, and their place in a training step.

Recipes whose terms do not collide and that compare the same tensors are one objective of the library's, so that the
features are read once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import kdkernels as kd

from .recipes import Recipe
from .schedule import kd_weight
from .settings import KdSettings
from .step import Step
from .teacher import FrozenTeacher
from .update import Losses, Objective

#: What the records call the norm of a term's gradient; the term's name, and the level's, follow.
GRADIENT_NORM = "gradient norm at the features"


class Distilled(NamedTuple):
    """The distillation of one step. Names are ``recipe/term``."""

    total: Tensor  #: 0-d, with the graph
    terms: dict[str, Tensor]  #: weighted and detached; they add up to the total
    details: dict[str, Tensor]  #: the same apart, by region and level, as far as the objective tells
    gradient_norms: dict[str, Tensor]  #: squared, at the features; where they were asked for


class Call(NamedTuple):
    """A recipe's part of one step: what its objective is configured with, and called with."""

    label: str
    terms: Mapping[str, Mapping[str, Any]]
    inputs: dict[str, Any]
    factor: float


class Distillation(nn.Module):
    """Recipes between one student and one teacher. Its parameters are the recipes' adapters.

    Args:
        recipes: at least one.
        teacher: stays out of this module's parameters and state.
        base_size: boxes whose side (root of the area) is below twice this many pixels mark the finest level; each
            doubling is one level up (``kd.masks``). Small pictures want a small one, or every box lands on that level.
        limit: at most so many proposals of a picture.
        steps, epoch_steps: of the whole run, and of one round through the pictures.
        compile: whether the objectives are compiled, each as one graph.
        schedule: when distillation counts; a weight that changes reaches the objectives as tensors, whose graph stays.
        process_group: of data-parallel ranks: the objectives' statistics and divisors become those of the joined batch.
            Terms that are no part of an objective, and sums whose rows a recipe weighs, are means over the ranks.

    Raises:
        ValueError: no recipe.
    """

    def __init__(
        self,
        recipes: Sequence[Recipe],
        teacher: FrozenTeacher,
        *,
        base_size: float | None = None,
        limit: int | None = None,
        steps: int = 1,
        epoch_steps: int = 1,
        compile: bool = False,
        schedule: KdSettings = KdSettings(),  # noqa: B008 - frozen
        process_group: Any = None,
    ) -> None:
        super().__init__()
        if not recipes:
            raise ValueError("recipes: expected at least one")
        self.recipes, self.teacher = nn.ModuleList(recipes), teacher
        self.base_size, self.limit, self.steps, self.epoch_steps = base_size, limit, steps, epoch_steps
        self.compile, self.schedule, self.process_group = compile, schedule, process_group
        names = [recipe.name for recipe in recipes]
        self.labels = [n if names.count(n) == 1 else f"{n}-{names[: i + 1].count(n)}" for i, n in enumerate(names)]
        self.needs_stages = any(recipe.needs_stages for recipe in recipes)
        self.needs_dense = any(recipe.needs_dense for recipe in recipes)
        self.needs_unlabeled = any(recipe.needs_unlabeled for recipe in recipes)
        self._objectives: dict[tuple[str, ...], kd.DetectionDistillationLoss] = {}
        self._called: dict[tuple[str, ...], Callable[..., kd.DistillationResult]] = {}
        self._kept: dict[Hashable, Any] = {}

    def step(
        self, student: Any, images: Tensor, targets: list[dict], index: int = 0, *, unlabeled: bool = False
    ) -> Step:
        """A step whose student features are computed here, once for the detector's own losses and all recipes."""
        stages = student.stages(images) if self.needs_stages else None
        features = student.features(images) if stages is None else student.neck(stages)
        return Step(
            student,
            self.teacher,
            images,
            targets,
            features,
            stages,
            base_size=self.base_size,
            limit=self.limit,
            index=index,
            steps=self.steps,
            epoch_steps=self.epoch_steps,
            unlabeled=unlabeled,
            kept=self._kept,
        )

    def forward(self, step: Step, *, together: bool = True, norms: bool = False) -> Distilled:
        """The distillation losses of a step.

        Args:
            together: False calls an objective per term, each of which reads the features again: for comparison.
            norms: whether the terms of features tell their gradients' squared norms.
        """
        calls, terms = [], {}
        exclusive = {label for label, r in zip(self.labels, self.recipes, strict=True) if r.exclusive(step)}
        total = torch.zeros((), device=step.images.device)
        scheduled = self.weight(step.index)
        for label, recipe in zip(self.labels, self.recipes, strict=True):
            factor = scheduled and scheduled * recipe.factor(step)
            if factor == 0 or (step.unlabeled and not recipe.needs_unlabeled) or (exclusive and label not in exclusive):
                continue
            if recipe.terms:
                calls.append(Call(label, recipe.terms, recipe.inputs(step), factor))
            for name, value in recipe.extra(step).items():
                value = value if factor == 1 else factor * value
                terms[f"{label}/{name}"] = value.detach()
                total = total + value
        details: dict[str, Tensor] = {}
        found: dict[str, Tensor] = {}
        for group in grouped(calls) if together else [[one] for call in calls for one in apart(call)]:
            owner = {term: call.label for call in group for term in call.terms}
            result = self._objective(group, norms)(
                **{key: value for call in group for key, value in call.inputs.items()},
                loss_weights=self._weights(group, step.images.device),
            )
            total = total + result.total
            terms |= {f"{owner[name]}/{name}": value for name, value in result.terms.items()}
            details |= {f"{owner[name.partition('/')[0]]}/{name}": value for name, value in result.details.items()}
            found |= {f"{owner[name.partition('/')[0]]}/{name}": x for name, x in result.gradient_norms.items()}
        return Distilled(total, terms, details, found)

    def weight(self, index: int) -> float:
        """The factor on everything at step ``index``."""
        return kd_weight(index, self.schedule)

    @property
    def generators(self) -> dict[str, torch.Generator]:
        """What the recipes draw from, by name."""
        return {
            f"{label}/{name}": generator
            for label, recipe in zip(self.labels, self.recipes, strict=True)
            for name, generator in recipe.generators.items()
        }

    def task_weight(self, loss: str, step: Step) -> float:
        """What a loss of the detector's own is multiplied by."""
        weight = 1.0
        for recipe in self.recipes:
            weight *= recipe.task_weight(loss, step)
        return weight

    def _weights(self, group: list[Call], device: torch.device) -> dict[str, Tensor] | None:
        """What the configured weights become at this step. On the device, so that a compiled graph stays the same; and,
        where they change from step to step, always, as a graph without them is another.
        """
        ranks = 1 if self.process_group is None else torch.distributed.get_world_size(self.process_group)
        always = self.schedule != KdSettings()
        found = {}
        for call in group:
            for name, keywords in call.terms.items():
                # The rows of a sum have weights that a recipe made of its own rank's rows: their mean over the ranks.
                factor = call.factor / ranks if keywords.get("reduction") == "sum" else call.factor
                if always or factor != 1:
                    found[name] = torch.tensor(factor * keywords.get("loss_weight", 1.0), device=device)
        return found or None

    def _objective(self, group: list[Call], norms: bool) -> Callable[..., kd.DistillationResult]:
        key = tuple(f"{call.label}/{term}" for call in group for term in call.terms)
        if key not in self._objectives:
            config = {name: keywords for call in group for name, keywords in call.terms.items()}
            device = next(x.device for x in _tensors(group[0].inputs))
            objective = kd.DetectionDistillationLoss(process_group=self.process_group, **config).to(device)
            self._objectives[key] = objective
            # What ranks tell each other is no part of a graph.
            compiled = self.compile and self.process_group is None
            self._called[key] = torch.compile(objective, fullgraph=True) if compiled else objective
        self._objectives[key].gradient_norms = norms
        return self._called[key]


#: Inputs that all terms of the same rows take where they are given: calls with and without one are not the same.
_WEIGHTS = {"row_weight": "student_logits", "delta_weight": "student_deltas"}


def grouped(calls: Sequence[Call]) -> list[list[Call]]:
    """Calls that can be one: no term of one is a term of another, and what both are given is the same object."""
    groups: list[list[Call]] = []
    for call in calls:
        for group in groups:
            if all(_fit(call, other) for other in group):
                group.append(call)
                break
        else:
            groups.append([call])
    return groups


def _fit(call: Call, other: Call) -> bool:
    mine, theirs = call.inputs, other.inputs
    shared = mine.keys() & theirs.keys()
    same = all(mine[key] is theirs[key] for key in shared)
    weighted = all(mine.get(weight) is theirs.get(weight) for weight, rows in _WEIGHTS.items() if rows in shared)
    return same and weighted and not call.terms.keys() & other.terms.keys()


def apart(call: Call) -> list[Call]:
    """A call per term."""
    return [call._replace(terms={name: keywords}) for name, keywords in call.terms.items()]


def _tensors(inputs: Mapping[str, Any]) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(list(inputs.values())) if isinstance(x, Tensor)]


def distilled(
    student: Any, distillation: Distillation, *, norms_every: int = 0, unlabeled: Callable[[int], Tensor] | None = None
) -> Objective:
    """The objective of a distilled student: its own losses and the recipes', from features computed once.

    Args:
        norms_every: every so many steps the gradient norms at the features are recorded; 0: never.
        unlabeled: gives a step's batch of pictures without ground truth, for recipes that ask for one.
    """

    def objective(images: Tensor, targets: list[dict], index: int) -> Losses:
        norms = norms_every > 0 and index % norms_every == 0
        step = distillation.step(student, images, targets, index)
        # A dense head that a recipe reads as well runs once.
        dense = {"dense": step.student_dense} if distillation.needs_dense else {}
        own = student.losses(step.features, targets, **dense)
        losses = {}
        for name, value in own.items():
            weight = distillation.task_weight(name, step)
            if weight != 0:  # or the optimiser would still decay what only this loss reaches
                losses[f"task/{name}"] = value if weight == 1 else weight * value
        found = distillation(step, norms=norms)
        total, terms = found.total, found.terms
        if unlabeled is not None and distillation.needs_unlabeled and distillation.weight(index):
            pictures = unlabeled(index)
            nothing = [_nothing(pictures.device) for _ in pictures]
            more = distillation(distillation.step(student, pictures, nothing, index, unlabeled=True))
            total, terms = total + more.total, terms | more.terms
        noted = dict(found.details)
        noted |= {f"{GRADIENT_NORM}/{name}": x.sqrt() for name, x in found.gradient_norms.items()}
        told = {f"distill/{name}": x for name, x in terms.items()}
        return Losses({**losses, "distill": total}, told, noted, sum(own.values()).detach())

    return objective


def alone(detector: Any) -> Objective:
    """The objective of a detector alone: its own losses."""

    def objective(images: Tensor, targets: list[dict], index: int) -> Losses:
        losses = detector.losses(detector.features(images), targets)
        return Losses({f"task/{name}": value for name, value in losses.items()})

    return objective


def _nothing(device: torch.device) -> dict[str, Tensor]:
    """The targets of a picture without ground truth."""
    return {
        "boxes": torch.zeros(0, 4, device=device),
        "labels": torch.zeros(0, dtype=torch.int64, device=device),
    }
