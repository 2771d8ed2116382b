"""Finds, builds and loads the shared objects.

`load("cpu")` makes the CPU kernels available, once per process: the object of the wheel, else one from the
user's cache, else one built now into that cache. It never raises: `status("cpu")` says what happened. Nothing is built
while torch.compile traces; `expected("cpu")` is the cheap forecast that a trace relies on.
"""

from __future__ import annotations

import ctypes
import os
import stat
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from . import build as builder

CAPABILITIES = ("base", "avx2", "avx512")
_WHEEL = Path(__file__).resolve().parent / "lib"
_lock = threading.RLock()


@dataclass
class Status:
    """What became of one shared object."""

    state: str = "unloaded"  # "unloaded", "loaded" or "failed"
    path: Path | None = None
    reason: str = "not needed yet"


_status = {"cpu": Status()}
# Read inside traced code, hence apart from the status: it changes only if loading fails after a good forecast.
cpu_failed = False


def status(name: str) -> Status:
    """What became of `name` so far."""
    return _status[name]


def _obstacle() -> str | None:
    if (_WHEEL / "kdkernels_cpu.so").exists():
        return None
    if os.environ.get("KDKERNELS_JIT") == "0":
        return "not built at install, and KDKERNELS_JIT=0 forbids building now"
    return builder.obstacle("cpu")


cpu_expected = _obstacle() is None


def forecast() -> str:
    """In words: what `load("cpu")` would do now."""
    shipped = (_WHEEL / "kdkernels_cpu.so").exists()
    return _obstacle() or ("built at install" if shipped else "will be loaded from the cache or built on first use")


def _say(line: str) -> None:
    print(f"kdkernels: {line}", file=sys.stderr, flush=True)


def _private(folder: Path) -> bool:
    """Whether `folder` is a real directory of this user that nobody else may write to."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        info = os.lstat(folder)
        good = stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid() and not info.st_mode & 0o022
        return good and os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        return False


def cache_directory() -> Path:
    """Where first-use builds live: $KDKERNELS_CACHE_DIR, the user's cache, or a private folder where there is no home."""
    wanted = os.environ.get("KDKERNELS_CACHE_DIR")
    if wanted:
        folder = Path(wanted).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    candidates = [Path(base) / "kdkernels", Path(tempfile.gettempdir()) / f"kdkernels-{os.getuid()}"]
    for folder in candidates:
        if _private(folder):
            return folder
    return Path(tempfile.mkdtemp(prefix="kdkernels-"))


def _build_into_cache() -> Path:
    import fcntl

    folder = cache_directory() / builder.cache_key(builder.source_directory())
    target = folder / "kdkernels_cpu.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    # The kernel releases a flock when its holder dies, however it dies: no stale lock can block anybody.
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            _say(f"another process is building the CPU kernels in {folder}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _say("building the CPU kernels (once, about half a minute on two cores) ...")
            builder.build("cpu", folder)
            _say(f"built the CPU kernels into {folder}")
    return target


def load(name: str = "cpu") -> bool:
    """Makes the CPU kernels available. True if they are; otherwise the reason was said once and is in `status`."""
    global cpu_failed
    entry = _status[name]
    if entry.state != "unloaded":
        return entry.state == "loaded"
    import torch

    with _lock:
        if entry.state != "unloaded":
            return entry.state == "loaded"
        try:
            shipped = _WHEEL / "kdkernels_cpu.so"
            reason = _obstacle()
            if reason:
                raise builder.BuildError(reason)
            path = shipped if shipped.exists() else _build_into_cache()
            torch.ops.load_library(str(path))
            if not torch._C._dispatch_has_kernel_for_dispatch_key("kdkernels::masked_mse", "CPU"):
                raise builder.BuildError(f"{path} loaded but registered no kernels")
            entry.path, entry.state = path, "loaded"
            entry.reason = "built at install" if path == shipped else "built on first use"
        except (builder.BuildError, OSError, RuntimeError) as error:
            entry.reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            entry.state = "failed"
            cpu_failed = True
            _say(f"no compiled CPU kernels ({entry.reason}); the PyTorch formulas serve instead")
    return entry.state == "loaded"


def _library() -> ctypes.CDLL:
    if not load("cpu"):
        raise RuntimeError(f"no compiled CPU kernels: {status('cpu').reason}")
    return ctypes.CDLL(str(status("cpu").path))


def cpu_capability() -> str:
    """The instruction set that the CPU kernels run with: "base", "avx2" or "avx512"."""
    return CAPABILITIES[_library().kdkernels_cpu_capability()]


def best_cpu_capability() -> str:
    """The widest instruction set that this CPU and this build have."""
    return CAPABILITIES[_library().kdkernels_cpu_best_capability()]


def set_cpu_capability(name: str) -> str:
    """Lowers the instruction set (for tests and benchmarks); returns what is in force, never more than the CPU has."""
    if name not in CAPABILITIES:
        raise ValueError(f"name: expected one of {CAPABILITIES}, got {name!r}")
    return CAPABILITIES[_library().kdkernels_cpu_set_capability(CAPABILITIES.index(name))]
