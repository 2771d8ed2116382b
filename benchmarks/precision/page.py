"""docs/numerics.md out of results/numerics.csv: a summary, where the eager formula is better, a table per loss.

Every figure on the page is computed here from the rows; no sentence below claims more than a count that it prints.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from .cases import CASES
from .providers import CPU, EAGER, EAGER32, FORMULA, LIGER, LIGER_LOG, OURS, PEERS
from .table import EAGER64, ROUNDED, floor
from .values import DTYPES

Row = dict[str, str]
Group = dict[str, Row]  # provider -> row, of one loss, input and dtype
WORST_CPU = "CPU kernels"
QUANTITIES = ("value", "gradient")
NAMES = {
    **{f"cpu {name}": f"CPU kernels, {name}" for name in CPU},
    **{WORST_CPU: WORST_CPU, FORMULA: "the formula (`reference`)", ROUNDED: "exact answer, rounded"},
    **{"cuda": "CUDA kernels, emulated", "triton": "Triton kernels, interpreted"},
    **{EAGER: "eager", EAGER32: "eager from float32"},
    **{LIGER: "Liger", LIGER_LOG: "Liger, `log_target`"},
}
# From here on two formulas differ by more than float64's rounding of them: they mean different things.
ANOTHER_MEANING = 1e-6

INTRODUCTION = """\
# Numerics

Made by `python benchmarks/numerics.py` from `benchmarks/results/numerics.csv`; do not edit. {environment}

Each cell is "error of the value / error of the student's gradient". Error of x against the formula in float64, x64:
max|x - x64| / max|x64|. The inputs are rounded to the dtype first, so x64 is the answer for the very numbers that
everybody is given. A loss of ours is float32 whatever comes in; gradients have the student's dtype. The column "exact,
rounded" is x64 rounded to those dtypes: nobody can do better.

- **eager**: the formula as users copy it (`eager` in `benchmarks/<loss>.py`), in the inputs' dtype. **eager from
  float32**: the same after `.float()`, for 16-bit inputs.
- **CPU kernels**: the worst of base, AVX2 and AVX-512; the CSV has each. **formula**: `reference`, what serves where no
  kernel does.
- **CUDA, emulated**: the CUDA kernels' own bodies, compiled for the host; **Triton, interpreted**: the Triton kernels
  in Triton's interpreter. Neither is a GPU, whose exponentials and logarithms round otherwise. A dash: not run, since
  emulators are slow on large inputs, or since float32 is what the eager formula has anyway.
- **Liger**: `LigerKLDivLossFunction` in Triton's interpreter, between PyTorch's log-softmax and softmax in the inputs'
  dtype (or log-softmax: `log_target`), which it asks its users to bring. Its kernel calls `eps.to(...)`, which the
  interpreter's Python floats do not have, so its eps is given as a float that has it; nothing else is changed.
- "wrong": not finite where x64 is finite and fits the result's dtype, or finite (or NaN) where it is infinite; for
  gradients with the number of such elements. "not 0": finite where x64 is 0.
- **Bold**: ours, where an eager formula is more than twice as accurate. † The eager formula differs in float64, too
  (by more than 1e-6): there it means something else, or is NaN by itself, and rounding is not to blame.
"""

COUNTED = """\
## In short

Cells by how ours compares with the eager formulas, and with Liger on temperature KL. "more": more than twice as
accurate, or finite where the peer is wrong; "less": the reverse; "equal": within a factor of two. Errors below one
rounding of the result (half an eps of our result's dtype, or the column "exact, rounded" where that is larger) are not
told apart. "other": the eager formula differs in float64, too, so its error is no rounding.
"""

INFINITE = """\
What is wrong about being finite. A cell is one input and dtype of a loss; who does not run everywhere has fewer.
"""

WRONG = """\
## Where ours is wrong

All cells in which a backend of ours is wrong about being finite:
"""

LESS = """\
## Where an eager formula is more accurate

All cells in which it is more than twice as accurate as one of ours, by provider:
"""


def grouped(rows: Sequence[Row]) -> dict[tuple[str, str, str], Group]:
    """The rows by loss, input and dtype, in the file's order, each with the worst of the CPU's instruction sets."""
    groups: dict[tuple[str, str, str], Group] = {}
    for row in rows:
        groups.setdefault((row["loss"], row["input"], row["dtype"]), {})[row["provider"]] = row
    for group in groups.values():
        here = [group[name] for name in OURS if name.startswith("cpu ") and name in group]
        if here:
            columns = [f"{what}_{kind}" for what in QUANTITIES for kind in ("error", "wrong")]
            group[WORST_CPU] = {**here[0], **{c: max((r[c] for r in here), key=float) for c in columns}}
    return groups


def other_meaning(group: Group, what: str) -> bool:
    """Whether the eager formula is not ours even in float64."""
    row = group.get(EAGER64)
    return row is not None and (int(row[f"{what}_wrong"]) > 0 or float(row[f"{what}_error"]) > ANOTHER_MEANING)


def verdict(group: Group, name: str, peer: str, what: str) -> str:
    """more, equal, less or other: how accurate `name` is beside `peer`."""
    if other_meaning(group, what):
        return "other"
    least = floor(group[ROUNDED], what)
    a, b = (
        math.inf if int(group[p][f"{what}_wrong"]) else max(float(group[p][f"{what}_error"]), least)
        for p in (name, peer)
    )
    if a == b:
        return "equal"
    return "less" if a > 2 * b else "more" if b > 2 * a else "equal"


def is_less(group: Group, name: str, what: str) -> bool:
    """Whether an eager formula is more than twice as accurate."""
    return any(verdict(group, name, peer, what) == "less" for peer in (EAGER, EAGER32) if peer in group)


def _cell(group: Group, name: str, *, plain: bool = False) -> str:
    if name not in group:
        return "-"
    parts = []
    for what in QUANTITIES:
        wrong, error = int(group[name][f"{what}_wrong"]), float(group[name][f"{what}_error"])
        text = f"{error:.1e}" if error else "0"
        if wrong:
            text = "wrong" if what == "value" else f"{wrong} wrong"
        elif math.isinf(error):
            text = "not 0"
        if name in (EAGER, EAGER32) and other_meaning(group, what):
            text += " †"
        ours = name == WORST_CPU or name in OURS
        parts.append(f"**{text}**" if ours and not plain and is_less(group, name, what) else text)
    return " / ".join(parts)


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Markdown without padding: a changed digit changes its own line alone."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *body))


def _counts(groups: Sequence[Group]) -> str:
    order = ("more", "equal", "less", "other")
    body = []
    for name in OURS:
        for peer in PEERS:
            both = [g for g in groups if name in g and peer in g]
            if both:
                cells = [Counter(verdict(g, name, peer, what) for g in both) for what in QUANTITIES]
                body.append([NAMES[name], NAMES[peer], *(str(c[v]) for c in cells for v in order)])
    header = [*("ours", "against"), *(f"{what}: {v}" if v == "more" else v for what in QUANTITIES for v in order)]
    return _table(header, body)


def _wrong(groups: Sequence[Group]) -> str:
    body = []
    for name in (*OURS, *PEERS):
        rows = [g[name] for g in groups if name in g]
        if rows:
            values, elements = (sum(int(r[c]) for r in rows) for c in ("value_wrong", "gradient_wrong"))
            touched = sum(int(r["gradient_wrong"]) > 0 for r in rows)
            every = sum(int(r["gradient_elements"]) for r in rows)
            body.append([NAMES[name], str(len(rows)), str(values), str(touched), f"{elements:,} of {every:,}"])
    return _table(["provider", "cells", "values wrong", "gradients wrong", "elements of gradients wrong"], body)


def _less(groups: dict[tuple[str, str, str], Group]) -> str:
    body = []
    for (loss, name, dtype), group in groups.items():
        for who in OURS:
            for what in QUANTITIES:
                if who in group and is_less(group, who, what):
                    peers = [
                        _cell(group, p, plain=True).split(" / ")[QUANTITIES.index(what)]
                        for p in (EAGER, EAGER32)
                        if p in group
                    ]
                    own = _cell(group, who, plain=True).split(" / ")[QUANTITIES.index(what)]
                    best = f"{float(group[ROUNDED][f'{what}_error']):.1e}"
                    body.append([f"`{loss}`", name, dtype, NAMES[who], what, own, ", ".join(peers), best])
    if not body:
        return "None."
    header = ["loss", "input", "dtype", "ours", "of the", "error", "eager (from float32)", "exact, rounded"]
    return _table(header, body)


def _ours_wrong(groups: dict[tuple[str, str, str], Group]) -> str:
    body = [
        [f"`{loss}`", name, dtype, NAMES[who], _cell(group, who, plain=True), _cell(group, EAGER)]
        for (loss, name, dtype), group in groups.items()
        for who in OURS
        if who in group and any(int(group[who][f"{what}_wrong"]) for what in QUANTITIES)
    ]
    return _table(["loss", "input", "dtype", "ours", "value / gradient", "eager"], body) if body else "None."


def _loss(loss: str, groups: dict[tuple[str, str, str], Group]) -> str:
    columns = [EAGER, EAGER32, WORST_CPU, FORMULA, "cuda", "triton", ROUNDED]
    if loss == "temperature_kl":
        columns += [LIGER, LIGER_LOG]
    titles = {
        FORMULA: "formula",
        "cuda": "CUDA, emulated",
        "triton": "Triton, interpreted",
        ROUNDED: "exact, rounded",
    }
    body = []
    for case in CASES[loss]:
        for dtype in DTYPES:
            group = groups.get((loss, case.name, dtype), {})
            body.append([case.name, dtype, *(_cell(group, name) for name in columns)])
    inputs = _table(
        ["input", "what it is", "shape"], [[c.name, c.what, " x ".join(map(str, c.shape))] for c in CASES[loss]]
    )
    header = ["input", "dtype", *(titles.get(c, NAMES[c]) for c in columns)]
    return f"## {loss}\n\n{_table(header, body)}\n\n{inputs}"


def _environment(rows: Sequence[Row]) -> str:
    first = rows[0]
    versions = ", ".join(f"{name} {first[name]}" for name in ("torch", "triton", "liger", "kdkernels") if first[name])
    return f"Run on {first['cpu']} with {versions}, on {first['date']}."


def page(rows: Sequence[Row]) -> str:
    """The whole page."""
    groups = grouped(rows)
    every = list(groups.values())
    parts = [INTRODUCTION.format(environment=_environment(rows)), COUNTED, _counts(every), INFINITE, _wrong(every)]
    parts += [WRONG, _ours_wrong(groups), LESS, _less(groups), *(_loss(loss, groups) for loss in CASES)]
    return "\n\n".join(part.strip() for part in parts) + "\n"
