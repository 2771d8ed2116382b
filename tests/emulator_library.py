"""Builds csrc/cuda for the host with tests/emulator, and registers it as ops on the CPU's tensors.

The ops are `kdkernels_emulator::<name>`, with the schemas of the real ones. KDKERNELS_EMULATOR_SANITIZE=1 is for a
process that was started with the sanitizers' runtime (test_emulator.py does that).
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import hashlib
import os
import subprocess
from pathlib import Path

import torch

from kdkernels import ops
from kdkernels.native import build as builder
from kdkernels.native import cache

FOLDER = Path(__file__).resolve().parent / "emulator"
FLAGS = ["-O1", "-fPIC", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
FLAGS += ["-DKD_EMULATOR", "-DKD_CAPABILITY=cuda", f"-DTORCH_TARGET_VERSION={builder.TORCH_TARGET}", f"-I{FOLDER}"]
SANITIZE = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]


def sources() -> list[Path]:
    """What is compiled."""
    csrc = builder.source_directory()
    return [*sorted(csrc.glob("cuda/*.cu")), *sorted(csrc.glob("torch/*_cuda.cpp")), FOLDER / "emulator.cpp"]


def _key(flags: list[str], cxx: list[str]) -> str:
    csrc = builder.source_directory()
    digest = hashlib.sha256(repr([flags, cxx]).encode())
    for path in sorted([*csrc.glob("*.h"), *csrc.glob("*/*"), *FOLDER.iterdir()]):
        if path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def build(sanitize: bool = False, csrc: Path | None = None) -> Path:
    """The shared object, from the cache or built now; a compiler is required."""
    cxx = builder.compiler()
    assert cxx, "no C++ compiler"
    flags = FLAGS + (SANITIZE if sanitize else [])
    folder = cache.directory() / f"emulator-{_key(flags, cxx)}"
    target = folder / "kdkernels_emulator.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    torch_folder = builder.torch_directory()

    def compile_one(source: Path) -> Path:
        out = folder / f"{source.stem}-{os.getpid()}.o"
        words = [
            *cxx,
            *flags,
            "-isystem",
            str(torch_folder / "include"),
            "-x",
            "c++",
            "-c",
            str(source),
            "-o",
            str(out),
        ]
        result = subprocess.run(words, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return out

    with cache.locked(folder):
        if target.exists():
            return target
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources()))
        fresh = folder / f"fresh-{os.getpid()}.so"
        link = ["-shared", "-o", str(fresh), *map(str, objects), f"-L{torch_folder / 'lib'}", "-Wl,--no-as-needed"]
        libraries = ["-ltorch", "-ltorch_cpu", "-lc10", *(["-fsanitize=address,undefined"] if sanitize else [])]
        result = subprocess.run([*cxx, *link, *libraries], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        for path in objects:
            path.unlink()
        os.replace(fresh, target)
    return target


@functools.cache
def load() -> ctypes.CDLL:
    """Registers the emulated kernels once per process; the handle has kdkernels_emulator_seed and the like."""
    given = os.environ.get("KDKERNELS_EMULATOR_LIBRARY")  # one that was built elsewhere: mutants/run.py
    path = Path(given) if given else build(sanitize=os.environ.get("KDKERNELS_EMULATOR_SANITIZE") == "1")
    library = torch.library.Library("kdkernels_emulator", "FRAGMENT")
    for name, served in ops.OPS.items():
        schema = str(served["cpu"]._schema).split("::")[1].replace(".default", "")
        library.define(schema)
        real = served["cpu"]  # whose fake serves both
        torch.library.register_fake(f"kdkernels_emulator::{name}", lambda *x, real=real: real(*x), lib=library)
    torch.ops.load_library(str(path))
    load.library = library  # lives as long as the process
    handle = ctypes.CDLL(str(path))
    handle.kdkernels_emulator_seed.argtypes = [ctypes.c_uint64]
    handle.kdkernels_emulator_capability.argtypes = [ctypes.c_int]
    handle.kdkernels_emulator_launches.restype = ctypes.c_int64
    return handle


def op(name: str) -> object:
    """The emulated op of this name."""
    return getattr(torch.ops.kdkernels_emulator, name).default


def has_kernel(name: str) -> bool:
    """Whether the loaded library has this op."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"kdkernels_emulator::{name}", "CPU")
