"""What a recipe is: its options, the terms of the library's objective that it configures, and what it compares.

A recipe is one file beside this one, which opens with its paper, equation and published weights, and one line in
``__init__.py``.
"""

from __future__ import annotations

import dataclasses
import keyword
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..step import Pair, Step, pair_levels

PRESETS = ("published", "scenes")
#: Names of torchvision's losses by what they are of; a detector of your own that names its losses so is weighted alike.
CLASS_LOSSES = ("loss_classifier", "classification")
BOX_LOSSES = ("loss_box_reg", "bbox_regression")
RPN_LOSSES = ("loss_objectness", "loss_rpn_box_reg")


@dataclass(frozen=True)
class Setup:
    """What a recipe is built for.

    student, teacher: detectors; the teacher's is the one inside the frozen teacher. Recipes keep neither.
    seed: of the recipes' own generators.
    image_size: of a picture that the student takes, for a question to its head.
    unlabeled: whether batches without ground truth come as well.
    """

    student: Any
    teacher: Any
    seed: int = 0
    image_size: int = 256
    unlabeled: bool = False

    def pairs(self, kind: str = "features") -> list[Pair]:
        """The pairs of levels."""
        return pair_levels(self.student, self.teacher, kind)

    @property
    def logits(self) -> tuple[str, int]:
        """The activation and the number of the student's class logits, background included, asked of it with two grey
        pictures.
        """
        student = self.student
        training = student.training
        weight = next(student.parameters())
        student.eval()
        try:
            with torch.no_grad():
                features = student.features(torch.full((2, 3, *[self.image_size] * 2), 0.5, device=weight.device))
                if hasattr(student, "head"):
                    logits, _ = student.head(features, [weight.new_tensor([[8.0, 8.0, 40.0, 40.0]])] * 2)
                    return "softmax", logits.shape[1]
                found = student.dense(features)
                return found.activation, found.logits.shape[2]
        finally:
            student.train(training)


class Recipe(nn.Module):
    """The base of all recipes. Its parameters, if any, are adapters: trained with the student, and saved apart.

    A recipe sets ``terms``, the objective's configuration, and gives the objective's inputs for each step; what is not
    among the library's losses it gives as ``extra``.
    """

    name: ClassVar[str]
    Options: ClassVar[type]  #: a frozen dataclass; its defaults are the published weights
    scenes: ClassVar[Mapping[str, Any]] = {}  #: what the preset "scenes" changes
    needs_stages: bool = False
    needs_dense: bool = False  #: whether it reads the dense head's predictions on pictures with ground truth
    needs_unlabeled: bool = False

    def __init__(self, options: Any, setup: Setup) -> None:
        super().__init__()
        self.options = options
        self.terms: dict[str, dict[str, Any]] = {}

    @property
    def generators(self) -> dict[str, torch.Generator]:
        """The recipe's own generators, by attribute: a checkpoint has their states."""
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Generator)}

    def inputs(self, step: Step) -> dict[str, Any]:
        """Keyword arguments of the objective for the terms of this recipe."""
        return {}

    def extra(self, step: Step) -> dict[str, Tensor]:
        """Terms in plain PyTorch, or of single functions of the library, weighted."""
        return {}

    def factor(self, step: Step) -> float:
        """What all terms are multiplied by at a step; 0 leaves them out."""
        return 1.0

    def exclusive(self, step: Step) -> bool:
        """Whether a step is this recipe's alone: all others are left out of it."""
        return False

    def task_weight(self, loss: str, step: Step) -> float:
        """What a loss of the detector's own is multiplied by."""
        return 1.0

    def adapter(self, pairs: list[Pair], wanted: bool | str, **how: Any) -> Adapter | None:
        """An adapter between the pairs' channels: always (True), where channels differ ("auto"), or none (False).

        Raises:
            ValueError: none is wanted and the channels differ.
        """
        student, teacher = [pair.channels[0] for pair in pairs], [pair.channels[1] for pair in pairs]
        if wanted is False:
            if student != teacher:
                raise ValueError(
                    f"{self.name}: without an adapter the channels must agree, and the student has {student}, the "
                    f"teacher {teacher}; adapter=auto gives it 1 x 1 convolutions"
                )
            return None
        adapter = Adapter(student, teacher, always=wanted is True, **how)
        return adapter if any(True for _ in adapter.parameters()) else None


def options_of(kind: type[Recipe], given: Mapping[str, str], preset: str) -> Any:
    """The options of a recipe from ``key=value`` texts over a preset's.

    Raises:
        ValueError: an unknown key or preset, or a value that the key cannot take; the message names them.
    """
    preset = given.get("preset", preset)
    if preset not in PRESETS:
        raise ValueError(f"{kind.name}: preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    hints = get_type_hints(kind.Options)
    found: dict[str, Any] = dict(kind.scenes) if preset == "scenes" else {}
    for key, text in given.items():
        if key == "preset":
            continue
        key += "_" if keyword.iskeyword(key) else ""
        if key not in hints:
            raise ValueError(f"{kind.name}: no key {key!r}; expected {', '.join([*hints, 'preset'])}")
        found[key] = _value(kind.name, key, text, hints[key])
    return kind.Options(**found)


def _value(name: str, key: str, text: str, kind: Any) -> Any:
    """A text as what the option's type says."""
    if get_origin(kind) is Literal:
        choices = {str(choice).lower(): choice for choice in get_args(kind)}
        if text.lower() not in choices:
            raise ValueError(f"{name}: {key}: expected one of {', '.join(choices)}, got {text!r}")
        return choices[text.lower()]
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{name}: {key}: expected true or false, got {text!r}")
        return text.lower() == "true"
    optional = type(None) in get_args(kind)
    if optional and text.lower() == "none":
        return None
    number = next(x for x in (get_args(kind) or (kind,)) if x is not type(None))
    try:
        value = number(text)
    except ValueError:
        raise ValueError(f"{name}: {key}: expected {number.__name__}, got {text!r}") from None
    if isinstance(value, float) and not value - value == 0:  # infinite, or NaN
        raise ValueError(f"{name}: {key}: expected a finite number, got {text!r}")
    positive = "temperature" in key
    if isinstance(value, float) and (value < 0 or (positive and value == 0)):
        raise ValueError(f"{name}: {key}: expected a number {'above' if positive else 'of at least'} 0, got {text!r}")
    return value


def described(kind: type[Recipe]) -> str:
    """The recipe's keys with their published values, and those of the preset "scenes" where it has others."""
    found = []
    for field in dataclasses.fields(kind.Options):
        scenes = f" (scenes: {kind.scenes[field.name]})" if field.name in kind.scenes else ""
        found.append(f"{field.name.rstrip('_')}={field.default}{scenes}")
    return ", ".join(found)
