"""What every test shares: the backends and devices to run on, a poisoned allocator, and reproducible numbers.

A test that needs a GPU is marked `gpu`: it skips by itself where there is none, and fails instead under
KDKERNELS_REQUIRE_GPU=1, so that a run on a GPU machine cannot pass by skipping.
"""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by triton when it is imported

import emulator_library
import on_gpu

import kdkernels as kd
from kdkernels import native, ops
from kdkernels.losses import one_pass

REQUIRE_GPU = os.environ.get("KDKERNELS_REQUIRE_GPU") == "1"


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        if REQUIRE_GPU:
            pytest.fail("KDKERNELS_REQUIRE_GPU=1, but torch sees no GPU")
        pytest.skip("needs a GPU")


@pytest.fixture(autouse=True)
def reproducible():
    """Each test starts from the same seed, and leaves threads and instruction set as it found them."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    if native.status("cpu").state == "loaded":
        native.set_cpu_capability("avx512")


# float64 on a GPU is the formula's: its kernels take no part in those cases.
GPU_KERNELS = ("cuda", "triton")


def _skip_float64(loss, student, teacher, **options):
    if ops._forced in GPU_KERNELS and torch.float64 in (student.dtype, teacher.dtype):
        pytest.skip("float64 is served by the formula on a GPU")
    return _backend_for(loss, student, teacher, **options)


_backend_for = ops.backend_for


@pytest.fixture(params=["base", "avx2", "avx512", "reference", *GPU_KERNELS])
def backend(request, monkeypatch):
    """Every implementation: the CPU's kernels at each instruction set, the formula, and the GPU's kernels. Those run on
    the GPU where there is one, else CUDA's in the emulator and Triton's in its interpreter.
    """
    if request.param == "reference":
        with kd.use_backend("reference"):
            yield request.param
        return
    if request.param in GPU_KERNELS:
        if request.param == "triton":
            pytest.importorskip("triton")
        if torch.cuda.is_available():
            assert request.param == "triton" or native.load("cuda"), native.status("cuda").reason
            for served in ops.OPS.values():
                monkeypatch.setitem(served, request.param, on_gpu.remote(served[request.param]))
        elif request.param == "cuda":
            emulator_library.load()
            for name, served in ops.OPS.items():
                monkeypatch.setitem(served, "cuda", emulator_library.op(name))
        monkeypatch.setattr(ops, "_obstacle", lambda backend: None)
        monkeypatch.setitem(ops.DEVICES, request.param, "cpu")
        monkeypatch.setattr(ops, "_order", lambda loss, student: (request.param,))
        monkeypatch.setattr(ops, "backend_for", _skip_float64)
        with kd.use_backend(request.param):
            yield request.param
        return
    assert native.load("cpu"), f"the CPU kernels could not be had: {native.status('cpu').reason}"
    if native.set_cpu_capability(request.param) != request.param:
        pytest.skip(f"this CPU has no {request.param}")
    if request.param == "base":  # where all dtypes take two passes; elsewhere those that cannot take one
        monkeypatch.setattr(one_pass, "_DTYPES", ())
    with kd.use_backend("cpu"):
        yield request.param
