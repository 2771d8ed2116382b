"""Whose numbers are held to float64: every backend of ours that runs here, the eager formula, Liger.

A provider is a function of a case's inputs. What cannot run on a machine is left out, with the reason.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch.nn.functional as F
from harness import ROOT, kdkernels
from torch import Tensor

from kdkernels import native
from kdkernels.native import build

from .values import Case

Call = Callable[..., Tensor]
CPU = ("base", "avx2", "avx512")
FORMULA = "formula"
OURS = ("cpu base", "cpu avx2", "cpu avx512", FORMULA, "cuda", "triton")
EAGER, EAGER32, LIGER, LIGER_LOG = "eager", "eager from float32", "liger", "liger, log target"
PEERS = (EAGER, EAGER32, LIGER, LIGER_LOG)


def ours(case: Case, student: Tensor, teacher: Tensor, *more: Any) -> Tensor:
    """The public function, whatever serves it."""
    function = getattr(kdkernels, f"{case.loss}_loss")
    if case.loss == "soft_cross_entropy":
        target, class_weight = more
        return function(student, teacher, target=target, class_weight=class_weight, **case.keywords)
    return function(student, teacher, *more, **case.keywords)


def eager(case: Case, *inputs: Any) -> Tensor:
    """The formula as users copy it, from the loss's own benchmark, in the inputs' dtype."""
    module = importlib.import_module(case.loss)
    with contextlib.ExitStack() as stack:
        for name, value in case.constants.items():
            stack.enter_context(mock.patch.object(module, name, value))
        return module.eager(*inputs)


def eager32(case: Case, student: Tensor, teacher: Tensor, *more: Any) -> Tensor:
    """The same after `.float()`: what a careful user writes for 16-bit tensors."""
    more = tuple(x.float() if x.is_floating_point() else x for x in more)
    return eager(case, student.float(), teacher.float(), *more)


class _Number(float):
    """A number on which `.to(dtype)` may be called, as Liger's kernel does with its eps: on a GPU a scalar argument has
    that method, in Triton's interpreter a Python float has not. It changes no arithmetic.
    """

    def to(self, dtype: object) -> _Number:
        return self


def liger(case: Case, student: Tensor, teacher: Tensor, *, log_target: bool = False) -> Tensor:
    """Liger's KL between PyTorch's log-softmax and softmax, which it asks its users to bring, times T^2."""
    from liger_kernel.ops.kl_div import LigerKLDivLossFunction

    t = case.keywords["temperature"]
    target = (F.log_softmax if log_target else F.softmax)(teacher / t, dim=-1)
    logs = F.log_softmax(student / t, dim=-1)
    return LigerKLDivLossFunction.apply(logs, target, "batchmean", log_target, _Number(1e-10)) * t**2


@dataclass(frozen=True)
class Provider:
    """`here` is entered around its calls; `loss` and `dtypes` say for whom it is."""

    name: str
    function: Call
    here: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    emulated: bool = False
    losses: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] | None = None

    def serves(self, case: Case, dtype: str) -> bool:
        """Whether it is asked for this case."""
        if self.emulated and case.large:
            return False
        return case.loss in (self.losses or (case.loss,)) and dtype in (self.dtypes or (dtype,))


@contextlib.contextmanager
def _capability(name: str) -> Iterator[None]:
    before = native.cpu_capability()
    native.set_cpu_capability(name)
    try:
        with kdkernels.use_backend("cpu"):
            yield
    finally:
        native.set_cpu_capability(before)


def _gpu_kernels() -> Any:
    """tests/gpu_kernels.py, which has GPU kernels serve CPU tensors."""
    if not (ROOT / "tests" / "gpu_kernels.py").exists():
        return None
    if str(ROOT / "tests") not in sys.path:
        sys.path.append(str(ROOT / "tests"))
    return importlib.import_module("gpu_kernels")


def _interpreter() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None if os.environ.get("TRITON_INTERPRET") == "1" else "TRITON_INTERPRET=1 is not set"


def available() -> tuple[list[Provider], dict[str, str]]:
    """Those that run on this machine, and why others do not."""
    found, missing = [], {}
    for name in CPU:
        if not native.load("cpu"):
            missing[f"cpu {name}"] = native.status("cpu").reason
        elif native.CAPABILITIES.index(name) > native.CAPABILITIES.index(native.best_cpu_capability()):
            missing[f"cpu {name}"] = "this CPU does not have it"
        else:
            found.append(Provider(f"cpu {name}", ours, functools.partial(_capability, name)))
    found.append(Provider(FORMULA, ours, functools.partial(kdkernels.use_backend, "reference")))
    kernels = _gpu_kernels()
    for name in ("cuda", "triton"):
        why = "tests/gpu_kernels.py is not here" if kernels is None else None
        if why is None:
            why = _interpreter() if name == "triton" else None if build.compiler() else "no C++ compiler"
        if why:
            missing[name] = why
        else:
            found.append(Provider(name, ours, functools.partial(kernels.serving, name), emulated=True))
    found += [Provider(EAGER, eager), Provider(EAGER32, eager32, dtypes=("bfloat16", "float16"))]
    why = _interpreter() or (None if importlib.util.find_spec("liger_kernel") else "liger-kernel is not installed")
    for name, log_target in ((LIGER, False), (LIGER_LOG, True)):
        if why:
            missing[name] = why
        else:
            function = functools.partial(liger, log_target=log_target)
            found.append(Provider(name, function, emulated=True, losses=("temperature_kl",)))
    return found, missing
