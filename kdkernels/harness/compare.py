"""Comparisons of recipes: rows from texts, the ablations of the papers by name, and the table that they end in.

A row is a student like any other, with one teacher for all rows; ``job.py`` trains it.
"""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any, NamedTuple

from .export import FOLDER
from .recipes import RecipeText, parse

COMPARE = (
    "train a student per row and compare them: none, a recipe, several joined by +, with inherit=PARTS and "
    "freeze=PARTS among them (pkd+inherit=fpn); or the name of a table: defeat-masks, defeat-regions, "
    "defeat-proposals, defeat-rows, chen2017-parts, pkd-mimic"
)
_CHEN = "chen2017:classes={classes},boxes={boxes},hint={hint}"


def _chen(title: str, classes: str = "hard", boxes: str = "none", hint: str = "none") -> str:
    return f"{title}={_CHEN.format(classes=classes, boxes=boxes, hint=hint)}"


#: Rows of the papers' ablations, ``title=row``. DeFeat: its tables 3 to 6; Chen et al.: table 4; PKD: its comparison of
#: Pearson features with plain ones.
TABLES = {
    "defeat-masks": (
        "student=none",
        *(f"{kind}=defeat:head=false,region=fg,masks={kind}" for kind in ("fine", "gaussian", "gt", "random", "all")),
    ),
    "defeat-regions": (
        "student=none",
        "neck, objects=defeat:head=false,region=fg",
        "neck, background=defeat:head=false,region=bg",
        "neck, both=defeat:head=false",
        "neck, whole=defeat:head=false,masks=all",
        "backbone, both=defeat:head=false,neck=false,backbone=true",
        "backbone and neck, both=defeat:head=false,backbone=true",
    ),
    "defeat-proposals": (
        "student=none",
        "student's proposals=defeat:neck=false,proposals=student",
        "teacher's proposals=defeat:neck=false,proposals=teacher",
    ),
    "defeat-rows": (
        "student=none",
        *(
            f"{title}=defeat:neck=false,rows={kind}"
            for title, kind in (
                ("positive", "pos"),
                ("negative", "neg"),
                ("as many negative", "subneg"),
                ("both, decoupled", "all"),
            )
        ),
        "all, one weight=hinton:alpha=0",
    ),
    "chen2017-parts": (
        _chen("baseline"),
        _chen("L2", boxes="l2"),
        _chen("L2-B", boxes="bounded"),
        _chen("CLS", classes="plain"),
        _chen("CLS-W", classes="weighted"),
        _chen("Hint", hint="plain"),
        _chen("Hint-A", hint="adapter"),
        _chen("L2-B + CLS-W", "weighted", "bounded"),
        _chen("L2-B + CLS-W + Hint-A", "weighted", "bounded", "adapter"),
    ),
    "pkd-mimic": ("student=none", "mimic=mimic", "PKD=pkd", "PKD, teacher's neck frozen=pkd+inherit=fpn+freeze=fpn"),
}


class Row(NamedTuple):
    """One row of a comparison."""

    title: str
    recipes: list[RecipeText]
    inherit: tuple[str, ...] = ()
    freeze: tuple[str, ...] = ()


def rows(texts: list[str], preset: str) -> list[Row]:
    """The rows that texts, or the names of tables, stand for; one that inherits gets its control, which only inherits.

    Raises:
        ValueError: a text that is none; the message names it.
    """
    found: list[Row] = []
    for text in texts:
        if text in TABLES:
            found += [_row(*_titled(entry), preset) for entry in TABLES[text]]
        else:
            found.append(_row(text, text, preset))
    controls = []
    for row in found:
        if row.recipes and row.inherit:
            what = [f"inherit={'/'.join(row.inherit)}"] + [f"freeze={'/'.join(row.freeze)}"] * bool(row.freeze)
            controls.append(Row("+".join(what), [], row.inherit, row.freeze))
    for control in controls:
        if all((r.recipes, r.inherit, r.freeze) != ([], control.inherit, control.freeze) for r in found):
            found.append(control)
    titles = [row.title for row in found]
    for title in titles:
        if titles.count(title) > 1:
            raise ValueError(f"{title!r} is given twice")
    return found


def _titled(entry: str) -> tuple[str, str]:
    title, _, text = entry.partition("=")
    return title, text


def _row(title: str, text: str, preset: str) -> Row:
    recipes, inherit, freeze = [], (), ()
    for part in text.split("+"):
        key, _, value = part.partition("=")
        if key in ("inherit", "freeze"):
            parts = tuple(filter(None, value.split("/")))
            if not parts:
                raise ValueError(f"{text!r}: {key}= needs parts, as in {key}=fpn/rpn")
            inherit, freeze = (parts, freeze) if key == "inherit" else (inherit, parts)
        elif part != "none":
            recipes.append(parse(part, preset))
    return Row(title, recipes, inherit, freeze)


def run(job: Any, begin: float) -> None:
    """Train the rows and write the table (compare.csv, compare.md)."""
    job.progress.record(kind="settings", **job.settings())
    teacher, teacher_run = job.teacher()
    lines = []
    if teacher_run is not None:
        lines.append(_line("teacher", teacher_run, None))
    for number, row in enumerate(job.options.compare, start=1):
        job.progress.say(f"row {number}/{len(job.options.compare)}: {row.title}")
        how = {"inherit": row.inherit, "freeze": row.freeze}
        student = job.student(row.title, job.options.training.steps, teacher, row.recipes, **how)
        lines.append(_line(row.title, student.run, row))
        job.progress.record(kind="result", pictures=len(job.val), **lines[-1])
        if not job.processes.first:
            continue
        write(job.options.output_dir, lines)  # after each row: a run that is stopped leaves what it has
    seconds = time.perf_counter() - begin
    job.progress.record(kind="end", seconds=seconds)
    if not job.processes.first:
        return
    print(table(lines))
    print(f"\nScored on {len(job.val)} pictures, with one seed: repeat with other --seed values before you believe a")
    print(f"difference. {seconds:.0f} s in all. In {job.options.output_dir}: metrics.jsonl, compare.csv, compare.md,")
    print(f"{FOLDER}/*.safetensors")


def _line(title: str, run: Any, row: Row | None) -> dict[str, Any]:
    return {
        "run": title,
        "row": _text(row) if row else "",
        "seed": run.seed,
        "steps": run.steps,
        "seconds": run.seconds,
        "ms_per_step": 1000 * run.median_step,
        **run.score._asdict(),
    }


def _text(row: Row) -> str:
    """What ``--compare`` takes for the row."""
    parts = [recipe.text for recipe in row.recipes] or ["none"] * (not row.inherit and not row.freeze)
    for key, names in (("inherit", row.inherit), ("freeze", row.freeze)):
        parts += [f"{key}={'/'.join(names)}"] * bool(names)
    return "+".join(parts)


def write(folder: Path, lines: list[dict[str, Any]]) -> None:
    """The table as files."""
    with (folder / "compare.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in line.items()} for line in lines)
    (folder / "compare.md").write_text(table(lines) + "\n", encoding="utf-8")


def table(lines: list[dict[str, Any]]) -> str:
    """The table as Markdown."""
    head = "| title | row | steps | s | mAP | AP50 | AP75 |\n| --- | --- | ---: | ---: | ---: | ---: | ---: |"
    body = [
        f"| {x['run']} | {_code(x['row'])} | {x['steps']} | {x['seconds']:.0f} "
        f"| {x['mean_ap']:.3f} | {x['ap50']:.3f} | {x['ap75']:.3f} |"
        for x in lines
    ]
    return "\n".join([head, *body])


def _code(text: str) -> str:
    return f"`{text}`" if text else ""
