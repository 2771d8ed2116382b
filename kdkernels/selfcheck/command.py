"""What `python -m kdkernels info --check` prints, and its exit status."""

from __future__ import annotations

import time
from collections.abc import Sequence

from . import checks, facts, speed, targets
from .inputs import LOSSES
from .targets import Target

_TOLD = 12  # failures that are printed; a kernel that is broken fails in every dtype

_RIGHT = """\
Right is: an error against the float64 formula of at most twice the same-dtype formula's plus 4 eps, for the loss and
each gradient (float64: 1e-9; the formula itself: 4 eps times the root of the number of values); for kernels, the same
bits when called again on one thread; the published values; for masks from boxes, PyTorch's own; for the objective, the
sum of the single functions."""


def _say(line: str = "") -> None:
    print(line, flush=True)


def check(names: Sequence[str] = (), *, timed: bool = True) -> int:
    """Checks the losses named (none: all) on every backend that is here; returns the exit status, 1 if one is wrong."""
    chosen = [name for name in LOSSES if not names or name in names]
    _say("Self-test. Kernels that are not built yet are built first, which the time below does not count.")
    here, absent = targets.find()
    for target in here:
        if target.backend == "triton":  # compiled for each dtype on first use
            for name in chosen:
                _say(f"  {name}: Triton compiles its kernels")
                checks.warm(name, target)
    _say(f"Backends: {', '.join(target.label for target in here)}.")
    for name, why in absent.items():
        _say(f"Not here: {name}: {why}.")
    _say(_RIGHT)
    begin = time.perf_counter()
    tally, times = checks.Tally(), {}
    for i, name in enumerate(chosen):
        start, right, wrong = time.perf_counter(), tally.passed, len(tally.failures)
        checks.run(name, here, tally)
        if timed:
            times[name] = speed.ratios(name, here)
        told = f"{tally.passed - right} right, {len(tally.failures) - wrong} wrong"
        _say(f"  {i + 1} of {len(chosen)}: {name}: {told}, {time.perf_counter() - start:.1f} s")
    seconds = time.perf_counter() - begin
    _say()
    _say(_table(chosen, here, tally, times))
    for failure in tally.failures[:_TOLD]:
        _say(f"WRONG: {failure}")
    if len(tally.failures) > _TOLD:
        _say(f"and {len(tally.failures) - _TOLD} more")
    _say()
    _say("For a bug report, this line:")
    _say(f"{facts.line(here, absent)} | {_verdict(names, tally)} | {seconds:.1f} s")
    return 1 if tally.failures else 0


def _verdict(names: Sequence[str], tally: checks.Tally) -> str:
    of = f"{', '.join(names)}: " if names else ""
    where = sorted(f"{loss} on {label}" for loss, label in tally.wrong)
    return f"{of}{tally.passed} checks right, {len(tally.failures)} wrong" + (f" ({', '.join(where)})" if where else "")


def _table(
    names: Sequence[str], here: Sequence[Target], tally: checks.Tally, times: dict[str, dict[str, float]]
) -> str:
    labels = [target.label for target in here]
    timed = [label for label in labels if any(label in found for found in times.values())]
    rows = [["checks right / wrong", *labels, *(f"{label}, x formula" for label in timed)]]
    for name in names:
        counts = ((tally.right.get((name, label), 0), len(tally.wrong.get((name, label), []))) for label in labels)
        ratios = (times.get(name, {}).get(label) for label in timed)
        rows.append(
            [name, *(f"{a} / {b}" for a, b in counts), *("-" if ratio is None else f"{ratio:.3g}" for ratio in ratios)]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(x.ljust(w) for x, w in zip(row, widths)).rstrip() for row in rows]
    if timed:
        lines.append(
            "x formula: how many times as fast as the PyTorch formula, both ways, float32, one thread, one shape."
        )
    return "\n".join(lines)
