"""Rows, and where they go: the columns, and one CSV per machine.

`python benchmarks/report.py benchmarks/results/<machine>.csv` prints the newest measurement of everything in a file as
Markdown. A figure that is published comes out of a committed CSV, by pages.py; what tables look like is in publish/.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CASE = ("loss", "shape", "dtype")
COLUMNS = (
    *CASE,
    *("provider", "setting", "mode"),
    *("ms_p20", "ms_p50", "ms_p80", "rounds"),
    # How many times this row is as fast as each peer: the peer's median over this one.
    *("times_eager", "times_compiled"),
    # What the mode must move at least, and the speed at which this row moves it.
    *("bytes", "gb_per_s"),
    # A read of both inputs and a write of one output; and this row's median over it, where a gradient is written.
    *("floor_touched_ms", "floor_fresh_ms", "over_touched", "over_fresh"),
    # Of one forward with a graph, inputs excluded.
    *("forward_peak_bytes", "forward_kept_bytes", "forward_resident_bytes"),
    *("loss_error", "gradient_error"),
    *("cpu", "cores", "threads", "load", "kdkernels", "torch", "python", "commit", "date", "command"),
)


def quantile(values: Sequence[float], q: float) -> float:
    """Linear between neighbours."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


@cache
def cpu_model() -> str:
    """The CPU's name; where a hypervisor hides it, family and model tell it from others."""
    try:
        text = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return platform.processor() or platform.machine()
    fields = {k.strip(): v.strip() for k, v in (line.split(":", 1) for line in text.splitlines() if ":" in line)}
    name = fields.get("model name") or platform.machine()
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']}, model {fields.get('model', '?')})"
    return name


def results_file() -> Path:
    """One file per machine: results of two machines never mix."""
    name = re.sub(r"\((R|TM)\)", "", f"{cpu_model()} {os.cpu_count()} cores")
    return HERE / "results" / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.csv"


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


@cache
def _commit() -> str:
    changed = _git("status", "--porcelain", "--", "../kdkernels", "../csrc", ".", ":!results")
    return _git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")


def _environment() -> dict[str, Any]:
    import torch

    import kdkernels

    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "",
        "kdkernels": kdkernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def rows(benchmark, shape, dtype, elements, providers, times, floors, memory, errors) -> list[dict[str, Any]]:
    """One row per provider and mode of one case, whose student has so many elements."""
    tensor = elements * dtype.itemsize
    # The least: inputs read once, and the gradient written where there is one. Two passes read the inputs twice.
    least = {"forward": benchmark.reads, "no_grad": benchmark.reads}
    least |= {"backward": benchmark.reads + 1, "both": benchmark.reads + 1}
    floor = {name: quantile(values, 0.5) for name, values in floors.items()}
    found = []
    environment = _environment()
    for provider in providers:
        for mode, samples in times[provider.name].items():
            median = quantile(samples, 0.5)
            row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
            row |= {"loss": benchmark.loss, "shape": "x".join(map(str, shape)), "dtype": str(dtype).split(".")[1]}
            row |= {"provider": provider.kind, "setting": provider.setting, "mode": mode, "rounds": len(samples)}
            row |= {f"ms_p{q}": f"{quantile(samples, q / 100) * 1e3:.4g}" for q in (20, 50, 80)}
            for peer in providers:
                if peer.kind != "ours":
                    row[f"times_{peer.kind}"] = f"{quantile(times[peer.name][mode], 0.5) / median:.3g}"
            row |= {"bytes": least[mode] * tensor, "gb_per_s": f"{least[mode] * tensor / median / 1e9:.3g}"}
            for name, value in floor.items():
                row[f"floor_{name}_ms"] = f"{value * 1e3:.4g}"
                if mode in ("backward", "both"):
                    row[f"over_{name}"] = f"{median / value:.3g}"
            used = memory[provider.name]
            row |= {f"forward_{k}_bytes": "" if v is None else v for k, v in used.items()}
            row["loss_error"], row["gradient_error"] = (f"{e:.1e}" for e in errors[provider.name])
            found.append(row | environment)
    return found


def check_header(path: Path) -> None:
    """ValueError if a file has other columns than rows would have."""
    if path.exists() and path.stat().st_size:
        with path.open(newline="") as file:
            if tuple(next(csv.reader(file))) != COLUMNS:
                raise ValueError(f"{path} has other columns: move it away, or name another file with --csv")


def append(path: Path, found: Sequence[dict[str, Any]]) -> None:
    """Adds rows to a file, which starts with the names of the columns."""
    check_header(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists() or not path.stat().st_size
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if fresh:
            writer.writeheader()
        writer.writerows(found)


def read(path: Path) -> list[dict[str, str]]:
    """The newest measurement of each case: an older one with other settings does not mix with it."""
    with path.open(newline="") as file:
        every = list(csv.DictReader(file))
    newest: dict[tuple, str] = {}
    for row in every:
        key = (*(row[c] for c in CASE), row["threads"])
        newest[key] = max(newest.get(key, ""), row["date"])
    return [row for row in every if row["date"] == newest[(*(row[c] for c in CASE), row["threads"])]]


def _markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    try:
        from tabulate import tabulate
    except ImportError:  # plainer, but the same table
        lines = [header, ["---"] * len(header), *body]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return tabulate(body, header, tablefmt="github", disable_numparse=True)


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: what the rows were measured on, then a table per case with a line per provider."""
    from publish import chapters, tables
    from publish.cases import group

    parts = [f"{chapters.setting(found)}.", *(" ".join(x.split()) for x in (chapters.LEGEND, chapters.COPY))]
    for case in group(found):
        whole = tables.whole_case(case)
        parts += [tables.case_line(case), _markdown(whole.header, whole.body)]
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the newest measurement of everything in a CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path)
    options = parser.parse_args(arguments)
    found = read(options.csv)
    if not found:
        parser.error(f"{options.csv} has no rows")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
