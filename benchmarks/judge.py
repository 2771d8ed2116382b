"""Whether a provider's numbers are right: loss and gradient against the formula in float64, before anything is timed.

Error of x is max|x - x64| / max|x64|. Ours may have twice the error of the same-dtype eager formula plus 4 eps of the
result's dtype: the bound that the tests hold kernels to. The peers are timed as users run them, so their own rounding
is shown, not judged: only an error that rounding cannot explain refuses them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# A peer rounds to its input's dtype after each of a few operations, and sums long rows in float32. In bfloat16 six
# roundings are 4.7 %: a swapped teacher, a factor of 1.05 or a gradient of zero exceeds that.
PEER_ROUNDINGS, PEER_SUM_ROUNDINGS = 6, 64


def error(x: Tensor, x64: Tensor) -> float:
    """max|x - x64| / max|x64|; infinite where x is not finite."""
    worst, largest = (x.double() - x64).abs().max().item(), x64.abs().max().item()
    if worst == 0:
        return 0.0
    return worst / largest if largest > 0 and math.isfinite(worst) else math.inf


def evaluate(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The loss without a graph, the loss with one, and the student's gradient."""
    with torch.no_grad():
        alone = function(*inputs)
    student = inputs[0].detach().clone().requires_grad_()
    loss = function(student, *inputs[1:])
    loss.backward()
    if student.grad is None:
        raise RuntimeError("the student got no gradient")
    return alone, loss.detach(), student.grad


class Judge:
    """Holds one set of inputs' exact answer; collects the errors of whom it accepts and the refusals, in words."""

    def __init__(self, formula: Callable[..., Tensor], inputs: Sequence[Tensor]):
        wide = [x.double() if x.is_floating_point() else x for x in inputs]
        self.truth = evaluate(formula, wide)
        self.peer = self._errors(evaluate(formula, inputs))
        self.errors: dict[str, tuple[float, float]] = {}
        self.refusals: list[str] = []

    def _errors(self, found: Sequence[Tensor]) -> tuple[float, float]:
        without, loss, grad = (error(x, x64) for x, x64 in zip(found, self.truth))
        return max(without, loss), grad

    def accepts(
        self,
        name: str,
        function: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        prepare: Callable[[], object] = lambda: None,
        *,
        ours: bool = False,
    ) -> bool:
        """Whether loss and gradient of a provider are right; keeps its errors, or says why it is refused."""
        prepare()
        found = evaluate(function, inputs)
        wrong = []
        errors = self._errors(found)
        for what, got, peer, x in zip(("loss", "gradient"), errors, self.peer, found[1:]):
            if ours:
                accepted = 2 * peer + 4 * torch.finfo(x.dtype).eps
            else:
                accepted = PEER_ROUNDINGS * torch.finfo(inputs[0].dtype).eps
                accepted += PEER_SUM_ROUNDINGS * torch.finfo(torch.float32).eps
            if not got <= accepted:
                wrong.append(f"{what} error {got:.2e}, accepted {accepted:.2e}")
        if wrong:
            self.refusals.append(f"{name}: {'; '.join(wrong)}")
            return False
        self.errors[name] = errors
        return True
