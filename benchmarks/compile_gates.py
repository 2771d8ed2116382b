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
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from gates import cuda, rules, sass, triton_kernels  # noqa: E402
from gates.rules import Kernel  # noqa: E402

RECORDED = HERE / "results" / "compile_gates.csv"
COLUMNS = {  # and their widths
    "op/kernel": 49,
    "backend": 7,
    "arch": 6,
    "dtypes": 9,
    "case": 24,
    "regs": 7,
    "spill B": 7,
    "local B": 7,
    "shared B": 8,
    "load128": 7,
    "narrow": 6,
    "store128": 8,
    "f64": 4,
    "cvt64": 5,
    "atomics": 7,
    "verdict": 0,
}


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


def show(cells: Iterable[str]) -> None:
    """One row of the table. Each is printed at once, so that a run that is stopped has said what it found."""
    print("  ".join(x.ljust(width) for x, width in zip(cells, COLUMNS.values())).rstrip(), flush=True)


def compiled(arguments: argparse.Namespace, errors: list[str]) -> Iterator[list[Kernel]]:
    """The kernels that the arguments ask for, those of an op, backend and architecture together; what does not compile
    goes to `errors`.
    """

    def wanted(backend: str, ops: Iterable[str]) -> list[str]:
        return [op for op in ops if backend in arguments.backend and (not arguments.only or op in arguments.only)]

    for arch in arguments.arch:
        if arch in cuda.ARCHITECTURES and not cuda.obstacle():
            for op in wanted("cuda", cuda.ops()):
                try:
                    yield list(cuda.kernels(op, arch, say))
                except RuntimeError as error:
                    errors.append(str(error))
        if not triton_kernels.obstacle():
            pairs = arguments.pairs or (triton_kernels.PAIRS[:3] if arch == "90" else ("bf16/bf16",))
            for op in wanted("triton", triton_kernels.ops()):
                yield list(triton_kernels.kernels(op, arch, tuple(pairs), say, errors.append))


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
    passed = failing = 0
    ranges = rules.read_ranges(RECORDED)
    print("\n".join(header()))
    show(COLUMNS)
    for kernels in compiled(chosen, errors):
        if chosen.record or chosen.widen:
            ranges = rules.record(ranges, kernels, widen=chosen.widen)
            rules.write_ranges(RECORDED, ranges)
        for kernel in kernels:
            failed = rules.failures(kernel, ranges)
            passed, failing = passed + (not failed), failing + bool(failed)
            show(row(kernel, failed))
    print(f"{passed} kernels pass, {failing} fail")
    for error in errors:
        print(error)
    return 1 if failing or errors or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
