"""The one harness under every benchmark: what a benchmark is, who is compared, and the run from tests to table.

A script states a loss (inputs, our call, the formula as users copy it, shapes) as a `Benchmark` and calls `main`. For
each shape and dtype every provider is first held against float64; only providers whose numbers are right are timed,
interleaved in one process with the two floors. Command-line options, the gate on tests and the order of a run live
here; how time and memory are measured in measure.py, how numbers are judged in judge.py, where rows go in report.py.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import measure
import report
import torch
from judge import Judge, tensors
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
try:
    import kdkernels
except ImportError:  # a checkout that is not installed
    sys.path.insert(0, str(ROOT))
    import kdkernels
from kdkernels import native  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COMPILE_MODES = ("default", "max-autotune-no-cudagraphs")
PROVIDERS = ("ours", "eager", "compiled")


@dataclass(frozen=True)
class Benchmark:
    """One loss to be timed.

    `inputs(shape, dtype, generator)` gives the student and then the constants; `ours` and `eager` take them in that
    order and return the same number. Student and teacher may be lists of tensors. `reads` counts the tensors of the
    student's size that the forward must read. `variants` are other ways of ours, at the widest capability alone.
    """

    loss: str
    inputs: Callable[[Sequence[int], torch.dtype, torch.Generator], tuple[Any, ...]]
    ours: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    shapes: Sequence[tuple[int, ...]]
    quick_shape: tuple[int, ...]
    reads: int = 2
    tests: str = ""  # test_<tests>.py, if not named after the loss
    variants: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Provider:
    """Somebody who computes the loss: `kind` is one of PROVIDERS, `setting` a capability or a compile mode."""

    kind: str
    setting: str
    function: Callable[..., Tensor]
    prepare: Callable[[], object] = lambda: None

    @property
    def name(self) -> str:
        return f"{self.kind} {self.setting}".strip()


def say(line: str) -> None:
    """Progress, to stderr, so that a long run is not silent and the table stays clean."""
    print(f"bench: {line}", file=sys.stderr, flush=True)


def tests_are_green(loss: str, tests: Path = ROOT / "tests") -> bool:
    """Runs the tests of a loss in a process of their own; what was said is shown on red."""
    file = tests / f"test_{loss}.py"
    if not file.exists():
        say(f"{loss}: no {file.name} here, so it is timed untested")
        return True
    say(f"{loss}: running {file.name}")
    package = str(Path(kdkernels.__file__).resolve().parents[1])  # test what is timed
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(file), "-x", "-q"],
        cwd=tests.parent,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        say(f"{loss}: its tests are red, so nothing is timed\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
    return done.returncode == 0


def _ours(benchmark: Benchmark) -> Iterator[Provider]:
    if not native.load("cpu"):
        # Timing the formula under our name would be a lie.
        say(f"{benchmark.loss}: no compiled kernels ({native.status('cpu').reason}), so ours is left out")
        return

    def on_the_cpu(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*inputs: Any) -> Tensor:
            with kdkernels.use_backend("cpu"):
                return function(*inputs)

        return call

    known, best = native.CAPABILITIES, native.best_cpu_capability()
    for name in reversed(known[: known.index(best) + 1]):
        yield Provider("ours", name, on_the_cpu(benchmark.ours), lambda name=name: native.set_cpu_capability(name))
        if name == best:
            for variant, function in benchmark.variants.items():
                setting = f"{name}, {variant}"
                yield Provider("ours", setting, on_the_cpu(function), lambda: native.set_cpu_capability(best))


def _compiled(benchmark: Benchmark, inputs: Sequence[Tensor], judge: Judge, modes: Sequence[str]) -> Provider | None:
    """torch.compile of the eager formula, at the faster of its settings."""
    import torch._inductor.config as inductor

    inductor.cpp.threads = torch.get_num_threads()  # part of its cache key, which the thread count alone is not
    best: tuple[float, Provider] | None = None
    for mode in modes:
        torch._dynamo.reset()  # an earlier shape would turn this one dynamic, and slower
        function = torch.compile(benchmark.eager, mode=mode, dynamic=False)
        provider = Provider("compiled", mode, function)
        say(f"    compiling, mode {mode}")
        try:
            accepted = judge.accepts(provider.name, function, inputs)
            trial = measure.trial(function, inputs) if accepted else None
        except Exception as error:  # whatever the compiler raises: a peer that cannot run must not stop the run
            say(f"    {provider.name}: not timed: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
            continue
        if trial is not None and (best is None or trial < best[0]):
            best = trial, provider
    if best is None:
        return None
    if len(modes) > 1 and best[1].setting != modes[-1]:
        torch._dynamo.reset()
        function = torch.compile(benchmark.eager, mode=best[1].setting, dynamic=False)
        return Provider("compiled", best[1].setting, function)
    return best[1]


def run_case(
    benchmark: Benchmark, shape: Sequence[int], dtype: torch.dtype, options: argparse.Namespace
) -> tuple[list[dict], bool]:
    """Rows of one shape and dtype, and whether every provider's numbers were right."""
    generator = torch.Generator().manual_seed(0)
    inputs = benchmark.inputs(shape, dtype, generator)
    judge = Judge(benchmark.eager, inputs)
    providers = []
    if "ours" in options.providers:
        providers += [p for p in _ours(benchmark) if judge.accepts(p.name, p.function, inputs, p.prepare, ours=True)]
    if "eager" in options.providers:
        eager = Provider("eager", "", benchmark.eager)
        providers += [eager] if judge.accepts(eager.name, eager.function, inputs) else []
    if "compiled" in options.providers:
        compiled = _compiled(benchmark, inputs, judge, COMPILE_MODES[:1] if options.quick else COMPILE_MODES)
        providers += [compiled] if compiled else []
    for refusal in judge.refusals:
        say(f"    REFUSED {refusal}")
    if not providers:
        return [], not judge.refusals
    times, floors = measure.interleaved(providers, inputs, options.rounds, options.seconds, say)
    memory = {p.name: measure.forward_memory(p, inputs) for p in providers}
    elements = sum(x.numel() for x in tensors(inputs[0]))
    return report.rows(
        benchmark, shape, dtype, elements, providers, times, floors, memory, judge.errors
    ), not judge.refusals


def parser() -> argparse.ArgumentParser:
    """The options that every script and the whole table share."""
    result = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = result.add_argument
    add("--loss", nargs="+", help="only these losses")
    add("--dtype", nargs="+", default=["float32", "bfloat16"], choices=DTYPES, help="default: float32 bfloat16")
    add("--threads", type=int, default=2, help="default: 2")
    add("--providers", nargs="+", default=list(PROVIDERS), choices=PROVIDERS, help="default: all")
    add("--rounds", type=int, help="samples per provider; default: as many as --seconds allow, 9 to 200")
    add("--seconds", type=float, default=10.0, help="time spent sampling each shape and dtype; default: 10")
    add("--quick", action="store_true", help="one small shape, three rounds, one compile mode, no file: a smoke test")
    add("--csv", type=Path, help="append rows here; default: benchmarks/results/<machine>.csv, with --quick nowhere")
    add("--report", type=Path, metavar="FOLDER", help="also write a self-contained web page of the run's rows there")
    add("--skip-tests", action="store_true", help="do not run the tests of what is timed first")
    return result


def main(benchmarks: Sequence[Benchmark], arguments: Sequence[str] | None = None) -> int:
    """Runs benchmarks as the options say and prints their table; 1 if a test was red or a provider refused."""
    options = parser().parse_args(arguments)
    known = {b.loss: b for b in benchmarks}
    if unknown := sorted(set(options.loss or ()) - set(known)):
        parser().error(f"--loss: no benchmark of {', '.join(unknown)}; there are {', '.join(known)}")
    chosen = [known[name] for name in options.loss or known]
    if options.quick:
        options.rounds = options.rounds or 3
    elif options.csv is None:
        options.csv = report.results_file()
    if options.csv is not None:
        report.check_header(options.csv)  # now, not after an hour
    if options.report is not None:
        import pages

        pages.plots.pyplot()  # a missing matplotlib is told now, too
    torch.set_num_threads(options.threads)
    good, found, began = True, [], time.monotonic()
    for benchmark in chosen:
        if not options.skip_tests and not tests_are_green(benchmark.tests or benchmark.loss):
            good = False
            continue
        for shape in [benchmark.quick_shape] if options.quick else benchmark.shapes:
            for dtype in options.dtype:
                say(f"{benchmark.loss} {tuple(shape)} {dtype} ({time.monotonic() - began:.0f} s so far)")
                rows, right = run_case(benchmark, shape, DTYPES[dtype], options)
                good &= right
                found += rows
                if options.csv is not None:
                    report.append(options.csv, rows)
    if native.status("cpu").state == "loaded":
        native.set_cpu_capability(native.best_cpu_capability())
    if found:
        print(report.table(found))
        if options.report is not None:
            pages.webpage(options.report, found)
    if options.csv is not None and found:
        say(f"{len(found)} rows appended to {options.csv}")
    return 0 if good else 1
