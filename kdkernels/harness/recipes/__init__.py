"""Recipes of distillation, one file each, by the names that ``--recipe`` takes."""

from __future__ import annotations

from typing import NamedTuple

from .chen2017 import Chen2017
from .combined import Combined
from .cwd import CWD
from .defeat import DeFeat
from .fgfi import FGFI
from .fitnets import FitNets
from .hinton import Hinton
from .logits import Logits
from .mimic import Mimic
from .noisy_teacher import NoisyTeacher
from .objectness import Objectness
from .pkd import PKD
from .recipe import PRESETS, Recipe, Setup, described, options_of
from .soft_labels import SoftLabels
from .tadf import TADF

RECIPES: dict[str, type[Recipe]] = {
    kind.name: kind
    for kind in (
        Combined,
        DeFeat,
        PKD,
        Chen2017,
        Mimic,
        FGFI,
        TADF,
        FitNets,
        CWD,
        Hinton,
        Logits,
        NoisyTeacher,
        SoftLabels,
        Objectness,
    )
}

__all__ = ["PRESETS", "RECIPES", "Recipe", "RecipeText", "Setup", "described", "parse"]


class RecipeText(NamedTuple):
    """A recipe as it was asked for, its options checked; it becomes a :class:`Recipe` once there are detectors."""

    text: str
    kind: type[Recipe]
    options: object

    def build(self, setup: Setup) -> Recipe:
        """The recipe between two detectors.

        Raises:
            ValueError: the detectors are not such that the recipe makes sense; the message is a sentence that says why.
        """
        try:
            return self.kind(self.options, setup)
        except ValueError as error:
            message = str(error)
            named = message.startswith(f"{self.kind.name}: ")
            raise ValueError(message if named else f"{self.kind.name}: {message}") from None


def parse(text: str, preset: str = "published") -> RecipeText:
    """``NAME[:key=value,...]``, as ``--recipe`` takes it.

    Args:
        preset: the weights that keys change, "published" or "scenes"; the key ``preset`` of the text goes before it.

    Raises:
        ValueError: an unknown recipe, key or value; the message names it and what is possible.
    """
    name, _, rest = text.partition(":")
    if name not in RECIPES:
        raise ValueError(f"no recipe {name!r}; expected one of {', '.join(RECIPES)}")
    given: dict[str, str] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = (x.strip() for x in part.partition("="))
        if not equals:
            raise ValueError(f"{name}: expected key=value, got {part!r}")
        if key in given:
            raise ValueError(f"{name}: {key} is given twice")
        given[key] = value
    return RecipeText(text, RECIPES[name], options_of(RECIPES[name], given, preset))
