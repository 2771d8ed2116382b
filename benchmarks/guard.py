"""Has anything of ours become slower? `python benchmarks/guard.py NEW.csv [COMMITTED.csv]`: 1 and its name if so.

Times of two runs cannot be compared: the machine is never the same. So ours is divided by what was timed beside it in
the same run, eager, compiled, Liger and the copy, and the two runs' ratios are compared. A row has become slower if

- against at least one of these its ratio grew beyond the spread of both runs: the interval from our p20 over the
  other's p80 to our p80 over the other's p20 lies wholly above that of the committed run; and
- against all of these its ratio of medians grew by more than our own spread, p50 to p80 or p20 to p50: a torch.compile
  that became faster, or a copy that became slower because another process took the bandwidth, is not our doing.

Why p20 and p80: they lie 0.84 standard deviations of a sample beside the median, so two intervals that do not meet,
each widened by two providers, are 3.4 deviations apart. A median of nine samples, the fewest that are taken, varies by
0.42 deviations, the quotient of two runs' quotients of medians by twice that: a false alarm needs four standard
deviations of chance, about one row in ten thousand over all baselines, if both runs are alike. The price: a small loss
in a noisy row goes unseen, and the last line says how small. The copy's spread is not in the rows; ours stands for it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import report
from pages import has_rows
from publish.cases import Case, group
from publish.tables import MODE_NAMES, figures

RESULTS = Path(__file__).resolve().parent / "results"
BASELINES = ("eager", "compiled", "liger", "copy")
Key = tuple[str, str, str, str]


@dataclass(frozen=True)
class Ratio:
    """Ours over a baseline of the same run: of the medians, and how low and high p20 and p80 let it be."""

    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{figures(self.middle)} ({figures(self.low)} - {figures(self.high)})"


@dataclass(frozen=True)
class Change:
    """A row of ours in both runs: (old, new) for each baseline that both have."""

    title: str
    own: float  # how many times its median p80 was, or p20 in the new run: the larger
    ratios: dict[str, tuple[Ratio, Ratio]]

    @property
    def slower(self) -> bool:
        pairs = self.ratios.values()
        beyond = any(new.low > old.high for old, new in pairs)
        return beyond and all(new.middle > self.own * old.middle for old, new in pairs)

    @property
    def faster(self) -> bool:
        pairs = self.ratios.values()
        beyond = any(new.high < old.low for old, new in pairs)
        return beyond and all(self.own * new.middle < old.middle for old, new in pairs)

    @property
    def needed(self) -> float:
        """How many times slower the new row would have to be to be named, by its sharpest baseline."""
        return min(old.high / old.middle * (new.middle / new.low) for old, new in self.ratios.values())

    def __str__(self) -> str:
        parts = [
            f"{kind} {old} -> {new}, x {figures(new.middle / old.middle)}" for kind, (old, new) in self.ratios.items()
        ]
        return f"{self.title}: over {'; over '.join(parts)}"


def _ratio(case: Case, name: str, kind: str, mode: str) -> Ratio | None:
    low, middle, high = (case.ms(name, mode, q) for q in (20, 50, 80))
    if kind == "copy":
        floor = case.floor("touched")
        base = (floor * low / middle, floor, floor * high / middle) if floor and low and middle and high else ()
    else:
        peer = case.fastest(kind, mode)
        base = tuple(case.ms(peer, mode, q) for q in (20, 50, 80))
    if not all((low, middle, high, *base)) or not base:
        return None
    return Ratio(middle / base[1], low / base[2], high / base[0])


def _key(case: Case) -> Key:
    return case.loss, case.shape, case.dtype, case.threads


def compare(new: Sequence[Case], old: Sequence[Case]) -> Iterator[Change]:
    """The rows of ours in cases of both runs, with their ratios: none without a time or a baseline in both."""
    before = {_key(case): case for case in old}
    for case in new:
        committed = before.get(_key(case))
        if committed is None:
            continue
        for name, mode in ((n, m) for n, modes in case.rows.items() if case.kind(n) == "ours" for m in modes):
            if name in committed.rows:  # else `missing` names it
                own = _own(committed, case, name, mode)
                pairs = {k: (_ratio(committed, name, k, mode), _ratio(case, name, k, mode)) for k in BASELINES}
                there = {kind: pair for kind, pair in pairs.items() if own and None not in pair}
                yield Change(f"{case.title}: {name}, {MODE_NAMES.get(mode, mode)}", own or 1.0, there)


def _own(old: Case, new: Case, name: str, mode: str) -> float | None:
    spans = [(old.ms(name, mode, 50), old.ms(name, mode, 80)), (new.ms(name, mode, 20), new.ms(name, mode, 50))]
    return max(high / low for low, high in spans) if all(x for pair in spans for x in pair) else None


def missing(some: Sequence[Case], others: Sequence[Case]) -> list[str]:
    """What `some` have and `others` have not: cases, and providers of ours in cases of both."""
    there = {_key(case): case for case in others}
    found = []
    for case in some:
        if _key(case) not in there:
            found.append(case.title)
        else:
            other = there[_key(case)]
            found += [f"{case.title}: {n}" for n in case.rows if case.kind(n) == "ours" and n not in other.rows]
    return found


def _committed(new: Sequence[Case]) -> Path | None:
    for path in sorted(RESULTS.glob("*.csv")):
        if has_rows(path) and group(report.read(path))[0].device == new[0].device:
            return path
    return None


def _read(parser: argparse.ArgumentParser, argument: str, path: Path) -> list[Case]:
    if not path.is_file() or not has_rows(path):
        parser.error(f"{argument}: {path} {'has no rows of benchmarks' if path.is_file() else 'is not a file'}")
    try:
        cases = group(report.read(path))
    except ValueError as error:
        parser.error(f"{argument}: {error}")
    devices = {case.device for case in cases}
    if len(devices) != 1:
        parser.error(f"{argument}: {path} has rows of {len(devices)} devices, where one is compared: {sorted(devices)}")
    return cases


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares; 1 if a row has become slower, 0 if none has, 2 if nothing can be compared."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("new", type=Path, help="rows of the run to judge")
    parser.add_argument("committed", type=Path, nargs="?", help="default: this device's file in benchmarks/results/")
    options = parser.parse_args(arguments)
    new = _read(parser, "new", options.new)
    path = options.committed or _committed(new)
    if path is None:
        parser.error(f"committed: benchmarks/results/ has no rows of {new[0].device}; name the file to compare with")
    old = _read(parser, "committed", path)
    if new[0].device != old[0].device:
        parser.error(f"committed: made on {old[0].device}, new on {new[0].device}: even ratios differ between machines")
    changes = list(compare(new, old))
    judged = [change for change in changes if change.ratios]
    lists = {
        "slower": [str(change) for change in judged if change.slower],
        "faster": [str(change) for change in judged if change.faster],
        "not judged, no time or no baseline in both": [change.title for change in changes if not change.ratios],
        "only in the new file": missing(new, old),
        "only in the committed file": missing(old, new),
    }
    for name, lines in lists.items():
        for line in lines:
            print(f"{name}: {line}")
    if not judged:
        print(f"guard: no row of ours with a baseline is both in {options.new} and in {path}", file=sys.stderr)
        return 2
    needed = sorted(change.needed for change in judged)
    seen, worst = (figures(100 * (x - 1)) for x in (report.quantile(needed, 0.5), needed[-1]))
    print(
        f"{len(judged)} rows of ours compared with {path.name}: {len(lists['slower'])} slower, {len(lists['faster'])} "
        f"faster. To be named, half of the rows would have to lose up to {seen} %, the noisiest {worst} %."
    )
    return 1 if lists["slower"] else 0


if __name__ == "__main__":
    sys.exit(main())
