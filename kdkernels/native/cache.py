"""The folder of kernels built on first execution: where it is, who may write to it, and how processes share it.

Standard library only. $KDKERNELS_CACHE_DIR names the folder; else it is `kdkernels` in the user's cache; else, where
there is no home to write to, a private folder. Each state of sources, flags and compiler has its own folder in it.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import build as builder


def say(line: str) -> None:
    """One line to the user, on stderr."""
    print(f"kdkernels: {line}", file=sys.stderr, flush=True)


def private(folder: Path) -> bool:
    """Whether `folder`, made if need be, is a real directory of this user that nobody else may write to.

    What lies in it is loaded into the process, so a link, a stranger's folder or one open to a group is refused.
    """
    try:
        folder.mkdir(exist_ok=True, mode=0o700)
        info = os.lstat(folder)
        good = stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid() and not info.st_mode & 0o022
        return good and os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        return False


def _home_cache() -> Path | None:
    """The user's cache, made in a home that exists; None without one (no home is ever created, nor a relative path)."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if not base.is_absolute():
        return None
    with contextlib.suppress(OSError):
        base.mkdir(exist_ok=True, mode=0o700)
    return base if os.path.isdir(base) else None  # Path.is_dir raises where the home may not be looked into


def directory() -> Path:
    """Where first-use builds live. Raises BuildError if $KDKERNELS_CACHE_DIR names a place that cannot be made."""
    wanted = os.environ.get("KDKERNELS_CACHE_DIR")
    if wanted:  # The user's own choice, perhaps shared by a group: taken as it is.
        try:
            folder = Path(wanted).expanduser().resolve()
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError) as error:  # "~name" of nobody is a RuntimeError
            raise builder.BuildError(f"KDKERNELS_CACHE_DIR={wanted} cannot be used: {error}") from None
        return folder
    home = _home_cache()
    if home and private(home / "kdkernels"):
        return home / "kdkernels"
    shared = Path(tempfile.gettempdir()) / f"kdkernels-{os.getuid()}"
    if private(shared):
        return shared
    # Somebody else holds that name: a folder that lives as long as this process. A loaded object outlives its file.
    own = Path(tempfile.mkdtemp(prefix="kdkernels-"))
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return own


@contextlib.contextmanager
def locked(folder: Path, what: str = "the CPU kernels") -> Iterator[bool]:
    """Holds `folder` for one process; yields False where the file system has no locks.

    The kernel releases a flock when its holder dies, however it dies: no stale lock can block anybody.
    """
    import fcntl

    with open(folder / "lock", "w") as lock:
        held = True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process is building {what} in {folder}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # Two may then build at once; each object still appears complete, by renaming.
            held = False
        yield held


def _build(name: str, architectures: Sequence[str], folder: Path, target: Path, alone: bool) -> None:
    if target.exists():
        say(f"{target} is damaged; building it again")
    if alone:
        for leftover in folder.glob(".build-*"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
    if name == "cpu":
        say("building the CPU kernels (once, about half a minute on two cores) ...")
    else:
        say(f"building the CUDA kernels for {', '.join(architectures)} (once, about a minute each) ...")
    started = time.monotonic()
    try:
        builder.build(name, folder, architectures)
    except builder.BuildError as error:
        if not error.log:
            raise
        log = folder / "failed.log"
        log.write_text(error.log)
        raise builder.BuildError(f"{error}; all of it in {log}", error.log) from None
    say(f"built the {name.upper()} kernels in {time.monotonic() - started:.0f} s into {folder}")


def obtain(name: str = "cpu", architectures: Sequence[str] = ()) -> Path:
    """The CPU kernels of these sources, or the CUDA kernels for `architectures`, from the cache, built now if they are
    not there. Raises BuildError, OSError.
    """
    root, csrc = directory(), builder.source_directory()
    for attempt in range(3):
        folder = root / builder.cache_key(csrc, name, architectures)
        target = folder / builder.OBJECTS[name]
        if builder.intact(target):  # Without the lock, so that a read-only cache serves too.
            break
        folder.mkdir(exist_ok=True, mode=0o700)
        with locked(folder, f"the {name.upper()} kernels") as alone:
            if builder.intact(target):
                break
            try:
                _build(name, architectures, folder, target, alone)
                break
            except builder.SourcesChanged:
                if attempt == 2:
                    raise
    return target
