"""Value and gradient error of every loss, dtype and backend on ordinary and hard inputs, beside eager and Liger.

`python benchmarks/numerics.py` computes everything (minutes), replaces results/numerics.csv and makes docs/numerics.md
of it. `--check` only says whether the page is that of the CSV and whether the CSV has every cell; `--quick` computes a
small part again and holds it to the CSV. Inputs live in precision/cases.py, the page in precision/page.py.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)] if str(HERE) not in sys.path else []
if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by triton when it is imported

import report  # noqa: E402
from harness import kdkernels  # noqa: E402
from precision import page, providers, table  # noqa: E402
from precision.values import Case  # noqa: E402

CSV = HERE / "results" / "numerics.csv"
PAGE = HERE.parent / "docs" / "numerics.md"
# What `--quick` computes again: of each loss, one ordinary input and the ones on which kernels have erred.
QUICK = ("ordinary", "close sides", "p_t = 0", "rows all -inf", "inf, both", "large offset", "huge", "empty mask")
QUICK_DTYPES = ("float32", "bfloat16")


def say(line: str) -> None:
    """Progress, to stderr."""
    print(f"numerics: {line}", file=sys.stderr, flush=True)


def environment() -> dict[str, str]:
    """What the numbers depend on besides the code."""
    found = {"cpu": report.cpu_model(), "date": datetime.date.today().isoformat()}
    for column, package in (("torch", "torch"), ("triton", "triton"), ("liger", "liger-kernel")):
        found[column] = (
            importlib.metadata.version(package) if importlib.util.find_spec(package.replace("-", "_")) else ""
        )
    return {**found, "kdkernels": kdkernels.__version__}


def compute(cells: Sequence[tuple[Case, str]], who: Iterable[providers.Provider]) -> list[dict[str, Any]]:
    """The rows of the cells."""
    who = list(who)
    rows = []
    for i, (case, dtype) in enumerate(cells, 1):
        say(f"{i} of {len(cells)}: {case.loss}, {case.name}, {dtype}")
        rows += table.measure(case, dtype, who)
    return rows


def quick_cells() -> list[tuple[Case, str]]:
    """A small part of the table."""
    return [(c, d) for c, d in table.cells() if c.name in QUICK and d in QUICK_DTYPES]


def check(csv_path: Path = CSV, page_path: Path = PAGE) -> list[str]:
    """How CSV, page and cases disagree, in words."""
    problems = []
    try:
        rows = table.read(csv_path)
        text = page_path.read_text()
    except (OSError, ValueError) as error:
        return [str(error)]
    found = {tuple(r[c] for c in table.KEY) for r in rows}
    if len(found) < len(rows):
        problems.append(f"{csv_path.name}: some cells are there twice")
    everywhere = (table.ROUNDED, table.EAGER64, providers.EAGER, *providers.OURS)
    wanted = {(c.loss, c.name, d, p) for c, d in table.cells() for p in everywhere}
    wanted -= {(c.loss, c.name, d, p) for c, d in table.cells() if c.large for p in ("cuda", "triton")}
    problems += [f"{csv_path.name}: no row for {', '.join(key)}" for key in sorted(wanted - found)]
    known = {(c.loss, c.name, d) for c, d in table.cells()}
    problems += [f"{csv_path.name}: no such input: {', '.join(key)}" for key in sorted({k[:3] for k in found} - known)]
    if not problems:
        expected = page.page(rows)
        for number, (old, new) in enumerate(zip(text.splitlines(), expected.splitlines()), 1):
            if old != new:
                return [f"{page_path.name}, line {number}: is not what {csv_path.name} says:\n  {old}\n  {new}"]
        if text != expected:
            problems.append(f"{page_path.name}: has other lines at its end than {csv_path.name} gives")
    return problems


def quick(csv_path: Path = CSV) -> list[str]:
    """What a small part of the CSV, computed again, gives that is worse than its rows."""
    who, missing = providers.available()
    for name, why in missing.items():
        say(f"{name} is left out: {why}")
    who = [p for p in who if p.name in providers.OURS]
    return table.drift(table.read(csv_path), compute(quick_cells(), who), providers.OURS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Computes, or checks; 1 if something disagrees."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="is the page that of the CSV, and is the CSV whole?")
    parser.add_argument("--quick", action="store_true", help="compute a small part again and hold it to the CSV")
    parser.add_argument("--page-only", action="store_true", help="make the page of the CSV that is there")
    parser.add_argument("--csv", type=Path, default=CSV)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    for name, path in (("--csv", options.csv), ("--page", options.page)):
        if not path.parent.is_dir():  # told now, not after minutes
            parser.error(f"{name}: {path.parent} is not a folder")
    try:
        return _run(options)
    except (OSError, ValueError) as error:
        parser.error(str(error))


def _run(options: argparse.Namespace) -> int:
    if options.check or options.quick:
        problems = check(options.csv, options.page) if options.check else []
        problems += quick(options.csv) if options.quick else []
        for problem in problems:
            print(problem)
        print("numerics: " + (f"{len(problems)} disagree" if problems else "all agree"))
        return 1 if problems else 0
    if not options.page_only:
        who, missing = providers.available()
        for name, why in missing.items():
            say(f"{name} is left out: {why}")
        table.write(options.csv, compute(table.cells(), who), environment())
    rows = table.read(options.csv)
    options.page.write_text(page.page(rows))
    say(f"{len(rows)} rows in {options.csv}, told in {options.page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
