"""A tiny csrc/ and a script in nvcc's place, for tests of how the CUDA kernels are built and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdkernels.native import build as builder

# Answers like nvcc and compiles nothing. Its calls are kept beside it.
NVCC = """#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release {release}, V{release}.1"; exit;;
  *--list-gpu-code*) for n in {codes}; do echo sm_$n; done; exit;;
esac
echo "$@" >> {calls}
how=-c
while [ $# -gt 0 ]; do
  [ "$1" = -o ] && out=$2
  [ "$1" = -shared ] && how=-shared
  shift
done
echo | c++ -fPIC -x c++ $how - -o "$out"
"""


def make_nvcc(folder: Path, release: str = "13.0", codes: tuple[int, ...] = (75, 80, 86, 90, 100, 120)) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "nvcc"
    path.write_text(NVCC.format(release=release, codes=" ".join(map(str, codes)), calls=folder / "calls"))
    path.chmod(0o755)
    return str(path)


def make_house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny csrc/, a script for nvcc, an empty cache, and no word about architectures in the environment."""
    names = (
        "arguments.h",
        "cpu/one.cpp",
        "cpu/one.h",
        "cpu/capability.cpp",
        "math/one.h",
        "cuda/one.cu",
        "cuda/one.cuh",
    )
    for name in (*names, "cuda/one.h", "torch/tensors.h", "torch/cuda.h", "torch/one_cpu.cpp", "torch/one_cuda.cpp"):
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("// nothing\n")
    monkeypatch.setattr(builder, "source_directory", lambda: tmp_path / "csrc")
    for name in ("CXX", "MAX_JOBS", "KDKERNELS_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST", "KDKERNELS_JIT", "NVCC_CCBIN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KDKERNELS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("NVCC", make_nvcc(tmp_path / "toolkit"))
    return tmp_path
