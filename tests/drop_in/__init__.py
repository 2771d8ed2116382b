"""Which call of another library becomes which call here: the one table behind docs/drop-in.md and its tests.

A file per family of libraries. Each writes, from the published formulas, what the library's calls compute, under the
library's own names and orders of arguments (no library is imported), and lists the rows: their line, our line. Both
are strings that the tests execute and that `python tests/drop_in/page.py` puts into the page. What changes here
changes the page: write it again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One replacement.

    `theirs` is executed as it stands, unless `runs` is what stands for it (code that has no name there). `kind` says
    which inputs (inputs.py); `student` and `teacher` what the library calls them. `same` is what must agree: "both",
    or "value" or "gradient" alone where the library's own differs, and then `differs` says how.
    """

    theirs: str
    ours: str
    kind: str
    scale: str = "the same"
    differs: str = ""
    runs: str = ""
    student: str = ""
    teacher: str = ""
    same: str = "both"


@dataclass(frozen=True)
class Missing:
    """A loss of theirs that has no equal here, and what to do."""

    theirs: str
    why: str


@dataclass(frozen=True)
class Library:
    """A table of the page. `names` are what its lines may use beside kd, torch, nn, F and the inputs."""

    name: str
    student: str
    teacher: str
    rows: Sequence[Row]
    missing: Sequence[Missing] = ()
    names: Mapping[str, Any] = field(default_factory=dict)


def libraries() -> dict[str, Library]:
    """Every table by its name, in the page's order."""
    from . import classification, detectors, language, openmmlab

    every = [
        *openmmlab.LIBRARIES,
        *classification.LIBRARIES,
        *detectors.LIBRARIES,
        *language.LIBRARIES,
    ]
    return {library.name: library for library in every}
