"""Learning curves: the loss over the steps and the validation AP50 over the time, of any number of runs and seeds.

Only this picture is drawn here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..loop import Run
from .drawing import COLOURS, MORE, plain, pyplot, shortened

#: More curves than this in one axes cannot be told apart.
TOGETHER = 5


def curves(path: Path, runs: Mapping[str, Run | Sequence[Run]], *, baseline: str | None = None) -> None:
    """Draw the detectors' own loss over the steps, and the validation AP50 over the seconds of training.

    Up to five runs share two axes. More of them get a panel each, of AP50 alone, where the run stands against
    ``baseline`` and the teacher's last score, with all others in grey.

    Args:
        path: of the PNG.
        runs: by name; a sequence is the same run with several seeds, drawn as the mean and a band from the lowest to
            the highest. The run of the name "teacher" is no student.
        baseline: the run that the others are seen against; default: "alone", or the first student.

    Raises:
        ValueError: no run, a name without one, a run without an evaluation, an unknown ``baseline``.
    """
    found = {name: [run] if isinstance(run, Run) else list(run) for name, run in runs.items()}
    for name, seeds in found.items():
        if not seeds or not all(run.scores and run.task_loss for run in seeds):
            raise ValueError(f"runs: {name!r} has {'no run' if not seeds else 'a run without steps or evaluations'}")
    students = [name for name in found if name != "teacher"]
    if not found:
        raise ValueError("runs: expected at least one")
    if baseline is not None and baseline not in students:
        raise ValueError(f"baseline: {baseline!r} is no student among the runs: {', '.join(students)}")
    plt = pyplot()
    if len(found) <= TOGETHER:
        figure = _together(plt, found)
    else:
        figure = _panels(plt, found, baseline or ("alone" if "alone" in students else students[0]))
    figure.savefig(path, dpi=130 if len(found) <= TOGETHER else 100)
    plt.close(figure)


def _together(plt: Any, runs: dict[str, list[Run]]) -> Any:
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    more = itertools.cycle(MORE)
    for name, seeds in runs.items():
        colour = COLOURS.get(name) or next(more)
        title = f"student {name}" if name in COLOURS and name != "teacher" else shortened(name, 50)
        _line(left, [(range(1, len(run.task_loss) + 1), _smooth(run.task_loss)) for run in seeds], colour, title)
        final = sum(run.score.ap50 for run in seeds) / len(seeds)
        _line(right, [_ap50(run) for run in seeds], colour, f"{title}: {final:.2f}", marker="o")
    figure.suptitle(f"Teacher and students, {_seeds(runs)}" if "teacher" in runs else f"Students, {_seeds(runs)}")
    left.set(title="Detection loss on the training pictures", xlabel="step", ylabel="loss (running mean)")
    left.set_ylim(bottom=0)
    right.set(title="Average precision on the validation pictures", xlabel="training time (s)", ylabel="AP at IoU .5")
    right.set_ylim(0, _top(runs))
    for axes in (left, right):
        plain(axes)
        axes.legend(frameon=False)
    return figure


def _panels(plt: Any, runs: dict[str, list[Run]], baseline: str) -> Any:
    shown = [name for name in runs if name not in ("teacher", baseline)]
    columns = min(5, math.ceil(math.sqrt(len(shown))))
    lines = math.ceil(len(shown) / columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(3.1 * columns, 2.4 * lines + 0.9), layout="constrained", squeeze=False,
        sharex=True, sharey=True,
    )  # fmt: skip
    points = {name: [_ap50(run) for run in seeds] for name, seeds in runs.items()}
    finals = {name: sum(run.score.ap50 for run in seeds) / len(seeds) for name, seeds in runs.items()}
    for number, (axes, name) in enumerate(itertools.zip_longest(grid.flat, shown)):
        if name is None:
            axes.set_visible(False)
            continue
        for other in shown:
            if other != name:
                _line(axes, points[other], "#c8c8c8", "other rows", band=False, width=0.7)
        if "teacher" in runs:
            # Its end alone: its training is longer than the students', which would have a corner left.
            label = f"teacher at its end ({finals['teacher']:.2f})"
            axes.axhline(finals["teacher"], color=COLOURS["teacher"], label=label, linewidth=1.0, linestyle=":")
        _line(axes, points[baseline], COLOURS["alone"], f"baseline: {shortened(baseline, 40)} ({finals[baseline]:.2f})")
        _line(axes, points[name], COLOURS["distilled"], "the panel's row: AP50 at the end (and against the baseline)")
        gain = finals[name] - finals[baseline]
        axes.set_title(f"{shortened(name, 40)}\n{finals[name]:.2f} ({gain:+.2f})", fontsize=8.5)
        axes.tick_params(labelsize=8, labelbottom=True)
        if number + columns >= len(shown):  # nothing below
            axes.set_xlabel("training time (s)", fontsize=9)
        plain(axes)
    grid[0][0].set_ylim(0, _top(runs))
    figure.suptitle(f"AP at IoU .5 on the validation pictures, {_seeds(runs)}", fontsize=11)
    figure.supylabel("AP at IoU .5", fontsize=10)
    handles = dict(zip(*reversed(grid[0][0].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _line(
    axes: Any,
    seeds: Sequence[tuple[Sequence[float], Sequence[float]]],
    colour: str,
    label: str,
    *,
    band: bool = True,
    width: float = 1.6,
    **how: Any,
) -> None:
    """The mean of several seeds' points, place by place, and what lies between the lowest and the highest."""
    steps, values = (list(zip(*side, strict=False)) for side in zip(*seeds, strict=True))  # to the shortest
    along = [_mean(x) for x in steps]
    axes.plot(along, [_mean(y) for y in values], color=colour, label=label, linewidth=width, markersize=4, **how)
    if band and len(seeds) > 1:
        axes.fill_between(along, [min(y) for y in values], [max(y) for y in values], color=colour, alpha=0.18, lw=0)


def _ap50(run: Run) -> tuple[list[float], list[float]]:
    return [0.0, *(entry[1] for entry in run.scores)], [0.0, *(entry[3] for entry in run.scores)]


def _top(runs: Mapping[str, list[Run]]) -> float:
    """The end of an axis of AP50."""
    return min(1.0, 0.05 + 1.15 * max(score[3] for seeds in runs.values() for run in seeds for score in run.scores))


def _seeds(runs: Mapping[str, list[Run]]) -> str:
    """Whose numbers these are."""
    numbers = sorted({run.seed for seeds in runs.values() for run in seeds})
    if max(len(seeds) for seeds in runs.values()) == 1:
        return f"seed {', '.join(map(str, numbers))}: one seed says little"
    return f"seeds {', '.join(map(str, numbers))}: line: their mean; band: from the lowest to the highest"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _smooth(values: list[float]) -> list[float]:
    """Running mean over a twentieth of the run."""
    window = max(1, len(values) // 20)
    sums = list(itertools.accumulate(values, initial=0.0))
    return [(sums[i] - sums[max(0, i - window)]) / min(window, i) for i in range(1, len(sums))]
