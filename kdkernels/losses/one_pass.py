"""The one-pass form of a loss: the forward computes loss and gradient together, and backward hands the gradient on.

The gradient is kept on the autograd node, as a saved tensor, in place of student and teacher, which the node does not
keep alive. Backward multiplies it by the upstream gradient: into a new tensor where the graph is kept, else in place,
and not at all where the upstream gradient is 1, which the device decides. So an upstream gradient of any size enters in
float32, and rounds a bfloat16 gradient once more.

Second derivatives come from the formula, for which student and teacher are needed after all: they are remembered
weakly, and a caller who drops them, or changes them in place, is told to ask for two passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
    """One of "auto", True and False."""
    if not isinstance(one_pass, bool) and one_pass != "auto":
        raise ValueError(f"one_pass: expected 'auto', True or False, got {one_pass!r}")
    return one_pass


def _obstacle(op: str, backend: str, students: Sequence[Tensor]) -> str | None:
    """Why a call cannot take the one-pass form, or None."""
    if torch.compiler.is_compiling():
        return "a compiled graph takes two passes"
    if not ops.has_kernel(op, backend):
        return f"backend {backend!r} has no one-pass kernel"
    for s in students:
        if s.dtype not in _DTYPES:
            return f"{s.dtype} takes two passes"
    return None


def takes_one_pass(
    one_pass: OnePass, op: str, backend: str, students: Sequence[Tensor], loss: str | None = None
) -> bool:
    """Whether a call of `loss` that `backend` serves forms the gradient in its forward, by `op`.

    Only where a student needs one. RuntimeError where `one_pass` is True and the call cannot.
    """
    if one_pass is False or not torch.is_grad_enabled() or not any(s.requires_grad for s in students):
        return False
    why = _obstacle(op, backend, students)
    if why is not None and one_pass is True:
        raise RuntimeError(f"{loss or op.removesuffix('_one_pass')}: one_pass=True cannot be had: {why}")
    return why is None


@dataclass(frozen=True)
class Call:
    """What a plan runs: one call of a one-pass op. The objective may pack several into one (joint_pass.py).

    arguments: given the students that need a gradient, by their places, the op's arguments.
    told: what the objective tells apart, from the op's results between the loss and the gradients.
    packed: the calls, each an op's name and its arguments, that stand for this one where several are packed, if it is
        not itself.
    """

    op: str
    backend: str
    arguments: Callable[[list[int]], Sequence[Any]]
    told: Callable[[Tensor], dict[str, Tensor]] | None = None
    packed: Callable[[list[int]], list[tuple[str, Sequence[Any]]]] | None = None

    def calls(self, wanted: list[int]) -> list[tuple[str, Sequence[Any]]]:
        """What to pack."""
        return self.packed(wanted) if self.packed else [(self.op, self.arguments(wanted))]

    def __call__(self, wanted: list[int]) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
        loss, *values, grads = ops.OPS[self.op][self.backend](*self.arguments(wanted))
        grads = [grads for _ in wanted] if isinstance(grads, Tensor) else list(grads)
        return loss, grads, self.told(*values) if self.told else {}


@dataclass
class Plan:
    """A call that is to take the one-pass form: `value` runs it, and the objective runs several as one node.

    run: given the students that need a gradient, by their places, returns the loss and those gradients, which nothing
        else may hold, and the values that the objective tells apart.
    formula: the loss again from students and `others`, differentiable twice. It must hold neither.
    others: teachers, and whatever else of a feature's size the formula needs.
    operands: the small tensors that the formula holds, and copies of students and others that nobody else keeps. A
        change of one in place is noticed, as with saved tensors.
    loss, details: what `run` found and told apart, once it ran; without a graph.
    """

    backend: str
    students: Sequence[Tensor]
    others: Sequence[Tensor]
    run: Call | Callable[[list[int]], tuple[Tensor, list[Tensor], dict[str, Tensor]]]
    formula: Callable[[list[Tensor], list[Tensor]], Tensor]
    operands: Sequence[Tensor] = ()
    loss: Tensor | None = None
    details: dict[str, Tensor] = field(default_factory=dict)

    def computed(self, wanted: list[int]) -> tuple[Tensor, list[Tensor]]:
        """Runs it, and keeps what it told."""
        self.loss, grads, self.details = self.run(wanted)
        return self.loss, grads


def value(result: Tensor | Plan) -> Tensor:
    """The loss itself, with its graph; runs what is still a plan."""
    if isinstance(result, Tensor):
        return result
    return _OnePass.apply(result, *result.students)


def foldable(loss_weight: Any, student: Tensor) -> bool:
    """Whether a loss weight may enter the forward. Otherwise it multiplies the loss: if it asks for a gradient, say."""
    if isinstance(loss_weight, Tensor):
        return (
            loss_weight.dim() == 0
            and loss_weight.dtype.is_floating_point
            and loss_weight.device == student.device
            and not loss_weight.requires_grad
        )
    return isinstance(loss_weight, (int, float))


def scaled(loss: Tensor, loss_weight: Any) -> Tensor:
    """A loss of two passes times its weight."""
    if isinstance(loss_weight, Tensor):
        if not torch.compiler.is_compiling() and loss_weight.is_inference():
            loss_weight = loss_weight.clone()  # autograd cannot save a tensor of inference mode
        return loss * loss_weight.to(loss.dtype)  # a wider weight does not widen the loss
    return loss if loss_weight == 1 else loss_weight * loss


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, *students):
        ctx.wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        loss, grads = plan.computed(ctx.wanted)
        ctx.save_for_backward(*grads)
        ctx.backend, ctx.formula = plan.backend, plan.formula
        ctx.inputs = [[_Remembered(x) for x in side] for side in (students, plan.others)]
        ctx.operands = [(x, None if x.is_inference() else x._version) for x in plan.operands]
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        found: Sequence[Tensor | None]
        if torch.is_grad_enabled():  # create_graph=True: the formula's gradient can be differentiated again
            students, others = _remembered(ctx)
            students = ops.apart(students)
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
        results: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for i, grad in zip(ctx.wanted, found):
            results[1 + i] = grad
        return tuple(results)


class _Remembered:
    """A tensor that is not kept alive, with the version that the forward saw. Inference tensors, which have none and
    are constants, are kept.
    """

    def __init__(self, x: Tensor) -> None:
        self.constant = x if x.is_inference() else None
        self.reference, self.version = (None, None) if x.is_inference() else (TensorWeakRef(x), x._version)

    def get(self) -> Tensor | None:
        """The tensor, if it is still there and as it was."""
        if self.reference is None:
            return self.constant
        x = self.reference()
        return None if x is None or x._version != self.version else x


def _remembered(ctx: Any) -> list[list[Tensor]]:
    sides = [[x.get() for x in side] for side in ctx.inputs]
    if any(x is None for side in sides for x in side):
        raise RuntimeError(
            "create_graph=True: the one-pass form keeps neither student nor teacher, and one of them is gone or "
            "was changed in place; keep both until backward, or pass one_pass=False"
        )
    if any(version is not None and x._version != version for x, version in ctx.operands):
        raise RuntimeError("create_graph=True: a mask, a weight or another operand of the loss was changed in place")
    return sides
