"""Checkpoints of one training on disk: written so that a kill at any moment leaves the last good ones, and read with
everything damaged or foreign refused. What is in them is the business of ``state.py``.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

FORMAT = 1
#: The first 16 hexadecimal digits of the content's SHA-256 are part of the name: a torn file does not match its own.
_NAME = re.compile(r"step-(\d{9})-([0-9a-f]{16})\.pt")


class Checkpoint(NamedTuple):
    """What a checkpoint holds."""

    path: Path
    step: int  #: steps done
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one training.

    Args:
        folder: theirs alone; made when the first is written.
        digest: of all that makes the training; a checkpoint with another one is not taken.
        say: told in one line of each file that is refused.
        keep: so many are kept, the newest.
    """

    def __init__(self, folder: Path, digest: str, say: Callable[[str], None], keep: int = 2) -> None:
        self.folder, self.digest, self.say, self.keep = folder, digest, say, keep
        self._refused: set[Path] = set()  # not among those that are kept, nor removed

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write a checkpoint of ``state`` after ``step`` steps, and remove the oldest beyond ``keep``.

        The content is on the disk before the file has its name, and the name before older ones are removed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"format": FORMAT, "digest": self.digest, "step": step, "state": state}
        handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=".step.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            path = self.folder / f"step-{step:09d}-{_hash(Path(temporary))}.pt"
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        sync_folder(self.folder)
        for old in [path for path in self.files() if path not in self._refused][self.keep :]:
            old.unlink(missing_ok=True)
        return path

    def files(self) -> list[Path]:
        """All of them, the one of the highest step first."""
        if not self.folder.is_dir():
            return []
        named = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]
        return sorted(named, key=lambda path: (path.name[:14], path.stat().st_mtime), reverse=True)

    def newest(self) -> Checkpoint | None:
        """The newest one that can be used, or None. Those that cannot are told of, and stay where they are."""
        found = self.files()
        for path in found:
            try:
                return self._read(path)
            except ValueError as error:
                self._refused.add(path)
                more = "taking the one before" if path is not found[-1] else "none is left, beginning anew"
                self.say(f"warning: {path} is not a usable checkpoint: {error}; {more}")
        return None

    def _read(self, path: Path) -> Checkpoint:
        try:
            size = path.stat().st_size
            if not size:
                raise ValueError("it is empty")
            if _hash(path) != _NAME.fullmatch(path.name)[2]:
                raise ValueError(f"its {size} bytes are not those that were written (torn, truncated or changed)")
            # weights_only: a checkpoint is data, it must not be able to run code
            content = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(content, dict):
                raise ValueError("it holds no training")
            if content["format"] != FORMAT:
                raise ValueError(f"it has format {content['format']}, and this version reads {FORMAT}")
            if content["digest"] != self.digest:
                raise ValueError("it is of a training with other settings")
            return Checkpoint(path, content["step"], content["state"])
        except ValueError:
            raise
        except Exception as error:  # whatever a damaged file raises, it is refused and named
            reason = str(error).strip().splitlines() or [""]
            raise ValueError(f"{type(error).__name__}: {reason[0]}") from error


def write_file(path: Path, text: str) -> None:
    """Write a text file so that a kill at any moment leaves the old content or the new."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk, where the system can."""
    with contextlib.suppress(OSError):  # some network file systems and Windows cannot
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]
