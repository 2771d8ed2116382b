"""The Triton kernels, compiled for any GPU without one.

The losses' public functions run on CPU tensors of typical shapes. Each launch is answered by compiling the kernel
exactly as a GPU would have it compiled (Triton's own specialisation of the arguments, its own options) and launching
nothing, so no kernel's argument list is repeated here, and what is not launched in practice is not judged.

To be used in a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from gates import amdgcn, sass
from gates.cases import CASES
from gates.flow import Counts, count
from gates.rules import Kernel

ARCHITECTURES = ("80", "90", "100", "120", "gfx942")
PAIRS = ("f32/f32", "bf16/bf16", "bf16/f32", "f16/f16", "f16/f32")
_AUXILIARY = ("rows", "features", "numbers")  # files whose small kernels serve several losses


def obstacle() -> str | None:
    """Why the kernels cannot be compiled here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set"
    return None


def ops() -> list[str]:
    """The losses that have a file in kdkernels/triton."""
    return sorted({case.op for case in CASES if importlib.util.find_spec(f"kdkernels.triton.{case.op}")})


def version() -> str:
    import triton

    return triton.__version__


def target(arch: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch), 32)


_imported_for: dict[str, str | None] = {}


@contextlib.contextmanager
def _compiling_for(arch: str, launches: list[Any]) -> Iterator[None]:
    """Inside the block the losses' Triton kernels serve CPU tensors, as if those were on a GPU of this kind, and a
    launch appends (module, name, compiled kernel) to `launches`.
    """
    import torch
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    import kdkernels as kd
    from kdkernels import ops

    class Driver:
        """As much of a GPU's driver as choosing a kernel takes."""

        def get_current_target(self) -> Any:
            return target(arch)

        def get_current_device(self) -> str:
            return arch  # Triton keeps what it compiled per device

        def get_current_stream(self, device: str) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    compile_only = JITFunction.run

    def run(self: JITFunction, *arguments: Any, **options: Any) -> Any:
        options["warmup"] = True
        kernel = compile_only(self, *arguments, **options)
        launches.append((self.__module__.rsplit(".", 1)[-1], self.__name__, kernel))
        return kernel

    hip = "6.4" if arch.startswith("gfx") else None
    if hip != _imported_for.get("hip", torch.version.hip):  # what files choose when they are imported is chosen anew
        for name in [x for x in sys.modules if x.startswith("kdkernels.triton")]:
            del sys.modules[name]
    _imported_for["hip"] = hip
    before = driver._active
    driver.set_active(Driver())
    try:
        with (
            mock.patch.object(JITFunction, "run", run),
            mock.patch.dict(ops.DEVICES, triton="cpu"),
            mock.patch.object(ops, "_order", lambda loss, student: ("triton",)),
            mock.patch.object(ops, "_obstacle", lambda backend: None),
            mock.patch.object(torch.version, "hip", hip),
            # Plans differ in the interpreter, which is where kernels meet CPU tensors otherwise.
            mock.patch.object(torch.Tensor, "is_cpu", property(lambda self: False), create=True),
            kd.use_backend("triton"),
        ):
            yield
    finally:
        driver._active = before


def _pointers(signature: Any) -> list[str]:
    """The element types that a signature points to."""
    if isinstance(signature, str):
        return [signature[1:]] if signature.startswith("*") else []
    values = signature.values() if isinstance(signature, dict) else signature
    return [x for value in values for x in _pointers(value)]


def _measure(kernel: Any) -> tuple[int, int, int, int, Counts]:
    """(registers, AMD's scalar registers, spill bytes, local bytes, counts) of a compiled kernel."""
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        usage = amdgcn.parse_usage(text)
        spilled, local = 4 * usage["vgpr_spill_count"], usage["private_segment_fixed_size"]
        return usage["vgpr_count"], usage["sgpr_count"], spilled, local, count(amdgcn.parse(text), amdgcn.KINDS)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        ((code, usage),) = sass.read(cubin).values()
    counts = count(code, sass.KINDS)
    return usage["REG"], 0, counts.local_bytes, usage["STACK"] + usage["LOCAL"], counts


_DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


def kernels(
    op: str, arch: str, pairs: tuple[str, ...], say: Callable[[str], None], failed: Callable[[str], None]
) -> Iterator[Kernel]:
    """Every kernel that the cases of a loss launch. A case that raises is given to `failed` as a line of text."""
    import torch

    measured: dict[str, tuple[int, int, int, int, Counts]] = {}
    seen = set()
    architecture = arch if arch.startswith("gfx") else f"sm_{arch}"
    for pair in pairs:
        for case in CASES:
            if case.op != op or (pair != pairs[0] and not case.dtypes):
                continue
            say(f"triton {op} {architecture} {pair} {case.name}")
            launches: list[Any] = []
            student, teacher = (getattr(torch, _DTYPES[x]) for x in pair.split("/"))
            try:
                with _compiling_for(arch, launches):
                    case.run(student, teacher)
            except Exception as error:
                say(traceback.format_exc())
                failed(f"triton {op} {architecture} {pair} {case.name}: {type(error).__name__}: {error}")
            for module, name, kernel in launches:
                key, dtypes_of, label = op, pair if case.dtypes else "-", case.name
                if module in _AUXILIARY:
                    key, label = module, "any"
                    dtypes_of = "/".join(dict.fromkeys(_pointers(kernel.src.signature)))
                if (key, name, dtypes_of, kernel.hash) in seen:  # the first case that launched it stands for all
                    continue
                seen.add((key, name, dtypes_of, kernel.hash))
                if kernel.hash not in measured:
                    measured[kernel.hash] = _measure(kernel)
                registers, scalars, spilled, local, counts = measured[kernel.hash]
                yield Kernel(
                    op=key,
                    name=name,
                    backend="triton",
                    arch=architecture,
                    dtypes=dtypes_of,
                    case=label,
                    compiler=version(),
                    registers=registers,
                    scalar_registers=scalars,
                    spill_bytes=spilled,
                    local_bytes=local,
                    shared_bytes=kernel.metadata.shared,
                    counts=counts,
                    shared=module in _AUXILIARY,
                )
