"""How many times as fast as the formula each loss is here: a few interleaved rounds of forward and backward.

A ratio for a bug report, of one shape that is neither small nor large, on one thread of a CPU, so that a busy machine
does not spoil it; benchmarks/ has the measurements.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence

import torch

import kdkernels as kd

from .checks import one_thread
from .inputs import LOSSES, PAIRS
from .numbers import leaves
from .targets import Target, widest

ROUNDS, FEWEST = 5, 3
SECONDS = 2.0  # after which the fewest rounds are enough


def _seconds(call: Callable[[], torch.Tensor], device: str) -> float:
    if device == "cpu":  # this thread's own time: what other processes take is nobody's
        begin = time.thread_time()
        call().backward()
        return time.thread_time() - begin
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call().backward()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def ratios(name: str, targets: Sequence[Target]) -> dict[str, float]:
    """By target's label: the formula's median time over the target's, in float32. A target that raises is left out:
    the checks have told.
    """
    found = {}
    for target in widest(targets):
        if target.backend == "reference":
            continue
        with contextlib.suppress(Exception), one_thread():
            found[target.label] = _ratio(name, target)
    return found


def _ratio(name: str, target: Target) -> float:
    loss = LOSSES[name]
    arguments, keywords = loss.middle.inputs(PAIRS["float32"], target.device)
    times: dict[str, list[float]] = {"ours": [], "formula": []}

    def one(function: Callable[..., torch.Tensor]) -> float:
        student = leaves(arguments[0])  # so that each backward allocates its gradient
        return _seconds(lambda: function(student, *arguments[1:], **keywords), target.device)

    begin = time.perf_counter()
    for i in range(1 + ROUNDS):
        with target.in_force():
            ours = one(loss.function)
        with kd.use_backend("reference"):
            formula = one(loss.equals)
        if i:  # the first warms up
            times["ours"].append(ours)
            times["formula"].append(formula)
        if i >= FEWEST and time.perf_counter() - begin > SECONDS:
            break
    ours, formula = (statistics.median(x) for x in times.values())
    return formula / ours
