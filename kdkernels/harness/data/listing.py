"""What an annotation file says, whatever its format: pictures, boxes, classes. Joining several lists, and no pixels."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from .problems import DataError, Problems


class Object(NamedTuple):
    """One annotated object; ``box`` is x1, y1, x2, y2 in pixels of the file, edges between pixels, the first at 0."""

    box: tuple[float, float, float, float]
    category: int
    crowd: bool = False  #: COCO's crowd region: not trained on, ignored in evaluation
    difficult: bool = False  #: VOC's difficult object: the same
    area: float | None = None  #: COCO's own area, of the segmentation; None: the box's


@dataclass
class Record:
    """One picture."""

    path: Path
    id: int
    name: str  #: as the annotations call it
    width: int | None = None  #: as annotated; None where nothing usable is said
    height: int | None = None
    objects: list[Object] = field(default_factory=list)


@dataclass
class Listing:
    """One annotated set. ``categories`` are ids and names, by id; the first has the label 1."""

    source: Path
    records: list[Record]
    categories: list[tuple[int, str]]
    digest: str

    @property
    def names(self) -> list[str]:
        return [name for _, name in self.categories]


def finite_box(values: Any, where: str, problems: Problems) -> tuple[float, ...] | None:
    """Four finite numbers, or None and a problem."""
    numbers = isinstance(values, (list, tuple)) and len(values) == 4
    if not numbers or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        problems.add("malformed box", where, f"its box is {values!r}, not four numbers")
        return None
    if not all(math.isfinite(v) and abs(v) < 1e9 for v in values):
        problems.add("box not finite", where, f"its box is {values!r}")
        return None
    return tuple(float(v) for v in values)


def positive(value: Any) -> int | None:
    """An annotated width or height; None where it says nothing (missing, 0, not a number)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return int(value) if value >= 1 else None


def joined(listings: list[Listing], classes: Iterable[str] | None, problems: Problems) -> Listing:
    """One set of all. Picture ids stay where they are unique; a later set that uses one again is moved behind.

    Categories that are the same everywhere stay as they are. Otherwise they are joined by name: ids count from 1 in the
    order of ``classes`` (another set's ``category_names``), or of first appearance.

    Raises:
        DataError: not one class of a set is among ``classes``, or two of them have the same name.
    """
    wanted = list(classes) if classes is not None else None
    first = listings[0].categories
    if any(listing.categories != first for listing in listings) or (wanted and wanted != listings[0].names):
        names = wanted or list(dict.fromkeys(name for listing in listings for name in listing.names))
        if len(set(names)) < len(names):
            raise DataError(f"{listings[0].source}: classes cannot be joined by name, two have the same: {_few(names)}")
        listings = [_renamed(listing, names, problems) for listing in listings]
    records, used = [], set()
    for listing in listings:
        if not used.isdisjoint(record.id for record in listing.records):
            shift = max(used) + 1 - min(record.id for record in listing.records)
            listing = replace(listing, records=[replace(record, id=record.id + shift) for record in listing.records])
        records += listing.records
        used |= {record.id for record in listing.records}
    digest = listings[0].digest
    if len(listings) > 1 or listings[0].categories != first:
        parts = [*(listing.digest for listing in listings), *listings[0].names]
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return Listing(listings[0].source, records, listings[0].categories, digest)


def _renamed(listing: Listing, names: list[str], problems: Problems) -> Listing:
    if not set(names) & set(listing.names):
        raise DataError(f"{listing.source}: none of its classes ({_few(listing.names)}) is among {_few(names)}")
    number = {name: index for index, name in enumerate(names, start=1)}
    called = dict(listing.categories)
    records = []
    for record in listing.records:
        objects = []
        for index, item in enumerate(record.objects):
            name = called[item.category]
            if name in number:
                objects.append(item._replace(category=number[name]))
            else:
                problems.add("unknown class", f"{record.path}, object {index}", f"class {name!r} is not trained on")
        records.append(replace(record, objects=objects))
    return replace(listing, records=records, categories=list(enumerate(names, start=1)))


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
