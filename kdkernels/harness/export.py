"""The trained students as files of their own, which ``--weights`` and other readers of safetensors load."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .detectors.rescaled import Rescaled
from .extras import require

FOLDER = "students"
#: Characters of a student's name in its file's.
LONGEST = 150


def export(folder: Path, name: str, student: Any) -> Path:
    """Write ``students/NAME.safetensors`` with a student's weights alone, and its adapters apart, if it has any
    (``students/NAME.adapters.safetensors``): nobody needs them to run it.

    Args:
        folder: the output folder.
        student: a :class:`kdkernels.harness.job.Student`.
    """
    save = require("safetensors.torch", "the students' weights").save_file
    (folder / FOLDER).mkdir(exist_ok=True)
    detector, path = student.detector, file_of(folder, name)
    # Its own names, whatever size of pictures it was shown.
    save(_state(detector.detector if isinstance(detector, Rescaled) else detector), path)
    adapters = {} if student.distillation is None else _state(student.distillation)
    if adapters:
        save(adapters, path.with_suffix(".adapters.safetensors"))
    return path


def file_of(folder: Path, name: str) -> Path:
    """Where the weights of the student of that name are. A long one is cut: file systems take 255 bytes."""
    stem = re.sub(r"[^\w.+=-]+", "-", name).strip("-")
    if len(stem) > LONGEST:
        stem = f"{stem[:LONGEST]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return folder / FOLDER / f"{stem}.safetensors"


def _state(module: nn.Module) -> dict[str, Tensor]:
    """The module's tensors; copies, as the format refuses those that share memory."""
    state = module.state_dict()
    return {key: x.detach().cpu().clone().contiguous() for key, x in state.items() if isinstance(x, Tensor)}
