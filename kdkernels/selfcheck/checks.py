"""The checks: numbers, bits and published values of every loss on every target; the objective against its parts.

A kernel that raises is a failed check, told like any other: nothing here ends the run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import kdkernels as kd

from .golden import CASES, Golden, projection, wave
from .inputs import LOSSES, PAIRS, Case, Loss, Pair, moved
from .numbers import Result, evaluate, exact, faults, formula
from .targets import Target

# The dtypes in which kernels of the CPU and CUDA have a form of one pass beside the one of two.
_ONE_PASS = (torch.float32, torch.bfloat16)


@dataclass
class Tally:
    """How many checks were right, by loss and target's label, and what was wrong, in words."""

    right: dict[tuple[str, str], int] = field(default_factory=dict)
    wrong: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def add(self, loss: str, target: Target, where: str, problems: Callable[[], Sequence[str]]) -> None:
        """Counts one check: right where `problems()` names none and does not raise."""
        key = loss, target.label
        try:
            found = list(problems())
        except Exception as error:  # whatever a broken kernel raises is what is to be told
            found = [f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"]
        if found:
            self.wrong.setdefault(key, []).append(f"{loss} on {target.label}, {where}: {'; '.join(found)}")
        else:
            self.right[key] = self.right.get(key, 0) + 1

    @property
    def passed(self) -> int:
        return sum(self.right.values())

    @property
    def failures(self) -> list[str]:
        return [line for lines in self.wrong.values() for line in lines]


def run(name: str, targets: Sequence[Target], tally: Tally) -> None:
    """All checks of one loss (or of the objective) on the targets."""
    loss = LOSSES[name]
    with _one_thread():  # small inputs: on a busy machine threads that wait for each other take most of the time
        for case in loss.cases:
            for pair_name, pair in PAIRS.items():
                _numbers(name, loss, case, pair_name, pair, targets, tally)
        for golden in CASES:
            if golden.function == f"{name}_loss":
                for target in targets:
                    _published(name, golden, target, tally)
    _numbers(name, loss, loss.middle, "float32", PAIRS["float32"], targets, tally)


def warm(name: str, target: Target) -> None:
    """Runs a loss once in every dtype, so that what a backend compiles on first use is compiled; errors wait."""
    loss = LOSSES[name]
    for case in (*loss.cases, loss.middle):
        for pair in PAIRS.values():
            if target.serves(*pair):
                with contextlib.suppress(Exception), target.in_force():
                    _evaluate(loss, case, pair, target.device, {})


# Numbers and bits.


def _forms(target: Target, pair: Pair) -> dict[str, dict[str, Any]]:
    if target.backend in ("cpu", "cuda") and pair[0] in _ONE_PASS:
        return {"one pass": {}, "two passes": {"one_pass": False}}
    return {"two passes": {}} if target.backend != "reference" else {"formula": {}}


def _numbers(
    name: str, loss: Loss, case: Case, pair_name: str, pair: Pair, targets: Sequence[Target], tally: Tally
) -> None:
    arguments, keywords = case.inputs(pair)
    truth = exact(loss.equals, *arguments, **keywords)
    peers: dict[str, Result] = {}
    for target in targets:
        if not target.serves(*pair):
            continue
        for form, options in _forms(target, pair).items():
            got: list[Result] = []

            def judged() -> list[str]:
                if target.device not in peers:
                    there, more = case.inputs(pair, target.device)
                    peers[target.device] = _home(formula(loss.equals, *there, **more))
                with target.in_force():
                    got.append(_evaluate(loss, case, pair, target.device, options))
                # The formula is no peer of itself: its bound is that of a sum in its dtype.
                peer = None if target.backend == "reference" else peers[target.device]
                return faults(got[0], truth, peer, case.length)

            def same() -> list[str]:
                if not got:
                    return []  # it raised, and was counted
                with target.in_force(), _one_thread():
                    again = _evaluate(loss, case, pair, target.device, options)
                return _differences(got[0], again)

            where = f"{pair_name}, {case.name}, {form}"
            tally.add(name, target, where, judged)
            if target.backend != "reference":  # PyTorch's own operations may add up in another order
                tally.add(name, target, f"{where}, second call with one thread", same)


def _evaluate(loss: Loss, case: Case, pair: Pair, device: str, options: dict[str, Any]) -> Result:
    arguments, keywords = case.inputs(pair, device)
    return _home(evaluate(loss.function, *arguments, **keywords, **options))


def _home(result: Result) -> Result:
    return Result(result.loss.cpu(), [grad.cpu() for grad in result.grads])


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _differences(one: Result, other: Result) -> list[str]:
    pairs = {"loss": (one.loss, other.loss)}
    pairs |= {f"gradient {i}": sides for i, sides in enumerate(zip(one.grads, other.grads))}
    return [f"{what}: other bits than the first time" for what, (a, b) in pairs.items() if not torch.equal(a, b)]


# Published values.


class _On:
    """The public functions for arguments of the CPU, called on another device."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(kd, name)
        return lambda *args, **keywords: function(*moved(args, self.device), **moved(keywords, self.device))


def _published(name: str, golden: Golden, target: Target, tally: Tally) -> None:
    """Loss, largest gradient and its projection, as the tests hold them: 1e-9 in float64, 1e-5 in float32."""
    for pair_name, tolerance in (("float64", 1e-9), ("float32", 1e-5)):
        dtype = PAIRS[pair_name][0]
        if not target.serves(dtype, dtype):
            continue

        def problems() -> list[str]:
            with target.in_force():
                loss, student = golden.loss(_On(target.device), dtype)
                (grad,) = torch.autograd.grad(loss, student)
            terms = (grad.double() * wave(tuple(grad.shape), 1, 0.21, 0.9)).abs().sum().item()
            slack = 4 * torch.finfo(dtype).eps * terms  # a sum of both signs loses what is relative to its terms
            found = {
                "loss": (loss.item(), golden.value, 0.0),
                "largest gradient": (grad.abs().max().item(), golden.largest, 0.0),
                "projected gradient": (projection(grad).item(), golden.projected, slack),
            }
            return [
                f"{what}: {got:.9g}, published {wanted:.9g}, accepted error {max(tolerance * abs(wanted), more):.2e}"
                for what, (got, wanted, more) in found.items()
                if not abs(got - wanted) <= max(tolerance * abs(wanted), more)
            ]

        tally.add(name, target, f"{pair_name}, published value ({golden.name})", problems)
