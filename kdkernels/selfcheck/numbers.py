"""How numbers are judged, by the tests and by the check on a user's machine: one error measure, one bound.

Error of x against the float64 formula x64: max|x - x64| / max|x64|. Bound: twice the same error of the formula run in
the tested dtype by plain PyTorch, plus 4 eps of the result's dtype; where PyTorch's own is not finite, 4 eps times the
square root of the number of summed values. There is no absolute tolerance: a zero gradient would pass it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kdkernels as kd

# The float64 kernels are held to the formula in float64 itself, so the bound above has no truth finer than what it
# judges. Both sum thousands of terms; 1e-9 is the contract's own demand in float64.
FLOAT64_BOUND = 1e-9


@dataclass
class Result:
    """A loss and the gradients of the student's levels (one for logits)."""

    loss: Tensor
    grads: list[Tensor]


def leaves(student: Any) -> Any:
    """Fresh leaves on the same memory, whatever its layout: a tensor, or a list of levels."""
    if isinstance(student, (list, tuple)):
        return [leaves(s) for s in student]
    return student.detach().requires_grad_()


def upstream_for(loss: Tensor) -> Tensor:
    """An upstream gradient that is not 1: one number, or one per row."""
    generator = torch.Generator().manual_seed(5)
    values = torch.rand(loss.shape, generator=generator, dtype=torch.float64) + 0.7
    return values.to(loss.dtype).to(loss.device)


def evaluate(
    function: Callable[..., Tensor], student: Any, *inputs: Any, upstream: Tensor | None = None, **keywords: Any
) -> Result:
    """Loss and gradients under an upstream gradient that is not 1."""
    student = leaves(student)
    loss = function(student, *inputs, **keywords)
    loss.backward(upstream_for(loss) if upstream is None else upstream.to(loss.dtype))
    levels = student if isinstance(student, list) else [student]
    return Result(loss.detach(), [s.grad for s in levels])


def to_float64(x: Any) -> Any:
    """Every floating-point tensor in nested arguments as float64: the inputs of the exact answer."""
    if isinstance(x, Tensor):
        return x.double() if x.dtype.is_floating_point else x
    if isinstance(x, (list, tuple)):
        return [to_float64(v) for v in x]
    if isinstance(x, dict):
        return {key: to_float64(v) for key, v in x.items()}
    return x


def exact(function: Callable[..., Tensor], student: Any, *inputs: Any, **keywords: Any) -> Result:
    """The formula in float64, by plain PyTorch."""
    with kd.use_backend("reference"):
        return evaluate(function, to_float64(student), *to_float64(inputs), **to_float64(keywords))


def formula(function: Callable[..., Tensor], student: Any, *inputs: Any, **keywords: Any) -> Result:
    """The formula in the tested dtype, by plain PyTorch: the peer that the bound refers to."""
    with kd.use_backend("reference"):
        return evaluate(function, student, *inputs, **keywords)


def error(x: Tensor, x64: Tensor) -> float:
    """max|x - x64| / max|x64|; 0 where both are 0; infinite where one is not finite and the other is."""
    x, x64 = x.detach().double(), x64.detach().double()
    if x.shape != x64.shape:
        raise ValueError(f"the shape is {tuple(x.shape)}, expected {tuple(x64.shape)}")
    if x64.numel() == 0:
        return 0.0
    same = (x == x64) | (x.isnan() & x64.isnan())
    difference = torch.where(same, 0.0, (x - x64).abs()).max().item()
    largest = torch.where(x64.isfinite(), x64.abs(), 0.0).max().item()
    if difference == 0:
        return 0.0
    return difference / largest if largest > 0 and math.isfinite(difference) else math.inf


def bound(peer_error: float, dtype: torch.dtype, length: int) -> float:
    """The largest error that is accepted; `length` is how many values the result sums."""
    if dtype == torch.float64:
        return FLOAT64_BOUND
    eps = torch.finfo(dtype).eps
    return 2 * peer_error + 4 * eps if math.isfinite(peer_error) else 4 * eps * math.sqrt(length)


def faults(result: Result, truth: Result, peer: Result | None, length: int) -> list[str]:
    """What is wrong with a result, in words; empty if nothing is. Without a peer, as if its own were not finite."""
    found = []
    peers = [peer.loss, *peer.grads] if peer else [None] * (1 + len(truth.grads))
    names = ["loss", *(f"gradient {i}" for i in range(len(truth.grads)))]
    for name, x, x64, p in zip(names, [result.loss, *result.grads], [truth.loss, *truth.grads], peers, strict=True):
        own = math.inf if p is None else error(p, x64)
        accepted, got = bound(own, x.dtype, length), error(x, x64)
        if not got <= accepted:
            told = "" if p is None else f", the formula's own {own:.2e}"
            found.append(f"{name}: error {got:.2e}, accepted {accepted:.2e}{told}")
    return found
