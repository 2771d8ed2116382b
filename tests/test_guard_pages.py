"""Kernels read their inputs and nothing beyond: each input ends, or begins, at a page that must not be touched.

A read of that page ends the process, so all of it happens in one of its own.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels import native

LOSSES = ("masked_mse", "pearson", "temperature_kl", "soft_cross_entropy", "binary_kl", "bounded_regression")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PAGES = 4


class Guarded:
    """Places for tensors between two pages without access."""

    def __init__(self) -> None:
        page = mmap.PAGESIZE
        self.area = mmap.mmap(-1, (PAGES + 2) * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.begin = ctypes.addressof(ctypes.c_char.from_buffer(self.area)) + page
        self.end = self.begin + PAGES * page
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        for address in (self.begin - page, self.end):
            assert protect(ctypes.c_void_p(address), ctypes.c_size_t(page), 0) == 0

    def place(self, x: Tensor, at_end: bool) -> Tensor:
        size = x.numel() * x.element_size()
        at = self.end - size if at_end else self.begin
        return torch.frombuffer((ctypes.c_char * size).from_address(at), dtype=x.dtype).view(x.shape).copy_(x)


def _inputs(name: str, width: int, dtype: torch.dtype) -> list[Tensor]:
    if name in ("masked_mse", "pearson"):
        pair = [torch.randn(1, 2, 1, width).to(dtype) for _ in range(2)]
        mask = torch.rand(1, 1, width, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        return [*pair, mask] if name == "masked_mse" else pair
    if name == "bounded_regression":
        return [torch.randn(width, 4).to(dtype) for _ in range(3)]
    return [torch.randn(2, width).to(dtype) for _ in range(2)]


def work() -> None:
    """What the process does; its last line says what it died of."""
    places = [Guarded() for _ in range(3)]
    for capability, name in itertools.product(native.CAPABILITIES, LOSSES):
        if native.set_cpu_capability(capability) != capability:
            continue
        print(capability, name, flush=True)
        loss = getattr(kd, f"{name}_loss")
        for width, dtype in itertools.product((*range(2, 36), 63, 65), DTYPES):
            inputs = _inputs(name, width, dtype)
            for at_end, one_pass in itertools.product((True, False), (False, "auto")):
                student, *others = (place.place(x, at_end) for place, x in zip(places, inputs, strict=False))
                loss(student.requires_grad_(), *others, one_pass=one_pass).sum().backward()
    print("beyond", flush=True)
    ctypes.string_at(places[0].end, 1)  # the pages do guard
    print("unguarded")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs mprotect")
def test_nothing_beyond_the_inputs_is_read():
    """The process dies, of the read that is made on purpose after all others."""
    paths = os.pathsep.join([str(Path(kd.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": paths, "KDKERNELS_BACKEND": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=env)
    lines = done.stdout.splitlines()
    assert f"{native.best_cpu_capability()} {LOSSES[-1]}" in lines, done.stdout + done.stderr[-2000:]
    assert lines[-1] == "beyond" and done.returncode == -signal.SIGSEGV, done.stdout + done.stderr[-2000:]


if __name__ == "__main__":
    work()
