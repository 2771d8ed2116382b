"""How long a distillation step spends in teacher, student and losses, and a step alone. Only this measurement."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import kdkernels as kd

from .data import to_device, training_batches
from .distill import Recipe, shared_proposals
from .settings import TrainSettings
from .teacher import FrozenTeacher

PARTS = ("teacher", "student", "losses")


def measure(
    student: nn.Module,
    recipe: Recipe,
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
    teacher = _TimedTeacher(recipe.teacher.detector, clock)
    student.train()
    for batch in training_batches(pictures, steps + 2, settings.batch_size, settings.seed, settings.workers):
        images, targets = to_device(*batch, device)
        for part, seconds in _step(student, recipe, teacher, images, targets).items():
            times[part].append(seconds)
        # In turn with the other, so that whatever else the machine does weighs on both alike.
        begin = clock()
        sum(student.losses(student.features(images), targets).values()).backward()
        times["alone"].append(clock() - begin)
    student.zero_grad(set_to_none=True)
    recipe.zero_grad(set_to_none=True)
    student.load_state_dict(before)
    return {part: statistics.median(values[2:]) for part, values in times.items()}


class _TimedTeacher(FrozenTeacher):
    """A frozen teacher that adds up the seconds of its own calls."""

    def __init__(self, detector: nn.Module, clock: Callable[[], float]) -> None:
        super().__init__(detector)
        self.clock, self.seconds = clock, 0.0

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        begin = self.clock()
        result = super()._call(function, *args, **kwargs)
        self.seconds += self.clock() - begin
        return result


def _step(
    student: nn.Module, recipe: Recipe, teacher: _TimedTeacher, images: Tensor, targets: list[dict]
) -> dict[str, float]:
    clock, teacher.seconds = teacher.clock, 0.0
    begin = clock()
    features = student.features(images)
    own = sum(student.losses(features, targets).values())
    wanted = teacher.features(images)
    rows = shared_proposals(student, teacher, features, wanted, targets, limit=recipe.settings.proposals)
    outputs = [*features.values(), rows.student_logits, rows.student_deltas]
    copies = [output.detach().requires_grad_() for output in outputs]
    levels = dict(zip(features, copies[:-2], strict=True))
    cut = rows._replace(student_logits=copies[-2], student_deltas=copies[-1])
    before_losses = clock()
    recipe.objective(**recipe.inputs(levels, wanted, cut, targets)).total.backward()
    after_losses = clock()
    torch.autograd.backward([own, *outputs], [None, *(copy.grad for copy in copies)])
    whole, losses = clock() - begin, after_losses - before_losses
    apart = [kd.DetectionDistillationLoss(**{name: terms}) for name, terms in recipe.objective.configured.items()]
    found = [(parameter, parameter.grad) for parameter in recipe.parameters()]
    recipe.zero_grad(set_to_none=True)
    before_separate = clock()
    inputs = recipe.inputs(levels, wanted, cut, targets)
    sum(term(**inputs).total for term in apart).backward()
    separate = clock() - before_separate
    for parameter, grad in found:  # a step has one backward of the losses
        parameter.grad = grad
    return {
        "teacher": teacher.seconds,
        "student": whole - losses - teacher.seconds,
        "losses": losses,
        "separate": separate,
    }


def _clock(device: torch.device) -> Callable[[], float]:
    def read() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return read
