"""How long a distillation step spends in teacher, student and losses, a step alone, and how much memory both hold. Only
this measurement.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from .data import to_device, training_batches
from .distill import Distillation, distilled
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
    unlabeled: Callable[[int], Tensor] | None = None,
    frozen: Sequence[nn.Parameter] = (),
) -> dict[str, float]:
    """Median seconds of each part of a step (forward and backward, without the optimiser), after two steps to warm up.

    The distillation losses are cut off the student's graph: their backward ends at copies of what they take, and the
    gradient found there enters the student's own backward. The sum is the same gradient, and each part has its own
    time; they are of the first step at which distillation counts. ``separate`` is "losses" with one call per loss
    instead of the objective that reads the features once, on what the student gave. ``distilled`` is a whole step as
    training takes it, and ``alone`` one without distillation, on the same pictures: means, without the longest, over
    step numbers from the whole run, as recipes may do other things in their course. ``memory`` and ``memory_alone`` are
    the bytes that PyTorch holds at most in such a step beyond what stood before it, gradients included; the first is
    of the first step at which distillation counts. Parameters, gradients and running statistics are left as they were.

    Args:
        unlabeled: as for :func:`~kdkernels.harness.distill.distilled`.
        frozen: what this student does not train and the one alone does: a step ``alone`` trains it.
    """
    before = {name: value.clone() for name, value in student.state_dict().items()}
    times: dict[str, list[float]] = {part: [] for part in (*PARTS, "separate", "distilled", "alone")}
    objective = distilled(student, distillation, unlabeled=unlabeled)
    clock = _clock(device)
    teacher = _TimedTeacher(distillation.teacher, clock)
    keys: list[Hashable] | None = None
    student.train()
    batches = training_batches(pictures, steps + 2, settings.batch_size, settings.seed, settings.workers)
    for number, batch in enumerate(batches):
        images, targets = to_device(*batch, device)
        if keys is None:
            keys = _asked_for(student, distillation, images, targets)
        for part, seconds in _step(student, distillation, teacher, images, targets, keys).items():
            times[part].append(seconds)
        # In turn with the other, so that whatever else the machine does weighs on both alike.
        index = distillation.steps * max(0, number - 2) // steps
        steps_of = {
            "distilled": lambda: sum(objective(images, targets, index).summed.values()).backward(),  # noqa: B023
            "alone": lambda: sum(student.losses(student.features(images), targets).values()).backward(),  # noqa: B023
        }
        for kind, step in steps_of.items():
            with _trained(frozen) if kind == "alone" else nullcontext():
                begin = clock()
                step()
                times[kind].append(clock() - begin)
    memory, index = {}, distillation.schedule.start
    for kind, step in steps_of.items():  # of the last pictures
        student.zero_grad(set_to_none=True)
        distillation.zero_grad(set_to_none=True)
        with _trained(frozen) if kind == "alone" else nullcontext():
            memory["memory" if kind == "distilled" else "memory_alone"] = _peak(step, device)
    student.zero_grad(set_to_none=True)
    distillation.zero_grad(set_to_none=True)
    student.load_state_dict(before)
    found = {part: statistics.median(values[2:]) for part, values in times.items()}
    return found | {part: _mean(times[part][2:]) for part in ("distilled", "alone")} | memory


@contextmanager
def _trained(frozen: Sequence[nn.Parameter]) -> Iterator[None]:
    """With gradients for what is frozen."""
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
            parameter.grad = None


def _peak(step: Callable[[], object], device: torch.device) -> int:
    """The bytes that PyTorch's allocator has given out at most while ``step`` runs, beyond those before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its lines would stand among the progress
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def _mean(values: list[float]) -> float:
    """Without the largest, where there are several: another program may have had the core."""
    return statistics.fmean(sorted(values)[: max(1, len(values) - 1)])


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
    step = distillation.step(student, images, targets, distillation.schedule.start)
    step.teacher = teacher
    dense = {"dense": step.student_dense} if distillation.needs_dense else {}
    losses = student.losses(step.features, targets, **dense)
    own = sum(distillation.task_weight(name, step) * value for name, value in losses.items())
    _ = step.teacher_features
    step.prefetch(keys)
    cut, leaves = step.cut()
    before_losses = clock()
    _backward(distillation(cut).total)
    after_losses = clock()
    reached = [(output, leaf.grad) for output, leaf in leaves if leaf.grad is not None]
    torch.autograd.backward([own, *(x for x, _ in reached)], [None, *(grad for _, grad in reached)])
    whole, losses_seconds = clock() - begin, after_losses - before_losses
    found = [(parameter, parameter.grad) for parameter in distillation.parameters()]
    distillation.zero_grad(set_to_none=True)
    again, _ = step.cut()
    before_separate = clock()
    _backward(distillation(again, together=False).total)
    separate = clock() - before_separate
    for parameter, grad in found:  # a step has one backward of the losses
        parameter.grad = grad
    return {
        "teacher": teacher.seconds,
        "student": whole - losses_seconds - teacher.seconds,
        "losses": losses_seconds,
        "separate": separate,
    }


def _backward(total: Tensor) -> None:
    """Of a sum that may have no term at this step."""
    if total.requires_grad:
        total.backward()


def _asked_for(student: nn.Module, distillation: Distillation, images: Tensor, targets: list[dict]) -> list[Hashable]:
    """What the recipes ask of a step, found by asking once."""
    with torch.no_grad():
        step = distillation.step(student, images, targets, distillation.schedule.start)
        distillation(step)
    return list(step.found)


def _clock(device: torch.device) -> Callable[[], float]:
    def read() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return read
