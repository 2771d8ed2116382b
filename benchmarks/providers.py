"""Who is compared: ours on each backend and instruction set, the formulas as users copy them, torch.compile, Liger.

Each function here gives the providers of one kind that this machine can run. One that cannot run is named in a line
and left out; whether its numbers are right is judged elsewhere (judge.py), before anything is timed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

try:
    import kdkernels
except ImportError:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import kdkernels
from kdkernels import native

if TYPE_CHECKING:
    from harness import Benchmark

KINDS = ("ours", "eager", "compiled", "liger")
COMPILE_MODES = ("default", "max-autotune-no-cudagraphs")
GPU_BACKENDS = ("cuda", "triton")


@dataclass(frozen=True)
class Provider:
    """Somebody who computes the loss: `kind` is one of KINDS, `setting` a backend, capability, origin or mode."""

    kind: str
    setting: str
    function: Callable[..., Any]
    prepare: Callable[[], object] = lambda: None

    @property
    def name(self) -> str:
        return f"{self.kind} {self.setting}".strip()


def say(line: str) -> None:
    """Progress, to stderr, so that a long run is not silent and the table stays clean."""
    print(f"bench: {line}", file=sys.stderr, flush=True)


def _on(backend: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*inputs: Any) -> Any:
        with kdkernels.use_backend(backend):
            return function(*inputs)

    return call


def ours(benchmark: Benchmark, device: str, every: bool = True) -> Iterator[Provider]:
    """Ours at each capability of the CPU, or on each backend of the GPU; with `every`, the variants, too."""
    variants = benchmark.variants if every else {}
    if device == "cuda":
        for backend in GPU_BACKENDS if every else GPU_BACKENDS[:1]:
            yield Provider("ours", backend, _on(backend, benchmark.ours))
            for variant, function in variants.items():
                yield Provider("ours", f"{backend}, {variant}", _on(backend, function))
    elif not native.load("cpu"):
        # Timing the formula under our name would be a lie.
        say(f"{benchmark.loss}: no compiled kernels ({native.status('cpu').reason}), so ours is left out")
    else:
        known, best = native.CAPABILITIES, native.best_cpu_capability()
        for name in reversed(known[: known.index(best) + 1]) if every else [best]:
            lower = lambda name=name: native.set_cpu_capability(name)  # noqa: E731
            yield Provider("ours", name, _on("cpu", benchmark.ours), lower)
            for variant, function in variants.items() if name == best else ():
                yield Provider("ours", f"{name}, {variant}", _on("cpu", function), lower)


def eager(benchmark: Benchmark, every: bool = True) -> Iterator[Provider]:
    """The formula, first the one that all ratios refer to; with `every`, other published forms, too."""
    yield Provider("eager", "", benchmark.eager)
    for name, function in benchmark.peers.items() if every else ():
        yield Provider("eager", name, function)


def compiled(
    benchmark: Benchmark,
    modes: Sequence[str],
    accepts: Callable[[Provider], bool],
    trial: Callable[[Provider], float],
) -> Provider | None:
    """torch.compile of the eager formula, at the faster of its settings."""
    import torch._inductor.config as inductor

    if benchmark.compiling is None:
        return None
    inductor.cpp.threads = torch.get_num_threads()  # part of its cache key, which the thread count alone is not

    def of(mode: str) -> Provider:
        torch._dynamo.reset()  # an earlier shape would turn this one dynamic, and slower
        whole = benchmark.compiling(lambda f: torch.compile(f, mode=mode, dynamic=False), benchmark.eager)
        return Provider("compiled", mode, whole)

    best: tuple[float, Provider] | None = None
    for mode in modes:
        say(f"    compiling, mode {mode}")
        provider = of(mode)
        if not accepts(provider):
            continue
        took = trial(provider) if len(modes) > 1 else 0.0
        if best is None or took < best[0]:
            best = took, provider
    if best is None or best[1].setting == modes[-1]:
        return best and best[1]
    return of(best[1].setting)


def liger(benchmark: Benchmark, device: str) -> Iterator[Provider]:
    """Liger's kernel of the same loss, where there is one, with what must be added to start from raw logits."""
    if benchmark.liger is None:
        return
    if device != "cuda":
        say(f"{benchmark.loss}: Liger's kernels are Triton's and need a GPU: left out")
        return
    try:
        yield Provider("liger", "", benchmark.liger())
    except ImportError as error:
        say(f"{benchmark.loss}: Liger is left out: {error} (pip install liger-kernel)")
