"""Whether a provider's numbers are right: loss and gradient against the formula in float64, before anything is timed.

Error of x is max|x - x64| / max|x64|. Ours may have twice the error of the same-dtype eager formula plus 4 eps of the
result's dtype: the bound that the tests hold kernels to. The peers are timed as users run them, so their own rounding
is shown, not judged: only an error that rounding cannot explain refuses them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# A peer rounds to its input's dtype after each of a few operations, and sums long rows in float32. In bfloat16 six
# roundings are 4.7 %: a swapped teacher, a factor of 1.05 or a gradient of zero exceeds that.
PEER_ROUNDINGS, PEER_SUM_ROUNDINGS = 6, 64


def error(x: Tensor, x64: Tensor) -> float:
    """max|x - x64| / max|x64|; infinite where x is not finite."""
    worst, largest = (x.double() - x64).abs().max().item(), x64.abs().max().item()
    if worst == 0:
        return 0.0
    return worst / largest if largest > 0 and math.isfinite(worst) else math.inf


def tensors(x: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """A side's tensors: its levels, or itself."""
    return [x] if isinstance(x, Tensor) else list(x)


def leaf(student: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
    """A fresh leaf of the student, or of each of its tensors."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors(student)]
    return leaves[0] if isinstance(student, Tensor) else leaves


def evaluate(function: Callable[..., Any], inputs: Sequence[Any], gradient: bool = True) -> tuple[Tensor, ...]:
    """The loss without a graph, the loss with one, and the student's gradient, all of its tensors in one row.

    Of what has no gradient, its tensors in one row, alone.
    """
    with torch.no_grad():
        alone = function(*inputs)
    if not gradient:
        return (torch.cat([x.flatten() for x in tensors(alone)]),)
    student = leaf(inputs[0])
    loss = function(student, *inputs[1:])
    loss.backward()
    grads = [x.grad for x in tensors(student)]
    if any(grad is None for grad in grads):
        raise RuntimeError("the student got no gradient")
    return alone, loss.detach(), torch.cat([grad.flatten() for grad in grads])


class Judge:
    """Holds one set of inputs' exact answer; collects the errors of whom it accepts and the refusals, in words."""

    def __init__(self, formula: Callable[..., Any], inputs: Sequence[Any], gradient: bool = True):
        def widened(x: Any) -> Any:
            return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

        self.gradient = gradient
        self.truth = evaluate(formula, pytree.tree_map(widened, list(inputs)), gradient)
        self.peer = self._errors(evaluate(formula, inputs, gradient))
        self.exact = all(x.isfinite().all() for x in self.truth)
        self.errors: dict[str, tuple[float, float]] = {}
        self.refusals: list[str] = []

    def _errors(self, found: Sequence[Tensor]) -> tuple[float, float]:
        worst = [error(x, x64) for x, x64 in zip(found, self.truth, strict=True)]
        return (max(worst[:2]), worst[2]) if self.gradient else (worst[0], 0.0)

    def accepts(
        self,
        name: str,
        function: Callable[..., Any],
        inputs: Sequence[Any],
        prepare: Callable[[], object] = lambda: None,
        *,
        ours: bool = False,
    ) -> bool:
        """Whether loss and gradient of a provider are right; keeps its errors, or says why it is refused."""
        if not self.exact:
            self.refusals.append(f"{name}: the formula is not finite in float64, so it cannot be held against that")
            return False
        prepare()
        found = evaluate(function, inputs, self.gradient)
        wrong = []
        errors = self._errors(found)
        for what, got, peer, x in zip(("loss", "gradient"), errors, self.peer, found[-2:]):
            if ours:
                accepted = 2 * peer + 4 * torch.finfo(x.dtype).eps
            else:
                accepted = PEER_ROUNDINGS * torch.finfo(tensors(inputs[0])[0].dtype).eps
                accepted += PEER_SUM_ROUNDINGS * torch.finfo(torch.float32).eps
            if not got <= accepted:
                wrong.append(f"{what} error {got:.2e}, accepted {accepted:.2e}")
        if wrong:
            self.refusals.append(f"{name}: {'; '.join(wrong)}")
            return False
        self.errors[name] = errors
        return True
