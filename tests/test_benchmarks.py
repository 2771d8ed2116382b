"""The benchmarks as instruments: they write what they promise and refuse wrong numbers. No test here asserts a time."""

from __future__ import annotations

import csv
import importlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kdkernels as kd
from kdkernels import __main__ as command_line
from kdkernels import native

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
ENTRY_POINTS = ["run", "harness", "judge", "measure", "report", "gpu", "compile_gates", "pages", "guard"]


@pytest.fixture(scope="module")
def bench():
    """benchmarks/ on the path, as for its own scripts: a function that imports one of its files by name."""
    if not FOLDER.is_dir():
        pytest.skip("benchmarks/ is not beside these tests")
    assert native.load("cpu"), f"the CPU kernels could not be had: {native.status('cpu').reason}"
    before = set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module
    sys.path.remove(str(FOLDER))
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or ".").parent == FOLDER:
            del sys.modules[name]


def quick(bench, benchmark, csv_path, *options):
    """A --quick run without compiling; status, then the rows that it wrote."""
    arguments = ["--quick", "--skip-tests", "--threads", "1", "--providers", "ours", "eager"]
    status = bench("harness").main([benchmark], [*arguments, "--csv", str(csv_path), *options])
    if not csv_path.exists():
        return status, []
    with csv_path.open(newline="") as file:
        return status, list(csv.DictReader(file))


def test_quick_run_writes_valid_rows(bench, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    status, rows = quick(bench, bench("pearson").BENCHMARK, path)
    assert status == 0
    capabilities = native.CAPABILITIES[: native.CAPABILITIES.index(native.best_cpu_capability()) + 1]
    providers = {("ours", c) for c in capabilities} | {("eager", "")}
    expected = {
        (d, *p, m)
        for d in ("float32", "bfloat16")
        for p in providers
        for m in ("forward", "backward", "both", "no_grad")
    }
    found = [(r["dtype"], r["provider"], r["setting"], r["mode"]) for r in rows]
    assert set(found) == expected and len(found) == len(expected)
    for row in rows:
        assert 0 < float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])
        assert 0 < float(row["floor_touched_ms"]) and 0 < float(row["floor_fresh_ms"])
        assert (float(row["times_eager"]) == 1) or row["provider"] != "eager"
        assert bool(row["over_fresh"]) == (row["mode"] in ("backward", "both"))
        assert all(row[c] for c in ("cpu", "threads", "torch", "kdkernels", "python", "date", "loss_error"))
        assert int(row["threads"]) == 1
    size = 2 * 8 * 12 * 20 * 4
    by_mode = {r["mode"]: int(r["bytes"]) for r in rows if r["dtype"] == "float32"}
    assert by_mode == {"forward": 2 * size, "no_grad": 2 * size, "backward": 3 * size, "both": 3 * size}
    out, progress = capsys.readouterr()
    assert "pearson, 2x8x12x20, float32" in out and "eager" in out
    assert "timing" in progress and "timing" not in out


def test_rows_are_appended_and_read_back(bench, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    _, first = quick(bench, bench("temperature_kl").BENCHMARK, path, "--dtype", "float32")
    _, both = quick(bench, bench("temperature_kl").BENCHMARK, path, "--dtype", "bfloat16")
    assert len(both) == 2 * len(first)
    assert len(bench("report").read(path)) == len(both)
    capsys.readouterr()
    assert bench("report").main([str(path)]) == 0
    assert "temperature_kl, 16x100, bfloat16" in capsys.readouterr().out
    path.write_text("other,columns\n")
    with pytest.raises(ValueError, match="other columns"):
        quick(bench, bench("temperature_kl").BENCHMARK, path)


# What a broken kernel gives: each keeps a graph, so that only its numbers can give it away.
WRONG = {
    "value x 1.05": lambda loss, student: loss * 1.05,
    "no gradient": lambda loss, student: loss.detach() + 0 * student.float().sum(),
    "gradient x 1.05": lambda loss, student: loss.detach() + 1.05 * (loss - loss.detach()),
    "NaN": lambda loss, student: loss * float("nan"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("side", ["ours", "eager"])
def test_wrong_numbers_are_refused(bench, tmp_path, capsys, monkeypatch, side, wrong):
    masked_mse = bench("masked_mse")
    right, break_it = masked_mse.ours if side == "ours" else masked_mse.eager, WRONG[wrong]

    def broken(student, *constants):
        loss = right(student, *constants)
        # In float64 it tells the truth: that call asks for the exact answer.
        return loss if student.dtype == torch.float64 else break_it(loss, student)

    benchmark = replace(masked_mse.BENCHMARK, **{side: broken})
    if side == "eager":
        # Alone: where the peer is this wrong, a bound in terms of its error would say little about ours.
        status, rows = quick(bench, benchmark, tmp_path / "rows.csv", "--dtype", "float32", "--providers", "eager")
        assert rows == []
    else:
        status, rows = quick(bench, benchmark, tmp_path / "rows.csv", "--dtype", "float32")
        assert {r["provider"] for r in rows} == {"eager"}
    assert status == 1
    out, progress = capsys.readouterr()
    assert f"REFUSED {side}" in progress
    assert "| ours" not in out


def test_swapped_sides_are_refused(bench, tmp_path, capsys):
    kl = bench("temperature_kl").BENCHMARK
    swapped = replace(kl, ours=lambda s, t: kd.temperature_kl_loss(t.float(), s.detach().float()) + 0 * s.float().sum())
    status, rows = quick(bench, swapped, tmp_path / "rows.csv")
    assert status == 1 and {r["provider"] for r in rows} == {"eager"}


def test_red_tests_print_nothing(bench, tmp_path, capsys, monkeypatch):
    harness = bench("harness")
    (tmp_path / "test_pearson.py").write_text("def test_red():\n    assert False, 'this one is red'\n")
    (tmp_path / "test_masked_mse.py").write_text("def test_green():\n    pass\n")
    assert harness.tests_are_green("masked_mse", tmp_path)
    assert not harness.tests_are_green("pearson", tmp_path)
    assert "this one is red" in capsys.readouterr().err
    monkeypatch.setattr(harness, "tests_are_green", lambda loss: False)
    assert harness.main([bench("pearson").BENCHMARK], ["--quick"]) == 1
    assert capsys.readouterr().out == ""


def test_every_loss_has_a_benchmark_whose_formula_agrees(bench):
    run, judge = bench("run"), bench("judge")
    scripts = {path.stem for path in FOLDER.glob("*.py")} - set(ENTRY_POINTS)
    assert {*run.LOSSES, "detection_distillation"} == scripts
    assert set(run.LOSSES) == set(kd.backend_info())
    benchmarks = [bench(loss).BENCHMARK for loss in run.LOSSES]
    assert [benchmark.loss for benchmark in benchmarks] == list(run.LOSSES)
    for benchmark in [*benchmarks, *bench("detection_distillation").BENCHMARKS]:
        inputs = benchmark.inputs(benchmark.quick_shape, torch.float64, torch.Generator().manual_seed(1))
        eager = judge.evaluate(benchmark.eager, inputs)
        for ours in (benchmark.ours, *benchmark.variants.values()):
            for x, x64 in zip(judge.evaluate(ours, inputs), eager):
                # float64 on both sides: 1e-9 is what the contract asks of values and gradients.
                assert judge.error(x, x64) < 1e-9, benchmark.loss


def test_memory_sees_a_buffer_of_feature_size(bench):
    measure, harness = bench("measure"), bench("harness")
    pearson = bench("pearson").BENCHMARK
    inputs = pearson.inputs((2, 16, 64, 64), torch.float32, torch.Generator().manual_seed(0))
    feature = inputs[0].numel() * 4
    lean = measure.forward_memory(harness.Provider("ours", "", pearson.ours), inputs)
    fat = measure.forward_memory(harness.Provider("eager", "", pearson.eager), inputs)
    assert fat["peak"] >= 2 * feature and fat["kept"] >= feature
    # The gradient, a few values per channel, and the loss.
    assert feature <= lean["kept"] <= lean["peak"] <= feature + 16 * 8 * 4 + 64


def test_command_runs_the_table(bench, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    options = [
        "--quick",
        "--skip-tests",
        "--threads",
        "1",
        "--providers",
        "eager",
        "--dtype",
        "float32",
        "--loss",
        "bounded_regression",
    ]
    assert command_line.main(["bench", *options]) == 0
    assert "bounded_regression, 64x4, float32" in capsys.readouterr().out
    monkeypatch.setattr(command_line, "__file__", str(tmp_path / "site-packages" / "kdkernels" / "__main__.py"))
    assert command_line.main(["bench", *options]) == 2
    assert "live in the repository" in capsys.readouterr().err


@pytest.mark.slow
def test_script_with_every_provider():
    """A script in a process of its own, torch.compile included."""
    done = subprocess.run(
        [sys.executable, str(FOLDER / "masked_mse.py"), "--quick", "--skip-tests", "--dtype", "bfloat16"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "| compiled default" in done.stdout and "| ours" in done.stdout and "| eager" in done.stdout


def test_the_gpu_script_in_small(bench, capsys):
    """Every loss through benchmarks/gpu.py, on the CPU where there is no GPU: it runs, and refuses nobody."""
    assert bench("gpu").main(["--smoke", "--no-compile", "--dtype", "float32"]) == 0
    said = capsys.readouterr()
    assert "REFUSED" not in said.err and "not timed" not in said.err
    lines = [line for line in said.out.splitlines() if line.startswith("|")]
    losses = {line.split("|")[1].strip() for line in lines[2:]}
    assert losses == set(bench("run").LOSSES)
    assert all(any(f"| {loss}" in line and "ours" in line for line in lines) for loss in losses)


def test_the_gpu_script_needs_a_gpu(bench, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert bench("gpu").main([]) == 2 and "no GPU" in capsys.readouterr().err


def test_gpu_check_resumes(tmp_path):
    """A stage that passed is marked and not run again; one that failed is run again, and the status says so."""

    def check(python: str, *stages: str) -> subprocess.CompletedProcess:
        command = ["bash", str(FOLDER / "gpu_check.sh"), str(tmp_path / "results"), *stages]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHON": python})

    assert check("true", "gpu").returncode == 0
    failed = check("false", "gpu", "bench")
    assert failed.returncode == 1 and "gpu: passed before" in failed.stdout and "bench: FAILED" in failed.stdout
    assert check("true", "gpu", "bench").returncode == 0
