"""How an op is declared, and which backend serves a call.

A loss declares its ops here (schema and fake implementation in Python; the shared objects add kernels) and asks
`backend_for` who serves a call. The answer depends on the device, the dtypes, what is built and what
`use_backend` forces, never on data.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import shutil
import sysconfig
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from . import choices, native

BACKENDS = ("cpu", "cuda", "triton", "reference")

# Every loss, by the name that it has in every folder.
LOSSES: list[str] = []

# Which device's tensors a backend's kernels take.
DEVICES = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda"}

# backend -> op, for every op. A dispatcher key cannot hold two kernels, so Triton's ops are a namespace of their own;
# the compiled kernels of both devices share one.
OPS: dict[str, dict[str, Any]] = {}

_compiled = torch.library.Library("kdkernels", "FRAGMENT")
_triton = torch.library.Library("kdkernels_triton", "FRAGMENT")
# Which op this thread is loading kernels for: its second arrival means that none fits its tensors.
_entered = threading.local()
_KERNEL_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}

try:  # The predicate that torch.autograd.Function itself consults. Private, hence guarded; a test covers it.
    functorch_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
except AttributeError:  # pragma: no cover

    def functorch_active() -> bool:
        return False


# A plain process-wide value: a ContextVar would break fullgraph, a thread-local would not reach the backward thread.
_forced: str | None = os.environ.get("KDKERNELS_BACKEND") or None
if _forced is not None and _forced not in BACKENDS:
    raise ValueError(f"KDKERNELS_BACKEND: expected one of {BACKENDS}, got {_forced!r}")


def _device_of(arguments: Sequence[Any]) -> str:
    """The device type of the first tensor among an op's arguments."""
    for x in arguments:
        if isinstance(x, torch.Tensor):
            return x.device.type
        if isinstance(x, (list, tuple)) and x:
            return _device_of(x)
    return "cpu"


def define(name: str, schema: str, fake: Callable[..., Any], *, module: str | None = None) -> dict[str, Any]:
    """Declares an op with its schema and its fake implementation, and returns it as {backend: op}.

    ``kdkernels::name`` is the compiled one, ``kdkernels_triton::name`` Triton's, which is the function `name` of
    kdkernels/triton/<loss>.py, or of `module` there. The ops have no autograd formula and stay private: each loss wraps
    them in an autograd Function. Until a shared object is loaded, a first execution (of a compiled graph, say) loads or
    builds it and then runs the kernel.
    """
    if not hasattr(torch.ops.kdkernels, name):  # importlib.reload runs this file again
        run_triton = functools.partial(_run_triton, module or name.removesuffix("_backward"), name)
        for library, run in ((_compiled, functools.partial(_load_then_run, name)), (_triton, run_triton)):
            library.define(f"{name}{schema}")
            torch.library.register_fake(f"{library.ns}::{name}", fake, lib=library)
            library.impl(name, run, "CompositeExplicitAutograd")
    compiled, triton = (getattr(space, name).default for space in (torch.ops.kdkernels, torch.ops.kdkernels_triton))
    OPS[name] = {"cpu": compiled, "cuda": compiled, "triton": triton}
    return OPS[name]


def _load_then_run(name: str, *args: Any) -> Any:
    if getattr(_entered, "name", None) == name:  # the kernels are there, and PyTorch took this again
        raise RuntimeError(f"kdkernels::{name}: no kernel for tensors of this kind")
    kernels = "cuda" if _device_of(args) == "cuda" else "cpu"
    if native.load(kernels):
        _entered.name = name
        try:
            return getattr(torch.ops.kdkernels, name).default(*args)
        finally:
            _entered.name = None
    raise RuntimeError(
        f"kdkernels::{name}: a compiled graph expected the {kernels.upper()} kernels, but "
        f"{native.status(kernels).reason}. The next call traces what serves instead."
    )


def _run_triton(module: str, name: str, *args: Any) -> Any:
    return getattr(importlib.import_module(f"{__package__}.triton.{module}"), name)(*args)


def kernel_dtypes(student: torch.dtype, teacher: torch.dtype, backend: str = "cpu") -> bool:
    """Whether a backend has kernels for this pair: alike, or a float32 teacher. The formula serves other pairs, and
    float64 on a GPU.
    """
    return student in _KERNEL_DTYPES[backend] and (teacher == student or teacher == torch.float32)


def _look_for_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'kdkernels[triton]')"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    # Triton compiles the launcher of each kernel as a Python extension.
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "triton needs a C compiler (gcc, clang or $CC)"
    if not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
        return "triton needs Python's headers (python3-dev)"
    return None


# Looked for once, at import: Dynamo traces what reads it, and warns of a functools.cache. triton is not imported.
_why_no_triton = _look_for_triton()


def _triton_obstacle() -> str | None:
    """Why Triton kernels cannot run here, or None."""
    return _why_no_triton


def _obstacle(backend: str) -> str | None:
    """Why the kernels of a backend cannot be had, or None. Loads them, but not while a graph is being traced."""
    if backend == "triton":
        return _triton_obstacle()
    if torch.compiler.is_compiling():
        return None if native.expected(backend) else "no compiled kernels are expected here"
    return None if native.load(backend) else native.status(backend).reason


@functools.cache
def _kernel_registered(op: str, device: str) -> bool:
    return native.registered(op, device)


def has_kernel(op: str, backend: str) -> bool:
    """Whether a backend that was chosen, so that its kernels are loaded, has one for a one-pass op. Triton has none."""
    if backend not in ("cpu", "cuda"):
        return False
    if torch.compiler.is_compiling():
        return True
    return _kernel_registered(op, backend)


def _order(loss: str, student: torch.Tensor) -> Sequence[str]:
    """The backends that may serve the student's device, the preferred one first."""
    device = student.device.type
    able = [backend for backend, served in DEVICES.items() if served == device]
    if len(able) < 2:
        return able
    return choices.order(loss, student)


def backend_for(loss: str, student: torch.Tensor, teacher: torch.Tensor, *, differentiable: bool = False) -> str:
    """Which backend serves one call of `loss`: one of `BACKENDS`.

    `differentiable` says that something besides the student asks for a gradient (a weight), which only the formula
    gives. Raises RuntimeError, naming op, device and dtypes, where a forced backend cannot serve.
    """
    if _forced == "reference" or functorch_active():
        return "reference"
    why = "a weight asks for a gradient" if differentiable else None
    if not differentiable:
        for backend in _order(loss, student):
            if _forced in (None, backend) and kernel_dtypes(student.dtype, teacher.dtype, backend):
                why = _obstacle(backend)
                if why is None:
                    return backend
    if _forced is not None:
        raise RuntimeError(
            f"{loss}: backend {_forced!r} is forced but cannot serve a {student.dtype} student with a {teacher.dtype} "
            f"teacher on {student.device.type}" + (f": {why}" if why else "")
        )
    return "reference"


def backend_for_levels(
    loss: str, students: Sequence[torch.Tensor], teachers: Sequence[torch.Tensor], *, differentiable: bool = False
) -> str:
    """Which backend serves all levels of a call in one op: the formula where they want different ones, or mix float64
    with other dtypes.
    """
    backends = {backend_for(loss, s, t, differentiable=differentiable) for s, t in zip(students, teachers)}
    mixed = len({s.dtype == torch.float64 for s in students}) > 1
    return "reference" if mixed or len(backends) > 1 else backends.pop()


def backend_for_masks(name: str, boxes: torch.Tensor) -> str:
    """Which backend draws masks where the boxes are; "reference" is PyTorch's operations. One that is forced and of
    another device than the boxes' leaves them to those; RuntimeError where it is of theirs and cannot be had.
    """
    if _forced == "reference" or functorch_active():
        return "reference"
    for backend in _order(name, boxes):
        if _forced in (None, backend):
            why = _obstacle(backend)
            if why is None:
                return backend
            if _forced is not None:
                raise RuntimeError(f"{name}: backend {_forced!r} is forced but cannot serve: {why}")
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


def apart(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same values, each a node of its own that no other depends on."""
    with torch.enable_grad():
        return [x.view_as(x) if x.requires_grad else x for x in inputs]


def gradients_of_formula(
    formula: Callable[[], torch.Tensor], inputs: Sequence[torch.Tensor], grad_output: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """The gradient as a differentiable function of the inputs: what backward returns under create_graph=True.

    Where there are several inputs, the formula must be of `apart(inputs)`: else a path from one input to another, of
    which autograd takes care itself, would count twice.
    """
    with torch.enable_grad():
        value = formula()
    return torch.autograd.grad(value, inputs, grad_output, create_graph=True, allow_unused=True)


class BackendInfo(dict):
    """Loss name -> device -> (who serves it, why). As a string: a table."""

    def __str__(self) -> str:
        width = max(map(len, self))
        rows = [f"{'loss':{width}}  {'device':6}  {'served by':9}  why"]
        for loss, devices in self.items():
            for device, (backend, why) in devices.items():
                rows.append(f"{loss:{width}}  {device:6}  {backend:9}  {why}")
        return "\n".join(rows)


def _info_cpu() -> tuple[str, str]:
    if _forced == "reference":
        return "reference", "forced"
    if _forced in ("cuda", "triton"):
        return "none", f"{_forced} is forced"
    able, why = native.prospects("cpu")
    if native.status("cpu").state == "loaded":
        why += f", {native.cpu_capability()}; float32, bfloat16 (in one pass), float16, float64"
    return ("cpu" if able else "reference"), why


def _info_cuda(loss: str) -> tuple[str, str]:
    if _forced == "reference":
        return "reference", "forced"
    if _forced == "cpu":
        return "none", "cpu is forced"
    here = native.gpus()
    major = None if isinstance(here, str) else here.capabilities[0][0]
    entry = choices.choice(loss, major)
    second = "triton" if entry.backend == "cuda" else "cuda"
    lacking = ""
    for backend in (entry.backend, second) if _forced is None else (_forced,):
        if backend == "cuda":
            able, why = native.prospects("cuda")
            if native.status("cuda").state == "loaded" and not native.registered(loss, "cuda"):
                able, why = False, "this build has no kernel for this loss"
        else:
            why = _triton_obstacle()
            able, why = why is None, why or "triton is installed"
        if able:
            break
        lacking += f"; not {backend}: {why}"
    else:
        backend, why = ("reference" if _forced is None else "none"), "the PyTorch formula"
    if backend == entry.backend and _forced is None:
        lacking = f"; chosen over {second}, {entry.measured or 'not measured on a GPU'}"
        for large in choices.TABLE:
            if large.elements and large.loss in (None, loss) and large.major in (None, major):
                lacking += f"; from {large.elements} elements {large.backend}, {large.measured or 'not measured'}"
    where = f"{here}; on a GPU: " if isinstance(here, str) else ""
    return backend, f"{where}{why}{lacking}" + ("; float64: the formula" if backend in ("cuda", "triton") else "")


def backend_info(*, build: bool = False) -> BackendInfo:
    """Which implementation serves each loss here, and why: ``{loss: {device: (backend, reason)}}``; ``str()`` is a
    table.

    Without a GPU, the "cuda" rows say what would serve on one. With ``build=True`` kernels that would be built on first
    use are built now.
    """
    if build:
        native.load("cpu")
        native.load("cuda")
    return BackendInfo({loss: {"cpu": _info_cpu(), "cuda": _info_cuda(loss)} for loss in LOSSES})
