"""The one-pass form: the forward computes loss and gradient together, and backward only hands the gradient on.

The gradient is kept on the autograd node, as a saved tensor, in place of student and teacher, which the node does not
keep alive. Backward multiplies it by the upstream gradient: into a new tensor where the graph is kept, else in place,
and not at all where the upstream gradient is 1, which the device decides. So an upstream gradient of any size enters in
float32, and rounds a bfloat16 gradient once more.

Second derivatives come from the formula, for which student and teacher are needed after all: they are remembered
weakly, and a caller who drops them, or changes them in place, is told to ask for two passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from .. import ops

OnePass = bool | str
# What a gradient that waits for its upstream factor may have: float16 would lose small values before a GradScaler's
# factor arrives.
_DTYPES = (torch.float32, torch.bfloat16)


def _fake_scale(grads, upstream):
    return [torch.empty_like(x) for x in grads]


_scale = ops.define("one_pass_scale", "(Tensor[] grads, Tensor upstream) -> Tensor[]", _fake_scale)
_scale_in_place = ops.define(
    "one_pass_scale_", "(Tensor(a!)[] grads, Tensor upstream) -> ()", lambda grads, upstream: None
)

try:  # Private, hence guarded: without it every graph counts as kept. A test covers it.
    _graph_is_kept: Callable[[], bool] = torch._C._autograd._get_current_graph_task_keep_graph
except AttributeError:  # pragma: no cover

    def _graph_is_kept() -> bool:
        return True


def check_one_pass(one_pass: OnePass) -> OnePass:
    """ "auto", True or False."""
    if not isinstance(one_pass, bool) and one_pass != "auto":
        raise ValueError(f"one_pass: expected 'auto', True or False, got {one_pass!r}")
    return one_pass


def _obstacle(op: str, backend: str, students: Sequence[Tensor]) -> str | None:
    """Why a call cannot take the one-pass form, or None."""
    if torch.compiler.is_compiling():
        return "a compiled graph takes two passes"
    if backend not in ops.OPS[op] or not ops.has_kernel(op, backend):
        return f"backend {backend!r} has no one-pass kernel"
    for s in students:
        if s.dtype not in _DTYPES:
            return f"{s.dtype} takes two passes"
    return None


def takes_one_pass(one_pass: OnePass, op: str, backend: str, students: Sequence[Tensor]) -> bool:
    """Whether a call that `backend` serves forms the gradient in its forward.

    Only where a student needs one. RuntimeError where `one_pass` is True and the call cannot.
    """
    if one_pass is False or not torch.is_grad_enabled() or not any(s.requires_grad for s in students):
        return False
    why = _obstacle(op, backend, students)
    if why is not None and one_pass is True:
        raise RuntimeError(f"{op.removesuffix('_one_pass')}: one_pass=True cannot be had: {why}")
    return why is None


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, run, formula, others, *students):
        ctx.wanted = [i for i, needed in enumerate(ctx.needs_input_grad[4:]) if needed]
        loss, grads = run(ctx.wanted)
        ctx.save_for_backward(*grads)
        ctx.backend, ctx.formula = backend, formula
        ctx.inputs = [
            [(TensorWeakRef(x), x._version) for x in side if not x.is_inference()] for side in (students, others)
        ]
        ctx.constants = {i: x for i, x in enumerate(others) if x.is_inference()}
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        found: Sequence[Tensor | None]
        if torch.is_grad_enabled():  # create_graph=True: the formula's gradient can be differentiated again
            students, others = _remembered(ctx)
            found = ops.gradients_of_formula(
                lambda: ctx.formula(students, others), [students[i] for i in ctx.wanted], grad_loss
            )
        else:
            grads = list(ctx.saved_tensors)
            if _graph_is_kept():
                found = _scale[ctx.backend](grads, grad_loss)
            else:
                _scale_in_place[ctx.backend](grads, grad_loss)
                found = grads
        results: list[Tensor | None] = [None] * (len(ctx.needs_input_grad) - 4)
        for i, grad in zip(ctx.wanted, found):
            results[i] = grad
        return (None,) * 4 + tuple(results)


def _remembered(ctx: Any) -> tuple[list[Tensor], list[Tensor]]:
    sides = []
    for side in ctx.inputs:
        alive = [(reference(), version) for reference, version in side]
        if any(x is None or x._version != version for x, version in alive):
            raise RuntimeError(
                "create_graph=True: the one-pass form keeps neither student nor teacher, and one of them is gone or "
                "was changed in place; keep both until backward, or pass one_pass=False"
            )
        sides.append([x for x, _ in alive])
    for i, x in sorted(ctx.constants.items()):
        sides[1].insert(i, x)
    return sides[0], sides[1]


def apply(
    backend: str,
    run: Callable[[list[int]], tuple[Tensor, list[Tensor]]],
    formula: Callable[[list[Tensor], list[Tensor]], Tensor],
    students: Sequence[Tensor],
    others: Sequence[Tensor],
) -> Tensor:
    """The loss of `run`, with its gradients.

    Args:
        run: given the students that need a gradient, by their places, returns the loss and those gradients, which
            nothing else may hold.
        formula: the loss again from students and `others`, differentiable twice. It must hold neither.
        others: teachers, and whatever else of a feature's size the formula needs.
    """
    return _OnePass.apply(backend, run, formula, list(others), *students)
