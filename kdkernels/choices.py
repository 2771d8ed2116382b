"""Which GPU backend serves a loss where both could: a table, with its measurements beside it.

An entry holds for one loss and one major compute capability, from a number of student elements upwards; the last that
fits decides. `measured` says what was timed and where, or is None: then the choice is an expectation that no GPU has
confirmed, and `kdkernels.backend_info()` says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Choice:
    """`backend` serves `loss` (None: any) of at least `elements` on GPUs of `major` (None: any)."""

    backend: str
    loss: str | None = None
    major: int | None = None
    elements: int = 0
    measured: str | None = None


# C++ first, an expectation: launches cost the host less, levels share one launch, and wide rows use clusters.
TABLE = [Choice("cuda")]


def _major(device: torch.device) -> int | None:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" and torch.cuda.is_available() else None


def choice(loss: str, major: int | None, elements: int | None = None) -> Choice:
    """The entry that decides; without `elements`, the one for any size."""
    found = TABLE[0]
    for entry in TABLE:
        if entry.loss in (None, loss) and entry.major in (None, major):
            # Only an entry that has a threshold looks at the size: a traced graph would be guarded on it.
            if entry.elements == 0 or (elements is not None and elements >= entry.elements):
                found = entry
    return found


def order(loss: str, student: torch.Tensor) -> tuple[str, ...]:
    """The GPU backends for a call, the preferred one first. Asks of device and size only what an entry depends on."""
    major = _major(student.device) if any(entry.major is not None for entry in TABLE) else None
    elements = student.numel() if any(entry.elements for entry in TABLE) else None
    preferred = choice(loss, major, elements).backend
    return (preferred, "triton" if preferred == "cuda" else "cuda")
