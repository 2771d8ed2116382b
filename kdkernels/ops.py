"""How an op is declared, and which backend serves a call.

A loss declares its ops here (schema and fake implementation in Python; the shared objects add kernels) and asks
`backend_for` who serves a call. The answer depends on the device, the dtypes, what is built and what
`use_backend` forces, never on data.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from . import native

BACKENDS = ("cpu", "cuda", "triton", "reference")

# Every loss, by the name that it has in every folder.
LOSSES: list[str] = []

_library = torch.library.Library("kdkernels", "FRAGMENT")
# Which op this thread is loading kernels for: its second arrival means that none fits its tensors.
_entered = threading.local()
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

try:  # The predicate that torch.autograd.Function itself consults. Private, hence guarded; a test covers it.
    functorch_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
except AttributeError:  # pragma: no cover

    def functorch_active() -> bool:
        return False


# A plain process-wide value: a ContextVar would break fullgraph, a thread-local would not reach the backward thread.
_forced: str | None = os.environ.get("KDKERNELS_BACKEND") or None
if _forced is not None and _forced not in BACKENDS:
    raise ValueError(f"KDKERNELS_BACKEND: expected one of {BACKENDS}, got {_forced!r}")


def define(name: str, schema: str, fake: Callable[..., Any]) -> Any:
    """Declares kdkernels::`name` with its schema and its fake implementation, and returns the op.

    The op has no autograd formula and stays private: each loss wraps it in an autograd Function. Until the shared
    object is loaded, a first execution (of a compiled graph, say) loads or builds it and then runs the kernel.
    """
    qualified = f"kdkernels::{name}"
    if not hasattr(torch.ops.kdkernels, name):  # importlib.reload runs this file again
        _library.define(f"{name}{schema}")
        torch.library.register_fake(qualified, fake, lib=_library)

        def load_then_run(*args: Any) -> Any:
            if getattr(_entered, "name", None) == name:  # the kernels are there, and PyTorch took this again
                raise RuntimeError(f"kdkernels::{name}: no kernel for tensors of this kind")
            if native.load("cpu"):
                _entered.name = name
                try:
                    return getattr(torch.ops.kdkernels, name).default(*args)
                finally:
                    _entered.name = None
            raise RuntimeError(
                f"kdkernels::{name}: a compiled graph expected the CPU kernels, but {native.status('cpu').reason}. "
                "The next call traces the PyTorch formula instead."
            )

        _library.impl(name, load_then_run, "CompositeExplicitAutograd")
    return getattr(torch.ops.kdkernels, name).default


def kernel_dtypes(student: torch.dtype, teacher: torch.dtype) -> bool:
    """Whether kernels exist for this pair: alike, or a float32 teacher. Other pairs are served by the formula."""
    return student in _KERNEL_DTYPES and (teacher == student or teacher == torch.float32)


def _cpu_usable() -> bool:
    if torch.compiler.is_compiling():
        return native.cpu_expected and not native.cpu_failed
    return native.load("cpu")


def backend_for(loss: str, student: torch.Tensor, teacher: torch.Tensor, *, differentiable: bool = False) -> str:
    """Which backend serves one call of `loss`: "cpu" or "reference".

    `differentiable` says that something besides the student asks for a gradient (a weight), which only the formula
    gives. Raises RuntimeError, naming op, device and dtypes, where a forced backend cannot serve.
    """
    device = student.device.type
    if _forced == "reference":
        return "reference"
    if functorch_active():
        return "reference"
    if (
        device == "cpu"
        and not differentiable
        and kernel_dtypes(student.dtype, teacher.dtype)
        and _forced in (None, "cpu")
    ):
        if _cpu_usable():
            return "cpu"
    if _forced is not None:
        raise RuntimeError(
            f"{loss}: backend {_forced!r} is forced but cannot serve a {student.dtype} student with a {teacher.dtype} "
            f"teacher on {device}"
            + (": a weight asks for a gradient" if differentiable else "")
            + (f": {native.status('cpu').reason}" if _forced == "cpu" and native.cpu_failed else "")
        )
    return "reference"


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces one backend ("cpu", "cuda", "triton" or "reference") for all calls of the process inside the block.

    A call that the backend cannot serve raises RuntimeError. $KDKERNELS_BACKEND is the outermost of these.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"name: expected one of {BACKENDS}, got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def save(ctx: Any, *tensors: torch.Tensor | None) -> None:
    """`ctx.save_for_backward`, and for inference tensors, which autograd refuses, a plain reference: they are
    constants.

    A teacher that ran under torch.inference_mode() gives such tensors.
    """
    kept = {}
    if not torch.compiler.is_compiling():
        kept = {i: x for i, x in enumerate(tensors) if x is not None and x.is_inference()}
    ctx.inference_tensors = kept
    ctx.save_for_backward(*(None if i in kept else x for i, x in enumerate(tensors)))


def saved(ctx: Any) -> list[torch.Tensor | None]:
    """What `save` was given."""
    tensors = list(ctx.saved_tensors)
    for i, x in ctx.inference_tensors.items():
        tensors[i] = x
    return tensors


def run_formula(formula: Callable[..., torch.Tensor], *inputs: Any, **keywords: Any) -> torch.Tensor:
    """Calls a formula of `reference/`, with copies of inference tensors, which autograd could not save for it."""

    def ordinary(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return x.clone() if x.is_inference() else x
        return [ordinary(v) for v in x] if isinstance(x, (list, tuple)) else x

    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return formula(*inputs, **keywords)
    return formula(*map(ordinary, inputs), **{name: ordinary(x) for name, x in keywords.items()})


def gradients_of_formula(
    formula: Callable[[], torch.Tensor], inputs: Sequence[torch.Tensor], grad_output: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """The gradient as a differentiable function of the inputs: what backward returns under create_graph=True."""
    with torch.enable_grad():
        value = formula()
    return torch.autograd.grad(value, inputs, grad_output, create_graph=True, allow_unused=True)


class BackendInfo(dict):
    """Loss name -> (implementation on the CPU, reason). As a string: a table."""

    def __str__(self) -> str:
        width = max(map(len, self))
        rows = [f"{'loss':{width}}  {'device':6}  {'served by':9}  why"]
        for loss, devices in self.items():
            for device, (backend, why) in devices.items():
                rows.append(f"{loss:{width}}  {device:6}  {backend:9}  {why}")
        return "\n".join(rows)


def backend_info(*, build: bool = False) -> BackendInfo:
    """Which implementation serves each loss here, and why: ``{loss: {device: (backend, reason)}}``; ``str()`` is a
    table.

    With ``build=True`` kernels that would be built on first use are built now.
    """
    if build:
        native.load("cpu")
    status = native.status("cpu")
    if _forced == "reference":
        cpu = ("reference", "forced")
    elif status.state == "failed" or not native.cpu_expected:
        cpu = ("reference", status.reason if status.state == "failed" else native.forecast())
    elif status.state == "loaded":
        cpu = ("cpu", f"{status.reason}, {native.cpu_capability()}; float32, bfloat16, float16, float64")
    else:
        cpu = ("cpu", native.forecast())
    other = ("reference", "no kernel in this version: the PyTorch formula, which runs on any device")
    return BackendInfo({loss: {"cpu": cpu, "cuda": other} for loss in LOSSES})
