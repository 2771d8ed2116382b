"""Finds and loads the shared objects.

`load("cpu")` and `load("cuda")` make kernels available, once per process: the object of the wheel, else one from the
user's cache, else one built now into that cache (`cache.py`; how it is built: `build.py`; what fits the GPUs:
`cuda.py`). They never raise: `status(name)` says what happened. Nothing is built while torch.compile traces or a CUDA
graph is captured; `expected(name)` is the cheap forecast that a trace relies on.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

from . import build as builder
from . import cache, cuda

CAPABILITIES = ("base", "avx2", "avx512")
_LIB = Path(__file__).resolve().parent / "lib"
_lock = threading.RLock()

for _name, _allowed in {"KDKERNELS_CPU_CAPABILITY": CAPABILITIES, "KDKERNELS_JIT": ("0", "1")}.items():
    if os.environ.get(_name) and os.environ[_name] not in _allowed:
        raise ValueError(f"{_name}: expected one of {_allowed}, got {os.environ[_name]!r}")
if (_archs := os.environ.get("KDKERNELS_CUDA_ARCHS", "").strip()) and not cuda.valid(_archs):
    raise ValueError(f'KDKERNELS_CUDA_ARCHS: expected the likes of "80;90", "all" or "native", got {_archs!r}')


class Misfit(builder.BuildError):
    """A CUDA object that is there but cannot serve these GPUs, this driver or this torch."""


@dataclass
class Status:
    """What became of one shared object."""

    state: str = "unloaded"  # "unloaded", "loaded" or "failed"
    path: Path | None = None
    reason: str = "not needed yet"


_status = {"cpu": Status(), "cuda": Status()}
_handle: dict[str, ctypes.CDLL] = {}
# Read inside traced code, hence apart from the status: it changes only if loading fails after a good forecast.
failed = {"cpu": False, "cuda": False}


def status(name: str) -> Status:
    """What became of `name` so far."""
    return _status[name]


def shipped(name: str) -> Path:
    """Where the object of the wheel is, if there is one."""
    return _LIB / builder.OBJECTS[name]


# The GPUs, as torch sees them.


def gpus() -> cuda.Gpus | str:
    """The GPUs of this process, or why there is none that the CUDA kernels could serve."""
    import torch

    if torch.version.hip:
        return "this torch is built for ROCm"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    count = range(torch.cuda.device_count())
    capabilities = tuple(torch.cuda.get_device_capability(i) for i in count)
    return cuda.Gpus(capabilities, tuple(torch.cuda.get_device_name(i) for i in count), _driver())


@functools.cache
def _driver() -> tuple[int, int] | None:
    """The newest CUDA that the driver runs, asked of the driver's library, which torch has loaded."""
    number = ctypes.c_int()  # 1000 * major + 10 * minor
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return number.value // 1000, number.value % 1000 // 10


def _misfit(path: Path, here: cuda.Gpus) -> str | None:
    """Why a CUDA object cannot serve the GPUs that are here, by its record."""
    try:
        record = json.loads(builder.record_of(path).read_text())
        codes, toolkit = record["architectures"], tuple(int(part) for part in record["cuda"].split("."))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "has no record of what it was built with"
    reason = cuda.misfit(codes, toolkit, here)
    return reason and f"was built {reason}"


def built_with(path: Path) -> str:
    """What an object was built with, in a few words."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        record = json.loads(builder.record_of(path).read_text())
        if "architectures" in record:
            return f"for {', '.join(record['architectures'])} with CUDA {record['cuda']}"
        return f"with {record['compiler']}"
    return "with nobody knows what"


# Forecasts.


def _obstacle_to_building(name: str) -> str | None:
    if os.environ.get("KDKERNELS_JIT") == "0":
        return "not built at install, and KDKERNELS_JIT=0 forbids building now"
    return builder.obstacle(name)


def _architectures(here: cuda.Gpus | str) -> list[str]:
    """What to build the CUDA kernels for now. Raises Misfit or BuildError where that would be no use here."""
    present = () if isinstance(here, str) else here.capabilities
    codes, _ = builder.cuda_architectures(present)
    if not isinstance(here, str) and (reason := cuda.misfit(codes, cuda.release(cuda.nvcc()), here)):
        raise Misfit(f"they would be built {reason}")
    return codes


def prospects(name: str) -> tuple[bool, str]:
    """Whether `load(name)` would succeed, and why, in words; nothing is built. Without a GPU, CUDA kernels are spoken
    of as if there were one.
    """
    entry = _status[name]
    if entry.state != "unloaded":
        built = f" {built_with(entry.path)}" if name == "cuda" and entry.path else ""
        return entry.state == "loaded", entry.reason + built
    here = gpus() if name == "cuda" else ""
    path = shipped(name)
    if path.exists() and (isinstance(here, str) or _misfit(path, here) is None):
        return True, "built at install" + (f" {built_with(path)}" if name == "cuda" else "")
    if reason := _obstacle_to_building(name):
        return False, reason
    if name == "cuda":
        try:
            if not isinstance(here, str):
                _architectures(here)
        except builder.BuildError as error:
            return False, str(error)
        return (
            True,
            f"will be loaded from the cache or built on first use, by nvcc {cuda.dotted(cuda.release(cuda.nvcc()))}",
        )
    return True, "will be loaded from the cache or built on first use"


def _cuda_expected() -> bool:
    return not isinstance(gpus(), str) and prospects("cuda")[0]


# What torch.compiler.assume_constant_result sets: Dynamo calls the function and does not trace it. The decorator itself
# imports Dynamo, which takes a second.
_cuda_expected._dynamo_marked_constant = True
_cpu_expected = prospects("cpu")[0]


def expected(name: str) -> bool:
    """Whether `load(name)` will succeed, as far as can be told without building; a trace relies on it."""
    if failed[name]:
        return False
    return _cpu_expected if name == "cpu" else _cuda_expected()


# Loading.


def registered(op: str, name: str) -> bool:
    """Whether the object `name`, which is loaded, has a kernel for an op."""
    import torch

    return torch._C._dispatch_has_kernel_for_dispatch_key(f"kdkernels::{op}", name.upper())


def _register(name: str, path: Path) -> Path:
    import torch

    if not builder.intact(path):
        raise builder.BuildError(f"{path} is damaged")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        if name == "cpu":
            raise
        torch_here = f"torch {torch.__version__} (CUDA {torch.version.cuda})"
        raise Misfit(
            f"{path}, built {built_with(path)}, cannot be loaded by {torch_here}: {_one_line(error)}"
        ) from None
    if name == "cpu":
        # Opened now: by the time somebody asks, another file may have taken this path, and would be a second copy.
        _handle[name] = ctypes.CDLL(str(path))
    if not registered("masked_mse", name):
        raise builder.BuildError(f"{path} loaded but registered no kernels")
    return path


def _one_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _fitting(name: str, path: Path) -> Path:
    if name == "cuda" and (reason := _misfit(path, gpus())):
        raise Misfit(f"{path} {reason}")
    return path


def _obtain(name: str) -> Path:
    """From the cache, built now if need be."""
    reason = _obstacle_to_building(name)
    if reason:
        raise builder.BuildError(reason)
    return cache.obtain() if name == "cpu" else cache.obtain(name, _architectures(gpus()))


def _find(name: str) -> tuple[Path, str]:
    unfit = None
    if shipped(name).exists():
        try:
            return _register(name, _fitting(name, shipped(name))), "built at install"
        except (OSError, RuntimeError) as error:
            unfit = error
    try:
        if unfit and (name == "cpu" or not _obstacle_to_building(name)):
            cache.say(f"what was built at install cannot be used ({_one_line(unfit)})")
        path = _obtain(name)
    except builder.BuildError as error:
        if unfit is None or name == "cpu":
            raise
        kind = Misfit if isinstance(unfit, Misfit) else builder.BuildError
        raise kind(f"{_one_line(unfit)}; and a new one cannot be built: {error}") from None
    return _register(name, _fitting(name, path)), "built on first use"


_INSTEAD = {"cpu": "the PyTorch formulas serve instead", "cuda": "Triton or the PyTorch formulas serve instead"}


def _not_now() -> str | None:
    """Why the CUDA kernels cannot be had at this moment, though perhaps later; or None."""
    import torch

    here = gpus()
    if isinstance(here, str):
        return here
    if torch.cuda.is_current_stream_capturing():
        reason = "a CUDA graph is being captured, which is no time to load them: call the loss once before"
        warnings.warn(
            f"kdkernels: no compiled CUDA kernels: {reason}; {_INSTEAD['cuda']}", RuntimeWarning, stacklevel=3
        )
        return reason
    return None


def load(name: str = "cpu") -> bool:
    """Makes the kernels of "cpu" or "cuda" available. True if they are; otherwise the reason is in `status`, and was
    said once if it lasts.
    """
    entry = _status[name]
    if entry.state != "unloaded":
        return entry.state == "loaded"
    with _lock:
        if entry.state == "unloaded" and name == "cuda" and (reason := _not_now()):
            entry.reason = reason
            return False
        if entry.state == "unloaded":
            try:
                entry.path, entry.reason = _find(name)
                entry.state = "loaded"
            except (OSError, RuntimeError) as error:
                entry.reason, entry.state = _one_line(error), "failed"
                failed[name] = True
                line = f"no compiled {name.upper()} kernels ({entry.reason}); {_INSTEAD[name]}"
                if isinstance(error, Misfit):
                    warnings.warn(f"kdkernels: {line}", RuntimeWarning, stacklevel=2)
                else:
                    cache.say(line)
    return entry.state == "loaded"


def build_ahead() -> str:
    """Builds the CUDA kernels for $KDKERNELS_CUDA_ARCHS into the cache, whatever GPUs are here; says how it went."""
    try:
        path = _obtain("cuda")
    except (OSError, RuntimeError) as error:
        return f"not built: {_one_line(error)}"
    return f"{path}, built {built_with(path)}"


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
