"""The GPU's kernels serving calls on CPU tensors: on the GPU where there is one, else CUDA's in the emulator and
Triton's in its interpreter. For the fixture `backend`, and for benchmarks/numerics.py. No pytest here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import emulator_library
import on_gpu
import torch

import kdkernels as kd
from kdkernels import native, ops

_real_has_kernel = ops.has_kernel


def _has_kernel(op: str, backend: str) -> bool:
    return emulator_library.has_kernel(op) if backend == "cuda" else _real_has_kernel(op, backend)


@contextlib.contextmanager
def serving(name: str) -> Iterator[None]:
    """Forces "cuda" or "triton" for all calls inside the block, whose tensors are on the CPU."""
    with contextlib.ExitStack() as stack:
        if torch.cuda.is_available():
            assert name == "triton" or native.load("cuda"), native.status("cuda").reason
            for served in ops.OPS.values():
                stack.enter_context(mock.patch.dict(served, {name: on_gpu.remote(served[name])}))
        elif name == "cuda":
            emulator_library.load()
            for op, served in ops.OPS.items():
                stack.enter_context(mock.patch.dict(served, {"cuda": emulator_library.op(op)}))
            stack.enter_context(mock.patch.object(ops, "has_kernel", _has_kernel))
        stack.enter_context(mock.patch.object(ops, "_obstacle", lambda backend: None))
        stack.enter_context(mock.patch.dict(ops.DEVICES, {name: "cpu"}))
        stack.enter_context(mock.patch.object(ops, "_order", lambda loss, student: (name,)))
        stack.enter_context(kd.use_backend(name))
        yield
