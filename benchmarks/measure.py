"""Time, floors and memory of providers on the CPU: what is measured there, and how (on a GPU: gpu.py).

One sample of a provider is a forward with a graph, its backward, and a forward without a graph; forward plus backward
("both") is the same clock read across the two, not a sum of medians. Samples of all providers and both floors
alternate in one process, so that a slow minute of the machine falls on everybody. Inputs are hot or cold as the machine
leaves them after the other providers have run; logits and features are hot in training, too.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import random
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from judge import leaf, tensors
from torch import Tensor

if TYPE_CHECKING:
    from harness import Benchmark
    from providers import Provider

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own lines would bury the progress
MODES = ("forward", "backward", "both", "no_grad")
FLOORS = ("touched", "fresh")
FEWEST, MOST = 9, 200


def _clear(student: Any) -> None:
    for x in tensors(student):
        x.grad = None


def _call(function: Callable[..., Any], inputs: Sequence[Any]) -> float:
    with torch.no_grad():
        start = time.perf_counter()
        result = function(*inputs)
        stop = time.perf_counter()
    del result
    return stop - start


def _sample(
    function: Callable[..., Any], student: Any, constants: Sequence[Any], gradient: bool = True
) -> dict[str, float]:
    if not gradient:
        return {"no_grad": _call(function, [student, *constants])}
    _clear(student)  # so that each backward allocates its gradient, as after zero_grad(set_to_none=True)
    begin = time.perf_counter()
    loss = function(student, *constants)
    middle = time.perf_counter()
    loss.backward()
    end = time.perf_counter()
    del loss
    _clear(student)
    alone = _call(function, [student, *constants])
    return {"forward": middle - begin, "backward": end - middle, "both": end - begin, "no_grad": alone}


def _words(x: Tensor) -> Tensor:
    """The bytes of a tensor as integers: moved without arithmetic that a dtype could slow down."""
    flat = x.detach().reshape(-1)
    return flat.view(torch.int32 if flat.numel() * flat.element_size() % 4 == 0 else torch.uint8)


class Floors:
    """A read of student and teacher and a write of one output of that size: into touched memory, and into new pages.

    For what has no gradient, a write of its result alone.
    """

    def __init__(self, student: Any, teacher: Any = None):
        self.sides = [[_words(s)] for s in tensors(student)]
        for side, t in zip(self.sides, tensors(teacher), strict=True) if teacher is not None else ():
            side.append(_words(t))
        self.buffers = [torch.zeros_like(s[0]) for s in self.sides]

    @staticmethod
    def _write(side: Sequence[Tensor], out: Tensor) -> Tensor:
        return torch.bitwise_xor(*side, out=out) if len(side) == 2 else out.fill_(1)

    def sample(self) -> dict[str, float]:
        begin = time.perf_counter()
        for side, buffer in zip(self.sides, self.buffers):
            self._write(side, buffer)
        middle = time.perf_counter()
        kept = []  # until all are written, as gradients are
        for side in self.sides:
            # Mapped by hand: an allocator might give back pages that were touched before.
            pages = mmap.mmap(-1, max(1, side[0].numel() * side[0].element_size()))
            kept.append(self._write(side, torch.frombuffer(pages, dtype=side[0].dtype)))
        end = time.perf_counter()
        return {"touched": middle - begin, "fresh": end - middle}


def copy_speed(megabytes: int, rounds: int = 9) -> float:
    """Bytes per second of a copy into touched memory, read and write counted."""
    source = torch.ones(megabytes * 2**20 // 4)
    target = torch.ones_like(source)
    times = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - begin)
    return 2 * source.numel() * 4 / sorted(times[1:])[rounds // 2]


def trial(function: Callable[..., Tensor], inputs: Sequence[Any], rounds: int = 5) -> float:
    """A quick median of forward plus backward: enough to choose between settings of one provider."""
    student = leaf(inputs[0])
    samples = [_sample(function, student, inputs[1:])["both"] for _ in range(rounds + 1)]
    return sorted(samples[1:])[rounds // 2]


def turns(providers: Sequence[Provider], number: int) -> list[Provider]:
    """The order of a round: drawn by its number. Whoever comes after one that has just given back gigabytes pays for
    fresh pages; in a fixed order, turned or not, that would always be the same one.
    """
    return random.Random(number).sample(list(providers), len(providers))


def interleaved(
    benchmark: Benchmark,
    providers: Sequence[Provider],
    inputs: Sequence[Any],
    rounds: int | None,
    seconds: float,
    say: Callable[[str], None],
) -> tuple[dict[str, dict[str, list[float]]], dict[str, list[float]]]:
    """Seconds per provider and mode, and per floor: as many rounds as asked for, or as fit into `seconds`."""
    gradient = benchmark.gradient
    student = leaf(inputs[0]) if gradient else inputs[0]
    floors = Floors(inputs[0], inputs[1]) if gradient else Floors(providers[0].function(*inputs))

    def one_round(number: int) -> dict[str, dict[str, float]]:
        found = {}
        for provider in turns(providers, number):
            provider.prepare()
            found[provider.name] = _sample(provider.function, student, inputs[1:], gradient)
        return found | {"floor": floors.sample()}

    say("    warming up")
    for number in range(2):
        begin = time.perf_counter()
        one_round(number)
        took = time.perf_counter() - begin
    rounds = rounds or int(max(FEWEST, min(MOST, seconds / took)))
    say(f"    timing {len(providers)} providers, {rounds} rounds, about {rounds * took:.0f} s")
    modes = MODES if gradient else MODES[-1:]
    times: dict[str, dict[str, list[float]]] = {p.name: {mode: [] for mode in modes} for p in providers}
    floor_times: dict[str, list[float]] = {name: [] for name in FLOORS}
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            for name, sample in one_round(number).items():
                into = floor_times if name == "floor" else times[name]
                for mode, value in sample.items():
                    into[mode].append(value)
    finally:
        gc.enable()
    return times, floor_times


def _allocated(function: Callable[[], object]) -> tuple[int, int]:
    """Bytes from PyTorch's allocator while `function` runs: the most at any moment, and what its result still holds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    del result
    return peak, now


def _resident_peak() -> int | None:
    try:
        with open("/proc/self/status") as status:
            fields = dict(line.split(":", 1) for line in status)
        return int(fields["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _resident_growth(function: Callable[[], object]) -> int | None:
    """How far the process grew beyond what it had: sees scratch memory that is not PyTorch's. Linux only."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # free memory is handed back, so that using it again shows
        with open("/proc/self/clear_refs", "w") as marks:
            marks.write("5")
    except (OSError, AttributeError):
        return None
    before = _resident_peak()
    result = function()
    after = _resident_peak()
    del result
    return None if before is None or after is None else after - before


def forward_memory(benchmark: Benchmark, provider: Provider, inputs: Sequence[Any]) -> dict[str, int | None]:
    """Bytes of one forward with a graph, inputs excluded: peak, kept for backward, and the growth of the process."""
    provider.prepare()
    student = leaf(inputs[0]) if benchmark.gradient else inputs[0]

    def forward() -> Any:
        return provider.function(student, *inputs[1:])

    forward()
    peak, kept = _allocated(forward)
    return {"peak": peak, "kept": kept, "resident": _resident_growth(forward)}
