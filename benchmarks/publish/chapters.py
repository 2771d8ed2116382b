"""What stands on which page: the README's section, docs/benchmarks.md and the web page of a run, as blocks.

The words here say how something was measured or found. Every figure, and every sentence that holds for some rows only,
is made from the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from . import defeats as lost
from . import plots, tables
from .cases import Case, Row, by_loss, device, group, largest, number
from .document import Block, Code, Heading, Picture, Text

WHOLE = "detection_distillation"
VERSIONS = ("torch", "triton", "liger", "liger_kernel", "cuda", "driver", "python")
COPY = """The copy reads both inputs and writes one output of the same size, in the same run: into memory that was
touched before, and into fresh pages (for masks, which have no gradient, it only writes; a target or labels are not in
it). Its share is its time over the row's: at 100 % data moves as fast as in the copy. Ours writes its gradient into
huge pages where the system grants them, so it can be faster than the copy into fresh pages."""
LEGEND = """Milliseconds: the median, and p20 to p80 in brackets. x eager, x `torch.compile`, x Liger: how many times as
fast as that peer at the fastest of its forms and settings, forward and backward together. GB/s: what must move at least
(inputs read once, the gradient written once) over the time. Forward memory is that of one forward with a graph, without
its inputs: the most at any moment, what is kept for the backward, and how far the process grew, scratch memory
included. Errors are max|x - x64| / max|x64| against the formula in float64."""
HEADLINE = """Forward and backward together (masks have no backward), a line per loss and dtype. The x columns are how
many times as fast as the formula that users copy (eager), as `torch.compile` of it and as Liger, each at its fastest
form and setting, by medians: least and most over the shapes of the default set, the largest of which is shown in full.
In {overlaps} of these {cases} cases the middle 60 % of ours and of its fastest peer overlap. Forward memory is its
peak, inputs excluded: in one pass the gradient is already there."""
ON_A_CPU = """Temporaries that are too large for the C library's allocator to keep (with glibc, over 32 MB) are fresh
memory in every step, and fresh memory is dear here, as the copy into it shows: of large features and logits, the
factors over eager owe a part to that."""
RULE = """A row for every case, dtype and mode in which a peer has the smaller median, however small the difference; in
which its forward peaks or keeps more than {part:g} % and {least:,} bytes less; or in which its error is smaller by more
than half an eps of the result's dtype, which the last rounding of an exact result can do by itself. Ours is the default
way at the widest instruction set. Where the spreads overlap, p20 to p80 of one and the other, another run may say the
opposite. Each reason stands above its rows."""
OTHER_WAYS = """Medians of forward and backward together; other ways are a lower instruction set, two passes, a call per
loss."""
SCALING = """Both axes are logarithmic. On the left, where a line is flat, time goes into calls and not into data; on
the right, where it runs beside the copy's, into moving data. Where it rises more steeply than the copy's into touched
memory, fresh memory is the first suspect, as of wide spreads."""
OBJECTIVE = """The whole objective at once: masked MSE and Pearson on five levels (the finest {shape}), decoupled KL and
bounded regression on the heads. One pass holds the gradients from the forward on; two passes allocate them in the
backward."""
ELSEWHERE = """A peer is faster, leaner or more accurate in {defeats} places, each with its reason, and another way of
ours is faster than the default one in {ways}: [{page}]({page}) lists them, beside every case, mode and
quantile.{least} `python benchmarks/pages.py` makes these tables and pictures from `benchmarks/results/`."""
MADE = """Made by `python benchmarks/pages.py` from the rows in `benchmarks/results/`: a change here is overwritten.
Every provider is first held against float64, and refused where it is wrong; then all of them are timed interleaved in
one process, from raw inputs to the student's gradient. Where p80 is several times p20, a gradient's fresh pages are
the first suspect, which the host of a virtual machine may have to provide: `python benchmarks/fresh_pages.py` measures
them by themselves. `python benchmarks/guard.py NEW.csv` says whether a new run has become slower, and `python -m
kdkernels bench --report FOLDER` makes a web page like this one of its own rows."""


def _values(rows: Sequence[Row], column: str) -> list[str]:
    return list(dict.fromkeys(str(row[column]) for row in rows if row.get(column)))


def setting(rows: Sequence[Row]) -> str:
    """Device, versions, commits, dates and load of rows."""
    parts = [" and ".join(dict.fromkeys(map(device, rows)))]
    parts += [f"{', '.join(_values(rows, c))} {c}" for c in ("cores", "threads") if _values(rows, c)]
    for column in (*VERSIONS, "kdkernels"):
        if versions := _values(rows, column):
            parts.append(f"{column.replace('_', '-')} {' and '.join(versions)}")
    if commits := _values(rows, "commit"):
        parts[-1] += f" at {', '.join(commits)}"
    days = sorted({date[:10] for date in _values(rows, "date")})
    parts += [" to ".join(dict.fromkeys([days[0], days[-1]]))] if days else []
    loads = sorted({load for row in rows if (load := number(row, "load")) is not None})
    parts += [f"load {' to '.join(dict.fromkeys([f'{loads[0]:g}', f'{loads[-1]:g}']))}"] if loads else []
    return ", ".join(parts)


def commands(rows: Sequence[Row]) -> str:
    """The commands that wrote the rows, as they can be given again."""
    lines = []
    for command in _values(rows, "command"):
        script, _, options = command.partition(" ")
        start = "python -m kdkernels" if script == "__main__.py" else f"python benchmarks/{script}"
        lines.append(f"{start} {options}".strip())
    return "\n".join(lines)


def _default(cases: Sequence[Case]) -> list[Case]:
    """The cases that the headline speaks of: those of the default set, which on a GPU has the large shapes, too."""
    sets = ("default", "large") if cases[0].on_gpu else ("default",)
    return [case for case in cases if case.set in sets] or list(cases)


def _overview(cases: Sequence[Case], folder: str) -> list[Block]:
    if not plots.has_overview(cases):
        return []
    text = "Time of each loss in copies of both inputs: kdkernels and its peers; less is better"
    return [Picture(f"{folder}/overview.png", text, partial(plots.overview, cases))]


def _objective(cases: Sequence[Case]) -> list[Block]:
    chosen = [case for case in cases if case.loss == WHOLE]
    if not chosen:
        return []
    shape = largest(chosen).shape.replace("x", " x ")
    return [Text(OBJECTIVE.format(shape=shape)), tables.objective(chosen)]


def _summary(cases: Sequence[Case], folder: str) -> list[Block]:
    picture = _overview(cases, folder)
    headline = HEADLINE.format(overlaps=sum(map(lost.undecided, cases)), cases=len(cases))
    on_a_cpu = [] if cases[0].on_gpu else [Text(ON_A_CPU)]
    return [*picture, Text(headline), tables.headline(cases), Text(COPY), *on_a_cpu, *_objective(cases)]


def _least(cases: Sequence[Case]) -> str:
    found = [x for case in cases if (x := case.times(case.ours, case.fastest("eager"))) is not None]
    text = " Of all sizes, those of the ladders included, the least factor over eager is"
    return f"{text} {tables.figures(min(found))}." if found else ""


def readme(machines: Mapping[str, Sequence[Row]], page: str) -> list[Block]:
    """The README's section: overview, headline and objective of every machine, and where to read the rest."""
    blocks: list[Block] = []
    for folder, rows in machines.items():
        cases = group(rows)
        count = {"defeats": len(lost.find(cases)), "ways": len(lost.other_ways(cases)), "least": _least(cases)}
        blocks += [Text(f"On {setting(rows)}:"), *_summary(_default(cases), folder)]
        blocks.append(Text(ELSEWHERE.format(page=page, **count)))
    return blocks


def machine(folder: str, rows: Sequence[Row], reasons: Mapping[str, str], level: int = 2) -> list[Block]:
    """Everything about the rows of one machine."""
    cases = group(rows)
    defeats, ways = lost.find(cases), lost.other_ways(cases)
    blocks: list[Block] = [Text(f"{setting(rows)}.")]
    if written := commands(rows):
        blocks += [Text("The rows were written by"), Code(written)]
    blocks += [Heading(level, "Overview"), *_summary(_default(cases), folder)]
    blocks.append(Heading(level, "Where a peer is faster, leaner or more accurate"))
    blocks.append(Text(RULE.format(part=100 * lost.LEAST_PART, least=lost.LEAST_BYTES)))
    for why, lines in tables.of_defeats(defeats, reasons):
        blocks += [Text(f"**Why:** {why}"), lines]
    blocks += [] if defeats else [Text("Nowhere in these rows.")]
    blocks += [Heading(level, "Where another way of ours is faster than the default one"), Text(OTHER_WAYS)]
    blocks.append(tables.of_other_ways(ways) if ways else Text("Nowhere in these rows."))
    pictures: list[Block] = []
    for loss, dtypes in plots.ladders(cases).items():
        text = f"{tables.title(loss)}: time against bytes moved, with the copy's line"
        pictures.append(Picture(f"{folder}/{loss}.png", text, partial(plots.scaling, loss, dtypes)))
    blocks += [Heading(level, "Time against size"), Text(SCALING), *pictures] if pictures else []
    blocks += [Heading(level, "Every case"), Text(LEGEND)]
    for loss, of_loss in by_loss(cases).items():
        blocks.append(Heading(level + 1, tables.title(loss)))
        for case in of_loss:
            blocks += [Text(tables.case_line(case)), tables.whole_case(case)]
    return blocks


def docs(machines: Mapping[str, Sequence[Row]], reasons: Mapping[str, str]) -> list[Block]:
    """docs/benchmarks.md: everything about every machine."""
    blocks: list[Block] = [Heading(1, "Benchmarks"), Text(MADE)]
    for folder, rows in machines.items():
        several = len(machines) > 1
        blocks += [Heading(2, device(rows[0]))] if several else []
        blocks += machine(folder, rows, reasons, 3 if several else 2)
    return blocks


def page_of_a_run(rows: Sequence[Row], reasons: Mapping[str, str]) -> list[Block]:
    """The web page of one CSV or one run."""
    return [Heading(1, "kdkernels: benchmarks"), *machine("run", rows, reasons)]
