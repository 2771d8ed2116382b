"""The whole table: every benchmark in one command. `python benchmarks/run.py --help` names the options."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import harness

LOSSES = (
    "masked_mse",
    "pearson",
    "temperature_kl",
    "decoupled_kl",
    "soft_cross_entropy",
    "binary_kl",
    "bounded_regression",
)
# Scripts of more than one: the whole objective and its halves; masks alone and in front of a loss.
SEVERAL = ("detection_distillation", "masks")


def benchmarks() -> list[harness.Benchmark]:
    """All of them, in the order of the table."""
    single = [importlib.import_module(loss).BENCHMARK for loss in LOSSES]
    return [*single, *(b for script in SEVERAL for b in importlib.import_module(script).BENCHMARKS)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the options choose."""
    return harness.main(benchmarks(), arguments)


if __name__ == "__main__":
    sys.exit(main())
