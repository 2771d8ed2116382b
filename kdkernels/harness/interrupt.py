"""SIGTERM, as batch systems send it before they kill: held back until a step is whole, and then an orderly end."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Stopped(BaseException):
    """The process was asked to stop. Not an ``Exception``: nothing that handles errors may swallow it."""


class Interruption:
    """While it is entered, SIGTERM raises :class:`Stopped`: at once, or after what ``held`` encloses.

    Outside of the main thread, where Python has no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.asked = False
        self._depth = 0
        self._before: Any = None
        self._process = os.getpid()

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._caught)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _caught(self, *_: object) -> None:
        if os.getpid() != self._process:  # a child that was forked and has not put its own handler in place
            os._exit(143)
        self.asked = True
        if not self._depth:
            raise Stopped

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """What is done inside is done whole; whoever uses it asks ``asked`` afterwards."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """Inside of ``held``: what is done here may be cut short, and is not begun if that was asked meanwhile."""
        depth, self._depth = self._depth, 0
        try:
            if self.asked:
                raise Stopped
            yield
        finally:
            self._depth = depth
