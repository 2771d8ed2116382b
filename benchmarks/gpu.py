"""Time, floor and memory of providers on a GPU: measure.py's functions with the device's clock.

Inputs rotate over more than three times the L2 cache, so that nothing is read from it that training would not find
there; warm-up is by time; samples of all providers and of the floor alternate in one process. Where launches bound the
time, forward and backward are also replayed from a CUDA graph (`replay`), and the host's part is measured alone. The
clock is the host's where there is no GPU, so that these lines can be tried without one; such times mean nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from judge import tensors
from measure import FEWEST, MODES, MOST, turns
from torch import Tensor
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from harness import Benchmark
    from providers import Provider

WARM_UP = 0.5  # seconds
LAUNCH_BOUND = 2**20  # bytes of inputs up to which launches are what takes the time
MOST_SETS, REPLAYED = 200, 32


class Clock:
    """A mark on the device's own time."""

    def __init__(self) -> None:
        self.mark = torch.cuda.Event(enable_timing=True) if torch.cuda.is_available() else time.perf_counter()
        if torch.cuda.is_available():
            self.mark.record()

    def until(self, other: Clock) -> float:
        """Seconds, after a synchronisation."""
        if torch.cuda.is_available():
            return self.mark.elapsed_time(other.mark) / 1e3
        return other.mark - self.mark


def synchronise() -> None:
    """Waits for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def copy_speed(megabytes: int, rounds: int = 20) -> float:
    """Bytes per second of a copy from device memory to device memory, read and write counted."""
    source = torch.ones(megabytes * 2**20 // 4, device="cuda" if torch.cuda.is_available() else "cpu")
    target = torch.empty_like(source)
    times = []
    for _ in range(rounds + 3):
        begin = Clock()
        target.copy_(source)
        end = Clock()
        synchronise()
        times.append(begin.until(end))
    return 2 * source.numel() * 4 / sorted(times[3:])[rounds // 2]


def size_of(inputs: Sequence[Any]) -> int:
    """Bytes of all tensors."""
    return sum(x.numel() * x.element_size() for x in pytree.tree_leaves(list(inputs)) if isinstance(x, Tensor))


def rotation(benchmark: Benchmark, inputs: Sequence[Any], count: int | None = None) -> list[list[Any]]:
    """The same values in other memory, until three caches' worth has passed by; students are leaves."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size if torch.cuda.is_available() else 0

    def copied(x: Any) -> Any:
        return x.detach().clone() if isinstance(x, Tensor) else x

    count = count or min(MOST_SETS, 3 * cache // max(1, size_of(inputs)) + 2)
    sets = [pytree.tree_map(copied, list(inputs)) for _ in range(count)]
    for one in sets if benchmark.gradient else ():
        for student in tensors(one[0]):
            student.requires_grad_()
    return sets


def _sample(function: Callable[..., Any], inputs: Sequence[Any], gradient: bool) -> dict[str, float]:
    marks = []
    if gradient:
        for student in tensors(inputs[0]):
            student.grad = None
        marks.append(Clock())
        loss = function(*inputs)
        marks.append(Clock())
        loss.backward()
        marks.append(Clock())
        del loss
        for student in tensors(inputs[0]):
            student.grad = None
    with torch.no_grad():
        marks.append(Clock())
        function(*inputs)
        marks.append(Clock())
    synchronise()
    alone = {"no_grad": marks[-2].until(marks[-1])}
    if not gradient:
        return alone
    forward, backward = marks[0].until(marks[1]), marks[1].until(marks[2])
    return {"forward": forward, "backward": backward, "both": marks[0].until(marks[2])} | alone


class Floor:
    """A read of student and teacher and a write of one output of that size; without a gradient, a write of a result."""

    def __init__(self, result: Any):
        self.buffers = [torch.empty_like(x, requires_grad=False) for x in tensors(result)]

    def sample(self, inputs: Sequence[Any], gradient: bool) -> dict[str, float]:
        sides = list(zip(tensors(inputs[0]), tensors(inputs[1]))) if gradient else [() for _ in self.buffers]
        with torch.no_grad():
            begin = Clock()
            for side, buffer in zip(sides, self.buffers, strict=True):
                torch.add(*side, out=buffer) if side else buffer.fill_(1)
            end = Clock()
        synchronise()
        return {"touched": begin.until(end)}


def trial(function: Callable[..., Tensor], inputs: Sequence[Any], rounds: int = 5) -> float:
    """A quick median of forward plus backward: enough to choose between settings of one provider."""
    for student in tensors(inputs[0]):
        student.requires_grad_()
    samples = [_sample(function, inputs, True)["both"] for _ in range(rounds + 3)]
    for student in tensors(inputs[0]):
        student.requires_grad_(False)
    return sorted(samples[3:])[rounds // 2]


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
    sets = rotation(benchmark, inputs)
    floor = Floor(inputs[0] if gradient else providers[0].function(*inputs))
    at = 0

    def one_round(number: int) -> dict[str, dict[str, float]]:
        nonlocal at
        found = {}
        for provider in turns(providers, number):
            provider.prepare()
            at += 1
            found[provider.name] = _sample(provider.function, sets[at % len(sets)], gradient)
        at += 1
        return found | {"floor": floor.sample(sets[at % len(sets)], gradient)}

    say("    warming up")
    begin, warm = time.perf_counter(), 0
    while warm < 3 or time.perf_counter() - begin < WARM_UP:
        last = time.perf_counter()
        one_round(warm)
        took = time.perf_counter() - last
        warm += 1
    rounds = rounds or int(max(FEWEST, min(MOST, seconds / took)))
    say(f"    timing {len(providers)} providers, {rounds} rounds, {len(sets)} copies of the inputs")
    times: dict[str, dict[str, list[float]]] = {p.name: {} for p in providers}
    floor_times: list[float] = []
    for number in range(rounds):
        for name, sample in one_round(number).items():
            if name == "floor":
                floor_times.append(sample["touched"])
            for mode in (m for m in MODES if m in sample):
                times[name].setdefault(mode, []).append(sample[mode])
    if gradient and torch.cuda.is_available() and size_of(inputs) < LAUNCH_BOUND:
        for name, samples in _replays(providers, sets[:REPLAYED], rounds, say).items():
            times[name]["replay"] = samples
    return times, {"touched": floor_times}


def _gradients(function: Callable[..., Tensor], inputs: Sequence[Any]) -> None:
    torch.autograd.grad(function(*inputs), tensors(inputs[0]))


def _captured(function: Callable[..., Tensor], sets: Sequence[Sequence[Any]]) -> torch.cuda.CUDAGraph:
    """Forward and backward on each of the inputs in one graph."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        _gradients(function, sets[0])
        # A call that waits for the device is found here, where it does no harm: in a capture it would.
        torch.cuda.set_sync_debug_mode("error")
        try:
            _gradients(function, sets[0])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for inputs in sets:
            _gradients(function, inputs)
    return graph


def _replays(
    providers: Sequence[Provider], sets: Sequence[Sequence[Any]], rounds: int, say: Callable[[str], None]
) -> dict[str, list[float]]:
    """Seconds of one forward and backward within a replay, for those who can be captured."""
    graphs = {}
    for provider in providers:
        provider.prepare()
        try:
            graphs[provider.name] = _captured(provider.function, sets)
        except Exception as error:  # whatever a peer raises: who cannot be captured has no row of it
            say(f"    {provider.name}: not captured: {type(error).__name__}: {str(error).splitlines()[0][:160]}")
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(rounds + 2):
        for name, graph in graphs.items():
            begin = Clock()
            graph.replay()
            end = Clock()
            synchronise()
            if turn >= 2:
                times[name].append(begin.until(end) / len(sets))
    return times


def host_time(provider: Provider, inputs: Sequence[Any], calls: int = 100) -> float:
    """Seconds that the host needs to launch forward and backward, the device's work not waited for."""
    provider.prepare()
    times = []
    for call in range(calls):
        begin = time.perf_counter()
        _gradients(provider.function, inputs)
        times.append(time.perf_counter() - begin)
        if call % 10 == 9:
            synchronise()
    return sorted(times)[calls // 2]


def forward_memory(benchmark: Benchmark, provider: Provider, inputs: Sequence[Any]) -> dict[str, int | None]:
    """Bytes of one forward with a graph, inputs excluded: peak, and kept for backward; nothing without a GPU."""
    if not torch.cuda.is_available():
        return {"peak": None, "kept": None, "resident": None}
    provider.prepare()
    (one,) = rotation(benchmark, inputs, 1)
    synchronise()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = provider.function(*one)
    synchronise()
    found = {"peak": torch.cuda.max_memory_allocated() - before, "kept": torch.cuda.memory_allocated() - before}
    del result
    return found | {"resident": None}
