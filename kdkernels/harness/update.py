"""One step of a training: forward and backward of its batches, and the update; and what becomes of one that fails."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .processes import Processes
from .schedule import learning_rate, optimizer_of
from .settings import TrainSettings, Upkeep

#: So many steps in a row may be skipped because of losses that are not finite; more are no accident.
MOST_SKIPPED = 20


class Losses(NamedTuple):
    """What an objective gives for a batch."""

    summed: dict[str, Tensor]  #: by name, each with its graph; their sum is what is trained
    told: dict[str, Tensor] = {}  #: what is recorded in place of "distill": its terms, detached
    noted: dict[str, Tensor] = {}  #: what is recorded beside them: regions, levels, gradient norms
    task: Tensor | None = None  #: the detector's own losses, unweighted; None: the sum of ``summed``


#: Pictures and targets of a batch, and the number of the step, from 0, to losses.
Objective = Callable[[Tensor, list[dict], int], Losses]


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and why."""


class Told(NamedTuple):
    """What a step has given, on the host."""

    loss: float
    task: float  #: the detector's own losses, unweighted
    values: dict[str, float]
    details: dict[str, float]
    lr: float
    norm: float
    skipped: bool


class Updates:
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

    def step(self, batches: list[tuple[Tensor, list[dict]]], step: int) -> Told:
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
        return Told(values.pop("total"), values.pop("task"), values, details, lr, float(norm), bad)

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
            names = [key for key, x in part.items() if key not in ("total", "task", "distill") and not math.isfinite(x)]
            told = ", ".join(f"{key.removeprefix('noted ')} is {part[key]}" for key in names or ["total"])
            return (
                f"{self.name}: the loss is {part['total']} at step {step}: {told}; {_pictures(targets)}; a smaller "
                "--lr may help, --on-nan skip leaves such steps out"
            )
        which = _pictures([target for _, targets in batches for target in targets])
        return f"{self.name}: the norm of the gradient is {norm} at step {step}, of finite losses; {which}"


def _named(losses: Losses, total: Tensor) -> dict[str, Tensor]:
    """What is read of a batch's losses, detached."""
    task = losses.task if losses.task is not None else total
    named = {**losses.summed, **losses.told, "total": total, "task": task}
    if losses.told:
        named.pop("distill")
    named |= {f"noted {name}": value for name, value in losses.noted.items()}
    return {name: value.detach() for name, value in named.items()}


def _pictures(targets: list[dict]) -> str:
    ids = [str(target["image_id"]) for target in targets if "image_id" in target]
    return f"image ids {', '.join(ids)}" if ids else f"{len(targets)} pictures"
