"""The trainings of a comparison, in their order: seed by seed all rows, then those of the best row, then the baseline
at the lengths that make up for the time that the others take.

What a run that was stopped has decided (the best row, the times of a step) it keeps when it goes on.
"""

from __future__ import annotations

import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from .. import report
from ..export import FOLDER, file_of
from ..update import TrainingError
from .chart import draw
from .rows import Row, candidates
from .summary import Line, Trained, paired, table, write_runs

#: Steps of the baseline at equal time are rounded up to so many parts of the rows' steps: rows share it.
QUARTERS = 4


def run(job: Any, begin: float) -> None:
    """Train the rows and write the table (compare.csv, compare.md) and the pictures.

    Raises:
        TrainingError: some trainings did not come to their end; all others did, and everything is written.
    """
    job.progress.record(kind="settings", **job.settings())
    teacher, teacher_run = job.teacher()
    comparison = Comparison(job, teacher, teacher_run)
    rows = job.options.compare
    for seed in comparison.seeds:
        for row in rows:
            if not row.best:
                comparison.train(row, seed)
    if any(row.best for row in rows):
        best = comparison.best()
        if best is None:
            comparison.failed.append("best: none of the rows that it may stand for came to its end")
        known = [row for row in rows if row.best and best is not None]
        known = [row._replace(recipes=[*best.recipes, *row.recipes], best=False) for row in known]
        for seed in comparison.seeds:
            for row in known:
                comparison.train(row, seed)
    if job.options.equal_time:
        baseline = comparison.row_of.get(comparison.baseline.title)  # which "best" may have been
        for steps in sorted({comparison.longer(row) for row in rows} - {job.options.training.steps}):
            for seed in comparison.seeds if baseline is not None else ():
                comparison.train(baseline, seed, steps)
    seconds = time.perf_counter() - begin
    job.progress.record(kind="end", seconds=seconds)
    if job.processes.first:
        comparison.finish(seconds)
    if comparison.failed:
        raise TrainingError("; ".join(comparison.failed))


class Comparison:
    """What has been trained so far, and the table of it."""

    def __init__(self, job: Any, teacher: Any, teacher_run: Any) -> None:
        self.job, self.teacher = job, teacher
        training = job.options.training
        self.steps = training.steps
        self.seeds = range(training.seed, training.seed + job.options.seeds)
        rows = job.options.compare
        #: What the others are held against: the student alone, or, where no row is that, the first one.
        self.baseline = next((row for row in rows if row.plain), rows[0])
        self.teacher_run = teacher_run
        self.runs: dict[tuple[str, int], list[Any]] = {}  #: by title and steps: a Run for each seed
        self.row_of: dict[str, Row] = {}  #: by title, as it is trained: with the recipes that "best" stands for
        self.failed: list[str] = []  #: trainings that did not come to their end, and why
        self.parts: dict[str, dict[str, float]] = {}  #: of rows with recipes, by title

    def train(self, row: Row, seed: int, steps: int | None = None) -> None:
        """Train one student, and write what there is: a run that is stopped leaves it."""
        job, steps = self.job, self.steps if steps is None else steps
        name = self.name(row, seed, steps)
        number = sum(len(found) for found in self.runs.values()) + 1
        job.progress.say(f"training {number}: {name}")
        how = {"inherit": row.inherit, "freeze": row.freeze, "seed": seed}
        self.row_of[row.title] = row
        try:
            student = job.student(name, steps, self.teacher, row.recipes, **how)
        except TrainingError as error:  # a row that diverges is a finding, and the others are still wanted
            job.progress.say(f"warning: {error}")
            self.failed.append(str(error))
            job.progress.record(kind="failed", run=name, error=str(error))
            return
        self.runs.setdefault((row.title, steps), []).append(student.run)
        if student.distillation is not None and row.title not in self.parts:
            self.parts[row.title] = job.decide(f"parts of {row.title}", lambda: job.split(student))
            job.progress.record(kind="step_split", run=row.title, **self.parts[row.title])
        line = self.trained(row, student.run)
        job.progress.record(kind="result", pictures=len(job.val), **line._asdict())
        if job.processes.first:
            self.write()

    def name(self, row: Row, seed: int, steps: int) -> str:
        """What a training is called in progress, records and files."""
        parts = [row.title, *[f"{steps} steps"] * (steps != self.steps), *[f"seed {seed}"] * (len(self.seeds) > 1)]
        return ", ".join(parts)

    def best(self) -> Row | None:
        """The row with the highest mean AP, among those that "best" may stand for; None: none came to its end."""
        job = self.job
        found = {row.title: self._all_of(row) for row in candidates(job.options.compare) if self._all_of(row)}
        if not found:  # not decided: a run that goes on may skip the steps that ended them
            return None
        scores = {title: statistics.fmean(run.score.mean_ap for run in runs) for title, runs in found.items()}
        title = job.decide("best", lambda: max(scores, key=scores.get))
        job.progress.say(f"the best row is {title}")
        return next(row for row in job.options.compare if row.title == title)

    def _all_of(self, row: Row) -> list[Any]:
        """Its trainings, where all came to their end."""
        found = self.runs.get((row.title, self.steps), [])
        return found if len(found) == len(self.seeds) else []

    def longer(self, row: Row) -> int:
        """The steps that take the baseline as long as this row takes, rounded up to the next quarter."""
        ratio = self._ratio(row) / self._ratio(self.baseline)
        return max(self.steps, math.ceil(QUARTERS * max(1.0, ratio)) * self.steps // QUARTERS)

    def _ratio(self, row: Row) -> float:
        """How many times as long as a step alone one of this row takes."""
        parts = self.parts.get(row.title)
        return 1.0 if parts is None else parts["distilled"] / parts["alone"]

    def trained(self, row: Row | None, run: Any) -> Trained:
        """A line of compare.csv."""
        title = "teacher" if row is None else row.title
        if row is not None and run.steps != self.steps:
            title = f"{title}, {run.steps} steps"
        text, options = ("", "") if row is None else (row.text, row.options)
        milliseconds = 1000 * run.median_step
        how = (title, text, options, run.seed, run.steps, run.seconds, milliseconds, run.skipped)
        return Trained(*how, *run.score)

    def lines(self) -> list[Line]:
        """The table's rows, as far as they are trained."""
        base = self._of(self.baseline, self.steps)
        found = []
        for row in self.row_of.values():
            trained = self._of(row, self.steps)
            if not trained:
                continue
            longer, other = self.longer(row), None
            if self.job.options.equal_time and row.title != self.baseline.title:
                other = paired(trained, self._of(self.baseline, longer))
            equal = None if row.title == self.baseline.title else paired(trained, base)
            found.append(Line(row.title, row.text, trained, equal, other, longer, self._parts(row)))
        return found

    def _of(self, row: Row, steps: int) -> list[Trained]:
        return [self.trained(row, run) for run in self.runs.get((row.title, steps), [])]

    def _parts(self, row: Row) -> dict[str, float] | None:
        """What a step of the row takes; of the student alone what was measured beside the others."""
        if row.recipes or row.freeze or not self.parts:
            return self.parts.get(row.title)
        return {
            name: statistics.median(parts[name] for parts in self.parts.values()) for name in ("alone", "memory_alone")
        }

    def table(self) -> str:
        """compare.md."""
        teacher = None if self.teacher_run is None else self.trained(None, self.teacher_run)
        device = self.job.device
        threads = torch.get_num_threads()
        where = f"{threads} thread{'s' * (threads > 1)} of the CPU" if device.type == "cpu" else f"{device}"
        return table(teacher, self.lines(), self.baseline.title, len(self.job.val), where, self.failed)

    def write(self) -> None:
        """The files, of what there is."""
        folder = self.job.options.output_dir
        teacher = [] if self.teacher_run is None else [self.trained(None, self.teacher_run)]
        trained = [self.trained(self.row_of[title], run) for (title, _), runs in self.runs.items() for run in runs]
        write_runs(folder / "compare.csv", teacher + trained)
        (folder / "compare.md").write_text(self.table() + "\n", encoding="utf-8")

    def finish(self, seconds: float) -> None:
        """The pictures, and what is printed."""
        folder, lines = self.job.options.output_dir, self.lines()
        drawn = self._pictures(folder, lines) if lines else []
        print(self.table())
        files = ", ".join(["metrics.jsonl", "compare.csv", "compare.md", *drawn])
        print(f"\n{seconds:.0f} s in all. In {folder}: {files}, {FOLDER}/*.safetensors")

    def _pictures(self, folder: Path, lines: list[Line]) -> list[str]:
        """Differences and curves of all rows; what the baseline and the best row find and see; the files' names."""
        drawn = ["differences.png"] if draw(folder / "differences.png", lines, self.baseline.title) else []
        runs = {line.title: self.runs[line.title, self.steps] for line in lines}
        teacher = {} if self.teacher_run is None else {"teacher": self.teacher_run}
        compared_with = self.baseline.title if self.baseline.title in runs else None
        report.curves(folder / "curves.png", {**teacher, **runs}, baseline=compared_with)
        best = max(lines, key=lambda line: statistics.fmean(x.mean_ap for x in line.trained)).title
        names = {title: self.name(self.row_of[title], runs[title][0].seed, self.steps) for title in runs}
        shown = {"teacher": self.teacher.detector}
        for title in dict.fromkeys(title for title in (compared_with, best) if title is not None):
            shown[title] = self.job.loaded(file_of(folder, names[title]))
        return [*drawn, "curves.png", *report.seen(folder, shown, self.job, names[best])]
