"""Pages as blocks, and the blocks as Markdown or as one HTML file with everything inside it.

Text may hold `code`, **bold** and [links](to); nothing else of Markdown is known here. A table's cells are strings.
"""

from __future__ import annotations

import base64
import html
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Heading:
    """Level 1 is the page's title."""

    level: int
    text: str


@dataclass(frozen=True)
class Text:
    """One paragraph."""

    text: str


@dataclass(frozen=True)
class Code:
    """Lines to be shown as they are."""

    text: str


@dataclass(frozen=True)
class Table:
    """A header and lines of as many cells."""

    header: Sequence[str]
    body: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """`draw(path)` makes the file, which is `path` below docs/pictures."""

    path: str
    text: str
    draw: Callable[[Path], object]


Block = Heading | Text | Code | Table | Picture


def _wrapped(text: str, width: int = 140) -> str:
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + len(word) >= width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return "\n".join([*lines, line])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def markdown(blocks: Sequence[Block], pictures: str) -> str:
    """Markdown that is the same on every machine; `pictures` is the way from the page to docs/pictures."""
    parts = []
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"{'#' * block.level} {block.text}")
        elif isinstance(block, Text):
            parts.append(_wrapped(block.text))
        elif isinstance(block, Code):
            parts.append(f"```\n{block.text}\n```")
        elif isinstance(block, Picture):
            parts.append(f"![{block.text}]({pictures}/{block.path})")
        else:
            lines = [block.header, ["---"] * len(block.header), *block.body]
            parts.append("\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines))
    return "\n\n".join(parts) + "\n"


STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 96rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; margin-top: 2rem; }
p { max-width: 60rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin: .5rem 0 1.5rem; }
th, td { border: 1px solid #8886; padding: .25rem .5rem; text-align: left; }
th { background: #8882; }
td { white-space: nowrap; }
td:last-child { white-space: normal; min-width: 8rem; }
img { max-width: 100%; height: auto; background: white; }
pre { background: #8882; padding: .5rem; overflow-x: auto; }
nav a { margin-right: 1rem; }
"""


def _inline(text: str) -> str:
    text = html.escape(text, quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)
    return re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", r'<a href="\2">\1</a>', text)


def _data(picture: Picture) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / Path(picture.path).name
        picture.draw(path)
        return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def webpage(blocks: Sequence[Block], title: str) -> str:
    """One HTML file that asks nothing of the network: its style and its pictures are inside."""
    parts, chapters = [], []
    for block in blocks:
        if isinstance(block, Heading):
            anchor = re.sub(r"[^a-z0-9]+", "-", block.text.lower()).strip("-")
            chapters += [(anchor, block.text)] if block.level == 2 else []
            parts.append(f'<h{block.level} id="{anchor}">{_inline(block.text)}</h{block.level}>')
        elif isinstance(block, Text):
            parts.append(f"<p>{_inline(block.text)}</p>")
        elif isinstance(block, Code):
            parts.append(f"<pre>{html.escape(block.text)}</pre>")
        elif isinstance(block, Picture):
            parts.append(f'<img src="{_data(block)}" alt="{html.escape(block.text)}">')
        else:
            head = "".join(f"<th>{_inline(cell)}</th>" for cell in block.header)
            lines = ("".join(f"<td>{_inline(cell)}</td>" for cell in line) for line in block.body)
            body = "\n".join(f"<tr>{line}</tr>" for line in lines)
            parts.append(
                f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
            )
    menu = "".join(f'<a href="#{anchor}">{_inline(text)}</a>' for anchor, text in chapters)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<nav>{menu}</nav>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )
