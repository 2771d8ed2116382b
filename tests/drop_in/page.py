"""Writes the tables of docs/drop-in.md: `python tests/drop_in/page.py`. What its markers enclose is from here."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "drop-in.md"

if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from drop_in import Library, Row, libraries  # noqa: E402

_TABLE = re.compile(r"<!-- table: ([\w -]+) -->\n.*?<!-- /table -->", re.S)


def _code(text: str) -> str:
    return f"`{text}`"


def _line(*cells: str) -> str:
    assert not any("|" in cell for cell in cells), f"{cells[0]}: a bar would end its cell"
    return "| " + " | ".join(cells) + " |"


def _row(row: Row) -> str:
    # what has no name there is told in words
    theirs = row.theirs if row.runs and "(..." not in row.theirs else _code(row.theirs)
    cells = theirs, _code(row.ours), row.scale, row.differs
    return _line(*cells)


def table(library: Library) -> str:
    """One library's rows, and what it has that is not here."""
    lines = ["| theirs | ours | scale | what still differs |", "| --- | --- | --- | --- |"]
    lines += [_row(row) for row in library.rows]
    lines += [_line(missing.theirs, "not here", "", missing.why) for missing in library.missing]
    return "\n".join(lines)


def render(text: str) -> str:
    """The page with its tables as they should be. ValueError where its markers are not the libraries."""
    every = libraries()
    named = _TABLE.findall(text)
    if sorted(named) != sorted(every):
        raise ValueError(f"{PAGE.name}: its markers name {named}, the tables are {list(every)}")
    return _TABLE.sub(lambda found: f"<!-- table: {found[1]} -->\n{table(every[found[1]])}\n<!-- /table -->", text)


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text()))
    print(f"{PAGE.relative_to(ROOT)}: {sum(len(library.rows) for library in libraries().values())} rows")
