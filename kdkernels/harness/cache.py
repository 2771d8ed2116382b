"""Trained teachers on disk, each under a key of all that made it. Only finding, reading and writing them lives here."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

FORMAT = 1


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/kdkernels/teachers``, or the same below ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "kdkernels" / "teachers"


def key_of(settings: dict[str, Any]) -> str:
    """A key of 16 hexadecimal digits; equal settings, in any order, give the same one."""
    text = json.dumps({"format": FORMAT, **settings}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class TeacherCache:
    """Teachers by key in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        """Where the teacher of ``key`` is, or would be."""
        return self.folder / f"{key}.pt"

    def load(self, key: str, detector: nn.Module) -> dict[str, Any] | None:
        """Load a teacher's weights into ``detector``; returns its record, or None where there is none.

        Raises:
            ValueError: the file is there and cannot be used; the message has its path and the reason, and ``detector``
                is unchanged.
        """
        path = self.path(key)
        if not path.exists():
            return None
        try:
            # weights_only: a cache file is data, it must not be able to run code
            content = torch.load(path, map_location="cpu", weights_only=True)
            if content["key"] != key:
                raise ValueError(f"it holds the teacher of key {content['key']}")
            state, record = content["state"], content["record"]
            here = detector.state_dict()
            if state.keys() != here.keys() or any(state[name].shape != here[name].shape for name in here):
                raise ValueError("its weights are of another detector")
            if not all(bool(torch.isfinite(value).all()) for value in state.values()):
                raise ValueError("its weights are not finite")
            detector.load_state_dict(state)
            return dict(record)
        except Exception as error:  # whatever a damaged file raises, it is refused and named
            raise ValueError(f"{path} is not a usable teacher: {type(error).__name__}: {error}") from error

    def save(self, key: str, detector: nn.Module, record: dict[str, Any]) -> Path:
        """Write a teacher atomically: another process sees the whole file, or none."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().cpu() for name, value in detector.state_dict().items()}
        handle, name = tempfile.mkstemp(dir=self.folder, prefix=f".{key}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save({"key": key, "state": state, "record": record}, file)
            os.replace(name, self.path(key))
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        return self.path(key)
