"""The losses on a GPU against a device copy, eager PyTorch, torch.compile and (where it is installed) Liger.

    python benchmarks/gpu.py [--loss masked_mse ...] [--dtype bfloat16 float32] [--csv results.csv]

Each provider is first held against float64. Then all of them are timed with CUDA events, interleaved, on inputs that
rotate over more than three times the L2 cache, so that nothing is read from it that training would not find there.
A row's share is that of a copy from device memory to device memory which this run measured. `--smoke` runs tiny shapes,
on the CPU where there is no GPU: it shows that the script works, and its times mean nothing.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import report
import torch
from harness import DTYPES, Benchmark, kdkernels, say
from judge import Judge
from run import LOSSES
from torch import Tensor

# At least 256 MB of inputs each, for the losses that the bandwidth bounds; the last of each loss is launch-bound.
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "masked_mse": [(8, 256, 200, 336), (2, 256, 100, 152), (2, 256, 25, 38), (1, 8, 8, 8)],
    "pearson": [(8, 256, 200, 336), (2, 256, 100, 152), (2, 256, 25, 38), (1, 8, 8, 8)],
    "temperature_kl": [
        *[(1_000_000, 80), (1_000_000, 81), (65_536, 1000), (16_384, 4096), (8192, 16_384), (4096, 32_000)],
        *[(4096, 50_257), (1024, 128_256), (1024, 151_936), (512, 262_144), (16, 80)],
    ],
    "decoupled_kl": [(1_000_000, 81), (1024, 81)],
    "soft_cross_entropy": [(1_000_000, 81), (65_536, 1000), (4096, 50_257), (1024, 81)],
    "binary_kl": [(1_000_000, 80), (8, 16_800, 80), (16, 80)],
    "bounded_regression": [(8_000_000, 4), (200_000, 4), (64, 4)],
}
SMOKE: dict[str, tuple[int, ...]] = {"masked_mse": (2, 8, 9, 7), "pearson": (2, 8, 9, 7), "bounded_regression": (33, 4)}
MODES = ("forward", "backward", "both", "no_grad")
COLUMNS = (
    *("loss", "shape", "dtype", "provider", "mode", "us_p20", "us_p50", "us_p80", "rounds"),
    *("bytes", "gb_per_s", "copy_gb_per_s", "share_of_copy", "times_eager", "times_compiled", "host_us"),
    *("forward_peak_bytes", "loss_error", "gradient_error"),
    *("device", "capability", "driver", "torch", "cuda", "triton", "kdkernels", "commit", "date"),
)


def _on_gpu() -> bool:
    return torch.cuda.is_available()


def _device() -> str:
    return "cuda" if _on_gpu() else "cpu"


class Clock:
    """Microseconds between two marks: of the device's time on a GPU."""

    def __init__(self):
        self.mark = torch.cuda.Event(enable_timing=True) if _on_gpu() else time.perf_counter()
        if _on_gpu():
            self.mark.record()

    def until(self, other: Clock) -> float:
        """After a synchronisation."""
        return self.mark.elapsed_time(other.mark) * 1e3 if _on_gpu() else (other.mark - self.mark) * 1e6


def synchronise() -> None:
    """Waits for the device."""
    if _on_gpu():
        torch.cuda.synchronize()


def copy_bandwidth(megabytes: int, rounds: int = 20) -> float:
    """GB/s of a copy, read and write counted."""
    source = torch.empty(megabytes * 2**20 // 4, dtype=torch.float32, device=_device()).normal_()
    target = torch.empty_like(source)
    times = []
    for _ in range(rounds + 3):
        begin = Clock()
        target.copy_(source)
        end = Clock()
        synchronise()
        times.append(begin.until(end))
    return 2 * source.numel() * 4 / report.quantile(times[3:], 0.5) / 1e3


def providers_of(benchmark: Benchmark, compiled: bool) -> dict[str, Callable[..., Tensor]]:
    """Name -> function of (student, constants...)."""

    def forced(backend: str) -> Callable[..., Tensor]:
        def call(*inputs: Tensor) -> Tensor:
            with kdkernels.use_backend(backend):
                return benchmark.ours(*inputs)

        return call

    found = {f"ours {b}": forced(b) for b in (("cuda", "triton") if _on_gpu() else ("cpu",))}
    found["eager"] = benchmark.eager
    if compiled:
        torch._dynamo.reset()
        found["compiled"] = torch.compile(benchmark.eager, dynamic=False)
    if benchmark.loss == "temperature_kl" and (liger := _liger()):
        found["liger"] = liger
    return found


def _liger() -> Callable[..., Tensor] | None:
    """Liger's KL starts from log-probabilities; what a user must add to start from logits is part of the work."""
    try:
        from liger_kernel.ops.kl_div import LigerKLDivLossFunction
    except ImportError:
        return None
    temperature = importlib.import_module("temperature_kl").TEMPERATURE

    def call(student: Tensor, teacher: Tensor) -> Tensor:
        log_p = torch.log_softmax(student / temperature, dim=-1)
        q = torch.softmax(teacher / temperature, dim=-1)
        return LigerKLDivLossFunction.apply(log_p, q, "batchmean") * temperature**2

    return call


def _step(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> dict[str, float]:
    student = inputs[0]
    student.grad = None
    marks = [Clock()]
    loss = function(*inputs)
    marks.append(Clock())
    loss.backward()
    marks.append(Clock())
    student.grad = None
    with torch.no_grad():
        marks.append(Clock())
        function(*inputs)
        marks.append(Clock())
    synchronise()
    forward, backward, no_grad = (marks[i].until(marks[i + 1]) for i in (0, 1, 3))
    return {"forward": forward, "backward": backward, "both": marks[0].until(marks[2]), "no_grad": no_grad}


def _host_time(function: Callable[..., Tensor], inputs: Sequence[Tensor], calls: int = 100) -> float:
    """Microseconds that the host needs to launch forward and backward, the device's work not waited for."""
    times = []
    for _ in range(calls):
        inputs[0].grad = None
        begin = time.perf_counter()
        function(*inputs).backward()
        times.append((time.perf_counter() - begin) * 1e6)
        if len(times) % 10 == 0:
            synchronise()
    return report.quantile(times, 0.5)


def _peak(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> int | str:
    if not _on_gpu():
        return ""
    synchronise()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = function(*inputs)
    synchronise()
    del loss
    return torch.cuda.max_memory_allocated() - before


def run_case(benchmark: Benchmark, shape: Sequence[int], dtype: torch.dtype, options, copy: float) -> list[dict]:
    """Rows of one loss, shape and dtype."""
    generator = torch.Generator().manual_seed(0)
    first = tuple(x.to(_device()) for x in benchmark.inputs(shape, dtype, generator))
    size = sum(x.numel() * x.element_size() for x in first)
    cache = torch.cuda.get_device_properties(0).L2_cache_size if _on_gpu() else 0
    judge = Judge(benchmark.eager, first)
    providers = {}
    for name, function in providers_of(benchmark, options.compile).items():
        try:
            if judge.accepts(name, function, first, ours=name.startswith("ours")):
                providers[name] = function
        except Exception as error:  # a peer that cannot run must not stop the run
            say(f"    {name}: not timed: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
    for refusal in judge.refusals:
        say(f"    REFUSED {refusal}")
    judge.truth = ()
    # Other values in other memory each time, until three caches' worth has passed by.
    sets = [first] + [tuple(x.clone() for x in first) for _ in range(min(200, 3 * cache // max(1, size) + 1))]
    sets = [(s[0].detach().requires_grad_(), *s[1:]) for s in sets]
    times: dict[str, dict[str, list[float]]] = {name: {mode: [] for mode in MODES} for name in providers}
    at = 0
    for turn in range(options.rounds + 3):
        for name, function in providers.items():
            at = (at + 1) % len(sets)
            sample = _step(function, sets[at])
            for mode, value in sample.items() if turn >= 3 else ():
                times[name][mode].append(value)
    tensor = first[0].numel() * first[0].element_size()
    least = {"forward": benchmark.reads * tensor, "no_grad": benchmark.reads * tensor}
    least |= {"backward": (benchmark.reads + 1) * tensor, "both": (2 * benchmark.reads + 1) * tensor}
    host = {name: _host_time(function, sets[0]) for name, function in providers.items()} if size < 2**20 else {}
    found = []
    for name, function in providers.items():
        peak = _peak(function, sets[0])
        for mode in MODES:
            samples = times[name][mode]
            median = report.quantile(samples, 0.5)
            speed = least[mode] / median / 1e3
            row = dict.fromkeys(COLUMNS, "") | {"loss": benchmark.loss, "shape": "x".join(map(str, shape))}
            row |= {"dtype": str(dtype).split(".")[1], "provider": name, "mode": mode, "rounds": len(samples)}
            row |= {f"us_p{q}": f"{report.quantile(samples, q / 100):.4g}" for q in (20, 50, 80)}
            row |= {"bytes": least[mode], "gb_per_s": f"{speed:.4g}", "copy_gb_per_s": f"{copy:.4g}"}
            row |= {"share_of_copy": f"{speed / copy:.3f}", "forward_peak_bytes": peak}
            for peer in ("eager", "compiled"):
                if peer in providers:
                    row[f"times_{peer}"] = f"{report.quantile(times[peer][mode], 0.5) / median:.3g}"
            if mode == "both" and name in host:
                row["host_us"] = f"{host[name]:.1f}"
            row["loss_error"], row["gradient_error"] = (f"{e:.1e}" for e in judge.errors[name])
            found.append(row)
    return found


def _environment() -> dict[str, str]:
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = ""
    properties = torch.cuda.get_device_properties(0) if _on_gpu() else None
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: "")() if _on_gpu() else ""
    return {
        "device": properties.name if properties else "cpu",
        "capability": f"{properties.major}.{properties.minor}" if properties else "",
        "driver": str(driver),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda or ""),
        "triton": version,
        "kdkernels": kdkernels.__version__,
        "commit": report._commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def table(found: Sequence[dict]) -> str:
    """Markdown, a line per case, provider and mode that moves data."""
    header = ["loss", "shape", "dtype", "provider", "mode", "us", "GB/s", "of copy", "x eager", "x compiled", "host us"]
    keys = [*("loss", "shape", "dtype", "provider", "mode", "us_p50", "gb_per_s", "share_of_copy")]
    keys += ["times_eager", "times_compiled", "host_us"]
    body = [[str(row[k]) for k in keys] for row in found if row["mode"] != "no_grad"]
    return report._markdown(header, body)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the table, appends the rows to the machine's CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loss", nargs="+", default=list(LOSSES), choices=LOSSES)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"], choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--csv", type=Path, help="append here; default: benchmarks/results/<device>.csv")
    parser.add_argument("--seconds", type=float, default=540.0, help="begin no further case after this time")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, three rounds, no file unless --csv")
    options = parser.parse_args(arguments)
    if not _on_gpu() and not options.smoke:
        print("benchmarks/gpu.py: no GPU here; --smoke tries the script on the CPU", file=sys.stderr)
        return 2
    environment = _environment()
    if options.csv is None and not options.smoke:
        name = re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")
        options.csv = Path(__file__).resolve().parent / "results" / f"{name}.csv"
    if options.smoke:
        options.rounds = 3
    copy = copy_bandwidth(1 if options.smoke else 2048)
    say(f"{environment['device']}: a copy moves {copy:.0f} GB/s")
    found, began = [], time.monotonic()
    for loss in options.loss:
        benchmark = importlib.import_module(loss).BENCHMARK
        for shape in [SMOKE.get(loss, (33, 81))] if options.smoke else SHAPES[loss]:
            for dtype in options.dtype:
                if time.monotonic() - began > options.seconds:
                    say(f"{loss} {shape} {dtype}: left out, the time is up; run it with --loss {loss}")
                    continue
                say(f"{loss} {shape} {dtype} ({time.monotonic() - began:.0f} s so far)")
                rows = [row | environment for row in run_case(benchmark, shape, DTYPES[dtype], options, copy)]
                found += rows
                if options.csv:
                    fresh = not options.csv.exists()
                    options.csv.parent.mkdir(parents=True, exist_ok=True)
                    with options.csv.open("a", newline="") as file:
                        writer = csv.DictWriter(file, COLUMNS)
                        if fresh:
                            writer.writeheader()
                        writer.writerows(rows)
    print(
        f"{environment['device']}, copy {copy:.0f} GB/s, torch {environment['torch']}, triton {environment['triton']}"
    )
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
