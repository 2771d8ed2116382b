"""How long a distillation step spends in teacher, student and losses, and a step alone. Only this measurement."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from .data import to_device, training_batches
from .distill import Distillation
from .settings import TrainSettings
from .teacher import FrozenTeacher

PARTS = ("teacher", "student", "losses")


def measure(
    student: nn.Module,
    distillation: Distillation,
    pictures: Dataset,
    settings: TrainSettings,
    device: torch.device,
    steps: int = 12,
) -> dict[str, float]:
    """Median seconds of each part of a step (forward and backward, without the optimiser), after two steps to warm up.

    The distillation losses are cut off the student's graph: their backward ends at copies of what they take, and the
    gradient found there enters the student's own backward. The sum is the same gradient, and each part has its own
    time. ``alone`` is a step of the student without distillation, on the same pictures. ``separate`` is "losses" with
    one call per loss instead of the objective that reads the features once, on what the student gave. Parameters,
    gradients and running statistics are left as they were.
    """
    before = {name: value.clone() for name, value in student.state_dict().items()}
    times: dict[str, list[float]] = {part: [] for part in (*PARTS, "separate", "alone")}
    clock = _clock(device)
    teacher = _TimedTeacher(distillation.teacher, clock)
    keys: list[Hashable] | None = None
    student.train()
    for batch in training_batches(pictures, steps + 2, settings.batch_size, settings.seed, settings.workers):
        images, targets = to_device(*batch, device)
        if keys is None:
            keys = _asked_for(student, distillation, images, targets)
        for part, seconds in _step(student, distillation, teacher, images, targets, keys).items():
            times[part].append(seconds)
        # In turn with the other, so that whatever else the machine does weighs on both alike.
        begin = clock()
        sum(student.losses(student.features(images), targets).values()).backward()
        times["alone"].append(clock() - begin)
    student.zero_grad(set_to_none=True)
    distillation.zero_grad(set_to_none=True)
    student.load_state_dict(before)
    return {part: statistics.median(values[2:]) for part, values in times.items()}


class _TimedTeacher(FrozenTeacher):
    """A frozen teacher that adds up the seconds of its own calls."""

    def __init__(self, teacher: FrozenTeacher, clock: Callable[[], float]) -> None:
        super().__init__(teacher.detector, teacher.dtype)
        self.clock, self.seconds = clock, 0.0

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        begin = self.clock()
        result = super()._call(function, *args, **kwargs)
        self.seconds += self.clock() - begin
        return result


def _step(
    student: nn.Module,
    distillation: Distillation,
    teacher: _TimedTeacher,
    images: Tensor,
    targets: list[dict],
    keys: list[Hashable],
) -> dict[str, float]:
    clock, teacher.seconds = teacher.clock, 0.0
    begin = clock()
    step = distillation.step(student, images, targets)
    step.teacher = teacher
    losses = student.losses(step.features, targets)
    own = sum(distillation.task_weight(name, step) * value for name, value in losses.items())
    _ = step.teacher_features
    step.prefetch(keys)
    cut, leaves = step.cut()
    before_losses = clock()
    distillation(cut).total.backward()
    after_losses = clock()
    reached = [(output, leaf.grad) for output, leaf in leaves if leaf.grad is not None]
    torch.autograd.backward([own, *(x for x, _ in reached)], [None, *(grad for _, grad in reached)])
    whole, losses_seconds = clock() - begin, after_losses - before_losses
    found = [(parameter, parameter.grad) for parameter in distillation.parameters()]
    distillation.zero_grad(set_to_none=True)
    again, _ = step.cut()
    before_separate = clock()
    distillation(again, together=False).total.backward()
    separate = clock() - before_separate
    for parameter, grad in found:  # a step has one backward of the losses
        parameter.grad = grad
    return {
        "teacher": teacher.seconds,
        "student": whole - losses_seconds - teacher.seconds,
        "losses": losses_seconds,
        "separate": separate,
    }


def _asked_for(student: nn.Module, distillation: Distillation, images: Tensor, targets: list[dict]) -> list[Hashable]:
    """What the recipes ask of a step, found by asking once."""
    with torch.no_grad():
        step = distillation.step(student, images, targets)
        distillation(step)
    return list(step.found)


def _clock(device: torch.device) -> Callable[[], float]:
    def read() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return read
