"""`python -m kdkernels info --check`: right here, loud where a kernel is broken, patient where a backend is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import kdkernels as kd
from kdkernels import __main__, native, ops
from kdkernels.losses import temperature_kl
from kdkernels.selfcheck import checks, command, facts, inputs, targets
from kdkernels.selfcheck.targets import Target


@pytest.fixture
def quick(monkeypatch):
    """The first two inputs of each loss, and no large one."""
    for name, loss in inputs.LOSSES.items():
        monkeypatch.setitem(inputs.LOSSES, name, replace(loss, cases=loss.cases[:2], middle=loss.cases[0]))


def told(capsys, *names: str) -> tuple[int, str]:
    status = command.check(names, timed=False)
    return status, capsys.readouterr().out


def wrong(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("WRONG: ")]


def test_every_loss_is_checked():
    assert set(inputs.LOSSES) == {*ops.LOSSES, "detection_distillation"}


def test_all_is_right_here(quick, capsys):
    status, output = told(capsys)
    assert status == 0 and not wrong(output), output
    for i, name in enumerate(inputs.LOSSES, 1):
        assert f"  {i} of {len(inputs.LOSSES)}: {name}: " in output  # progress
    here, absent = targets.find()
    assert [t.label for t in here if t.backend == "cpu"][-1] == f"cpu {native.cpu_capability()}"
    assert all(target.label in output for target in here) and all(why in output for why in absent.values())


def test_edges_extremes_and_speed_of_one_loss(capsys):
    """Through the command, as it is typed."""
    assert __main__.main(["info", "--check", "bounded_regression"]) == 0
    output = capsys.readouterr().out
    assert "x formula" in output and "1 of 1: bounded_regression" in output
    last = output.splitlines()[-1]
    assert last.startswith("kdkernels ") and "bounded_regression: " in last and " 0 wrong" in last


def test_the_line_has_everything(monkeypatch):
    monkeypatch.setenv("KDKERNELS_JIT", "1")
    monkeypatch.setenv("KDKERNELS_CACHE_DIR", "/home/somebody")
    here, absent = targets.find()
    line = facts.line(here, absent)
    assert "\n" not in line and "/home/somebody" not in line
    for fact in (
        f"kdkernels {kd.__version__}",
        f"torch {torch.__version__}",
        "triton ",
        f"Python {sys.version.split()[0]}",
        sys.platform.capitalize(),
        f"{os.cpu_count()} cores",
        native.cpu_capability(),
        "GPU ",
        "KDKERNELS_JIT=1",
        "KDKERNELS_CACHE_DIR set",
        *(target.label for target in here),
        *absent,
    ):
        assert fact in line


def broken(monkeypatch, op, change) -> None:
    """The CPU's kernel of an op, with its results changed; calls are counted from 0."""
    real, calls = ops.OPS[op]["cpu"], []

    def run(*arguments):
        calls.append(None)
        return change(real(*arguments), len(calls) - 1)

    monkeypatch.setitem(ops.OPS[op], "cpu", run)


def test_a_broken_gradient(quick, monkeypatch, capsys):
    """Told are loss, backend, dtype, input and form, the error and what would be accepted."""
    broken(monkeypatch, "binary_kl_one_pass", lambda found, _: (found[0], found[1] * 1.05))
    status, output = told(capsys, "binary_kl")
    lines = wrong(output)
    assert status == 1 and lines and all("one pass" in line for line in lines)
    assert any("binary_kl on cpu base, float32, ordinary, one pass: gradient 0: error 5" in line for line in lines)
    assert all("accepted" in line for line in lines)
    assert "wrong (binary_kl on cpu " in output.splitlines()[-1]


def test_a_broken_value_in_two_passes(quick, monkeypatch, capsys):
    broken(monkeypatch, "binary_kl", lambda found, _: (found[0] * 1.01, *found[1:]))
    status, output = told(capsys, "binary_kl")
    assert status == 1 and any("float64, ordinary, two passes: loss: error" in line for line in wrong(output))
    assert not any("one pass" in line for line in wrong(output))


def test_other_bits_at_the_second_call(quick, monkeypatch, capsys):
    """By one unit in the last place, which no bound of numbers sees."""

    def drift(found, call):
        return (torch.nextafter(found[0], found[0] + 1) if call % 2 else found[0]), *found[1:]

    broken(monkeypatch, "binary_kl_one_pass", drift)
    status, output = told(capsys, "binary_kl")
    assert status == 1
    assert all("second call with one thread: loss: other bits" in line for line in wrong(output))


@pytest.mark.parametrize("op", ["ground_truth_masks", "gaussian_masks"])
def test_a_mask_with_a_wrong_cell(quick, monkeypatch, capsys, op):
    def one_cell(masks, _):
        masks[1][1, 0, 0] = 1 - masks[1][1, 0, 0]
        return masks

    assert kd.masks._KERNELS[op] is ops.OPS[op]
    broken(monkeypatch, op, one_cell)
    status, output = told(capsys, "masked_mse")
    assert status == 1 and f"masked_mse on cpu base, {op} from boxes: level 1: 1 of 442 cells" in output


def test_boxes_mark_every_level():
    rows, keywords = inputs.boxes()
    assert all(0 < mask.mean() < 1 for mask in kd.masks.ground_truth_masks(rows, **keywords))


def test_a_kernel_that_raises(quick, monkeypatch, capsys):
    def fail(found, call):
        raise RuntimeError("an illegal instruction\nand more")

    broken(monkeypatch, "binary_kl", fail)
    status, output = told(capsys, "binary_kl")
    assert status == 1 and "Traceback" not in output
    assert any(line.endswith("two passes: RuntimeError: an illegal instruction") for line in wrong(output))


def test_a_formula_that_raises_on_its_device(quick, monkeypatch):
    """As on a GPU that an earlier kernel has stopped."""

    def fail(*arguments, **keywords):
        raise RuntimeError("unspecified launch failure")

    monkeypatch.setattr(checks, "formula", fail)
    failures = tally_of("binary_kl", [Target("reference")]).failures
    assert failures and all(line.endswith("the formula: RuntimeError: unspecified launch failure") for line in failures)


def test_a_broken_formula(quick, monkeypatch, capsys):
    """What judges the kernels is itself held to the published values."""
    real = temperature_kl.formula
    monkeypatch.setattr(temperature_kl, "formula", lambda *args, **keywords: 1.001 * real(*args, **keywords))
    status, output = told(capsys, "temperature_kl")
    assert status == 1 and "temperature_kl on formula" in output.splitlines()[-1]
    failures = tally_of("temperature_kl", [Target("reference")]).failures
    assert any("on formula, float64, published value" in line for line in failures)


def tally_of(name: str, here: list[Target] | None = None) -> checks.Tally:
    tally = checks.Tally()
    checks.run(name, targets.find()[0] if here is None else here, tally)
    return tally


def test_the_objective_must_equal_the_sum(quick, monkeypatch):
    loss = inputs.LOSSES["detection_distillation"]
    swapped = lambda *args, **keywords: loss.function(*args, **keywords) * 1.01  # noqa: E731
    monkeypatch.setitem(inputs.LOSSES, "detection_distillation", replace(loss, function=swapped))
    failures = tally_of("detection_distillation").failures
    assert any("gradient 0: error 1.00e-02" in line for line in failures)
    assert any(line.startswith("detection_distillation on formula") for line in failures)


def test_threads_and_backend_are_left_as_they_were(quick):
    before = torch.get_num_threads(), ops._forced, native.load("cpu") and native.cpu_capability()
    tally_of("bounded_regression")
    assert before == (torch.get_num_threads(), ops._forced, native.cpu_capability())


@pytest.mark.parametrize("backend", ["cuda", "triton"], indirect=True)
def test_the_kernels_of_a_gpu(backend, quick):
    """In the emulator and in Triton's interpreter where there is no GPU."""
    tally = tally_of("bounded_regression", [Target(backend), Target("reference")])
    assert not tally.failures and tally.right["bounded_regression", backend] > 20


def test_a_missing_backend_is_no_fault(quick, monkeypatch, capsys):
    """No compiled kernels at all: the formula is what is left, and the reason is told."""
    monkeypatch.setitem(native._status, "cpu", native.Status("failed", None, "no C++ compiler"))
    status, output = told(capsys, "binary_kl")
    assert status == 0 and "Not here: cpu: no C++ compiler." in output
    assert not any(f"cpu {name}" in output for name in native.CAPABILITIES)
    assert "no cpu (no C++ compiler)" in output.splitlines()[-1]


def test_without_a_compiler(tmp_path):
    """As a user without one runs it. Not in a folder that a build filled before."""
    environment = {**os.environ, "KDKERNELS_JIT": "0", "KDKERNELS_CACHE_DIR": str(tmp_path), "CXX": "no-such-compiler"}
    environment.pop("KDKERNELS_BACKEND", None)
    run = subprocess.run(
        [sys.executable, "-m", "kdkernels", "info", "--check", "bounded_regression"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr
    if not native.shipped("cpu").exists():
        assert "KDKERNELS_JIT=0 forbids building now" in run.stdout.splitlines()[-1]


def test_an_unknown_loss(capsys):
    with pytest.raises(SystemExit) as caught:
        __main__.main(["info", "--check", "person"])
    assert caught.value.code == 2
    assert "--check: no loss 'person'; there are masked_mse, pearson" in capsys.readouterr().err
