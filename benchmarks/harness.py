"""The one harness under every benchmark: what a benchmark is, its options, and the run from tests to table.

A script states a loss (inputs, our call, the formula as users copy it, shapes) as a `Benchmark` and calls `main`. For
each shape and dtype every provider (providers.py) is first held against float64 (judge.py); only providers whose
numbers are right are timed, interleaved in one process with the floors (measure.py, on a GPU gpu.py). Which shapes is
shapes.py's, where rows go is report.py's.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu
import measure
import providers
import report
import torch
from judge import Judge, tensors
from providers import Provider, kdkernels, native, say
from publish.cases import group as grouped
from shapes import CPU_BYTES, NAMES, Shape, Shapes, parse
from torch import Tensor
from torch.utils import _pytree as pytree

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Ours at its best and the formula: what a ladder of sizes is drawn from.
SCALING_KINDS = ("ours", "eager")


@dataclass(frozen=True)
class Benchmark:
    """One loss to be timed.

    `inputs(shape, dtype, generator)` gives the student and then the constants; `ours` and `eager` take them in that
    order and return the same number. Student and teacher may be lists of tensors. `reads` counts the tensors of the
    student's size that the forward must read, `elements` says how large the student is. `variants` are other ways of
    ours, at the widest capability alone; `peers` are other published forms of the formula.
    """

    loss: str
    inputs: Callable[[Sequence[int], torch.dtype, torch.Generator], tuple[Any, ...]]
    ours: Callable[..., Any]
    eager: Callable[..., Any]
    shapes: Shapes
    reads: int = 2
    tests: str = ""  # test_<tests>.py, if not named after the loss
    variants: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    peers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    # From torch.compile with its options and the eager formula to what a user would run; None: nothing to compile.
    compiling: Callable[[Callable[..., Any], Callable[..., Any]], Callable[..., Any]] | None = lambda compile, f: (
        compile(f)
    )
    liger: Callable[[], Callable[..., Tensor]] | None = None  # ImportError where it is not installed
    elements: Callable[[Shape], int] = math.prod
    gradient: bool = True  # False: what is computed is not differentiated, and may be a list of tensors
    dtypes: Sequence[str] = tuple(DTYPES)


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


def _accepts(judge: Judge, provider: Provider, inputs: Sequence[Any]) -> bool:
    """Whether a provider's numbers are right; one that cannot run is named, and must not stop the run."""
    is_ours = provider.kind == "ours"
    try:
        if not judge.accepts(provider.name, provider.function, inputs, provider.prepare, ours=is_ours):
            return False
    except Exception as error:  # whatever a compiler or a peer raises
        text = (str(error).splitlines() or [""])[0][:200]
        if is_ours and "cpu" in {x.device.type for x in pytree.tree_leaves(list(inputs)) if isinstance(x, Tensor)}:
            raise  # on the CPU there is no reason for it
        say(f"    {provider.name}: not timed: {type(error).__name__}: {text}")
        return False
    loss, gradient = judge.errors[provider.name]
    also = f", of the gradient {gradient:.1e}" if judge.gradient else ""
    say(f"    {provider.name}: right: error of the result {loss:.1e}{also}")
    return True


def run_case(
    benchmark: Benchmark, group: str, shape: Sequence[int], dtype: torch.dtype, options: argparse.Namespace
) -> tuple[list[dict], bool]:
    """Rows of one shape and dtype, and whether every provider's numbers were right."""
    meter = gpu if options.device == "cuda" else measure
    generator = torch.Generator().manual_seed(0)
    inputs = benchmark.inputs(shape, dtype, generator)
    inputs = pytree.tree_map(lambda x: x.to(options.device) if isinstance(x, Tensor) else x, inputs)
    judge = Judge(benchmark.eager, inputs, benchmark.gradient)
    kinds = options.providers or (SCALING_KINDS if group == "scaling" else providers.KINDS)
    candidates, every = [], group != "scaling"
    if "ours" in kinds:
        candidates += providers.ours(benchmark, options.device, every)
    if "eager" in kinds:
        candidates += providers.eager(benchmark, every)
    if "liger" in kinds:
        candidates += providers.liger(benchmark, options.device)
    found = [p for p in candidates if _accepts(judge, p, inputs)]
    if "compiled" in kinds:
        modes = providers.COMPILE_MODES[:1] if options.quick else providers.COMPILE_MODES
        accepts, trial = lambda p: _accepts(judge, p, inputs), lambda p: meter.trial(p.function, inputs)
        compiled = providers.compiled(benchmark, modes, accepts, trial)
        found += [compiled] if compiled else []
    for refusal in judge.refusals:
        say(f"    REFUSED {refusal}")
    judge.truth = ()  # as large as the gradient, twice
    if not found:
        return [], not judge.refusals
    times, floors = meter.interleaved(benchmark, found, inputs, options.rounds, options.seconds, say)
    memory = {p.name: meter.forward_memory(benchmark, p, inputs) for p in found}
    host = {p.name: gpu.host_time(p, *gpu.rotation(benchmark, inputs, 1)) for p in found if "replay" in times[p.name]}
    moved = tensors(inputs[0] if benchmark.gradient else found[0].function(*inputs))
    case = report.Case(benchmark, group, shape, dtype, sum(x.numel() * x.element_size() for x in moved))
    return report.rows(case, found, times, floors, memory, judge.errors, host, options), not judge.refusals


def _whole(text: str) -> int:
    """A whole number of 1 or more, for argparse."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    """A number of seconds, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise argparse.ArgumentTypeError(f"expected a number of seconds, got {text!r}")
    return value


def parser() -> argparse.ArgumentParser:
    """The options that every script and the whole table share."""
    result = argparse.ArgumentParser(
        prog="python -m kdkernels bench" if Path(sys.argv[0]).name == "__main__.py" else None,
        description=__doc__.splitlines()[0],
    )
    add = result.add_argument
    add("losses", nargs="*", metavar="loss", help="only these; default: all")
    add("--device", default="cpu", choices=["cpu", "cuda"], help="default: cpu")
    add("--dtype", nargs="+", default=["float32", "bfloat16"], choices=DTYPES, help="default: float32 bfloat16")
    sets = f"{', '.join(NAMES)}, or shapes such as 2x256x100x152 of the losses that are named; default: default"
    add("--shapes", nargs="+", type=parse, metavar="SET", default=["default"], help=sets)
    add("--threads", type=_whole, default=2, help="of the CPU; default: 2")
    kinds = "default: all, and for the scaling set ours at its best and eager"
    add("--providers", nargs="+", choices=providers.KINDS, help=kinds)
    add("--rounds", type=_whole, help="samples per provider; default: as many as --seconds allow, 9 to 200")
    add("--seconds", type=_seconds, default=2.0, help="time spent sampling each shape and dtype; default: 2")
    add("--budget", type=_seconds, default=math.inf, help="begin no further case after so many seconds, and say which")
    add("--quick", action="store_true", help="the quick set, three rounds, one compile mode, no file: a smoke test")
    add("--csv", type=Path, help="append rows here; default: benchmarks/results/<machine>.csv, with --quick nowhere")
    add("--report", type=Path, metavar="FOLDER", help="also write a self-contained web page of the run's rows there")
    add("--skip-tests", action="store_true", help="do not run the tests of what is timed first")
    return result


def _cases(chosen: Sequence[Benchmark], options: argparse.Namespace) -> list[tuple[Benchmark, str, Shape, str]]:
    """What will be timed, in order; what is left out is said."""
    found = []
    for benchmark in chosen:
        for group, shape in benchmark.shapes.chosen(options.shapes, options.device):
            size = benchmark.reads * benchmark.elements(shape) * 4
            if options.device == "cpu" and size > CPU_BYTES and group != "given":
                say(f"{benchmark.loss} {shape}: left out, {size / 1e6:.0f} MB of float32 inputs: for --device cuda")
                continue
            found += [(benchmark, group, shape, dtype) for dtype in options.dtype if dtype in benchmark.dtypes]
    return found


def _read(benchmarks: Sequence[Benchmark], arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[Any]]:
    """The options, and the benchmarks that they name."""
    reader = parser()
    options = reader.parse_args(arguments)
    known = {b.loss: b for b in benchmarks}
    if unknown := sorted(set(options.losses) - set(known)):
        reader.error(f"no benchmark of {', '.join(unknown)}; there are {', '.join(known)}")
    chosen = [known[name] for name in dict.fromkeys(options.losses or known)]
    if options.device == "cuda" and not torch.cuda.is_available():
        reader.error("--device cuda: torch sees no GPU here")
    options.quick |= options.shapes == ["quick"]
    if options.quick and options.shapes not in (["default"], ["quick"]):
        reader.error("--quick: has shapes of its own, so --shapes cannot go with it")
    if options.quick:
        options.shapes, options.rounds = ["quick"], options.rounds or 3
    for shape in (s for s in options.shapes if not isinstance(s, str)):
        if not options.losses and len(known) > 1:
            reader.error(f"--shapes {'x'.join(map(str, shape))}: name the losses that it is for")
        if wrong := [b.loss for b in chosen if not b.shapes.fits(shape)]:
            like = "x".join(map(str, known[wrong[0]].shapes.quick))
            reader.error(f"--shapes {'x'.join(map(str, shape))}: a shape of {wrong[0]} is like {like}")
        if not all(b.elements(shape) for b in chosen):
            reader.error(f"--shapes {'x'.join(map(str, shape))}: there is nothing in it to be timed")
    if not any(set(options.dtype) & set(b.dtypes) for b in chosen):
        reader.error(f"--dtype {' '.join(options.dtype)}: {chosen[0].loss} has {', '.join(chosen[0].dtypes)} alone")
    if options.csv is None and not options.quick:
        options.csv = report.results_file(options.device)
    _check_files(reader, options)
    return options, chosen


def _check_files(reader: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """What cannot be written is told now, not after an hour."""
    try:
        name = "--csv"
        if options.csv is not None:
            report.check_header(options.csv)
            options.csv.parent.mkdir(parents=True, exist_ok=True)
            _check_writable(options.csv if options.csv.exists() else options.csv.parent)
        name = "--report"
        if options.report is not None:
            import pages

            pages.plots.pyplot()  # a missing matplotlib, too
            options.report.mkdir(parents=True, exist_ok=True)
            _check_writable(options.report)
    except (OSError, ValueError) as error:
        reader.error(f"{name}: {error}")


def _check_writable(path: Path) -> None:
    if not os.access(path, os.W_OK):
        raise PermissionError(f"{path} cannot be written")


def main(benchmarks: Sequence[Benchmark], arguments: Sequence[str] | None = None) -> int:
    """Runs benchmarks as the options say and prints their table; 1 if a test was red, a provider refused, or the budget
    spent before the last case.
    """
    options, chosen = _read(benchmarks, arguments)
    torch.set_num_threads(options.threads)
    good, found, began = True, [], time.monotonic()
    if not options.skip_tests:
        tested = {name: tests_are_green(name) for name in dict.fromkeys(b.tests or b.loss for b in chosen)}
        good = all(tested.values())
        chosen = [b for b in chosen if tested[b.tests or b.loss]]
    cases = _cases(chosen, options)
    options.copy_speed = 0.0
    if cases:
        options.copy_speed = (gpu if options.device == "cuda" else measure).copy_speed(16 if options.quick else 512)
        say(
            f"{report.machine(options.device)}, {options.threads} threads: {len(cases)} cases; a copy moves "
            f"{options.copy_speed / 1e9:.1f} GB/s"
        )
    for i, (benchmark, group, shape, dtype) in enumerate(cases):
        spent = time.monotonic() - began
        if spent > options.budget:
            say(f"{benchmark.loss} {shape} {dtype}: left out, the --budget is spent")
            good = False
            continue
        say(f"{benchmark.loss} {shape} {dtype} ({i + 1} of {len(cases)}, {spent:.0f} s so far)")
        rows, right = run_case(benchmark, group, shape, DTYPES[dtype], options)
        good &= right
        found += rows
        if options.csv is not None:
            report.append(options.csv, rows)
    if native.status("cpu").state == "loaded":
        native.set_cpu_capability(native.best_cpu_capability())
    if found:
        print(report.table(found))
        if options.report is not None:
            import pages

            pages.webpage(options.report, found)
        for case in grouped(found):
            if case.disturbed:
                say(f"DISTURBED: {case.title}: even its copy was slowed by something else; run it again")
    if options.csv is not None and found:
        say(f"{len(found)} rows appended to {options.csv}")
    return 0 if good else 1
