"""The picture of a comparison: each row's paired differences to the baseline, with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ..report.drawing import plain, pyplot, shortened
from .summary import Difference, Line

#: Equal steps and equal time (Okabe and Ito).
COLOURS = {"equal steps": "#0072B2", "equal time": "#D55E00"}


def draw(path: Path, lines: Sequence[Line], baseline: str) -> bool:
    """Draw the rows from the first down; a bar is the 95 % interval, where there are several seeds. Returns whether
    there was a difference to draw.
    """
    shown = [line for line in lines if line.equal_steps is not None]
    if not shown:
        return False
    plt = pyplot()
    baseline = shortened(baseline, 40)
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.42 * len(shown)), layout="constrained")
    axes.axvline(0, color="black", linewidth=0.9)
    for name, shift in (("equal steps", -0.13), ("equal time", 0.13)):
        label = name
        for place, line in enumerate(shown):
            found: Difference | None = line.equal_steps if name == "equal steps" else line.equal_time
            if found is None:
                continue
            at = place + shift
            if not math.isnan(found.low):
                axes.plot([found.low, found.high], [at, at], color=COLOURS[name], linewidth=2, solid_capstyle="butt")
            axes.plot([found.mean], [at], "o", color=COLOURS[name], markersize=6, label=label)
            label = None
    axes.set_yticks(range(len(shown)), [shortened(line.title, 60) for line in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)  # the first row on top
    axes.set_xlabel(f"mAP over {baseline}")
    seeds = len(shown[0].trained)
    what = f"mean over {seeds} seeds and its 95 % interval" if seeds > 1 else "one seed, which says little"
    axes.set_title(f"Differences to {baseline}: {what}", fontsize=11)
    plain(axes)
    axes.grid(visible=False, axis="y")
    axes.legend(frameon=False, loc="best")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True
