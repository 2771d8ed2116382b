"""The training loop: a fixed number of steps, what it records, and how it stops and goes on.

One function, ``fit``, trains teacher and students alike; what differs is the ``objective`` that it is given.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from .checkpoint import Checkpoints
from .data import to_device, training_batches
from .evaluate import Evaluator, Score
from .interrupt import Interruption, Stopped
from .processes import ALONE, Processes
from .progress import Progress, Task
from .schedule import learning_rate, optimizer_of
from .settings import TrainSettings, Upkeep
from .state import State, seed_all

#: So many steps in a row may be skipped because of losses that are not finite; more are no accident.
MOST_SKIPPED = 20


class Losses(NamedTuple):
    """What an objective gives for a batch."""

    summed: dict[str, Tensor]  #: by name, each with its graph; their sum is what is trained
    told: dict[str, Tensor] = {}  #: what is recorded in place of "distill": its terms, detached
    noted: dict[str, Tensor] = {}  #: what is recorded beside them: regions, levels, gradient norms


#: Pictures and targets of a batch, and the number of the step, from 0, to losses.
Objective = Callable[[Tensor, list[dict], int], Losses]


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and why."""


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
    distillation: nn.Module | None = None,
    generators: Mapping[str, torch.Generator] | None = None,
    interruption: Interruption | None = None,
    processes: Processes = ALONE,
) -> Run:
    """Train ``detector`` for ``settings.steps`` steps of ``objective``, and evaluate it on the way and at the end.

    With ``checkpoints`` it goes on after the newest one, and ends in the same bits as if it had never stopped, on a
    CPU.

    Args:
        name: what the progress and the records call it.
        objective: pictures and targets of a batch to losses; those whose names start with ``task/`` are summed into the
            curve that all runs share.
        parameters: all that is trained (the detector's, and an adapter's).
        distillation: what else belongs into a checkpoint: its parameters are the adapters.
        generators: by name, what ``objective`` draws from beside the global generators.
        processes: each trains on its share of a step's pictures.

    Raises:
        TrainingError: a loss or the gradient is not finite; with ``upkeep.on_nan`` "skip", time after time.
        Stopped: SIGTERM, after a checkpoint of the step in progress.
    """
    training = _Training(detector, objective, settings, list(parameters), device, upkeep, processes, name)
    modules = {"student": detector} | ({"distillation": distillation} if distillation is not None else {})
    state = State(modules, training.optimizer, training.scaler, generators or {}, processes)
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
            progress.sync()
            checkpoints.save(step, content)

    def evaluate(step: int, task: Task) -> None:
        if processes.first:
            score = evaluator(detector)
            run.scores.append((step, run.seconds, *score))
            progress.record(kind="evaluation", run=name, step=step, seconds=run.seconds, **score._asdict())
            task.say(f"{name}: step {step}/{settings.steps}  mAP {score.mean_ap:.3f}  AP50 {score.ap50:.3f}")
        run.scores = processes.told(run.scores)

    with progress.task(name, settings.steps, first) as task:
        if first in due and run.evaluated < first:  # stopped between the step and its evaluation
            evaluate(first, task)
        if first == settings.steps:
            return run
        begin = time.perf_counter()
        batches = _steps(pictures, settings, first, processes)
        for step, batch in enumerate(batches, start=first + 1):
            with interruption.held():
                told = training.step([to_device(*part, device) for part in batch], step)
                seconds = time.perf_counter() - begin
                _note(run, told, seconds, step, progress, task)
                stop = processes.any(interruption.asked, device)
                # Before an evaluation as well: it may take minutes, and nothing is lost when it is cut short.
                every = upkeep.checkpoint_every
                if stop or step in due or (every and step % every == 0):
                    save(step)
            # Several processes stop by what they agreed on; one that was asked meanwhile says so at the next step.
            if stop or (processes.count == 1 and interruption.asked):
                raise Stopped
            if step in due:
                evaluate(step, task)
            begin = time.perf_counter()
        processes.share_buffers(detector)
        with interruption.held():
            save(settings.steps, finished=True)
            stop = processes.any(interruption.asked, device)
        if stop:
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


def _note(run: Run, told: _Told, seconds: float, step: int, progress: Progress, task: Task) -> None:
    """Record a step, and show it."""
    run.seconds += seconds
    run.step_seconds.append(seconds)
    run.task_loss.append(sum(v for key, v in told.values.items() if key.startswith("task/")))
    run.skipped += told.skipped
    entry = {"loss": told.loss, "losses": told.values, "lr": told.lr, "grad_norm": told.norm, "seconds": seconds}
    entry |= {"details": told.details} if told.details else {}
    entry |= {"skipped": True} if told.skipped else {}
    progress.record(kind="step", run=run.name, step=step, **entry)
    task.advance(step, f"loss {told.loss:.3f}  {1000 * run.median_step:.0f} ms/step")
    factor = slowed(run.step_seconds)
    if factor is not None and not task.warned:
        # OpenMP's threads spin while they wait; with one busy program beside them a step can take fifty times as long.
        task.warned = True
        task.say(
            f"{run.name}: steps now take {factor:.0f} times as long as before; if other programs use the same "
            "cores, OMP_WAIT_POLICY=PASSIVE in the environment shares them better"
        )


class _Told(NamedTuple):
    """What a step has given, on the host."""

    loss: float
    values: dict[str, float]
    details: dict[str, float]
    lr: float
    norm: float
    skipped: bool


class _Training:
    """What one step needs, beside its batches."""

    def __init__(
        self,
        detector: nn.Module,
        objective: Objective,
        settings: TrainSettings,
        parameters: list[nn.Parameter],
        device: torch.device,
        upkeep: Upkeep,
        processes: Processes,
        name: str,
    ) -> None:
        self.detector, self.objective, self.settings, self.device = detector, objective, settings, device
        self.upkeep, self.processes, self.name = upkeep, processes, name
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.optimizer = optimizer_of(self.parameters, detector, settings)
        self.base = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == "float16")
        self.in_a_row = 0

    def step(self, batches: list[tuple[Tensor, list[dict]]], step: int) -> _Told:
        """Step number ``step``, from 1."""
        settings, skip = self.settings, self.upkeep.on_nan == "skip"
        lr = settings.lr * learning_rate(step - 1, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        kept = [x.clone() for x in self.detector.buffers()] if skip else []
        self.optimizer.zero_grad(set_to_none=True)
        parts = []
        for place, (images, targets) in enumerate(batches):
            with self._shared(place == len(batches) - 1):
                with self._precision():
                    losses = self.objective(images, targets, step - 1)
                total = sum(losses.summed.values())
                self.scaler.scale(total if len(batches) == 1 else total / len(batches)).backward()
            parts.append(_named(losses, total))
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, settings.clip or math.inf)
        if not skip:  # before anything is read: a GPU has work while the host waits for the numbers
            self.scaler.step(self.optimizer)
            self.scaler.update()
        read = [dict(zip(part, torch.stack(list(part.values())).tolist(), strict=True)) for part in parts]
        # A gradient beyond float16 is an everyday matter of the scaler's, which leaves the step out and scales less.
        bad = not all(math.isfinite(part["total"]) for part in read)
        bad = bad or not (self.scaler.is_enabled() or math.isfinite(norm))
        if skip:
            bad = self.processes.any(bad, self.device)
            if bad:
                self._undo(kept)
            else:
                self.scaler.step(self.optimizer)
            self.scaler.update()
        self.in_a_row = self.in_a_row + 1 if bad else 0
        if bad and (not skip or self.in_a_row > MOST_SKIPPED):
            raise TrainingError(self._blame(read, batches, float(norm), step))
        values = {key: sum(part[key] for part in read) / len(read) for key in read[0]}
        details = {key.removeprefix("noted "): values.pop(key) for key in read[0] if key.startswith("noted ")}
        return _Told(values.pop("total"), values, details, lr, float(norm), bad)

    def _precision(self) -> contextlib.AbstractContextManager:
        if self.settings.amp is None:
            return contextlib.nullcontext()
        # Without its cache: a weight that was cast where no gradient was wanted would be found there where one is.
        return torch.autocast(self.device.type, getattr(torch, self.settings.amp), cache_enabled=False)

    def _shared(self, last: bool) -> contextlib.AbstractContextManager:
        """Gradients are exchanged once a step, with its last batch."""
        unshared = getattr(self.objective, "no_sync", None)
        return contextlib.nullcontext() if last or unshared is None else unshared()

    def _undo(self, buffers: list[Tensor]) -> None:
        """The step changes nothing: neither weights nor running statistics."""
        with torch.no_grad():
            for mine, before in zip(self.detector.buffers(), buffers, strict=True):
                mine.copy_(before)
        self.optimizer.zero_grad(set_to_none=True)

    def _blame(self, read: list[dict[str, float]], batches: list[Any], norm: float, step: int) -> str:
        """Which terms are not finite, and on which pictures."""
        for part, (_, targets) in zip(read, batches, strict=True):
            if math.isfinite(part["total"]):
                continue
            names = [key for key, x in part.items() if key not in ("total", "distill") and not math.isfinite(x)]
            told = ", ".join(f"{key.removeprefix('noted ')} is {part[key]}" for key in names or ["total"])
            return (
                f"{self.name}: the loss is {part['total']} at step {step}: {told}; {_pictures(targets)}; a smaller "
                "--lr may help, --on-nan skip leaves such steps out"
            )
        which = _pictures([target for _, targets in batches for target in targets])
        return f"{self.name}: the norm of the gradient is {norm} at step {step}, of finite losses; {which}"


def _named(losses: Losses, total: Tensor) -> dict[str, Tensor]:
    """What is read of a batch's losses, detached."""
    named = {**losses.summed, **losses.told, "total": total}
    if losses.told:
        named.pop("distill")
    named |= {f"noted {name}": value for name, value in losses.noted.items()}
    return {name: value.detach() for name, value in named.items()}


def _pictures(targets: list[dict]) -> str:
    ids = [str(target["image_id"]) for target in targets if "image_id" in target]
    return f"image ids {', '.join(ids)}" if ids else f"{len(targets)} pictures"
