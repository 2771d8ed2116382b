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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the options choose."""
    objective = importlib.import_module("detection_distillation").BENCHMARKS
    return harness.main([*(importlib.import_module(loss).BENCHMARK for loss in LOSSES), *objective], arguments)


if __name__ == "__main__":
    sys.exit(main())
