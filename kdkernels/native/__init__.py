"""Finds and loads the shared objects.

`load("cpu")` makes the CPU kernels available, once per process: the object of the wheel, else one from the user's
cache, else one built now into that cache (`cache.py`; how it is built: `build.py`). It never raises: `status("cpu")`
says what happened. Nothing is built while torch.compile traces; `cpu_expected` is the cheap forecast that a trace
relies on.
"""

from __future__ import annotations

import ctypes
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from . import build as builder
from . import cache

CAPABILITIES = ("base", "avx2", "avx512")
_SHIPPED = Path(__file__).resolve().parent / "lib" / builder.CPU_OBJECT
_lock = threading.RLock()

for _name, _allowed in {"KDKERNELS_CPU_CAPABILITY": CAPABILITIES, "KDKERNELS_JIT": ("0", "1")}.items():
    if os.environ.get(_name) and os.environ[_name] not in _allowed:
        raise ValueError(f"{_name}: expected one of {_allowed}, got {os.environ[_name]!r}")


@dataclass
class Status:
    """What became of one shared object."""

    state: str = "unloaded"  # "unloaded", "loaded" or "failed"
    path: Path | None = None
    reason: str = "not needed yet"


_status = {"cpu": Status(), "cuda": Status("failed", None, "no CUDA kernels in this build")}
_handle: dict[str, ctypes.CDLL] = {}
# Read inside traced code, hence apart from the status: it changes only if loading fails after a good forecast.
cpu_failed = False


def status(name: str) -> Status:
    """What became of `name` so far."""
    return _status[name]


def _obstacle_to_building() -> str | None:
    if os.environ.get("KDKERNELS_JIT") == "0":
        return "not built at install, and KDKERNELS_JIT=0 forbids building now"
    return builder.obstacle("cpu")


def _obstacle() -> str | None:
    return None if _SHIPPED.exists() else _obstacle_to_building()


cpu_expected = _obstacle() is None


def expected(name: str) -> bool:
    """Whether `load(name)` will succeed, as far as can be told without building; a trace relies on it."""
    return name == "cpu" and cpu_expected and not cpu_failed


def forecast() -> str:
    """In words: what `load("cpu")` would do now."""
    served = "built at install" if _SHIPPED.exists() else "will be loaded from the cache or built on first use"
    return _obstacle() or served


def _register(path: Path) -> Path:
    import torch

    if not builder.intact(path):
        raise builder.BuildError(f"{path} is damaged")
    torch.ops.load_library(str(path))
    # Opened now: by the time somebody asks, another file may have taken this path, and would be a second copy.
    _handle["cpu"] = ctypes.CDLL(str(path))
    if not torch._C._dispatch_has_kernel_for_dispatch_key("kdkernels::masked_mse", "CPU"):
        raise builder.BuildError(f"{path} loaded but registered no kernels")
    return path


def _one_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _find() -> tuple[Path, str]:
    if _SHIPPED.exists():
        try:
            return _register(_SHIPPED), "built at install"
        except (OSError, RuntimeError) as error:
            cache.say(f"what was built at install cannot be used ({_one_line(error)})")
    reason = _obstacle_to_building()
    if reason:
        raise builder.BuildError(reason)
    return _register(cache.obtain()), "built on first use"


def load(name: str = "cpu") -> bool:
    """Makes the CPU kernels available. True if they are; otherwise the reason was said once and is in `status`."""
    global cpu_failed
    entry = _status[name]
    if entry.state != "unloaded":
        return entry.state == "loaded"
    with _lock:
        if entry.state == "unloaded":
            try:
                entry.path, entry.reason = _find()
                entry.state = "loaded"
            except (OSError, RuntimeError) as error:
                entry.reason, entry.state = _one_line(error), "failed"
                cpu_failed = True
                cache.say(f"no compiled CPU kernels ({entry.reason}); the PyTorch formulas serve instead")
    return entry.state == "loaded"


def _library() -> ctypes.CDLL:
    if not load("cpu"):
        raise RuntimeError(f"no compiled CPU kernels: {status('cpu').reason}")
    return _handle["cpu"]


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
