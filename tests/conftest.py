"""What every test shares: the backends and devices to run on, a poisoned allocator, and reproducible numbers.

A test that needs a GPU is marked `gpu`: it skips by itself where there is none, and fails instead under
KDKERNELS_REQUIRE_GPU=1, so that a run on a GPU machine cannot pass by skipping.
"""

from __future__ import annotations

import os
import zlib

import pytest

if os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch; the workers are the threads

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by triton when it is imported

import emulator_library
import gpu_kernels

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


# Forward and backward as CUDA kernels of their own, for dtypes that would take the one-pass form.
TWO_PASSES = "cuda-two-passes"


# Without a GPU, of Triton's cases in these tests one in so many is quick enough for every run.
INTERPRETED = {"test_error_bound": 2, "test_label_out_of_range_makes_its_row_nan": 4, "test_nan_stays_in_its_row": 2}


@pytest.hookimpl(tryfirst=True)  # before slow tests are left out
def pytest_collection_modifyitems(config, items):
    """Both forms of CUDA's kernels are for each loss's own tests; elsewhere its calls take what they take. Triton's
    interpreter takes half of all time: of the largest grids, a part of its cases, the same ones in every run, is slow.
    """
    own = {f"test_{loss}.py" for loss in ops.LOSSES}
    kept, unwanted = [], []
    for item in items:
        backend = getattr(item, "callspec", None) and item.callspec.params.get("backend")
        if backend == "triton" and not torch.cuda.is_available():
            if zlib.crc32(item.name.encode()) % INTERPRETED.get(item.originalname, 1):
                item.add_marker("slow")
        (unwanted if backend == TWO_PASSES and item.path.name not in own else kept).append(item)
    config.hook.pytest_deselected(items=unwanted)
    items[:] = kept


@pytest.fixture(params=["base", "avx2", "avx512", "reference", "cuda", TWO_PASSES, "triton"])
def backend(request, monkeypatch):
    """Every implementation: the CPU's kernels at each instruction set, the formula, and the GPU's kernels. Those run on
    the GPU where there is one, else CUDA's in the emulator and Triton's in its interpreter.
    """
    name = "cuda" if request.param == TWO_PASSES else request.param
    if request.param == "reference":
        with kd.use_backend("reference"):
            yield request.param
        return
    if request.param in ("base", TWO_PASSES):  # where all dtypes take two passes; elsewhere those that cannot take one
        monkeypatch.setattr(one_pass, "_DTYPES", ())
    if name in GPU_KERNELS:
        if name == "triton":
            pytest.importorskip("triton")
        monkeypatch.setattr(ops, "backend_for", _skip_float64)
        with gpu_kernels.serving(name):
            yield name
        return
    assert native.load("cpu"), f"the CPU kernels could not be had: {native.status('cpu').reason}"
    if native.set_cpu_capability(request.param) != request.param:
        pytest.skip(f"this CPU has no {request.param}")
    with kd.use_backend("cpu"):
        yield request.param


@pytest.fixture
def emulator():
    """The emulator's handle; architecture and order of threads are restored."""
    library = emulator_library.load()
    yield library
    library.kdkernels_emulator_capability(90)
    library.kdkernels_emulator_code(0)
    library.kdkernels_emulator_seed(0)
