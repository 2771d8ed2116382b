"""The parts of the objective: what each configured term makes of a call's inputs, features in one pass where they can.

A part is one term, or masked MSE and Pearson together. Its result is a plan (one_pass.py) or a loss of two passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .. import masks as draw
from .. import ops
from . import (
    binary_kl,
    bounded_regression,
    decoupled_kl,
    feature_pass,
    masked_mse,
    pearson,
    soft_cross_entropy,
    temperature_kl,
)
from .arguments import check_float, feature_levels
from .feature_pass import (
    BACKGROUND,
    FOREGROUND,
    MASKED_MSE,
    MASKED_MSE_NORM,
    PEARSON,
    PEARSON_NORM,
    MaskedMSETerm,
    PearsonTerm,
)
from .one_pass import OnePass, Plan, foldable, takes_one_pass, value

FEATURES = {"masked_mse": masked_mse, "pearson": pearson}
LOGITS = {
    "decoupled_kl": decoupled_kl,
    "temperature_kl": temperature_kl,
    "soft_cross_entropy": soft_cross_entropy,
    "binary_kl": binary_kl,
}
TERMS = {**FEATURES, **LOGITS, "bounded_regression": bounded_regression}

Given = Mapping[str, Any]  # a call's inputs, None where there is none


@dataclass
class Part:
    """A part of the total: `result` times `factor`. `told` gives its terms, details and norms once it was computed."""

    result: Tensor | Plan
    told: Callable[[Tensor, dict[str, Tensor]], Told]
    factor: Any = 1.0


@dataclass
class Told:
    """A part's terms, details and gradient norms by name, still without its factor."""

    terms: dict[str, Tensor]
    details: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)


def need(term: str, given: Given, *names: str) -> list[Any]:
    """The inputs of a term, or ValueError naming what is missing."""
    for name in names:
        if given[name] is None:
            raise ValueError(f"{term} is configured, but {name} is not given")
    return [given[name] for name in names]


def split_weight(keywords: dict[str, Any], student: Tensor) -> tuple[dict[str, Any], Any]:
    """The keywords with the weight that may enter the forward, and the factor that may not."""
    weight = keywords["loss_weight"]
    return (keywords, 1.0) if foldable(weight, student) else ({**keywords, "loss_weight": 1.0}, weight)


# Heads.


def head_part(name: str, keywords: dict[str, Any], given: Given, one_pass: OnePass) -> Part:
    """A term over logits or deltas."""
    inputs, keywords, factor = head_call(name, keywords, given)
    result = TERMS[name].weighted(*inputs, one_pass=one_pass, **keywords)
    if name == "decoupled_kl" and isinstance(result, Tensor):
        again = _regions_again(inputs, keywords)
        return Part(result, lambda loss, _: Told({name: loss}, again), factor)
    return Part(result, lambda loss, details: Told({name: loss}, details), factor)


@torch.no_grad()
def _regions_again(inputs: list[Tensor], keywords: dict[str, Any]) -> dict[str, Tensor]:
    """decoupled_kl's regions after two passes, for the details: one more read of the logits each."""
    found = {}
    for region, other in (("foreground", "background"), ("background", "foreground")):
        found[f"decoupled_kl/{region}"] = value(decoupled_kl.weighted(*inputs, **{**keywords, f"{other}_weight": 0.0}))
    return found


def head_call(name: str, keywords: dict[str, Any], given: Given) -> tuple[list[Any], dict[str, Any], Any]:
    """The inputs of a head's term, its keywords with those of the call, and the factor that may not enter them."""
    if name == "bounded_regression":
        inputs, weight = need(name, given, "student_deltas", "teacher_deltas", "target_deltas"), given["delta_weight"]
    else:
        more = ["foreground"] if name == "decoupled_kl" else []
        inputs, weight = need(name, given, "student_logits", "teacher_logits", *more), given["row_weight"]
    keywords, factor = split_weight(keywords, inputs[0]) if isinstance(inputs[0], Tensor) else (keywords, 1.0)
    target = {"target": given["target"]} if name == "soft_cross_entropy" else {}
    return inputs, {**keywords, **target, "weight": weight}, factor


# Features.


@dataclass
class Levels:
    """Both sides' levels and their names."""

    names: list[Any]
    students: list[Tensor]
    teachers: list[Tensor]

    def of(self, places: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        return [self.students[i] for i in places], [self.teachers[i] for i in places]


def read_levels(term: str, given: Given) -> Levels:
    """Student and teacher levels; `term` is who asks."""
    student, teacher = need(term, given, "student_features", "teacher_features")
    names = list(student) if isinstance(student, Mapping) else None
    students = feature_levels("student_features", student)
    teachers = feature_levels("teacher_features", teacher, names if isinstance(teacher, Mapping) else None)
    if len(students) != len(teachers):
        raise ValueError(f"student_features has {len(students)} levels, teacher_features has {len(teachers)}")
    if not students:
        raise ValueError("student_features: no levels")
    for side, levels in (("student", students), ("teacher", teachers)):
        for i, x in enumerate(levels):
            check_float(f"{side}_features[{i}]", x)
            if x.dim() != 4:
                raise ValueError(f"{side}_features[{i}]: expected (N, C, H, W), got shape {tuple(x.shape)}")
    return Levels(names or list(range(len(students))), students, teachers)


def read_masks(given: Given, levels: Levels, places: Sequence[int]) -> Sequence[Tensor]:
    """One mask for each of these levels: as given, or of the boxes, to be drawn by whoever needs it."""
    masks, boxes = given["masks"], given["boxes"]
    if (masks is None) == (boxes is None):
        what = "neither masks nor boxes are given" if masks is None else "masks and boxes are both given"
        raise ValueError(f"masked_mse is configured, but {what}")
    if masks is not None:
        both = isinstance(masks, Mapping) and isinstance(given["student_features"], Mapping)
        found = feature_levels("masks", masks, levels.names if both else None)
        if len(found) != len(levels.students):
            raise ValueError(f"masks has {len(found)} levels, student_features has {len(levels.students)}")
        return [found[i] for i in places]
    (strides,) = need("masked_mse with boxes", given, "strides")
    if not isinstance(strides, (list, tuple)):
        raise TypeError(f"strides: expected a list with one entry per level, got {type(strides).__name__}")
    if len(strides) != len(levels.students):
        raise ValueError(f"strides has {len(strides)} levels, student_features has {len(levels.students)}")
    first = levels.students[0]
    sizes = [(int(s.shape[2]), int(s.shape[3])) if i in places else (0, 0) for i, s in enumerate(levels.students)]
    masks = draw.GroundTruth(boxes, sizes, strides, places=places, batch_size=first.shape[0])
    # What does not fit is drawn, to be refused as any other mask.
    fits = all(s.shape[0] == first.shape[0] and s.device == masks.boxes.device for s in levels.of(places)[0])
    return masks if fits and not torch.compiler.is_compiling() else list(masks)


def pick(term: str, wanted: Sequence[Any] | None, names: list[Any]) -> list[int]:
    """The places of the levels that a term takes: all, or by name or place."""
    if wanted is None:
        return list(range(len(names)))
    if not isinstance(wanted, (list, tuple, range)):
        raise TypeError(f"{term}: levels: expected a list of levels, got {type(wanted).__name__}")
    found: list[int] = []
    for level in wanted:
        if level in names:
            place = names.index(level)
        elif isinstance(level, int) and 0 <= level < len(names):
            place = level
        else:
            raise ValueError(f"{term}: levels has {level!r}, the student's levels are {names}")
        if place in found:
            raise ValueError(f"{term}: levels has {level!r} twice")
        found.append(place)
    if not found:
        raise ValueError(f"{term}: levels is empty; leave the term out instead")
    return sorted(found)


@dataclass
class FeatureTerm:
    """A checked term on its own levels, and where these are among all."""

    name: str
    places: list[int]
    students: list[Tensor]
    teachers: list[Tensor]
    term: MaskedMSETerm | PearsonTerm
    backend: str
    factor: Any

    def keyword(self) -> dict[str, Any]:
        return {self.name: self.term}


def feature_parts(active: dict[str, dict[str, Any]], given: Given, one_pass: OnePass, norms: bool) -> list[Part]:
    """The feature terms: one part where they can share the read, else one each."""
    levels = read_levels(next(iter(active)), given)
    terms = [check_term(name, keywords, levels, given) for name, keywords in active.items()]
    if len(terms) == 2 and can_share(terms, levels, one_pass):
        return [shared_part(terms, levels, norms)]
    return [single_part(term, levels, one_pass, norms) for term in terms]


def check_term(name: str, keywords: dict[str, Any], levels: Levels, given: Given) -> FeatureTerm:
    """A term on the levels that it takes, as its single function checks it."""
    places = pick(name, keywords.get("levels"), levels.names)
    keywords, factor = split_weight({k: v for k, v in keywords.items() if k != "levels"}, levels.students[0])
    students, teachers = levels.of(places)
    if name == "masked_mse":
        masks = read_masks(given, levels, places)
        students, teachers, term = masked_mse.check(students, teachers, masks, **keywords)
        backend = masked_mse.backend_of(students, teachers, term)
    else:
        students, teachers, term = pearson.check(students, teachers, **keywords)
        backend = ops.backend_for_levels("pearson", students, teachers)
    return FeatureTerm(name, places, students, teachers, term, backend, factor)


def can_share(terms: list[FeatureTerm], levels: Levels, one_pass: OnePass) -> bool:
    """Whether both terms can read the features once: on the same backend, as they are, with weights that may enter."""
    a, b = terms
    as_given = all(s is levels.students[i] for t in terms for i, s in zip(t.places, t.students))
    numbers = all(isinstance(t.factor, float) for t in terms)
    union = [levels.students[i] for i in sorted({*a.places, *b.places})]
    if a.backend != b.backend or not as_given or not numbers:
        return False
    return reads_once(one_pass, a.backend, union, "masked_mse and pearson")


def reads_once(one_pass: OnePass, backend: str, students: list[Tensor], loss: str) -> bool:
    """Whether one pass serves: with the gradient, or, where none is needed, for the values alone."""
    needed = torch.is_grad_enabled() and any(s.requires_grad for s in students)
    if one_pass is False or needed or torch.compiler.is_compiling():
        return takes_one_pass(one_pass, feature_pass.OP, backend, students, loss)
    return ops.has_kernel(feature_pass.OP, backend) and all(s.dtype != torch.float64 for s in students)


def shared_part(terms: list[FeatureTerm], levels: Levels, norms: bool) -> Part:
    """Both terms on the union of their levels, in one pass."""
    union = sorted({i for t in terms for i in t.places})
    placed = {t.name: replace(t.term, levels=[union.index(i) for i in t.places]) for t in terms}
    plan = feature_pass.plan(terms[0].backend, *levels.of(union), norms=norms, **placed)
    names = [levels.names[i] for i in union]
    rows = {t.name: [union.index(i) for i in t.places] for t in terms}
    return Part(plan, lambda loss, details: told_by_values(details["features"], rows, names, norms))


def single_part(term: FeatureTerm, levels: Levels, one_pass: OnePass, norms: bool) -> Part:
    """One term on its own levels."""
    names = [levels.names[i] for i in term.places]
    rows = {term.name: list(range(len(names)))}
    if reads_once(one_pass, term.backend, term.students, term.name):
        plan = feature_pass.plan(term.backend, term.students, term.teachers, norms=norms, **term.keyword())
        return Part(plan, lambda loss, details: told_by_values(details["features"], rows, names, norms), term.factor)
    module = FEATURES[term.name]
    loss = module.two_passes(term.backend, term.students, term.teachers, term.term)

    def told(loss, details):
        values = values_again(term, norms)
        found = told_by_values(values, rows, names, norms)
        return Told({term.name: loss}, found.details, found.norms)

    return Part(loss, told, term.factor)


def told_by_values(values: Tensor, rows: dict[str, list[int]], names: list[Any], norms: bool) -> Told:
    """Terms and details as views of a pass's values; `rows` has each term's levels among `names`."""
    told = Told({})
    columns = {"masked_mse": (MASKED_MSE, MASKED_MSE_NORM), "pearson": (PEARSON, PEARSON_NORM)}
    for name, places in rows.items():
        column, norm = columns[name]
        told.terms[name] = values[-1, column]
        if name == "masked_mse":
            told.details["masked_mse/foreground"] = values[-1, FOREGROUND]
            told.details["masked_mse/background"] = values[-1, BACKGROUND]
        if norms:
            told.norms[name] = values[-1, norm]
        for i in places:
            told.details[f"{name}/{names[i]}"] = values[i, column]
            if norms:
                told.norms[f"{name}/{names[i]}"] = values[i, norm]
    return told


@torch.no_grad()
def values_again(term: FeatureTerm, norms: bool) -> Tensor:
    """A two-pass term's values, for the details: one more read of the features, which a compiled graph drops where
    nobody asks for them.
    """
    students, teachers = [s.detach() for s in term.students], term.teachers
    if ops.has_kernel(feature_pass.OP, term.backend) and all(s.dtype != torch.float64 for s in students):
        return feature_pass.feature_pass(term.backend, students, teachers, (), norms=norms, **term.keyword())[1]
    rows = [_level_values(term, students, teachers, i, norms) for i in range(len(students))]
    return torch.stack([*rows, torch.stack(rows).sum(0)])


def _level_values(term: FeatureTerm, students: list[Tensor], teachers: list[Tensor], i: int, norms: bool) -> Tensor:
    """The values of one level, by the single functions."""
    share = 1 / len(students) if term.term.level_reduction == "mean" else 1.0
    module = FEATURES[term.name]
    nothing = students[i].new_zeros((), dtype=torch.promote_types(students[i].dtype, torch.float32))
    row = [nothing] * feature_pass.COLUMNS

    def loss(student, **changed):
        one = replace(term.term, levels=[0], **changed)
        return share * module.two_passes(term.backend, [student], [teachers[i]], one)

    if term.name == "masked_mse":
        mask = [term.term.masks[i]]
        row[FOREGROUND] = loss(students[i], masks=mask, background_weight=0.0)
        row[BACKGROUND] = loss(students[i], masks=mask, foreground_weight=0.0)
        row[MASKED_MSE] = row[FOREGROUND] + row[BACKGROUND]
    else:
        row[PEARSON] = loss(students[i])
    if norms:
        with torch.inference_mode(False), torch.enable_grad():
            student = students[i].clone().requires_grad_()
            whole = loss(student, **({"masks": mask} if term.name == "masked_mse" else {}))
            (grad,) = torch.autograd.grad(whole, student)
        row[MASKED_MSE_NORM if term.name == "masked_mse" else PEARSON_NORM] = grad.to(row[0].dtype).square().sum()
    return torch.stack([x.to(nothing.dtype) for x in row])
