"""One row per loss, input, dtype and provider: its errors against the exact answer, and what is not finite.

The rows are in results/numerics.csv; its first row alone carries the environment, so that a run that finds the same
numbers changes one line.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import judge
import torch
from harness import kdkernels
from torch import Tensor
from torch.utils import _pytree as pytree

from .cases import CASES
from .providers import EAGER, FORMULA, OURS, Provider, eager, ours
from .values import DTYPES, Case

KEY = ("loss", "input", "dtype", "provider")
ENVIRONMENT = ("cpu", "torch", "triton", "liger", "kdkernels", "date")
COLUMNS = (
    *KEY,
    # max|x - x64| / max|x64| over what is finite in float64; inf where x is not finite there, or not 0 where x64 is.
    *("value_error", "gradient_error"),
    # How many are not finite where float64 is (of 1 value and so many elements), or finite where float64 is infinite.
    *("value_wrong", "gradient_wrong", "gradient_elements"),
    *ENVIRONMENT,
)
FIGURES = {
    **dict.fromkeys(("value_error", "gradient_error"), float),
    **dict.fromkeys(("value_wrong", "gradient_wrong", "gradient_elements"), int),
}
# The exact answer rounded to the result's dtype: nobody can do better. And the eager formula in float64, whose error
# says that it means something else there.
ROUNDED, EAGER64 = "exact, rounded", "eager in float64"

Answer = tuple[Tensor, Tensor, Tensor]  # the loss without a graph, with one, the gradient


def _errors(x: Tensor, x64: Tensor, dtype: torch.dtype) -> tuple[float, int]:
    """The error over what the dtype can hold of the exact answer, and how many are wrong about being finite."""
    x, expected = x.double(), x64.to(dtype)
    finite = expected.isfinite()
    wrong = torch.where(finite, ~x.isfinite(), x != expected.double()).sum().item()
    if not finite.any():
        return 0.0, int(wrong)
    return judge.error(x[finite], x64[finite]), int(wrong)


def row(case: Case, dtype: str, provider: str, found: Answer, truth: Answer) -> dict[str, Any]:
    """What a provider's answer is worth. It may be infinite where our result's dtype cannot hold the exact one."""
    results = (torch.float32, DTYPES[dtype]) if provider != EAGER64 else (torch.float64,) * 2
    (alone, alone_wrong), (loss, loss_wrong) = (_errors(x, t, results[0]) for x, t in zip(found[:2], truth))
    gradient, gradient_wrong = _errors(found[2], truth[2], results[1])
    return {
        **dict(zip(KEY, (case.loss, case.name, dtype, provider))),
        **{"value_error": f"{max(alone, loss):.2e}", "gradient_error": f"{gradient:.2e}"},
        **{"value_wrong": max(alone_wrong, loss_wrong), "gradient_wrong": gradient_wrong},
        "gradient_elements": truth[2].numel(),
    }


def exact(case: Case, inputs: Sequence[Any], function: Callable[..., Tensor] = ours) -> Answer:
    """A formula in float64 on the very numbers that everybody was given."""
    wide = pytree.tree_map(lambda x: x.double() if x.is_floating_point() else x, list(inputs))
    with kdkernels.use_backend("reference"):
        return judge.evaluate(lambda *x: function(case, *x), wide)


def measure(case: Case, dtype: str, providers: Iterable[Provider]) -> list[dict[str, Any]]:
    """The rows of one case and dtype."""
    inputs = case.inputs(dtype)
    truth = exact(case, inputs)
    rounded = (truth[0].float(), truth[1].float(), truth[2].to(DTYPES[dtype]))
    found = [row(case, dtype, ROUNDED, rounded, truth)]
    for provider in providers:
        if provider.name == EAGER:
            found.append(row(case, dtype, EAGER64, exact(case, inputs, eager), truth))
        if provider.serves(case, dtype):
            with provider.here():
                answer = judge.evaluate(lambda *x, p=provider: p.function(case, *x), inputs)
            found.append(row(case, dtype, provider.name, answer, truth))
    return found


def cells() -> list[tuple[Case, str]]:
    """Every case in every dtype, in the order of the page."""
    return [(case, dtype) for cases in CASES.values() for case in cases for dtype in DTYPES]


def write(path: Path, rows: Sequence[dict[str, Any]], environment: dict[str, str]) -> None:
    """Replaces the file."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows([{**rows[0], **environment}, *rows[1:]])


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a file; ValueError where its columns are others, it has no rows, or a figure is none."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} has other columns than {', '.join(COLUMNS)}: run benchmarks/numerics.py again")
        rows = list(reader)
    if not rows:
        raise ValueError(f"{path} has no rows: run benchmarks/numerics.py again")
    for number, row in enumerate(rows, 1):
        for column, kind in FIGURES.items():
            try:
                kind(row[column])
            except (TypeError, ValueError):  # a row that was cut off has None
                raise ValueError(f"{path}: row {number} has {row[column]!r} for its {column}") from None
    return rows


def floor(rounded: dict[str, str], what: str) -> float:
    """The error below which results are not told apart: one rounding of the exact answer to the result's dtype."""
    eps = torch.finfo(torch.float32 if what == "value" else DTYPES[rounded["dtype"]]).eps
    return max(float(rounded[f"{what}_error"]), eps / 2)


def drift(kept: Sequence[dict[str, str]], found: Sequence[dict[str, Any]], names: Iterable[str]) -> list[str]:
    """What is worse in `found` than the kept rows allow, in words, for the providers named.

    Another processor, compiler or libm adds in another order and rounds otherwise. How much that matters, where terms
    cancel, is seen in how our kernels differ: so an error may be four times the largest that any of them kept for these
    inputs (the formula's: four times its own or the eager one's), plus four of the roundings that nobody can avoid. Not
    one value or element more may be wrong.
    """
    names, formulas = set(names), {FORMULA, EAGER}
    before = {tuple(r[c] for c in KEY): r for r in kept}
    problems = []
    for new in found:
        key = tuple(new[c] for c in KEY)
        if key[-1] not in names:
            continue
        old, rounded = before.get(key), before.get((*key[:-1], ROUNDED))
        alike = [before.get((*key[:-1], name)) for name in (formulas if key[-1] in formulas else set(OURS) - formulas)]
        if old is None or rounded is None:
            problems.append(f"{', '.join(key)}: not in the kept rows")
            continue
        for what in ("value", "gradient"):
            error, most = float(new[f"{what}_error"]), max(float(r[f"{what}_error"]) for r in alike if r)
            allowed = 4 * most + 4 * floor(rounded, what)
            if not error <= allowed:
                problems.append(f"{', '.join(key)}: {what} error {error:.2e}, {allowed:.2e} allowed")
            if int(new[f"{what}_wrong"]) > int(old[f"{what}_wrong"]):
                problems.append(f"{', '.join(key)}: {new[f'{what}_wrong']} wrong, {old[f'{what}_wrong']} kept ({what})")
    return problems
