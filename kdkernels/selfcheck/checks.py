"""The checks: numbers, bits and published values of every loss on every target, with masked MSE the masks from boxes;
the objective against its parts.

A kernel that raises is a failed check, told like any other: nothing here ends the run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

import kdkernels as kd

from .golden import CASES, Golden, projection, wave
from .inputs import LOSSES, PAIRS, Call, Case, Loss, Pair, boxes, moved
from .numbers import Result, evaluate, exact, faults, formula
from .targets import Target, widest

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
    with one_thread():
        for case in loss.cases:
            for pair_name, pair in PAIRS.items():
                _numbers(name, loss, case, pair_name, pair, targets, tally)
        for golden in CASES:
            if golden.function == f"{name}_loss":
                for target in targets:
                    _published(name, golden, target, tally)
        for target in targets if name == "masked_mse" else ():
            if target.backend != "reference":
                for kind in ("ground_truth_masks", "gaussian_masks"):
                    tally.add(name, target, f"{kind} from boxes", partial(_masks, kind, target))
    # Shared among threads, which all instruction sets do alike.
    _numbers(name, loss, loss.middle, "float32", PAIRS["float32"], widest(targets), tally)


def warm(name: str, target: Target) -> None:
    """Runs a loss once in every dtype, so that what a backend compiles on first use is compiled; errors wait."""
    loss = LOSSES[name]
    for case in (*loss.cases, loss.middle):
        for pair in PAIRS.values():
            if target.serves(*pair):
                with contextlib.suppress(Exception):
                    _Call(loss, target, *case.inputs(pair, target.device))()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch's operations and the CPU kernels run on one thread inside: on a busy machine threads that wait for each
    other take most of the time of small calls.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Numbers and bits.


@dataclass(frozen=True)
class _Call:
    """One call of a loss on one target, in one of its forms."""

    loss: Loss
    target: Target
    arguments: list[Any]
    keywords: dict[str, Any]

    def __call__(self, **options: Any) -> Result:
        with self.target.in_force():
            return _home(evaluate(self.loss.function, *self.arguments, **self.keywords, **options))


def _forms(target: Target, pair: Pair) -> dict[str, dict[str, Any]]:
    if target.backend in ("cpu", "cuda") and pair[0] in _ONE_PASS:
        return {"one pass": {}, "two passes": {"one_pass": False}}
    return {"two passes": {}} if target.backend != "reference" else {"formula": {}}


def _numbers(
    name: str, loss: Loss, case: Case, pair_name: str, pair: Pair, targets: Sequence[Target], tally: Tally
) -> None:
    """Every target on one input: built once, for a device once more, as are the exact answer and the formula's."""
    serving = [target for target in targets if target.serves(*pair)]
    inputs: dict[str, Call] = {}
    peers: dict[str, Result] = {}
    lost: dict[str, Exception] = {}
    with one_thread():
        arguments, keywords = case.inputs(pair)
        truth = exact(loss.equals, *arguments, **keywords)
        for device in dict.fromkeys(target.device for target in serving):
            try:
                inputs[device] = there, more = moved(arguments, device), moved(keywords, device)
                peers[device] = _home(formula(loss.equals, *there, **more))
            except Exception as error:  # a GPU without memory, or that a kernel before has stopped
                lost[device] = error
    for target in serving:
        if target.device in lost:
            tally.add(name, target, f"{pair_name}, {case.name}, the formula", partial(_raise, lost[target.device]))
            continue
        call = _Call(loss, target, *inputs[target.device])
        # The formula is no peer of itself: its bound is that of a sum in its dtype.
        peer = None if target.backend == "reference" else peers[target.device]
        for form, options in _forms(target, pair).items():
            got: list[Result] = []
            where = f"{pair_name}, {case.name}, {form}"
            tally.add(name, target, where, partial(_judged, call, options, truth, peer, case.length, got))
            if got and peer is not None:  # PyTorch's own operations may add up in another order
                again = partial(_again, call, options, got[0])
                tally.add(name, target, f"{where}, second call with one thread", again)


def _raise(error: Exception) -> list[str]:
    raise error


def _judged(
    call: _Call, options: dict[str, Any], truth: Result, peer: Result | None, length: int, got: list[Result]
) -> list[str]:
    """Runs a call, keeps its result in `got`, and judges it."""
    with contextlib.nullcontext() if peer else one_thread():  # threads are for what kernels do with them
        got.append(call(**options))
    return faults(got[0], truth, peer, length)


def _again(call: _Call, options: dict[str, Any], first: Result) -> list[str]:
    with one_thread():
        again = call(**options)
    pairs = {"loss": (first.loss, again.loss)}
    pairs |= {f"gradient {i}": sides for i, sides in enumerate(zip(first.grads, again.grads))}
    return [f"{what}: other bits than the first time" for what, (a, b) in pairs.items() if not torch.equal(a, b)]


def _home(result: Result) -> Result:
    return Result(result.loss.cpu(), [grad.cpu() for grad in result.grads])


# Masks, which a loss of their own would not show: a wrong cell changes a loss by little.


def _masks(kind: str, target: Target) -> list[str]:
    """Cells that are drawn unlike PyTorch's: ground truth to the bit, Gaussians to 4 eps."""
    rows, keywords = boxes()
    draw = getattr(kd.masks, kind)
    with kd.use_backend("reference"):
        wanted = draw(rows, **keywords)
    with target.in_force():
        found = draw(rows.to(target.device), **keywords)
    accepted = 0 if kind == "ground_truth_masks" else 4 * torch.finfo(torch.float32).eps
    return [
        f"level {k}: {wrong} of {want.numel()} cells"
        for k, (got, want) in enumerate(zip(found, wanted, strict=True))
        if (wrong := int((~((got.cpu() - want).abs() <= accepted)).sum()))
    ]


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
        if target.serves(dtype, dtype):
            where = f"{pair_name}, published value ({golden.name})"
            tally.add(name, target, where, partial(_distances, golden, target, dtype, tolerance))


def _distances(golden: Golden, target: Target, dtype: torch.dtype, tolerance: float) -> list[str]:
    with target.in_force():
        loss, student = golden.loss(_On(target.device), dtype)
        (grad,) = torch.autograd.grad(loss, student)
    # The projection sums terms of both signs: what it can lose is relative to the terms, not to what is left of them.
    terms = (grad.double() * wave(tuple(grad.shape), 1, 0.21, 0.9)).abs().sum().item()
    found = []
    for what, got, wanted, slack in (
        ("loss", loss.item(), golden.value, 0.0),
        ("largest gradient", grad.abs().max().item(), golden.largest, 0.0),
        ("projected gradient", projection(grad).item(), golden.projected, 4 * torch.finfo(dtype).eps * terms),
    ):
        accepted = max(tolerance * abs(wanted), slack)
        if not abs(got - wanted) <= accepted:
            found.append(f"{what}: error {abs(got - wanted):.2e}, accepted {accepted:.2e}, published {wanted:.9g}")
    return found
