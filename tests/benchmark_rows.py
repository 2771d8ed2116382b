"""Made-up rows of benchmarks, for the tests of what is made from rows; and benchmarks/ on the path."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    """benchmarks/ on the path, as for its own scripts: a function that imports one of its files by name."""
    if not FOLDER.is_dir():
        pytest.skip("benchmarks/ is not beside these tests")
    before = set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module
    sys.path.remove(str(FOLDER))
    for name in set(sys.modules) - before:
        if FOLDER in Path(getattr(sys.modules[name], "__file__", None) or ".").parents:
            del sys.modules[name]


def row(provider, ms, *, setting="", mode="both", loss="pearson", shape="2x8x4x4", dtype="float32", **others):
    """One row, with a spread of 2 % to both sides and the memory and errors of nobody in particular."""
    low, middle, high = ms if isinstance(ms, tuple) else (0.98 * ms, ms, 1.02 * ms)
    found = {"loss": loss, "shape": shape, "dtype": dtype, "provider": provider, "setting": setting, "mode": mode}
    found |= {"ms_p20": low, "ms_p50": middle, "ms_p80": high, "bytes": 3072, "gb_per_s": 1.5}
    found |= {"floor_touched_ms": 0.5, "floor_fresh_ms": 2, "forward_peak_bytes": 5000, "forward_kept_bytes": 5000}
    found |= {"loss_error": 1e-8, "gradient_error": 1e-8, "cpu": "made up", "threads": 2, "date": "2026-01-02T03"}
    return {key: str(value) for key, value in (found | others).items()}


def case(ours=1.0, eager=10.0, compiled=3.0, **others):
    """A case's three rows in one mode."""
    times = {"ours": ours, "eager": eager, "compiled": compiled}
    settings = {"ours": "avx2", "eager": "", "compiled": "default"}
    return [row(provider, ms, setting=settings[provider], **others) for provider, ms in times.items()]


def save(path, rows):
    columns = list(dict.fromkeys(key for r in rows for key in r))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path
