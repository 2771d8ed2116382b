"""Which backends are here to be checked, and why others are not. Nothing here raises for a backend that is missing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

import kdkernels as kd
from kdkernels import native, ops


@dataclass(frozen=True)
class Target:
    """One implementation on one device; `capability` is the CPU kernels' instruction set."""

    backend: str
    device: str = "cpu"
    capability: str | None = None

    @property
    def label(self) -> str:
        if self.backend == "reference":
            return "formula" if self.device == "cpu" else f"formula, {self.device}"
        return f"{self.backend} {self.capability}" if self.capability else self.backend

    def serves(self, student: torch.dtype, teacher: torch.dtype) -> bool:
        """Whether it has kernels for a pair of dtypes; the formula serves all."""
        return self.backend == "reference" or ops.kernel_dtypes(student, teacher, self.backend)

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """Every call inside is served by this one, or raises."""
        before = None
        if self.capability:
            before = native.cpu_capability()
            if native.set_cpu_capability(self.capability) != self.capability:
                raise RuntimeError(f"this CPU or this build has no {self.capability}")
        try:
            with kd.use_backend(self.backend):
                yield
        finally:
            if before:
                native.set_cpu_capability(before)


def widest(targets: Sequence[Target]) -> list[Target]:
    """Without the CPU's instruction sets below the widest."""
    last = [target for target in targets if target.backend == "cpu"][-1:]
    return [target for target in targets if target.backend != "cpu" or target in last]


def find() -> tuple[list[Target], dict[str, str]]:
    """The targets that are here, and for the others why not. Loads the kernels, and builds them where need be."""
    targets, absent = [], {}
    if native.load("cpu"):
        count = native.CAPABILITIES.index(native.cpu_capability()) + 1  # no more than $KDKERNELS_CPU_CAPABILITY allows
        targets += [Target("cpu", "cpu", name) for name in native.CAPABILITIES[:count]]
        best = native.CAPABILITIES.index(native.best_cpu_capability()) + 1
        for i, name in enumerate(native.CAPABILITIES[count:], count):
            absent[f"cpu {name}"] = "KDKERNELS_CPU_CAPABILITY is lower" if i < best else "not in this CPU or this build"
    else:
        absent["cpu"] = native.status("cpu").reason
    gpu = torch.cuda.is_available()
    if native.load("cuda"):
        targets.append(Target("cuda", "cuda"))
    else:
        absent["cuda"] = native.status("cuda").reason
    why = ops._triton_obstacle() or (None if gpu else "torch sees no GPU")
    if why is None:
        targets.append(Target("triton", "cuda"))
    else:
        absent["triton"] = why
    targets.append(Target("reference"))
    if gpu:
        targets.append(Target("reference", "cuda"))
    return targets, absent
