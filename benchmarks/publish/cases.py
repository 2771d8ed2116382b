"""Rows of a results CSV as cases: one loss, shape, dtype and thread count with everybody who was timed on it.

Columns that a file does not have count as empty, so that older and newer files are read alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MODES = ("forward", "backward", "both", "no_grad", "replay")
NEEDED = ("loss", "shape", "dtype", "provider", "setting", "mode", "ms_p20", "ms_p50", "ms_p80")
Row = Mapping[str, Any]


def number(row: Row | None, column: str) -> float | None:
    """A cell as a number; None where the row or the cell is missing, empty or not a finite number."""
    try:
        value = float(row[column])  # type: ignore[index]
    except (TypeError, KeyError, ValueError):
        return None
    return value if math.isfinite(value) else None


def device(row: Row) -> str:
    """What the row was measured on: the GPU's name, or the CPU's."""
    name = row.get("device") or "cpu"
    return str((row.get("cpu") or "unknown CPU") if name == "cpu" else name)


@dataclass
class Case:
    """`rows[name][mode]`, the names in the order of the file: ours at the widest capability, or as CUDA, first."""

    loss: str
    shape: str
    dtype: str
    threads: str
    set: str
    device: str
    on_gpu: bool
    rows: dict[str, dict[str, Row]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        threads = f", {self.threads} thread{'s' * (self.threads != '1')}" if self.threads else ""
        return f"{self.loss}, {self.shape}, {self.dtype}{threads}"

    def kind(self, name: str) -> str:
        """ours, eager, compiled, ..."""
        return next(iter(self.rows[name].values()))["provider"]

    @property
    def ours(self) -> str | None:
        """The name of our default way at the widest capability; a setting with a comma names another way."""
        ways = [name for name in self.rows if self.kind(name) == "ours"]
        return next((name for name in ways if "," not in name), ways[0] if ways else None)

    @property
    def peers(self) -> list[str]:
        return [name for name in self.rows if self.kind(name) != "ours"]

    @property
    def mode(self) -> str:
        """The mode that sums the case up: forward and backward together, where it has one."""
        there = {mode for modes in self.rows.values() for mode in modes}
        return next((mode for mode in ("both", *MODES) if mode in there), "both")

    def ms(self, name: str | None, mode: str, quantile: int = 50) -> float | None:
        """Milliseconds of a provider in a mode."""
        return number(self.rows.get(name or "", {}).get(mode), f"ms_p{quantile}")

    def fastest(self, kind: str, mode: str | None = None) -> str | None:
        """Of a kind's forms and settings the fastest: a peer is shown at its best."""
        timed = [(self.ms(n, mode or self.mode), n) for n in self.rows if self.kind(n) == kind]
        return min(((ms, n) for ms, n in timed if ms is not None), default=(0, None))[1]

    def times(self, name: str | None, peer: str | None, mode: str | None = None) -> float | None:
        """How many times as fast as a peer a provider is."""
        mine, theirs = self.ms(name, mode or self.mode), self.ms(peer, mode or self.mode)
        return theirs / mine if mine and theirs else None

    def of(self, name: str | None, column: str) -> float | None:
        """A column that is the same in all modes of a provider, or that belongs to the mode of the sum."""
        return number(self.rows.get(name or "", {}).get(self.mode), column)

    def floor(self, which: str) -> float | None:
        """Milliseconds of the copy into touched memory or into fresh pages."""
        return next((f for n in self.rows if (f := self.of(n, f"floor_{which}_ms")) is not None), None)

    @property
    def disturbed(self) -> bool:
        """Whether something else ran beside it: its copy into touched memory took over four times as long as at the
        speed of the run's large copy, and not by the half millisecond that a call may cost.
        """
        ms, name = self.floor("touched"), next(iter(self.rows))
        own, large = self.of(name, "floor_gb_per_s"), self.of(name, "copy_gb_per_s")
        return None not in (ms, own, large) and ms > 4 * ms * own / large + 0.5

    @property
    def bytes(self) -> float:
        """What the mode of the sum must move at least."""
        return next((b for n in self.rows if (b := self.of(n, "bytes")) is not None), 0.0)


def group(rows: Iterable[Row]) -> list[Case]:
    """The cases in the order in which they first appear."""
    found: dict[tuple[str, ...], Case] = {}
    for row in rows:
        threads = str(row.get("threads") or "")
        key = (row["loss"], row["shape"], row["dtype"], threads, str(row.get("set") or "default"), device(row))
        name = f"{row['provider']} {row['setting']}".strip()
        on_gpu = (row.get("device") or "cpu") != "cpu"
        found.setdefault(key, Case(*key, on_gpu)).rows.setdefault(name, {})[row["mode"]] = row
    return list(found.values())


def by_loss(cases: Sequence[Case]) -> dict[str, list[Case]]:
    """The cases of each loss."""
    found: dict[str, list[Case]] = {}
    for case in cases:
        found.setdefault(case.loss, []).append(case)
    return found


def largest(cases: Sequence[Case]) -> Case:
    """The case that moves most: the first of several."""
    return max(cases, key=lambda case: case.bytes)
