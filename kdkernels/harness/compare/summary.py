"""From the trained students of a comparison to its table: means, paired differences and their intervals.

A difference is paired: of two students of the same seed, which begin with the same weights and see the same pictures in
the same order. Its interval is Student's, of 95 %, over the seeds; it speaks of seeds, not of other pictures.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..extras import require
from ..split import PARTS

CONFIDENCE = 0.95


class Trained(NamedTuple):
    """One trained student, or the teacher: a line of compare.csv."""

    run: str  #: the row's title; of the baseline at another length its title and its steps
    row: str
    options: str
    seed: int
    steps: int
    seconds: float
    ms_per_step: float
    skipped: int
    mean_ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float


class Difference(NamedTuple):
    """The mean of paired differences, and its interval; NaN where one seed has none."""

    mean: float
    low: float
    high: float

    @property
    def told(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.mean:+.3f}"
        interval = f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"
        return interval if self.told else f"{interval} no difference"


class Line(NamedTuple):
    """A row of the table."""

    title: str
    text: str
    trained: list[Trained]
    equal_steps: Difference | None  #: to the baseline of as many steps; None: it is the baseline
    equal_time: Difference | None  #: to the baseline of as much time; None: none was trained
    longer: int  #: the steps of that one
    parts: Mapping[str, float] | None  #: seconds and bytes of a step, as split.measure gives them


def paired(ours: Sequence[Trained], theirs: Sequence[Trained]) -> Difference | None:
    """The mean AP of one minus that of the other, over the seeds that both have; None: there is none."""
    other = {trained.seed: trained.mean_ap for trained in theirs}
    differences = [trained.mean_ap - other[trained.seed] for trained in ours if trained.seed in other]
    if not differences:
        return None
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return Difference(mean, math.nan, math.nan)
    quantile = require("scipy.stats", "the intervals of a comparison").t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1)
    half = float(quantile) * statistics.stdev(differences) / math.sqrt(len(differences))
    return Difference(mean, mean - half, mean + half)


def mean_and_deviation(values: Sequence[float]) -> str:
    """``0.203 ± 0.012``, the deviation that of a sample; of one value the value."""
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.3f}"


def write_runs(path: Path, trained: Sequence[Trained]) -> None:
    """Every training as a line of a CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Trained._fields)
        writer.writerows([f"{x:.6g}" if isinstance(x, float) else x for x in line] for line in trained)


def table(
    teacher: Trained | None, lines: Sequence[Line], baseline: str, pictures: int, where: str, failed: Sequence[str] = ()
) -> str:
    """The comparison as Markdown: scores and differences, what a step costs, and what the numbers mean."""
    several = any(len(line.trained) > 1 for line in lines)
    timed = any(line.equal_time is not None for line in lines)
    head = ["row", "seeds", "mAP", "AP50", f"mAP over {baseline}, equal steps"]
    head += ["equal time (its steps)"] * timed
    scores, costs = [], []
    if teacher is not None:
        first = ["teacher", "1", f"{teacher.mean_ap:.3f}", f"{teacher.ap50:.3f}"]
        scores.append(first + [""] * (len(head) - len(first)))
    for line in lines:
        name = f"`{line.text}`" if line.text == line.title else f"{line.title}: `{line.text}`"
        found = [mean_and_deviation([getattr(x, name) for x in line.trained]) for name in ("mean_ap", "ap50")]
        cells = [name, str(len(line.trained)), *found, "" if line.equal_steps is None else str(line.equal_steps)]
        scores.append(cells + ["" if line.equal_time is None else f"{line.equal_time} ({line.longer})"] * timed)
        if line.parts is not None:
            costs.append([name, *_cost(line.parts)])
    said = [
        f"Scored on {pictures} validation pictures. Step: forward and backward without the optimiser, on {where}; the "
        "kinds of step were timed in turn, after the row's first training. Memory: what a step holds at most beyond "
        "what stood before it."
    ]
    if timed:
        said.append(
            f"Equal time: against {baseline} trained for as long as the row takes, by that ratio of the steps' times, "
            "rounded up to the next quarter of the row's steps."
        )
    if several:
        said.append(
            "±: standard deviation over the seeds. [ ]: 95 % interval of the mean of paired differences (Student's t "
            "over the seeds; the pictures and the teacher are the same). Of twenty intervals of rows that do not "
            "differ, one leaves out 0 by chance."
        )
    else:
        said.append("One seed says little: --seeds 3 gives differences with intervals.")
    said += [f"Not trained to the end: {text}." for text in failed]
    parts = [_markdown(head, scores), ""]
    if costs:
        parts += [_markdown(["row", "step, ms", "x alone", *(f"{part}, ms" for part in PARTS), "memory"], costs), ""]
    parts += said
    weights = [f"- `{line.text}`: {line.trained[0].options}" for line in lines if line.trained[0].options]
    if weights:
        parts += ["\nWeights and options:\n", *weights]
    return "\n".join(parts)


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *body))


def _cost(parts: Mapping[str, float]) -> list[str]:
    if "distilled" not in parts:  # of the student alone
        return [f"{1000 * parts['alone']:.0f}", "1", *[""] * len(PARTS), _megabytes(parts["memory_alone"])]
    shares = [f"{1000 * parts[part]:.0f}" for part in PARTS]
    ratio = f"{parts['distilled'] / parts['alone']:.2f}"
    return [f"{1000 * parts['distilled']:.0f}", ratio, *shares, _megabytes(parts["memory"])]


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.0f} MB"
