"""Rows, and where they go: the columns, and one CSV per machine.

`python benchmarks/report.py benchmarks/results/<machine>.csv` prints the newest measurement of everything in a file as
Markdown. A figure that is published comes out of a committed CSV, by pages.py; what tables look like is in publish/.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import io
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CASE = ("loss", "shape", "dtype")
MODES = ("forward", "backward", "both", "no_grad")
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
    # Of the case: which set of shapes it is from (shapes.py), and "cpu" or the GPU's name.
    *("set", "device", "times_liger"),
    # The row's speed over that of the floor into touched memory, and over that of a large copy in the same run.
    *("floor_gb_per_s", "share_of_floor", "copy_gb_per_s", "share_of_copy"),
    # Of small cases on a GPU: what the host needs to launch forward and backward.
    "host_us",
    *("capability", "driver", "cuda", "triton", "liger"),
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


def machine(device: str = "cpu") -> str:
    """The GPU's name, or the CPU's with its cores."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    return f"{cpu_model()} {os.cpu_count()} cores"


def results_file(device: str = "cpu") -> Path:
    """One file per machine: results of two machines never mix."""
    name = re.sub(r"\((R|TM)\)", "", machine(device))
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


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _environment(device: str) -> dict[str, Any]:
    import torch

    import kdkernels

    found = {
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
        "device": device,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        found |= {"cuda": torch.version.cuda or "", "triton": _version("triton")}
        found["driver"] = getattr(torch._C, "_cuda_getDriverVersion", lambda: "")()
    return found


@dataclass(frozen=True)
class Case:
    """What rows are about: a benchmark, the set that the shape is from, shape and dtype, the student's bytes."""

    benchmark: Any
    group: str
    shape: Sequence[int]
    dtype: Any
    size: int

    def least(self) -> dict[str, int]:
        """Bytes per mode at least: inputs read once, and the gradient written where there is one.

        Two passes read the inputs twice. What has no gradient writes its result.
        """
        if not self.benchmark.gradient:
            return {"no_grad": self.size}
        read, write = self.benchmark.reads * self.size, self.size
        return {m: read + write * (m not in ("forward", "no_grad")) for m in (*MODES, "replay")}


def rows(case, providers, times, floors, memory, errors, host, options) -> list[dict[str, Any]]:
    """One row per provider and mode of one case; `host` has seconds of those whose launches were timed alone."""
    least, gradient = case.least(), case.benchmark.gradient
    floor = {name: quantile(values, 0.5) for name, values in floors.items()}
    floor_speed, copy_speed = (3 if gradient else 1) * case.size / floor["touched"], options.copy_speed
    named = {"loss": case.benchmark.loss, "shape": "x".join(map(str, case.shape)), "set": case.group}
    named |= {"dtype": str(case.dtype).split(".")[1]}
    environment = _environment(options.device)
    found = []
    for provider in providers:
        for mode, samples in times[provider.name].items():
            median = quantile(samples, 0.5)
            speed = least[mode] / median
            row: dict[str, Any] = dict.fromkeys(COLUMNS, "") | named
            row |= {"provider": provider.kind, "setting": provider.setting, "mode": mode, "rounds": len(samples)}
            row |= {f"ms_p{q}": f"{quantile(samples, q / 100) * 1e3:.4g}" for q in (20, 50, 80)}
            for peer in reversed(providers):  # of several eager formulas the first is the one that is meant
                if peer.kind != "ours" and mode in times[peer.name]:
                    row[f"times_{peer.kind}"] = f"{quantile(times[peer.name][mode], 0.5) / median:.3g}"
            row |= {"bytes": least[mode], "gb_per_s": f"{speed / 1e9:.3g}"}
            row |= {"floor_gb_per_s": f"{floor_speed / 1e9:.3g}", "share_of_floor": f"{speed / floor_speed:.3g}"}
            row |= {"copy_gb_per_s": f"{copy_speed / 1e9:.3g}", "share_of_copy": f"{speed / copy_speed:.3g}"}
            for name, value in floor.items():
                row[f"floor_{name}_ms"] = f"{value * 1e3:.4g}"
                if mode not in ("forward", "no_grad") or not gradient:
                    row[f"over_{name}"] = f"{median / value:.3g}"
            used = memory[provider.name]
            row |= {f"forward_{k}_bytes": "" if v is None else v for k, v in used.items()}
            if mode == "both" and provider.name in host:
                row["host_us"] = f"{host[provider.name] * 1e6:.1f}"
            if provider.kind == "liger":
                row["liger"] = _version("liger-kernel")
            row["loss_error"], row["gradient_error"] = (f"{e:.1e}" for e in errors[provider.name])
            row |= {} if gradient else {"gradient_error": ""}
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
    before = path.read_bytes() if path.exists() else b""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    if not before:
        writer.writeheader()
    elif not before.endswith(b"\n"):  # as editors may leave it
        text.write("\r\n")
    writer.writerows(found)
    with path.open("ab", buffering=0) as file:  # at once: a run that is killed leaves no half of a case
        file.write(text.getvalue().encode())


def read(path: Path) -> list[dict[str, str]]:
    """The newest measurement of each case on each device: an older one with other settings does not mix with it.

    ValueError where a row has more or fewer cells than there are columns: a run was cut off while it wrote.
    """
    with path.open(newline="") as file:
        every = list(csv.DictReader(file))
    newest: dict[tuple, str] = {}
    keys = [tuple(row.get(c) for c in (*CASE, "threads", "device", "cpu")) for row in every]
    for i, (key, row) in enumerate(zip(keys, every), 1):
        if None in row or None in row.values():
            raise ValueError(f"{path}: row {i} has {'more' if None in row else 'fewer'} cells than there are columns")
        newest[key] = max(newest.get(key, ""), row.get("date", ""))
    return [row for key, row in zip(keys, every) if row.get("date", "") == newest[key]]


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
    from publish.cases import NEEDED

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path)
    options = parser.parse_args(arguments)
    try:
        found = read(options.csv)
    except (OSError, ValueError) as error:
        parser.error(f"csv: {error}")
    if not found:
        parser.error(f"csv: {options.csv} has no rows")
    if absent := [column for column in NEEDED if column not in found[0]]:
        parser.error(f"csv: {options.csv} has no column {', '.join(absent)}")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
