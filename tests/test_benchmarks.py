"""The benchmarks as instruments: they write what they promise and refuse wrong numbers. No test here asserts a time."""

from __future__ import annotations

import csv
import itertools
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from benchmark_rows import FOLDER, bench  # noqa: F401

import kdkernels as kd
from kdkernels import __main__ as command_line
from kdkernels import native

ENTRY_POINTS = [
    *("run", "harness", "providers", "shapes", "judge", "measure", "gpu", "report"),
    *("compile_gates", "pages", "guard", "numerics", "fresh_pages"),
]


@pytest.fixture(scope="module", autouse=True)
def kernels():
    assert native.load("cpu"), f"the CPU kernels could not be had: {native.status('cpu').reason}"


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
    providers = {("ours", c) for c in capabilities} | {("eager", ""), ("ours", f"{capabilities[-1]}, two passes")}
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
        assert int(row["threads"]) == 1 and (row["set"], row["device"]) == ("quick", "cpu")
        assert float(row["share_of_floor"]) == pytest.approx(
            float(row["gb_per_s"]) / float(row["floor_gb_per_s"]), rel=0.02
        )
        assert float(row["share_of_copy"]) == pytest.approx(
            float(row["gb_per_s"]) / float(row["copy_gb_per_s"]), rel=0.02
        )
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
    with pytest.raises(SystemExit):
        quick(bench, bench("temperature_kl").BENCHMARK, path)
    assert "--csv" in (said := capsys.readouterr().err) and "other columns" in said


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

    benchmark = replace(masked_mse.BENCHMARK, **{side: broken}, variants={})
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
    swapped = replace(
        kl, variants={}, ours=lambda s, t: kd.temperature_kl_loss(t.float(), s.detach().float()) + 0 * s.float().sum()
    )
    status, rows = quick(bench, swapped, tmp_path / "rows.csv")
    assert status == 1 and {r["provider"] for r in rows} == {"eager"}


@pytest.mark.filterwarnings("ignore:std")
def test_nothing_is_held_against_a_formula_that_is_not_finite(bench, tmp_path, capsys):
    """Pearson of one sample per channel: whatever ours returned would have been as right as the formula."""
    pearson = bench("pearson").BENCHMARK
    one = bench("shapes").Shapes((1, 3, 1, 1), [(1, 3, 1, 1)])
    status, rows = quick(bench, replace(pearson, shapes=one), tmp_path / "rows.csv")
    assert status == 1 and rows == []
    assert "the formula is not finite in float64" in capsys.readouterr().err


def test_a_file_without_its_last_newline_is_gone_on_with(bench, tmp_path):
    report, path = bench("report"), tmp_path / "rows.csv"
    one = dict.fromkeys(report.COLUMNS, "1")
    report.append(path, [one])
    path.write_bytes(path.read_bytes().rstrip())
    report.append(path, [one | {"loss": "2"}])
    assert [row["loss"] for row in report.read(path)] == ["1", "2"]


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
    assert {*run.LOSSES, *run.SEVERAL} == scripts
    assert set(run.LOSSES) == set(kd.backend_info())
    benchmarks = [bench(loss).BENCHMARK for loss in run.LOSSES]
    assert [benchmark.loss for benchmark in benchmarks] == list(run.LOSSES)
    for benchmark in run.benchmarks():
        inputs = benchmark.inputs(benchmark.shapes.quick, torch.float64, torch.Generator().manual_seed(1))
        size = sum(x.numel() for x in judge.tensors(inputs[0] if benchmark.gradient else benchmark.eager(*inputs)))
        assert (
            benchmark.elements(benchmark.shapes.quick)
            <= size
            < 1.2 * benchmark.elements(benchmark.shapes.quick) + 85 * 1024
        )
        eager = judge.evaluate(benchmark.eager, inputs, benchmark.gradient)
        for ours in (benchmark.ours, *benchmark.variants.values(), *benchmark.peers.values()):
            for x, x64 in zip(judge.evaluate(ours, inputs, benchmark.gradient), eager, strict=True):
                # float64 on both sides: 1e-9 is what the contract asks of values and gradients.
                assert judge.error(x, x64) < 1e-9, benchmark.loss


def test_everybody_comes_after_everybody_else(bench):
    """Whoever follows the one that gave back gigabytes pays for it: in turns of a fixed order, always the same one."""
    measure = bench("measure")
    names = [*"abcdef"]
    rounds = [measure.turns(names, number) for number in range(60)]
    assert all(sorted(turn) == names for turn in rounds)
    pairs = {(one, other) for turn in rounds for one, other in itertools.pairwise(turn)}
    assert len(pairs) == 30
    assert rounds == [measure.turns(names, number) for number in range(60)], "the same in every run"


def test_memory_sees_a_buffer_of_feature_size(bench):
    measure, harness = bench("measure"), bench("harness")
    pearson = bench("pearson").BENCHMARK
    inputs = pearson.inputs((2, 16, 64, 64), torch.float32, torch.Generator().manual_seed(0))
    feature = inputs[0].numel() * 4
    lean = measure.forward_memory(pearson, harness.Provider("ours", "", pearson.ours), inputs)
    fat = measure.forward_memory(pearson, harness.Provider("eager", "", pearson.eager), inputs)
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
    ]
    options.insert(0, "bounded_regression")
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


def test_sets_of_shapes(bench):
    """A shape is in one set, so that its rows are of one kind; each set is what the options say."""
    for benchmark in bench("run").benchmarks():
        shapes = benchmark.shapes
        every = [shape for name, shape in shapes.each()]
        assert len(set(every)) == len(every), benchmark.loss
        assert all(len(shape) == len(shapes.quick) for shape in every), benchmark.loss
        assert shapes.default and len(shapes.scaling) >= 5
        sizes = [benchmark.elements(shape) for shape in shapes.scaling]
        assert sizes == sorted(sizes) and sizes[-1] > 100 * sizes[0]
        cpu, gpu = (shapes.chosen(["default"], device) for device in ("cpu", "cuda"))
        assert [shape for _, shape in cpu] == list(shapes.default)
        assert [shape for _, shape in gpu] == [*shapes.default, *shapes.large]
        assert dict(map(reversed, shapes.chosen(["all"], "cpu"))).keys() == {*every} - {*shapes.scaling, shapes.quick}
        assert shapes.chosen([shapes.default[0]], "cpu") == [("default", shapes.default[0])]
        unheard = (7,) * (len(shapes.quick) - 1) + shapes.quick[-1:]
        assert shapes.chosen([unheard], "cpu") == [("given", unheard)]


def test_large_cases_are_left_out_on_a_cpu(bench, capsys):
    harness = bench("harness")
    options = harness.parser().parse_args(["--shapes", "all", "scaling", "--dtype", "float32"])
    cases = harness._cases(bench("run").benchmarks(), options)
    assert max(4 * b.reads * b.elements(shape) for b, _, shape, _ in cases) < 650e6
    left_out = capsys.readouterr().err
    for benchmark in bench("run").benchmarks():
        for shape in benchmark.shapes.large:
            assert f"{benchmark.loss} {shape}: left out" in left_out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pearsn"], "no benchmark of pearsn"),
        (["--shapes", "biggest"], "'biggest' is neither one of default"),
        (["--shapes", "2x8x9x7"], "name the losses"),
        (["pearson", "temperature_kl", "--shapes", "2x8x9x7"], "a shape of temperature_kl is like 16x100"),
        (["bounded_regression", "--shapes", "512x21"], "a shape of bounded_regression is like 64x4"),
        (["--device", "cuda"], "sees no GPU"),
        (["--threads", "0"], "--threads: expected a whole number of 1 or more, got '0'"),
        (["--rounds", "-1"], "--rounds: expected a whole number"),
        (["--seconds", "nan"], "--seconds: expected a number of seconds, got 'nan'"),
        (["--budget", "soon"], "--budget: expected a number of seconds, got 'soon'"),
        (["pearson", "--shapes", "2x0x9x7"], "--shapes 2x0x9x7: there is nothing in it"),
        (["pearson", "--quick", "--shapes", "2x8x9x7"], "--quick: has shapes of its own"),
        (["masks", "--dtype", "bfloat16"], "--dtype bfloat16: masks has float32 alone"),
        (["--quick", "--csv", str(FOLDER)], "--csv: "),
        (["--csv", str(FOLDER / "run.py" / "x.csv")], "--csv: "),
        (["--quick", "--report", str(FOLDER / "run.py")], "--report: "),
    ],
)
def test_options_that_make_no_sense(bench, capsys, arguments, said):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as end:
        bench("run").main(arguments)
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_given_shapes_and_ladders(bench, tmp_path, capsys, monkeypatch):
    """Explicit shapes are timed as given; a ladder has ours at its best and the formula, nobody else."""
    harness, path = bench("harness"), tmp_path / "rows.csv"
    monkeypatch.setattr(bench("providers"), "compiled", lambda *_: None)  # it takes long
    monkeypatch.setattr(bench("measure"), "copy_speed", lambda megabytes: 1e9)
    kl = replace(bench("temperature_kl").BENCHMARK, shapes=bench("shapes").Shapes((4, 5), [(4, 6)], scaling=[(4, 7)]))
    few = ["--skip-tests", "--threads", "1", "--rounds", "2", "--dtype", "float32", "--csv", str(path)]
    assert harness.main([kl], ["temperature_kl", "--shapes", "scaling", "3x9", *few, "--budget", "60"]) == 0
    rows = list(csv.DictReader(path.open(newline="")))
    assert {(r["set"], r["shape"]) for r in rows} == {("scaling", "4x7"), ("given", "3x9")}
    best = native.best_cpu_capability()
    ladder = {(r["provider"], r["setting"]) for r in rows if r["set"] == "scaling"}
    assert ladder == {("ours", best), ("eager", "")}
    given = {(r["provider"], r["setting"]) for r in rows if r["set"] == "given"}
    assert given > ladder | {("ours", f"{best}, two passes"), ("eager", "mmdet")}
    assert "Liger's kernels are Triton's and need a GPU" in capsys.readouterr().err
    assert harness.main([kl], [*few, "--budget", "-1"]) == 1
    assert "left out, the --budget is spent" in capsys.readouterr().err
    assert len(list(csv.DictReader(path.open(newline="")))) == len(rows)


def test_masks_are_timed_without_a_gradient(bench, tmp_path, capsys):
    masks = bench("masks").BENCHMARKS[0]
    status, rows = quick(bench, masks, tmp_path / "rows.csv")
    capabilities = native.CAPABILITIES[: native.CAPABILITIES.index(native.best_cpu_capability()) + 1]
    who = {("ours", name) for name in capabilities} | {("eager", "")}
    assert status == 0 and {(r["provider"], r["setting"]) for r in rows} == who
    assert {(r["mode"], r["loss_error"], r["gradient_error"]) for r in rows} == {("no_grad", "0.0e+00", "")}
    cells = 2 * (16 * 24 + 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2)
    assert {int(r["bytes"]) for r in rows} == {4 * cells} and all(r["over_touched"] for r in rows)
    boxes, sizes = masks.inputs((2, 60, 800, 1344), torch.float32, torch.Generator().manual_seed(0))
    boxes[1] = torch.cat([boxes[1], torch.tensor([[0.0, 0, 1343, 799]])])  # the last level's
    for drawn, published in zip(masks.ours(boxes, sizes), masks.eager(boxes, sizes), strict=True):
        assert drawn.equal(published) and 0 < drawn.mean() < 1
    one_cell_off = replace(masks, ours=lambda *inputs: [m.roll(1, -1) for m in masks.ours(*inputs)])
    status, rows = quick(bench, one_cell_off, tmp_path / "other.csv")
    assert status == 1 and {r["provider"] for r in rows} == {"eager"}


def test_the_gpu_clock_in_small(bench, tmp_path, monkeypatch):
    """Every line of gpu.py that does without a GPU, and rows out of what it measured."""
    gpu, harness, report = bench("gpu"), bench("harness"), bench("report")
    monkeypatch.setattr(gpu, "WARM_UP", 0.0)
    for benchmark in bench("run").benchmarks():
        inputs = benchmark.inputs(benchmark.shapes.quick, torch.float32, torch.Generator().manual_seed(0))
        providers = [harness.Provider("ours", "cuda", benchmark.ours), harness.Provider("eager", "", benchmark.eager)]
        times, floors = gpu.interleaved(benchmark, providers, inputs, 2, 0.0, lambda line: None)
        memory = {p.name: gpu.forward_memory(benchmark, p, inputs) for p in providers}
        case = report.Case(benchmark, "quick", benchmark.shapes.quick, torch.float32, 1000)
        options = harness.parser().parse_args([])
        options.copy_speed = gpu.copy_speed(1)
        errors = {p.name: (0.0, 0.0) for p in providers}
        host = {p.name: 1e-5 for p in providers}
        rows = report.rows(case, providers, times, floors, memory, errors, host, options)
        assert len(rows) == 2 * (4 if benchmark.gradient else 1), benchmark.loss
        assert all(float(r["ms_p50"]) > 0 and float(r["share_of_copy"]) > 0 and not r["floor_fresh_ms"] for r in rows)
        assert {r["host_us"] for r in rows if r["mode"] == "both"} <= {"10.0"}
        on_a_gpu = report.table([row | {"device": "some GPU"} for row in rows])
        assert on_a_gpu.startswith("some GPU") and ("10.0" in on_a_gpu) == benchmark.gradient
        if benchmark.gradient:
            assert gpu.trial(benchmark.eager, inputs, 1) > 0
            sets = gpu.rotation(benchmark, inputs)
            assert gpu.host_time(providers[0], sets[0], 2) > 0
