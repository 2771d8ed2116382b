"""The processes of a run: one, or as many as ``torchrun`` has started. Only what they tell each other lives here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class Processes:
    """This process among those of the run. Every method but the properties is called by all of them together."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and evaluates."""
        return self.rank == 0

    def gathered(self, value: Any) -> list[Any]:
        """Everyone's value, by rank."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def told(self, value: Any) -> Any:
        """The first one's value."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether it is true for one of them."""
        if self.count == 1:
            return flag
        found = torch.tensor(float(flag), device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def share_buffers(self, module: nn.Module) -> None:
        """Everyone's running statistics become the first one's."""
        if self.count > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)


ALONE = Processes()


def asked_for() -> tuple[int, int, int]:
    """Rank, number of processes and rank on this machine, as ``torchrun`` says in the environment."""
    return tuple(
        int(os.environ.get(name, default)) for name, default in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), "010")
    )


def join(device: torch.device, timeout: float) -> Processes:
    """Meet the other processes that ``torchrun`` has started; alone where it has not.

    Args:
        timeout: seconds after which a process that waits for another gives up.
    """
    rank, count, _ = asked_for()
    if count == 1:
        return ALONE
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout))
    return Processes(rank, count)


def leave(processes: Processes) -> None:
    """End what :func:`join` began."""
    if processes.count > 1 and dist.is_initialized():
        dist.destroy_process_group()


class Shared:
    """An objective of which all processes compute the gradient together: the mean of their own.

    DistributedDataParallel wants one forward of one module; the whole objective is that forward, as a step of
    distillation calls many of a detector's methods and its ``forward`` never. The teacher is no part of it.
    """

    def __init__(
        self, objective: Any, detector: nn.Module, distillation: nn.Module | None, device: torch.device
    ) -> None:
        self.module: Any = nn.parallel.DistributedDataParallel(
            _Objective(objective, detector, distillation),
            device_ids=[device] if device.type == "cuda" else None,
            # Recipes come and go with the steps, and a batch without objects passes a head by.
            find_unused_parameters=True,
        )

    def __call__(self, *batch: Any) -> Any:
        return self.module(*batch)

    def no_sync(self) -> Any:
        """Inside, gradients stay with their process."""
        return self.module.no_sync()


class _Objective(nn.Module):
    """A detector, its adapters, and what is trained, as one module."""

    def __init__(self, objective: Any, detector: nn.Module, distillation: nn.Module | None) -> None:
        super().__init__()
        self.detector, self.distillation, self.objective = detector, distillation, objective

    def forward(self, *batch: Any) -> Any:
        return self.objective(*batch)
