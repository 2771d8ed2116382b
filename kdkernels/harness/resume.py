"""What a whole run leaves beside its checkpoints so that it can go on: its command line, what makes it, and which
decisions it took on the way. Not the trainings' states: those are ``checkpoint.py`` and ``state.py``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoints, write_file

FORMAT = 1
FOLDER, FILE = "checkpoints", "job.json"
#: Options that a run may go on with changed: they do not change what it computes.
FREE = ("output_dir", "teacher_cache", "upkeep", "argv", "resume", "device", "compile", "dist_timeout")


class ResumeError(ValueError):
    """A folder cannot be gone on with; the message names it, and why."""


class RunFolder:
    """The folder ``checkpoints`` of an output folder.

    Args:
        output: the output folder.
        made_of: what makes the run, as :func:`made_of` gives it.
        argv: its command line.
        resume: whether it goes on; else there must be none.
        first: whether this process is the one that writes.

    Raises:
        ResumeError: what is there is damaged, or of another run; the message names what differs.
    """

    def __init__(
        self, output: Path, made_of: Mapping[str, Any], argv: Sequence[str], *, resume: bool, first: bool = True
    ) -> None:
        self.folder, self.first = output / FOLDER, first
        self._lock: Any = None
        made_of = json.loads(json.dumps(made_of))
        self.content: dict[str, Any] = {"format": FORMAT, "argv": list(argv), "made_of": made_of, "decided": {}}
        if resume:
            found = read(output)
            changed = differences(found["made_of"], made_of)
            if changed:
                raise ResumeError(f"{output} holds another run: {'; '.join(changed[:5])}")
            self.content["decided"] = found["decided"]
            if first:
                self._take()
                self._tidy(output)
        elif first:
            self.folder.mkdir(parents=True)
            self._take()
        self._write()

    def checkpoints(self, name: str, steps: int, say: Callable[[str], None]) -> Checkpoints:
        """Those of the training that is called ``name``."""
        made_of = {"job": self.content["made_of"], "name": name, "steps": steps}
        slug = re.sub(r"[^a-z0-9.=-]+", "-", name.lower()).strip("-")[:40]
        return Checkpoints(self.folder / f"{slug}-{_digest(name)[:6]}", _digest(made_of), say)

    def decided(self, name: str) -> bool:
        """Whether the run took a decision before."""
        return name in self.content["decided"]

    def decide(self, name: str, value: Any) -> None:
        """Keep to ``value``, in JSON's types, whenever the run goes on."""
        self.content["decided"][name] = value
        self._write()

    def finish(self) -> None:
        """The run has written its results: nothing of this is needed any more."""
        if self.first:
            self.close()
            # At once: a kill leaves a run to go on with or a finished one.
            done = self.folder.with_name(f".{FOLDER}.done")
            os.replace(self.folder, done)
            shutil.rmtree(done, ignore_errors=True)

    def close(self) -> None:
        """Leave the folder to whoever goes on with it."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _take(self) -> None:
        """A process that was given up for dead and one that goes on for it must not write the same files."""
        try:
            import fcntl
        except ImportError:  # Windows
            return
        self._lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise ResumeError(f"{self.folder.parent} is being written by another process") from None
        except OSError:  # a file system without locks
            pass

    def _tidy(self, output: Path) -> None:
        """Remove what a killed process has left half written."""
        for folder in (output, self.folder, *(path for path in self.folder.iterdir() if path.is_dir())):
            for path in folder.glob(".*.tmp"):
                path.unlink(missing_ok=True)

    def _write(self) -> None:
        if self.first:
            write_file(self.folder / FILE, json.dumps(self.content, indent=1) + "\n")


def read(output: Path) -> dict[str, Any]:
    """What an output folder says of its run.

    Raises:
        ResumeError: it says nothing that can be read.
    """
    path = output / FOLDER / FILE
    if not output.is_dir():
        raise ResumeError(f"{output} is not a folder")
    if not path.is_file():
        raise ResumeError(f"{output} has no {FOLDER}/{FILE}: its run is finished, or none began there")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"it has format {content['format']}, and this version reads {FORMAT}")
        for name, kind in (("argv", list), ("made_of", dict), ("decided", dict)):
            if not isinstance(content[name], kind):
                raise ValueError(f"its {name} is no {kind.__name__}")
        return content
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResumeError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def made_of(options: Any, **more: Any) -> dict[str, Any]:
    """What makes a run, in JSON's types: all options but those in ``FREE``, and of files their content."""
    found = {field.name: _plain(getattr(options, field.name)) for field in fields(options) if field.name not in FREE}
    found["training"].pop("workers")
    for name in ("data_path", "unlabeled_path", "splits"):  # where pictures lie; what they are has its digest
        found.pop(name)
    return {**found, **{name: _plain(value) for name, value in more.items()}}


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Where two values of JSON's types differ, in words."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        return [
            line for key in keys for line in differences(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if before == now else [f"{name} was {_short(before)} and is {_short(now)}"]


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return _content(value)
    if isinstance(value, type):
        return value.__name__
    if is_dataclass(value):
        return {key: _plain(x) for key, x in asdict(value).items()}
    if hasattr(value, "_asdict"):
        return {key: _plain(x) for key, x in value._asdict().items()}
    if isinstance(value, Mapping):
        return {str(key): _plain(x) for key, x in value.items()}
    return [_plain(x) for x in value] if isinstance(value, (list, tuple)) else value


def _content(path: Path) -> str:
    if not path.is_file():
        return str(path)
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
