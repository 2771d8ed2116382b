"""What a compiled kernel must satisfy, which kernels are excused and why, and the recorded ranges."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gates.flow import Counts

# Excuses, each a pattern of "op.kernel", "op.kernel case" or "op.kernel case architecture", which must match whole, and
# the reason.
FLOAT64 = {
    r".*finish.*": "one block adds up the partial results of a whole launch, in float64 on purpose",
    r"bounded_regression\.bounded_regression_batch_gate": "one block compares two means over all rows, in float64",
    r"pearson\.(pearson)?_total": "one block adds up the totals that the finishing kernel left",
    r"detection_distillation\.feature_planes": "one thread makes statistics of a channel's moments, once",
    r"detection_distillation\.feature_(tiles|pixels)": "one warp of a block finds the scales of masked MSE's regions",
}
CONVERSIONS = {
    r"bounded_regression\.bounded_regression_(rows|errors)": "a float64 target is rounded as it is read",
    r"detection_distillation_heads\.detection_distillation_heads": "the same target, in the launch of all heads",
}
NARROW_LOADS = {
    r".*finish.*": "reads the partial results, not features or rows",
    r"bounded_regression\.bounded_regression_batch_gate": "reads the partial results, not rows",
    r"pearson\.(pearson)?_total": "reads the partial results, not features",
    r"rows\.count|\w+\.count_rows<\w+>": "reads class indices or flags, a few bytes per row",
    r"masks\.draw.*": "reads boxes, of which there are few; masks are what it writes",
    r"bounded_regression\.bounded_tile .* gfx942": "a row is four values: 8 bytes of a 16-bit dtype, a lane's own row",
}
# Triton cannot peel an unaligned head inside a tile.
_TRITON_ODD = {
    r"(masked_mse|pearson)\.\w+ .* channels_last 255": "rows that begin at any address; necks have 256 channels",
    r"\w+\.\w*tile(_gradient)? (81|1999).*": "short rows of odd width: values one by one, by neighbouring threads",
}
NARROW_LOADS |= _TRITON_ODD
# What one compiler does with code that no other spills; known, and slower than it should be, but right.
SPILLS = {
    r"binary_kl\.binary_kl_tile 1999 sm_100": "Triton's ptxas for Blackwell spills; elsewhere it takes 96 to 142",
    r"masked_mse\._backward 25x41 sm_100": "the same ptxas stops at 48 registers and spills 16 bytes; others take 56",
}
NARROW_STORES = {
    **_TRITON_ODD,
    r"bounded_regression\.bounded_tile_gradient .*": "a row is four values: 8 bytes of a 16-bit dtype",
    r"masks\.draw .*": "rows of masks begin anywhere, and masks are under one percent of what a loss moves",
}

# Kernels that write something of the size of features, rows or pixels.
WRITES_MUCH = re.compile(r"grad|backward|draw")

# How far registers may move from what was recorded with the same compiler: what registers are handed out in.
SLACK = 8


@dataclass(frozen=True)
class Kernel:
    """A kernel as one compiler made it for one architecture. `case` is the shape that it was specialised for."""

    op: str
    name: str
    backend: str
    arch: str
    dtypes: str
    case: str
    compiler: str  # nvcc's release or Triton's version
    registers: int
    scalar_registers: int  # AMD's; 0 elsewhere
    spill_bytes: int
    local_bytes: int  # per thread
    shared_bytes: int  # static; Triton: all
    counts: Counts
    shared: bool = False  # by several ops, so that one op's cases need not launch all of its variants

    @property
    def key(self) -> tuple[str, ...]:
        return (self.op, self.name, self.backend, self.arch, self.dtypes, self.case)


@dataclass(frozen=True)
class Range:
    """Registers that were recorded, and narrow loads in the main loop at most; with which compilers."""

    registers_low: int
    registers_high: int
    narrow_loads: int
    compilers: frozenset[str]

    def including(self, other: Range) -> Range:
        return Range(
            min(self.registers_low, other.registers_low),
            max(self.registers_high, other.registers_high),
            max(self.narrow_loads, other.narrow_loads),
            self.compilers | other.compilers,
        )


NUMBERS = ("registers_low", "registers_high", "narrow_loads")
KEY = ("op", "kernel", "backend", "architecture", "dtypes", "case")
Ranges = dict[tuple[str, ...], Range]


def excuse(kernel: Kernel, excuses: dict[str, str]) -> str | None:
    """Why a gate does not apply to the kernel, or None."""
    name = f"{kernel.op}.{kernel.name}"
    for pattern, reason in excuses.items():
        if any(
            re.fullmatch(pattern, x) for x in (name, f"{name} {kernel.case}", f"{name} {kernel.case} {kernel.arch}")
        ):
            return reason
    return None


def compilers(ranges: Ranges, backend: str) -> frozenset[str]:
    """Those that ranges were recorded with. What another compiler makes is held against the other gates alone."""
    return frozenset().union(*(x.compilers for key, x in ranges.items() if key[2] == backend))


def failures(kernel: Kernel, ranges: Ranges) -> list[str]:
    """The gates that the kernel fails; empty: it passes."""
    counts = kernel.counts
    found = []
    spills = excuse(kernel, SPILLS)
    if kernel.spill_bytes and not spills:
        found.append(f"{kernel.spill_bytes} bytes of spills")
    if (kernel.local_bytes or counts.local_bytes) and not spills:
        found.append(f"local memory ({kernel.local_bytes} bytes, {counts.local_bytes} moved)")
    if counts.float64 and not excuse(kernel, FLOAT64):
        found.append(f"{counts.float64} float64 instructions")
    if counts.conversions and not excuse(kernel, FLOAT64) and not excuse(kernel, CONVERSIONS):
        found.append(f"{counts.conversions} conversions from or to float64 in loops")
    if counts.atomics:
        found.append(f"{counts.atomics} atomics")
    if not counts.wide_loads and not excuse(kernel, NARROW_LOADS):
        found.append("no 16-byte loads")
    if WRITES_MUCH.search(kernel.name) and not counts.wide_stores and not excuse(kernel, NARROW_STORES):
        found.append("no 16-byte stores")
    recorded = ranges.get(kernel.key)
    if recorded is None:
        if kernel.compiler in compilers(ranges, kernel.backend):
            found.append("no recorded range (--record)")
    elif kernel.compiler in recorded.compilers:
        low, high = recorded.registers_low - SLACK, recorded.registers_high + SLACK
        if not low <= kernel.registers <= high:
            found.append(f"{kernel.registers} registers, recorded {recorded.registers_low}-{recorded.registers_high}")
        if counts.narrow_loads and counts.wide_loads and not recorded.narrow_loads:
            found.append(f"{counts.narrow_loads} narrow loads in the main loop, recorded 0")
    return found


def range_of(kernel: Kernel) -> Range:
    return Range(kernel.registers, kernel.registers, kernel.counts.narrow_loads, frozenset([kernel.compiler]))


def read_ranges(path: Path) -> Ranges:
    """The recorded ranges; none where there is no file."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        tuple(row[k] for k in KEY): Range(*(int(row[n]) for n in NUMBERS), frozenset(row["compilers"].split()))
        for row in rows
    }


def write_ranges(path: Path, ranges: Ranges) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*KEY, *NUMBERS, "compilers"])
        for key, x in sorted(ranges.items(), key=lambda item: item[0]):
            writer.writerow([*key, *(getattr(x, name) for name in NUMBERS), " ".join(sorted(x.compilers))])


def record(ranges: Ranges, kernels: Iterable[Kernel], *, widen: bool) -> Ranges:
    """The ranges with these kernels' in place of those of the same ops, backends and architectures; or, to `widen`
    them by what another version of a compiler makes, beside them.
    """
    kernels = list(kernels)
    replaced = {k.key for k in kernels}
    scope = {(k.op, k.backend, k.arch) for k in kernels if not k.shared}
    kept = {
        key: x for key, x in ranges.items() if widen or (key not in replaced and (key[0], key[2], key[3]) not in scope)
    }
    for kernel in kernels:
        new = range_of(kernel)
        kept[kernel.key] = kept[kernel.key].including(new) if kernel.key in kept else new
    return kept
