"""Compiles every CUDA and Triton kernel, without a GPU, and judges the machine code.

`python benchmarks/compile_gates.py [--arch 90] [--only masked_mse]` prints one row per kernel, architecture, dtypes and
shape, and fails if a gate does: no spills, no local memory, no float64 arithmetic, no atomics, 16-byte loads in the
main loop and 16-byte stores of gradients, registers near the recorded range. gates/rules.py has the excuses, each with
its reason. Loads are those of the main loop, conversions (cvt64) those in any loop; shared memory is what is declared
(CUDA) or all of it (Triton); AMD's registers are vector + scalar ones.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from gates import cuda, rules, sass, triton_kernels  # noqa: E402
from gates.rules import Kernel  # noqa: E402

RECORDED = HERE / "results" / "compile_gates.csv"
COLUMNS = (
    "op/kernel",
    "backend",
    "arch",
    "dtypes",
    "case",
    "regs",
    "spill B",
    "local B",
    "shared B",
    "load128",
    "narrow",
    "store128",
    "f64",
    "cvt64",
    "atomics",
    "verdict",
)


def say(line: str) -> None:
    """Progress, to stderr, so that a long run is not silent and the table stays clean."""
    print(f"gates: {line}", file=sys.stderr, flush=True)


def header() -> list[str]:
    """What compiles here, and what cannot."""
    lines = []
    if why := cuda.obstacle():
        lines.append(f"CUDA kernels: not compiled: {why}")
    else:
        lines.append(f"CUDA kernels: {cuda.version()}")
    if why := triton_kernels.obstacle():
        lines.append(f"Triton kernels: not compiled: {why}")
    else:
        assemblers = ", ".join(f"{name} {sass.version(name)}" for name in ("ptxas", "ptxas-blackwell"))
        lines.append(f"Triton kernels: triton {triton_kernels.version()}, {assemblers}")
    lines.append(f"Machine code: nvdisasm {sass.version('nvdisasm')}, cuobjdump {sass.version('cuobjdump')}")
    return lines


def row(kernel: Kernel, failed: Sequence[str]) -> tuple[str, ...]:
    counts = kernel.counts
    registers = f"{kernel.registers}+{kernel.scalar_registers}" if kernel.scalar_registers else str(kernel.registers)
    numbers = (
        kernel.spill_bytes,
        kernel.local_bytes,
        kernel.shared_bytes,
        counts.wide_loads,
        counts.narrow_loads,
        counts.wide_stores,
        counts.float64,
        counts.conversions,
        counts.atomics,
    )
    name = f"{kernel.op}/{kernel.name}"
    verdict = "; ".join(failed) or "ok"
    return (name, kernel.backend, kernel.arch, kernel.dtypes, kernel.case, registers, *map(str, numbers), verdict)


def table(rows: Iterable[Sequence[str]]) -> str:
    lines = [COLUMNS, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(line, widths)).rstrip() for line in lines)


def compiled(arguments: argparse.Namespace, errors: list[str]) -> Iterable[Kernel]:
    """Every kernel that the arguments ask for; what does not compile goes to `errors`."""
    for arch in arguments.arch:
        if arch in cuda.ARCHITECTURES and "cuda" in arguments.backend and not cuda.obstacle():
            for op in cuda.ops():
                if not arguments.only or op in arguments.only:
                    try:
                        yield from cuda.kernels(op, arch, say)
                    except RuntimeError as error:
                        errors.append(str(error))
        if "triton" in arguments.backend and not triton_kernels.obstacle():
            for op in triton_kernels.ops():
                if not arguments.only or op in arguments.only:
                    pairs = arguments.pairs or (triton_kernels.PAIRS[:3] if arch == "90" else ("bf16/bf16",))
                    yield from triton_kernels.kernels(op, arch, tuple(pairs), say, errors.append)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=triton_kernels.ARCHITECTURES, default=triton_kernels.ARCHITECTURES)
    parser.add_argument("--only", nargs="+", metavar="OP", help="these losses; all by default")
    parser.add_argument("--backend", nargs="+", choices=("cuda", "triton"), default=("cuda", "triton"))
    parser.add_argument(
        "--pairs", nargs="+", choices=triton_kernels.PAIRS,
        help="Triton: student/teacher dtypes; by default bf16/bf16, on sm_90 float32 students and teachers too "
        "(float16 compiles like bfloat16; CUDA files have all pairs)",
    )  # fmt: skip
    parser.add_argument("--record", action="store_true", help="replace the recorded ranges of what is compiled")
    parser.add_argument("--widen", action="store_true", help="widen the recorded ranges by what is compiled")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles, judges, prints; 1 if a gate fails or nothing was compiled."""
    chosen = parse(arguments)
    os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported, which nothing has done yet
    errors: list[str] = []
    kernels: dict[object, Kernel] = {}
    for kernel in compiled(chosen, errors):
        kernels[kernel] = kernel
    ranges = rules.read_ranges(RECORDED)
    if chosen.record or chosen.widen:
        ranges = rules.record(ranges, kernels, widen=chosen.widen)
        rules.write_ranges(RECORDED, ranges)
    judged = [(kernel, rules.failures(kernel, ranges)) for kernel in kernels]
    print("\n".join(header()))
    print(table(row(kernel, failed) for kernel, failed in judged))
    failing = sum(1 for _, failed in judged if failed)
    print(f"{len(judged)} kernels, {failing} fail")
    for error in errors:
        print(error)
    return 1 if failing or errors or not judged else 0


if __name__ == "__main__":
    sys.exit(main())
