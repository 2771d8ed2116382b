"""The README's benchmark tables, docs/benchmarks.md and its pictures, out of the committed rows in benchmarks/results/.

    python benchmarks/pages.py                  writes them
    python benchmarks/pages.py --check          compares instead: 1 where a page is stale, a picture or a reason missing
    python benchmarks/pages.py --html out/ [x.csv ...]   one self-contained web page, of these files or of all

--check compares text and asks of pictures only that they exist, so that it needs neither matplotlib nor torch.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import report
from publish import chapters, defeats, document, plots
from publish.cases import NEEDED, device, group
from publish.reasons import CALL, REASONS

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- benchmarks -->\n", "<!-- /benchmarks -->"
PAGE = "docs/benchmarks.md"
Rows = Sequence[Mapping[str, Any]]


def say(line: str) -> None:
    """Progress, to stderr."""
    print(f"pages: {line}", file=sys.stderr, flush=True)


def has_rows(path: Path) -> bool:
    """Whether a CSV holds rows of benchmarks: other results lie in the same folder."""
    with path.open(newline="", errors="replace") as file:
        lines = csv.reader(file)
        return set(NEEDED) <= set(next(lines, [])) and next(lines, None) is not None


def read(paths: Sequence[Path]) -> dict[str, Rows]:
    """The newest rows of each file, by the name of its pictures' folder; ValueError where two would be shown as one."""
    found: dict[str, Rows] = {}
    for path in paths:
        rows = report.read(path)
        if len(devices := sorted({device(row) for row in rows})) > 1:
            raise ValueError(f"{path} has rows of {len(devices)} devices, where a page is of one: {devices}")
        if path.stem in found:
            raise ValueError(f"{path}: another file is called {path.stem}, too, and each gets a folder of its name")
        found |= {path.stem: rows} if rows else {}
    return found


def between(text: str, new: str) -> str:
    """The README with another section; ValueError where the markers are not there once each, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"README.md needs one line {BEGIN.strip()} and after it one line {END}")
    before, rest = text.split(BEGIN)
    return before + BEGIN + new + END + rest.split(END)[1]


def texts(root: Path, machines: Mapping[str, Rows], reasons: Mapping[str, str]) -> tuple[dict[Path, str], list]:
    """What README.md and docs/benchmarks.md should be, and the pictures that they show."""
    readme, docs = chapters.readme(machines, PAGE), chapters.docs(machines, reasons)
    found = {
        root / "README.md": between(
            (root / "README.md").read_text(encoding="utf-8"), document.markdown(readme, "docs/pictures")
        ),
        root / PAGE: document.markdown(docs, "pictures"),
    }
    return found, [block for block in docs if isinstance(block, document.Picture)]


def problems(root: Path, machines: Mapping[str, Rows], reasons: Mapping[str, str] = REASONS) -> list[str]:
    """What --check complains about, a text each; nothing where all pages agree with the rows."""
    wanted, pictures = texts(root, machines, reasons)
    found = []
    for path, text in wanted.items():
        there = path.read_text(encoding="utf-8") if path.exists() else ""
        if there != text:
            lines = difflib.unified_diff(there.splitlines(), text.splitlines(), "there", "wanted", lineterm="", n=0)
            found.append("\n".join([f"{path.relative_to(root)} disagrees with the rows:", *list(lines)[:40]]))
    for picture in pictures:
        if not (root / "docs/pictures" / picture.path).is_file():
            found.append(f"docs/pictures/{picture.path} is missing")
    lost = [defeat for rows in machines.values() for defeat in defeats.find(group(rows))]
    found += defeats.unexplained(lost, reasons) + defeats.unneeded(lost, reasons)
    return found + [x for rows in machines.values() for x in defeats.too_large(group(rows), reasons, CALL)]


def write(root: Path, machines: Mapping[str, Rows], reasons: Mapping[str, str] = REASONS) -> list[str]:
    """Writes pages and pictures; returns what is still wrong, such as a missing reason."""
    wanted, pictures = texts(root, machines, reasons)
    plots.pyplot()  # now, before half is written
    for path, text in wanted.items():
        path.write_text(text, encoding="utf-8")
        say(f"{path.relative_to(root)}: {len(text.splitlines())} lines")
    for picture in pictures:
        path = root / "docs/pictures" / picture.path
        picture.draw(path)
        say(f"docs/pictures/{picture.path}: {path.stat().st_size / 1000:.0f} KB")
    return problems(root, machines, reasons)


def webpage(folder: Path, rows: Rows, reasons: Mapping[str, str] = REASONS) -> Path:
    """One self-contained page of rows: folder/index.html."""
    plots.pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "index.html"
    path.write_text(document.webpage(chapters.page_of_a_run(rows, reasons), "kdkernels: benchmarks"), encoding="utf-8")
    say(f"{path}: {path.stat().st_size / 1000:.0f} KB")
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes, checks, or makes the web page; 1 where something is missing or disagrees."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path, nargs="*", help="default: every file of rows in benchmarks/results/")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; 1 and a diff where a page disagrees with the rows"
    )
    parser.add_argument("--html", type=Path, metavar="FOLDER", help="only write a self-contained web page there")
    options = parser.parse_args(arguments)
    if options.csv and not options.html:
        parser.error("csv: the committed pages are made from all of benchmarks/results/; name files with --html only")
    for path in options.csv:
        if not path.is_file() or not has_rows(path):
            parser.error(f"csv: {path} {'has no rows of benchmarks' if path.is_file() else 'is not a file'}")
    paths = options.csv or sorted(path for path in (ROOT / "benchmarks" / "results").glob("*.csv") if has_rows(path))
    try:
        machines = read(paths)
    except ValueError as error:
        parser.error(f"csv: {error}")
    if not machines:
        parser.error("csv: no rows in benchmarks/results/")
    if options.html:
        for name, rows in machines.items():
            webpage(options.html / name if len(machines) > 1 else options.html, rows)
        return 0
    wrong = problems(ROOT, machines) if options.check else write(ROOT, machines)
    print("\n".join(wrong) or "README.md, docs/benchmarks.md and its pictures agree with benchmarks/results/")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
