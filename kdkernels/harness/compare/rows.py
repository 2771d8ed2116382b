"""The rows of a comparison: from the texts that ``--compare`` takes, and the ablations of the papers by name."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from ..export import file_of
from ..recipes import RecipeText, parse

_CHEN = "chen2017:classes={classes},boxes={boxes},hint={hint}"


def _chen(title: str, classes: str = "hard", boxes: str = "none", hint: str = "none") -> str:
    return f"{title}={_CHEN.format(classes=classes, boxes=boxes, hint=hint)}"


#: Rows of the papers' ablations, ``title=row``. DeFeat: its tables 3 to 6; Chen et al.: table 4; PKD: its comparison of
#: Pearson features with plain ones.
TABLES = {
    "defeat-masks": (
        "student=none",
        *(f"{kind}=defeat:head=false,region=fg,masks={kind}" for kind in ("fine", "gaussian", "gt", "random", "all")),
    ),
    "defeat-regions": (
        "student=none",
        "neck, objects=defeat:head=false,region=fg",
        "neck, background=defeat:head=false,region=bg",
        "neck, both=defeat:head=false",
        "neck, whole=defeat:head=false,masks=all",
        "backbone, both=defeat:head=false,neck=false,backbone=true",
        "backbone and neck, both=defeat:head=false,backbone=true",
    ),
    "defeat-proposals": (
        "student=none",
        "student's proposals=defeat:neck=false,proposals=student",
        "teacher's proposals=defeat:neck=false,proposals=teacher",
    ),
    "defeat-rows": (
        "student=none",
        *(
            f"{title}=defeat:neck=false,rows={kind}"
            for title, kind in (
                ("positive", "pos"),
                ("negative", "neg"),
                ("as many negative", "subneg"),
                ("both, decoupled", "all"),
            )
        ),
        "all, one weight=hinton:alpha=0",
    ),
    "chen2017-parts": (
        _chen("baseline"),
        _chen("L2", boxes="l2"),
        _chen("L2-B", boxes="bounded"),
        _chen("CLS", classes="plain"),
        _chen("CLS-W", classes="weighted"),
        _chen("Hint", hint="plain"),
        _chen("Hint-A", hint="adapter"),
        _chen("L2-B + CLS-W", "weighted", "bounded"),
        _chen("L2-B + CLS-W + Hint-A", "weighted", "bounded", "adapter"),
    ),
    "pkd-mimic": ("student=none", "mimic=mimic", "PKD=pkd", "PKD, teacher's neck frozen=pkd+inherit=fpn+freeze=fpn"),
}
COMPARE = (
    "train a student per row and compare them: none, a recipe, several joined by +, with inherit=PARTS and "
    "freeze=PARTS among them (pkd+inherit=fpn), best for the recipe of the best row (best+inherit=fpn); or the name of "
    f"a table: {', '.join(TABLES)}"
)


class Row(NamedTuple):
    """One row of a comparison: a student like any other. ``best``: it has the recipes of the best row as well."""

    title: str
    recipes: list[RecipeText]
    inherit: tuple[str, ...] = ()
    freeze: tuple[str, ...] = ()
    best: bool = False

    @property
    def plain(self) -> bool:
        """Whether it is the student alone."""
        return not (self.recipes or self.inherit or self.freeze or self.best)

    @property
    def text(self) -> str:
        """What ``--compare`` takes for the row."""
        parts = ["best"] * self.best + [recipe.text for recipe in self.recipes] or ["none"] * self.plain
        for key, names in (("inherit", self.inherit), ("freeze", self.freeze)):
            parts += [f"{key}={'/'.join(names)}"] * bool(names)
        return "+".join(parts)

    @property
    def options(self) -> str:
        """Every weight and option of the row's recipes, in words."""
        return "; ".join(
            f"{recipe.kind.name} "
            + ", ".join(f"{key.rstrip('_')}={value}" for key, value in asdict(recipe.options).items())
            for recipe in self.recipes
        )


def rows(texts: list[str], preset: str) -> list[Row]:
    """The rows that texts, or the names of tables, stand for; one that inherits gets its control, which only inherits.

    Of rows that a table shares with another table or with a text, however titled, the first is kept.

    Raises:
        ValueError: a text that is none; the message names it.
    """
    found: list[Row] = []
    of_tables: list[Row] = []

    def among(row: Row, others: list[Row]) -> bool:
        return row._replace(title="") in [other._replace(title="") for other in others]

    for text in texts:
        if text in TABLES:
            table = [_row(*_titled(entry), preset) for entry in TABLES[text]]
            found += [row for row in table if not among(row, found)]
            of_tables += table
        elif texts.count(text) > 1:
            raise ValueError(f"{text!r} is given twice")
        elif not among(row := _row(text, text, preset), of_tables):
            found.append(row)
    for row in [row for row in found if row.inherit and (row.recipes or row.best)]:
        control = Row("", [], row.inherit, row.freeze)
        if not among(control, found):
            found.append(control._replace(title=control.text))
    if any(row.best for row in found) and not candidates(found):
        raise ValueError("'best': no other row has recipes alone, of which one could be the best")
    files: dict[str, str] = {}
    for row in found:
        # Not the title alone: two that differ in blanks or case would write the same students.
        file = file_of(Path(), row.title).name.casefold()
        if file in files:
            other = "" if files[file] == row.title else f", the other time as {files[file]!r}"
            raise ValueError(f"{row.title!r} is given twice{other}")
        files[file] = row.title
    return found


def candidates(found: list[Row]) -> list[Row]:
    """The rows that "best" may stand for: with recipes, and nothing inherited or frozen."""
    return [row for row in found if row.recipes and not (row.best or row.inherit or row.freeze)]


def _titled(entry: str) -> tuple[str, str]:
    title, _, text = entry.partition("=")
    return title, text


def _row(title: str, text: str, preset: str) -> Row:
    recipes, inherit, freeze, best = [], (), (), False
    if text != "none" and "none" in text.split("+"):
        raise ValueError(f"{text!r}: none is the student alone, and joins nothing")
    for part in text.split("+"):
        key, _, value = part.partition("=")
        if key in ("inherit", "freeze"):
            parts = tuple(filter(None, value.split("/")))
            if not parts:
                raise ValueError(f"{text!r}: {key}= needs parts, as in {key}=fpn/rpn")
            if inherit if key == "inherit" else freeze:
                raise ValueError(f"{text!r}: {key}= is given twice; several parts are {key}=fpn/rpn")
            inherit, freeze = (parts, freeze) if key == "inherit" else (inherit, parts)
        elif part == "best":
            if best:
                raise ValueError(f"{text!r}: best is given twice")
            best = True
        elif part != "none":
            recipes.append(parse(part, preset))
    return Row(title, recipes, inherit, freeze, best)
