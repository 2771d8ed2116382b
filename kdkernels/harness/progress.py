"""Progress on the terminal and ``metrics.jsonl``: bars where somebody watches, plain lines in a log. Nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from .checkpoint import write_file

#: Seconds after which a log gets a line, at the latest.
QUIET = 10.0


class Progress:
    """Say what goes on, and append records to a JSON-lines file, flushed line by line so that a crash loses nothing."""

    def __init__(
        self,
        metrics: Path,
        stream: TextIO | None = None,
        *,
        resume: bool = False,
        print_freq: int | None = None,
    ) -> None:
        """``resume`` goes on with the file of a run that was stopped; what is written of a whole run begins anew."""
        self._stream = stream or sys.stderr
        self._path, self.print_freq = metrics, print_freq
        self._resumed = resume and metrics.exists()
        if self._resumed:
            self._file = None
            self._keep(lambda entry: entry.get("kind") in ("step", "evaluation"))
        else:
            self._file = metrics.open("x", encoding="utf-8")
        self.bars = self._stream.isatty()

    def record(self, **entry: Any) -> None:
        """Append one record; floats are cut to six significant digits."""
        self._file.write(json.dumps(_short(entry)) + "\n")
        self._file.flush()

    def forget(self, run: str, after: int) -> None:
        """Leave out what an earlier process recorded of ``run`` after step ``after``: it comes again."""
        if self._resumed:
            self._keep(lambda entry: entry.get("run") != run or entry.get("step", 0) <= after)

    def sync(self) -> None:
        """Bring the records to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def _keep(self, wanted: Callable[[dict], bool]) -> None:
        """Keep the whole lines whose record is wanted; the last line of a killed process may be a part of one."""
        if self._file is not None:
            self._file.close()
        lines = []
        with self._path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    if line.endswith("\n") and wanted(json.loads(line)):
                        lines.append(line)
        write_file(self._path, "".join(lines))
        self._file = self._path.open("a", encoding="utf-8")

    def say(self, text: str) -> None:
        """One line."""
        print(text, file=self._stream, flush=True)

    @contextlib.contextmanager
    def task(self, name: str, total: int, first: int = 0) -> Iterator[Task]:
        """Show the progress of ``total`` steps, of which ``first`` are done."""
        task = Task(self, name, total, first)
        try:
            yield task
        finally:
            task.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Task:
    """The bar of one training, or its lines."""

    def __init__(self, progress: Progress, name: str, total: int, first: int = 0) -> None:
        self._progress, self._name, self._total, self._first = progress, name, total, first
        self.warned = False  #: whether something that is said once was said
        self._begin = self._last = time.monotonic()
        self._bar = None
        if progress.bars:
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                self._bar = tqdm(
                    total=total, initial=first, desc=name, file=progress._stream, unit="step", dynamic_ncols=True
                )

    def advance(self, step: int, text: str) -> None:
        """Step number ``step`` is done."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        done, every = step - self._first, self._progress.print_freq
        if done == 1 or (now - self._last >= QUIET if every is None else step % every == 0):
            self._last = now
            left = (now - self._begin) / done * (self._total - step)
            self._progress.say(f"{self._name}: step {step}/{self._total}  {text}  {left:.0f} s left")

    def say(self, text: str) -> None:
        """One line, above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._progress._stream)
        else:
            self._last = time.monotonic()
            self._progress.say(text)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_short(item) for item in value]
    return value


class Silent(Progress):
    """Of a process that is not the first: it says and writes nothing."""

    def __init__(self) -> None:
        self._stream, self.print_freq, self.bars = open(os.devnull, "w"), None, False

    def record(self, **entry: Any) -> None:
        pass

    def forget(self, run: str, after: int) -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        self._stream.close()
