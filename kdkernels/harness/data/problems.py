"""What is wrong with a data folder: counted by kind, named once, left out or refused. Only the bookkeeping."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

#: Every kind of problem, and what becomes of the thing that has it.
KINDS = {
    "malformed entry": "entry left out",
    "duplicate picture": "the later one left out",
    "missing annotation": "picture left out",
    "unreadable annotation": "picture left out",
    "missing picture": "picture left out",
    "unreadable picture": "picture left out",
    "wrong size": "picture left out",
    "unknown picture": "object left out",
    "unknown class": "object left out",
    "malformed box": "object left out",
    "box not finite": "object left out",
    "empty box": "object left out",
    "box outside": "object left out",
    "box partly outside": "box clipped",
    "duplicate object": "the later one left out",
    "duplicate object id": "object kept, with an id of its own",
    "undecodable picture": "another one in its place in training, not scored in evaluation",
}
#: Problems of a kind that are named; the others are counted only.
NAMED = 5


class DataError(ValueError):
    """A data folder that cannot be used; the message names the file and what is wrong with it."""


class Finding(NamedTuple):
    """One problem: plain strings, so that a sample carries it from a worker to the parent."""

    kind: str
    where: str  #: path of the file, with the object's place in it
    what: str


@dataclass
class Problems:
    """The problems of a set of pictures.

    Attributes:
        counts: how many of each kind, each counted once however often it is met.
        examples: the first ``NAMED`` of each kind, as "path: what is wrong".
        say: what an undecodable picture is told to when it is met for the first time; standard error by default.
    """

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    say: Callable[[str], None] | None = field(default=None, repr=False)
    _met: set[tuple[str, str]] = field(default_factory=set, repr=False)

    def add(self, kind: str, where: object, what: str) -> None:
        """Count a problem of a kind in ``KINDS``."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < NAMED:
            examples.append(f"{where}: {what}")

    def meet(self, finding: Finding) -> None:
        """Count a problem that was found while pictures are read, unless it was met before, and say so."""
        if (finding.kind, finding.where) in self._met:
            return
        self._met.add((finding.kind, finding.where))
        self.add(*finding)
        if self.counts[finding.kind] <= NAMED:
            text = f"warning: {finding.where}: {finding.what}; {KINDS[finding.kind]}"
            text += "; more of the kind are counted only" if self.counts[finding.kind] == NAMED else ""
            if self.say is not None:
                self.say(text)
            else:
                print(text, file=sys.stderr, flush=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "say": None}  # who listens stays in the parent

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        """One line per kind: its number, what was done, and the first of them."""
        if not self.counts:
            return "no problems in the data"
        total = sum(self.counts.values())
        lines = [f"{total} problem{'s' if total > 1 else ''} in the data:"]
        for kind, count in self.counts.items():
            lines.append(f"  {kind}: {count} ({KINDS[kind]}); {self.examples[kind][0]}")
        return "\n".join(lines)
