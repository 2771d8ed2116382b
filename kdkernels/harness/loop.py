"""The training loop: a fixed number of steps of AdamW with warm-up and cosine, and what it records.

One function, ``fit``, trains teacher and students alike; what differs is the ``objective`` that it is given.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from .data import to_device, training_batches
from .evaluate import Evaluator, Score
from .progress import Progress
from .settings import TrainSettings


class Losses(NamedTuple):
    """What an objective gives for a batch."""

    summed: dict[str, Tensor]  #: by name, each with its graph; their sum is what is trained
    told: dict[str, Tensor] = {}  #: what is recorded in place of "distill": its terms, detached
    noted: dict[str, Tensor] = {}  #: what is recorded beside them: regions, levels, gradient norms
    task: Tensor | None = None  #: the detector's own losses, unweighted; None: their sum in ``summed``


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

    @property
    def score(self) -> Score:
        """Of the last evaluation, which follows the last step."""
        return Score(*self.scores[-1][2:])

    @property
    def median_step(self) -> float:
        """Median seconds of a step, without the first ones, which allocate and tune."""
        return statistics.median(self.step_seconds[len(self.step_seconds) // 10 :])


def slowed(step_seconds: list[float]) -> float | None:
    """How many times the median the last five steps took, each of them, where that is five times or more."""
    if len(step_seconds) < 20:
        return None
    factor = min(step_seconds[-5:]) / statistics.median(step_seconds)
    return factor if factor >= 5 else None


def learning_rate(step: int, settings: TrainSettings) -> float:
    """The factor on ``lr`` at ``step`` (from 0): linear warm-up, then a cosine down to ``final``."""
    warmup = min(settings.warmup, max(1, settings.steps // 5))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, settings.steps - warmup)
    return settings.final + (1 - settings.final) * (1 + math.cos(math.pi * done)) / 2


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
) -> Run:
    """Train ``detector`` for ``settings.steps`` steps of ``objective``, and evaluate it on the way and at the end.

    Args:
        name: what the progress and the records call it.
        objective: pictures and targets of a batch to losses; those whose names start with ``task/`` are summed into the
            curve that all runs share.
        parameters: all that is trained (the detector's, and an adapter's).
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, settings))
    run = Run(name, settings.seed, settings.steps)
    torch.manual_seed(settings.seed)  # torchvision's samplers draw from the global generator
    checkpoints = {round(settings.steps * (k + 1) / settings.evaluations) for k in range(settings.evaluations)}
    warned = False
    recent: deque[float] = deque(maxlen=200)
    detector.train()
    with progress.task(name, settings.steps) as task:
        begin = time.perf_counter()
        batches = training_batches(pictures, settings.steps, settings.batch_size, settings.seed, settings.workers)
        for step, batch in enumerate(batches, start=1):
            images, targets = to_device(*batch, device)
            losses = objective(images, targets, step - 1)
            total = sum(losses.summed.values())
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            norm = nn.utils.clip_grad_norm_(parameters, settings.clip)
            optimizer.step()
            lr = schedule.get_last_lr()[0]
            schedule.step()
            named = {**losses.summed, **losses.told, "total": total}
            named |= {f"noted {name}": value for name, value in losses.noted.items()}
            named["task"] = losses.task if losses.task is not None else total
            values = dict(zip(named, torch.stack([value.detach() for value in named.values()]).tolist(), strict=True))
            seconds = time.perf_counter() - begin
            loss = values.pop("total")
            noted = {name: values.pop(f"noted {name}") for name in losses.noted}
            if losses.told:
                values.pop("distill")
            if not math.isfinite(loss):
                raise TrainingError(f"{name}: the loss is {loss} at step {step}: {values}; a smaller --lr may help")
            run.seconds += seconds
            run.step_seconds.append(seconds)
            run.task_loss.append(values.pop("task"))
            entry = {"loss": loss, "losses": values, "lr": lr, "grad_norm": float(norm), "seconds": seconds}
            progress.record(kind="step", run=name, step=step, **entry, **({"details": noted} if noted else {}))
            recent.append(seconds)
            task.advance(step, f"loss {loss:.3f}  {1000 * statistics.median(recent):.0f} ms/step")
            factor = slowed(list(recent))
            if factor is not None and not warned:
                # OpenMP's threads spin while they wait; with one busy program beside them a step can take fifty times
                # as long.
                warned = True
                task.say(
                    f"{name}: steps now take {factor:.0f} times as long as before; if other programs use the same "
                    "cores, OMP_WAIT_POLICY=PASSIVE in the environment shares them better"
                )
            if step in checkpoints:
                score = evaluator(detector)
                run.scores.append((step, run.seconds, *score))
                progress.record(kind="evaluation", run=name, step=step, seconds=run.seconds, **score._asdict())
                task.say(f"{name}: step {step}/{settings.steps}  mAP {score.mean_ap:.3f}  AP50 {score.ap50:.3f}")
            begin = time.perf_counter()
    return run
