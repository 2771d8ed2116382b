"""How strongly each term of features pulls at each pyramid level in the course of a run. Only this picture here."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path

from ..distill import GRADIENT_NORM
from .drawing import plain, pyplot

#: What ``norms_of`` calls all levels together.
ALL = "all levels"
#: By term and by level: steps, and norms at them.
Norms = Mapping[str, Mapping[str, tuple[list[int], list[float]]]]


def norms_of(metrics: Path, run: str = "distilled") -> Norms:
    """The gradient norms that ``metrics.jsonl`` has of a run, by term (``recipe/term``) and level; empty where none
    were recorded (``--grad-report-every``).
    """
    found: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    with metrics.open(encoding="utf-8") as file:
        for line in file:
            if GRADIENT_NORM not in line:  # nearly all of a long run's: their JSON is not needed
                continue
            entry = json.loads(line)
            if entry.get("kind") != "step" or entry.get("run") != run:
                continue
            for name, value in entry["details"].items():
                kind, _, rest = name.partition("/")
                if kind != GRADIENT_NORM:
                    continue
                recipe, term, *level = rest.split("/", 2)
                steps, norms = found.setdefault(f"{recipe}/{term}", {}).setdefault(level[0] if level else ALL, ([], []))
                steps.append(entry["step"])
                norms.append(value)
    return found


def gradients(path: Path, norms: Norms) -> None:
    """Draw the norm of each term's gradient at the student's features over the steps, by level: one panel per term.

    Args:
        path: of the PNG.
        norms: as :func:`norms_of` gives them.

    Raises:
        ValueError: there are none.
    """
    if not norms:
        raise ValueError("norms: there are none; --grad-report-every records them")
    plt = pyplot()
    columns = min(3, len(norms))
    lines = math.ceil(len(norms) / columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(max(7.5, 5.6 * columns), 4.4 * lines + 0.4), layout="constrained", squeeze=False,
        sharey=True,
    )  # fmt: skip
    levels = sorted({level for term in norms.values() for level in term} - {ALL}, key=_place)
    shades = plt.get_cmap("viridis")([0.92 * i / max(1, len(levels) - 1) for i in range(len(levels))])
    colours = {**dict(zip(levels, shades, strict=True)), ALL: "black"}
    for axes, term in itertools.zip_longest(grid.flat, norms):
        if term is None:
            axes.set_visible(False)
            continue
        whole = sum(value**2 for value in norms[term].get(ALL, ([], []))[1])
        for level in [*levels, ALL]:
            if level not in norms[term]:
                continue
            steps, values = norms[term][level]
            # The squares add up over the levels.
            share = sum(value**2 for value in values) / whole if whole > 0 and level != ALL else None
            label = level if share is None else f"{level}: {share:.0%}"
            style = {"linestyle": "--", "linewidth": 1.2} if level == ALL else {"linewidth": 1.6}
            marker = "o" if len(steps) < 40 else ""
            axes.plot(steps, values, color=colours[level], label=label, marker=marker, markersize=3, **style)
        if any(value > 0 for _, values in norms[term].values() for value in values):
            axes.set_yscale("log")
        axes.set(title=term, xlabel="step")
        axes.tick_params(labelleft=True)
        plain(axes)
        axes.legend(
            frameon=False, fontsize=9, title="share of the\nsquared norm", title_fontsize=9, loc="center left",
            bbox_to_anchor=(1.0, 0.5),
        )  # fmt: skip
    for line in grid:
        line[0].set_ylabel("norm of the gradient (weighted term)")
    figure.suptitle(
        "Gradient of each distillation term at the features that it compares, by pyramid level", fontsize=12
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _place(level: str) -> tuple[int, str]:
    """Finest first: P2 before P10."""
    return len(level), level
