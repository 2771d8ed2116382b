"""One line that says on what machine, and with which versions, a check ran: for a bug report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

import kdkernels as kd
from kdkernels import native
from kdkernels.native import cuda

from .targets import Target

# What changes which kernels serve. Of the folder of the cache only that it is set: a path is nobody's business.
_VARIABLES = ("BACKEND", "BUILD", "CPU_CAPABILITY", "CUDA_ARCHS", "JIT")


def _cpu() -> str:
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    runs = native.cpu_capability() if native.status("cpu").state == "loaded" else "no kernels"
    return f"CPU {name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {runs}"


def _gpu() -> str:
    here = native.gpus()
    if isinstance(here, str) and not torch.cuda.is_available():
        return f"GPU none ({here})"
    if isinstance(here, str):  # ROCm's
        return f"GPU {torch.cuda.get_device_name()} ({here}, HIP {torch.version.hip})"
    names = [f"{here.name(i)} sm_{''.join(map(str, c))}" for i, c in enumerate(here.capabilities)]
    driver = cuda.dotted(here.driver or ("?",))
    return f"GPU {', '.join(names)}, driver for CUDA {driver}, torch's CUDA {torch.version.cuda}"


def _triton() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def line(targets: Sequence[Target], absent: dict[str, str]) -> str:
    """Versions, machine and backends, in one line."""
    cpu = native.status("cpu")
    variables = [f"KDKERNELS_{name}" for name in _VARIABLES]
    told = [f"{name}={os.environ[name]}" for name in variables if os.environ.get(name)]
    told += ["KDKERNELS_CACHE_DIR set"] if os.environ.get("KDKERNELS_CACHE_DIR") else []
    parts = [
        f"kdkernels {kd.__version__}",
        f"torch {torch.__version__}",
        f"triton {_triton()}",
        f"Python {platform.python_version()}",
        platform.platform(),
        _cpu(),
        _gpu(),
        *([f"CPU kernels {cpu.reason} {native.built_with(cpu.path)}"] if cpu.path else []),
        f"backends {', '.join(target.label for target in targets)}",
        *(f"no {name} ({why})" for name, why in absent.items()),
        *told,
    ]
    return " | ".join(" ".join(part.split()) for part in parts)
