"""What a compiled kernel must satisfy, which kernels are excused and why, and the recorded ranges."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from gates.flow import Counts

# Excuses, each a pattern of "op.kernel" or "op.kernel case", which must match whole, and the reason.
FLOAT64 = {
    r".*finish.*": "one block adds up the partial results of a whole launch, in float64 on purpose",
    r"bounded_regression\.bounded_regression_batch_gate": "one block compares two means over all rows, in float64",
}
CONVERSIONS = {
    r"bounded_regression\.bounded_regression_(rows|errors)": "a float64 target is rounded as it is read",
}
NARROW_LOADS = {
    r".*finish.*": "reads the partial results, not features or rows",
    r"bounded_regression\.bounded_regression_batch_gate": "reads the partial results, not rows",
    r"rows\.count": "reads class indices or flags, a few bytes per row",
}
# Triton cannot peel an unaligned head inside a tile.
_TRITON_ODD = {
    r"masked_mse\.\w+ .* channels_last 255": "rows of channels that begin at any address; necks have 256 channels",
    r"\w+\.kl_tile(_gradient)? (81|1999).*": "short rows of odd width: values one by one, by neighbouring threads",
}
NARROW_LOADS |= _TRITON_ODD
NARROW_STORES = dict(_TRITON_ODD)

# Kernels that write something of the student's size.
WRITES_GRADIENT = re.compile(r"grad|backward")

# Compilers' versions differ by so many registers on unchanged source (63 and 72 were seen).
SLACK = 10


@dataclass(frozen=True)
class Kernel:
    """A kernel as one compiler made it for one architecture. `case` is the shape that it was specialised for."""

    op: str
    name: str
    backend: str
    arch: str
    dtypes: str
    case: str
    registers: int
    scalar_registers: int  # AMD's; 0 elsewhere
    spill_bytes: int
    local_bytes: int  # per thread
    shared_bytes: int  # static; Triton: all
    counts: Counts

    @property
    def key(self) -> tuple[str, ...]:
        return (self.op, self.name, self.backend, self.arch, self.dtypes, self.case)


@dataclass(frozen=True)
class Range:
    """Registers that were recorded, over the compilers used, and narrow loads in the main loop, at most."""

    registers_low: int
    registers_high: int
    narrow_loads: int

    def including(self, other: Range) -> Range:
        return Range(
            min(self.registers_low, other.registers_low),
            max(self.registers_high, other.registers_high),
            max(self.narrow_loads, other.narrow_loads),
        )


KEY = ("op", "kernel", "backend", "architecture", "dtypes", "case")
Ranges = dict[tuple[str, ...], Range]


def excuse(kernel: Kernel, excuses: dict[str, str]) -> str | None:
    """Why a gate does not apply to the kernel, or None."""
    name = f"{kernel.op}.{kernel.name}"
    for pattern, reason in excuses.items():
        if re.fullmatch(pattern, name) or re.fullmatch(pattern, f"{name} {kernel.case}"):
            return reason
    return None


def failures(kernel: Kernel, ranges: Ranges) -> list[str]:
    """The gates that the kernel fails; empty: it passes."""
    counts = kernel.counts
    found = []
    if kernel.spill_bytes:
        found.append(f"{kernel.spill_bytes} bytes of spills")
    if kernel.local_bytes or counts.local_bytes:
        found.append(f"local memory ({kernel.local_bytes} bytes, {counts.local_bytes} moved)")
    if counts.float64 and not excuse(kernel, FLOAT64):
        found.append(f"{counts.float64} float64 instructions")
    if counts.conversions and not excuse(kernel, FLOAT64) and not excuse(kernel, CONVERSIONS):
        found.append(f"{counts.conversions} conversions from or to float64 in loops")
    if counts.atomics:
        found.append(f"{counts.atomics} atomics")
    if not counts.wide_loads and not excuse(kernel, NARROW_LOADS):
        found.append("no 16-byte loads")
    if WRITES_GRADIENT.search(kernel.name) and not counts.wide_stores and not excuse(kernel, NARROW_STORES):
        found.append("no 16-byte stores")
    recorded = ranges.get(kernel.key)
    if recorded is None:
        found.append("no recorded range (--record)")
    else:
        low, high = recorded.registers_low - SLACK, recorded.registers_high + SLACK
        if not low <= kernel.registers <= high:
            found.append(f"{kernel.registers} registers, recorded {recorded.registers_low}-{recorded.registers_high}")
        if counts.narrow_loads and counts.wide_loads and not recorded.narrow_loads:
            found.append(f"{counts.narrow_loads} narrow loads in the main loop, recorded 0")
    return found


def range_of(kernel: Kernel) -> Range:
    return Range(kernel.registers, kernel.registers, kernel.counts.narrow_loads)


def read_ranges(path: Path) -> Ranges:
    """The recorded ranges; none where there is no file."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {tuple(row[k] for k in KEY): Range(*(int(row[f.name]) for f in fields(Range))) for row in rows}


def write_ranges(path: Path, ranges: Ranges) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*KEY, *(f.name for f in fields(Range))])
        for key in sorted(ranges):
            writer.writerow([*key, *(getattr(ranges[key], f.name) for f in fields(Range))])


def record(ranges: Ranges, kernels: Iterable[Kernel], *, widen: bool) -> Ranges:
    """The ranges with these kernels' in place of those of the same ops, backends and architectures; or, to `widen`
    them by what another version of a compiler makes, beside them.
    """
    kernels = list(kernels)
    scope = {(k.op, k.backend, k.arch) for k in kernels}
    kept = {key: x for key, x in ranges.items() if widen or (key[0], key[2], key[3]) not in scope}
    for kernel in kernels:
        new = range_of(kernel)
        kept[kernel.key] = kept[kernel.key].including(new) if kernel.key in kept else new
    return kept
