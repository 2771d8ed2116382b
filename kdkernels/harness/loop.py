"""The training loop: a fixed number of steps, what it records, and how it stops and goes on.

One function, ``fit``, trains teacher and students alike; what differs is the ``objective`` that it is given.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from .checkpoint import Checkpoints
from .data import to_device, training_batches
from .distill import Distillation
from .evaluate import Evaluator, Score
from .interrupt import Interruption, Stopped
from .processes import ALONE, Processes
from .progress import Progress, Task
from .settings import TrainSettings, Upkeep
from .state import State, seed_all
from .update import Losses, Objective, Told, TrainingError, Updates

__all__ = ["Losses", "Objective", "Run", "TrainingError", "fit", "slowed"]


@dataclass
class Run:
    """What one training has given. Seconds are of training alone: evaluations do not count."""

    name: str
    seed: int
    steps: int
    seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    task_loss: list[float] = field(default_factory=list)
    scores: list[tuple[float, ...]] = field(default_factory=list)  # step, seconds, and what a Score holds
    skipped: int = 0  # steps that changed nothing, as a loss or the gradient was not finite

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Run:
        """What ``asdict`` made of one, and a file kept."""
        return cls(**{**record, "scores": [tuple(score) for score in record["scores"]]})

    @property
    def score(self) -> Score:
        """Of the last evaluation, which follows the last step."""
        return Score(*self.scores[-1][2:])

    @property
    def median_step(self) -> float:
        """Median seconds of a step, without the first ones, which allocate and tune."""
        return statistics.median(self.step_seconds[len(self.step_seconds) // 10 :])

    @property
    def evaluated(self) -> int:
        """The step of the last evaluation; 0: none yet."""
        return self.scores[-1][0] if self.scores else 0


def slowed(step_seconds: list[float]) -> float | None:
    """How many times the median the last five steps took, each of them, where that is five times or more."""
    if len(step_seconds) < 20:
        return None
    factor = min(step_seconds[-5:]) / statistics.median(step_seconds)
    return factor if factor >= 5 else None


def fit(
    name: str,
    detector: nn.Module,
    objective: Objective,
    pictures: Dataset,
    settings: TrainSettings,
    *,
    parameters: Iterable[nn.Parameter],
    device: torch.device,
    evaluator: Evaluator,
    progress: Progress,
    upkeep: Upkeep = Upkeep(),  # noqa: B008 - frozen
    checkpoints: Checkpoints | None = None,
    distillation: Distillation | None = None,
    interruption: Interruption | None = None,
    processes: Processes = ALONE,
) -> Run:
    """Train ``detector`` for ``settings.steps`` steps of ``objective``, and evaluate it on the way and at the end.

    With ``checkpoints`` it goes on after the newest one, and ends in the same bits as if it had never stopped, on a
    CPU.

    Args:
        name: what the progress and the records call it.
        objective: pictures and targets of a batch to losses.
        parameters: all that is trained (the detector's, and an adapter's).
        distillation: what else belongs into a checkpoint: its parameters, the adapters, and what its recipes draw from.
        processes: each trains on its share of a step's pictures.

    Raises:
        TrainingError: a loss or the gradient is not finite; with ``upkeep.on_nan`` "skip", time after time.
        Stopped: SIGTERM, after a checkpoint of the step in progress.
    """
    training = Updates(detector, objective, settings, list(parameters), device, upkeep, processes, name)
    modules = {"student": detector} | ({"distillation": distillation} if distillation is not None else {})
    generators = distillation.generators if distillation is not None else {}
    state = State(modules, training.optimizer, training.scaler, generators, processes)
    interruption = interruption or Interruption()
    run = Run(name, settings.seed, settings.steps)
    seed_all(settings.seed + processes.rank)  # torchvision's samplers draw from the global generator
    first = 0
    if checkpoints is not None:
        found = checkpoints.newest()
        if found is not None:
            state.load(found.state)
            run, first = Run.of(found.state["run"]), found.step
            if first < settings.steps:
                progress.say(f"{name}: going on after step {first}/{settings.steps}, from {found.path}")
    progress.forget(name, first)
    detector.train()
    due = {round(settings.steps * (k + 1) / settings.evaluations) for k in range(settings.evaluations)}

    def save(step: int, *, finished: bool = False) -> None:
        content = state.content(asdict(run), finished=finished)
        if checkpoints is not None and processes.first:
            try:
                progress.sync()
                checkpoints.save(step, content)
            except (OSError, RuntimeError) as error:  # a full disk: the training is worth more than its checkpoint
                reason = str(error).splitlines()[0]
                progress.say(f"warning: {name}: no checkpoint of step {step} could be written: {reason}")

    def evaluate(step: int, task: Task) -> None:
        if processes.first:
            # A checkpoint was written just before: the minutes that this may take can be cut short.
            with interruption.released():
                score = evaluator(detector)
            run.scores.append((step, run.seconds, *score))
            progress.record(kind="evaluation", run=name, step=step, seconds=run.seconds, **score._asdict())
            task.say(f"{name}: step {step}/{settings.steps}  mAP {score.mean_ap:.3f}  AP50 {score.ap50:.3f}")
        run.scores = processes.told(run.scores)

    # Nothing is lost between two steps either: a signal while pictures are read waits for the step that they are for.
    with progress.task(name, settings.steps, first) as task, interruption.held():
        if first in due and run.evaluated < first:  # stopped between the step and its evaluation
            evaluate(first, task)
        if first == settings.steps:
            return run
        begin = time.perf_counter()
        for step, batch in enumerate(_steps(pictures, settings, first, processes), start=first + 1):
            told = training.step([to_device(*part, device) for part in batch], step)
            _note(run, told, time.perf_counter() - begin, step, progress, task)
            stop = processes.any(interruption.asked, device)
            every = upkeep.checkpoint_every
            if stop or step in due or (every and step % every == 0):
                save(step)
            if stop:
                raise Stopped
            if step in due:
                evaluate(step, task)
            begin = time.perf_counter()
        processes.share_buffers(detector)
        save(settings.steps, finished=True)
        if processes.any(interruption.asked, device):
            raise Stopped
    if run.skipped:
        progress.say(
            f"{name}: {run.skipped} of {run.steps} steps were skipped, their loss or gradient not being finite"
        )
    return run


def _steps(pictures: Any, settings: TrainSettings, first: int, processes: Processes) -> Iterator[list[Any]]:
    """The batches of each step after the first so many."""
    each = settings.accumulate
    batches = training_batches(
        pictures,
        settings.steps * each,
        settings.batch_size,
        settings.seed,
        settings.workers,
        first * each,
        share=(processes.rank, processes.count),
    )
    for _ in range(first, settings.steps):
        yield [next(batches) for _ in range(each)]


def _note(run: Run, told: Told, seconds: float, step: int, progress: Progress, task: Task) -> None:
    """Record a step, and show it."""
    run.seconds += seconds
    run.step_seconds.append(seconds)
    run.task_loss.append(told.task)
    run.skipped += told.skipped
    entry = {"loss": told.loss, "losses": told.values, "lr": told.lr, "grad_norm": told.norm, "seconds": seconds}
    entry |= {"details": told.details} if told.details else {}
    entry |= {"skipped": True} if told.skipped else {}
    progress.record(kind="step", run=run.name, step=step, **entry)
    recent = run.step_seconds[-200:]  # of all, a long run would spend its time on sorting
    task.advance(step, f"loss {told.loss:.3f}  {1000 * statistics.median(recent):.0f} ms/step")
    factor = slowed(recent)
    if factor is not None and not task.warned:
        # OpenMP's threads spin while they wait; with one busy program beside them a step can take fifty times as long.
        task.warned = True
        task.say(
            f"{run.name}: steps now take {factor:.0f} times as long as before; if other programs use the same "
            "cores, OMP_WAIT_POLICY=PASSIVE in the environment shares them better"
        )
