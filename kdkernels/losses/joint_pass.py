"""Several plans of the objective as one: one autograd node, and one op where the backend has it.

The op `detection_distillation` makes the calls of the single one-pass ops in one, so that a GPU launches once for all
heads, and adds up everything at the end. Its arguments are theirs, packed by their schemas (csrc/torch/packed_calls.h
unpacks): a list as its length and its elements, what may be None as whether it is there.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from . import feature_pass
from .one_pass import Call, Plan

# csrc/torch/detection_distillation_cuda.cpp: Packed. Features come first, and once; before them may come their masks'
# boxes, in which case the features are given no masks.
PACKED = (
    feature_pass.OP,
    "decoupled_kl_one_pass",
    "temperature_kl_one_pass",
    "soft_cross_entropy_one_pass",
    "binary_kl_one_pass",
    "bounded_regression_one_pass",
    feature_pass.DRAW,
)
OP = feature_pass.JOINT
MOST_HEADS = 8  # csrc/cuda/row_sums.h: most_heads
# What the op tells of each call: the features' in the first row, then a row per head.
LOSS, PARTS, TOLD = 0, slice(1, 3), 3

_Packed = tuple[list[Tensor], list[int], list[float]]


@functools.cache
def _kinds(op: str) -> tuple[str, ...]:
    """The types of an op's arguments."""
    return tuple(str(x.type) for x in ops.OPS[op]["cpu"]._schema.arguments)


def _inner(kind: str, of: str) -> str | None:
    return kind[len(of) + 1 : -1] if kind.startswith(f"{of}[") else None


def pack(calls: Sequence[tuple[str, Sequence[Any]]]) -> _Packed:
    """The arguments of these calls, each an op's name and what it is given."""
    packed: _Packed = ([], [], [])
    tensors, integers, numbers = packed

    def put(kind: str, x: Any) -> None:
        if kind == "Tensor":
            tensors.append(x)
        elif kind == "float":
            numbers.append(float(x))
        elif kind in ("int", "bool"):
            integers.append(int(x))
        elif inner := _inner(kind, "Optional"):
            integers.append(int(x is not None))
            if x is not None:
                put(inner, x)
        else:
            integers.append(len(x))
            for element in x:
                put(str(_inner(kind, "List")), element)

    for op, arguments in calls:
        integers.append(PACKED.index(op))
        for kind, x in zip(_kinds(op), arguments, strict=True):
            put(kind, x)
    return packed


def unpack(tensors: Sequence[Tensor], integers: Sequence[int], numbers: Sequence[float]) -> list[tuple[str, list[Any]]]:
    """What `pack` was given."""
    left = {"Tensor": iter(tensors), "int": iter(integers), "float": iter(numbers)}

    def take(kind: str) -> Any:
        if kind in left:
            return next(left[kind])
        if kind == "bool":
            return bool(take("int"))
        if inner := _inner(kind, "Optional"):
            return take(inner) if take("int") else None
        return [take(str(_inner(kind, "List"))) for _ in range(take("int"))]

    calls = []
    for place in left["int"]:
        op = PACKED[place]
        calls.append((op, [take(kind) for kind in _kinds(op)]))
    return calls


def _fake(tensors, integers, numbers):
    grads, heads, levels = [], 0, 0
    for op, arguments in unpack(tensors, integers, numbers):
        if op == feature_pass.DRAW:
            continue
        *_, found = ops.OPS[op]["cpu"](*arguments)
        if op == feature_pass.OP:
            grads, levels = [*grads, *found], len(arguments[0])
        else:
            grads, heads = [*grads, found], heads + 1
    new = functools.partial(tensors[0].new_empty, dtype=torch.float32)
    return new(()), new((heads + 1, TOLD)), new((levels + 1, feature_pass.COLUMNS)), grads


_op = ops.define(OP, "(Tensor[] tensors, int[] integers, float[] numbers) -> (Tensor, Tensor, Tensor, Tensor[])", _fake)


def joined(plans: Sequence[Plan]) -> Plan:
    """Several plans of one backend as one: its loss is their sum."""
    backend = plans[0].backend
    starts = [sum(len(p.students) for p in plans[:i]) for i in range(len(plans) + 1)]
    others = [sum(len(p.others) for p in plans[:i]) for i in range(len(plans) + 1)]
    together = _together(plans) if ops.has_kernel(OP, backend) else []
    if len(plans) == 1 and not together:
        return plans[0]

    def run(wanted):
        of = [[i - start for i in wanted if start <= i < end] for start, end in itertools.pairwise(starts)]
        losses, grads = [], {}
        if together:
            loss, found = _run_together([plans[k] for k in together], [of[k] for k in together])
            losses.append(loss)
            grads |= zip(together, found)
        for k, plan in enumerate(plans):
            if k not in grads:
                loss, grads[k] = plan.computed(of[k])
                losses.append(loss)
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        return loss, [grad for k in range(len(plans)) for grad in grads[k]], {}

    formulas = [plan.formula for plan in plans]

    def formula(students, constants):
        return sum(
            f(students[starts[k] : starts[k + 1]], constants[others[k] : others[k + 1]]) for k, f in enumerate(formulas)
        )

    return Plan(
        backend,
        [s for p in plans for s in p.students],
        [x for p in plans for x in p.others],
        run,
        formula,
        [x for p in plans for x in p.operands],
    )


def _together(plans: Sequence[Plan]) -> list[int]:
    """The places of the plans that the op takes: features once and first, and so many heads."""
    calls = [plan.run.op if isinstance(plan.run, Call) else None for plan in plans]
    heads = [i for i, op in enumerate(calls) if op in PACKED and op != feature_pass.OP]
    features = [i for i, op in enumerate(calls) if op == feature_pass.OP]
    return [*features[:1], *heads[:MOST_HEADS]]


def _run_together(plans: Sequence[Plan], wanted: Sequence[list[int]]) -> tuple[Tensor, list[list[Tensor]]]:
    """Their loss, and the gradients of each; each keeps what it told."""
    calls = [plan.run for plan in plans]
    packed = [one for call, w in zip(calls, wanted) for one in call.calls(w)]
    loss, told, values, grads = _op[plans[0].backend](*pack(packed))
    left, found, row = iter(grads), [], 1
    for plan, call, of_plan in zip(plans, calls, wanted):
        if call.op == feature_pass.OP:
            plan.loss, plan.details = told[0, LOSS], call.told(values)
            found.append([next(left) for _ in of_plan])
        else:
            plan.loss, plan.details = told[row, LOSS], call.told(told[row, PARTS]) if call.told else {}
            grad = next(left)
            found.append([grad for _ in of_plan])
            row += 1
    return loss, found
