"""Progress on the terminal and ``metrics.jsonl``: bars where somebody watches, plain lines in a log. Nothing else."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

#: Seconds after which a log gets a line, at the latest.
QUIET = 10.0


class Progress:
    """Say what goes on, and append records to a JSON-lines file, flushed line by line so that a crash loses nothing."""

    def __init__(self, metrics: Path, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._file = metrics.open("x", encoding="utf-8")
        self.bars = self._stream.isatty()

    def record(self, **entry: Any) -> None:
        """Append one record; floats are cut to six significant digits."""
        self._file.write(json.dumps(_short(entry)) + "\n")
        self._file.flush()

    def say(self, text: str) -> None:
        """One line."""
        print(text, file=self._stream, flush=True)

    @contextlib.contextmanager
    def task(self, name: str, total: int) -> Iterator[Task]:
        """Show the progress of ``total`` steps."""
        task = Task(self, name, total)
        try:
            yield task
        finally:
            task.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Task:
    """The bar of one training, or its lines."""

    def __init__(self, progress: Progress, name: str, total: int) -> None:
        self._progress, self._name, self._total = progress, name, total
        self._begin = self._last = time.monotonic()
        self._bar = None
        if progress.bars:
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                self._bar = tqdm(total=total, desc=name, file=progress._stream, unit="step", dynamic_ncols=True)

    def advance(self, step: int, text: str) -> None:
        """Step number ``step`` is done."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if step == 1 or now - self._last >= QUIET:
            self._last = now
            left = (now - self._begin) / step * (self._total - step)
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
