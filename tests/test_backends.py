"""Which implementation serves a call, how that is forced, told and switched off, and what an import pulls in."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from losses import LOSSES, op_calls

import kdkernels as kd
from kdkernels import native, ops
from kdkernels.native import build as builder

ALL = pytest.mark.parametrize("name", LOSSES)


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """A process of its own, with variables added."""
    command = [sys.executable, *(("-c", code) if code else ()), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def kernel_runs(name: str, **keywords) -> bool:
    return bool(op_calls(LOSSES[name].inputs(**keywords)))


@ALL
def test_kernels_serve_by_default(name):
    assert kernel_runs(name)
    with kd.use_backend("cpu"):
        assert kernel_runs(name)
    with kd.use_backend("reference"):
        assert not kernel_runs(name)


def test_use_backend_nests_and_restores():
    assert kernel_runs("binary_kl")
    with kd.use_backend("reference"):
        with kd.use_backend("cpu"):
            assert kernel_runs("binary_kl")
        assert not kernel_runs("binary_kl")
        with pytest.raises(ZeroDivisionError), kd.use_backend("cpu"):
            raise ZeroDivisionError
        assert not kernel_runs("binary_kl")
    assert kernel_runs("binary_kl")


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"name: expected one of .*'rocm'"):
        with kd.use_backend("rocm"):
            pass


@ALL
@pytest.mark.parametrize("forced", ["cuda", "triton"])
def test_forced_and_unable(name, forced):
    """The message names op, backend, device and dtypes."""
    inputs = LOSSES[name].inputs()
    with kd.use_backend(forced), pytest.raises(RuntimeError) as caught:
        inputs(*inputs.students)
    assert all(word in str(caught.value) for word in (name, forced, "torch.float32", "on cpu"))


@ALL
def test_forced_and_unable_for_a_pair_of_dtypes(name):
    inputs = LOSSES[name].inputs()
    inputs.students = [s.half() for s in inputs.students]
    inputs.others[0] = [t.bfloat16() for t in inputs.others[0]] if inputs.listed else inputs.others[0].bfloat16()
    with kd.use_backend("cpu"), pytest.raises(RuntimeError, match=r"torch\.float16.*torch\.bfloat16"):
        inputs(*inputs.students)
    assert not op_calls(inputs)  # unforced, the formula serves
    assert inputs(*inputs.students).isfinite()


@ALL
def test_a_float32_teacher_has_a_kernel(name):
    inputs = LOSSES[name].inputs()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        inputs.students = [s.to(dtype) for s in inputs.students]
        assert op_calls(inputs)


def test_a_weight_with_gradient_cannot_be_forced():
    inputs = LOSSES["masked_mse"].inputs(variant="tensors")
    inputs.keywords["foreground_weight"].requires_grad_()
    with kd.use_backend("cpu"), pytest.raises(RuntimeError, match="gradient"):
        inputs(*inputs.students)


USED = """
import torch, kdkernels as kd
from kdkernels import native
kd.binary_kl_loss(torch.zeros(2, 3), torch.zeros(2, 3))
print(native.status("cpu").state)
"""


def test_the_environment_is_the_outermost_use_backend():
    assert python(USED, KDKERNELS_BACKEND="reference").stdout == "unloaded\n"
    assert python(USED, KDKERNELS_BACKEND="cpu").stdout == "loaded\n"
    assert python(USED, KDKERNELS_BACKEND="").stdout == "loaded\n"
    refused = python(USED, KDKERNELS_BACKEND="triton")
    assert refused.returncode != 0 and "RuntimeError: binary_kl: backend 'triton' is forced" in refused.stderr


def test_a_bad_value_in_the_environment_is_refused_at_import():
    run = python("import kdkernels", KDKERNELS_BACKEND="gpu")
    assert run.returncode != 0
    assert "KDKERNELS_BACKEND" in run.stderr and "'gpu'" in run.stderr and "reference" in run.stderr


def test_backend_info():
    info = kd.backend_info(build=True)
    assert set(info) == set(LOSSES)
    for devices in info.values():
        backend, why = devices["cpu"]
        assert backend == "cpu" and native.cpu_capability() in why
        assert devices["cuda"][0] in ops.BACKENDS
    lines = str(info).splitlines()
    assert len(lines) == 1 + sum(len(devices) for devices in info.values())
    assert all(any(line.startswith(name) for line in lines) for name in LOSSES)
    with kd.use_backend("reference"):
        assert {devices["cpu"] for devices in kd.backend_info().values()} == {("reference", "forced")}


CAPABILITY = "from kdkernels import native; print(native.cpu_capability(), native.best_cpu_capability())"


@pytest.mark.parametrize("wanted", native.CAPABILITIES)
def test_the_environment_lowers_the_instruction_set(wanted):
    got, best = python(CAPABILITY, KDKERNELS_CPU_CAPABILITY=wanted).stdout.split()
    order = native.CAPABILITIES.index
    assert order(got) == min(order(wanted), order(best))


def test_set_cpu_capability():
    best = native.best_cpu_capability()
    assert native.set_cpu_capability("base") == "base" == native.cpu_capability()
    assert native.set_cpu_capability(native.CAPABILITIES[-1]) == best
    with pytest.raises(ValueError, match="name"):
        native.set_cpu_capability("sse9")


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_no_code_of_one_instruction_set_can_serve_another():
    """The linker keeps one copy of each weak symbol. If an AVX-512 file defined one that base code calls, older CPUs
    would die of it. So every kernel lives in its capability's namespace, and nothing weak or global is shared."""
    assert native.load("cpu")
    path = str(native.status("cpu").path)
    lines = subprocess.run(["nm", "-C", "--defined-only", path], capture_output=True, text=True).stdout.splitlines()
    symbols = [m.groups() for m in (re.match(r"[0-9a-f]+ (\w) (.*)", line) for line in lines) if m]
    kernels = [name for _, name in symbols if re.search(r"kdkernels::(base|avx2|avx512)::", name)]
    assert kernels
    torchs = re.compile(r"\b(std|torch|c10|__gnu_cxx)::|DW.ref.__gxx_personality")
    for kind, name in symbols:
        if kind in "WVu" and not torchs.search(name):
            assert re.search(r"kdkernels::(base|avx2|avx512)::", name), f"weak, outside the namespaces: {name}"


def test_kernels_include_no_templates_of_the_standard_library():
    """Those would be weak symbols of std::, which the linked object no longer tells from torch's own."""
    sources = [p for folder in ("cpu", "math") for p in (builder.source_directory() / folder).iterdir()]
    included = {name for p in sources for name in re.findall(r"#include <(.*)>", p.read_text())}
    assert included <= {"math.h", "stdint.h", "stdlib.h", "string.h", "immintrin.h", "cpuid.h"}


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_exported_symbols():
    """Only the C functions that Python calls are visible, so that no other library can meet ours."""
    assert native.load("cpu")
    path = str(native.status("cpu").path)
    lines = subprocess.run(["nm", "-D", "-C", "--defined-only", path], capture_output=True, text=True).stdout
    names = {line.split(" ", 2)[2] for line in lines.splitlines()}
    ours = {name for name in names if "kd" in name.lower()}
    assert ours == {f"kdkernels_cpu_{n}" for n in ("capability", "best_capability", "set_capability")}


@pytest.mark.parametrize("module", ["triton", "torchvision", "matplotlib", "sklearn", "kdkernels.harness"])
def test_an_import_pulls_in_no_extra(module):
    """Beside what torch itself imports."""
    code = f"""
import sys, torch
before = set(sys.modules)
import kdkernels
print({module!r} in set(sys.modules) - before)
"""
    assert python(code).stdout == "False\n"


def test_an_import_builds_and_loads_nothing():
    code = "import kdkernels; from kdkernels import native; print(native.status('cpu').state)"
    assert python(code).stdout == "unloaded\n"


def test_the_info_command():
    run = python("", "-m", "kdkernels", "info")
    assert run.returncode == 0, run.stderr
    assert kd.__version__ in run.stdout and torch.__version__ in run.stdout
    assert all(name in run.stdout for name in LOSSES)


def test_an_unknown_command():
    run = python("", "-m", "kdkernels", "trian")
    assert run.returncode == 2 and "trian" in run.stderr and not run.stdout


def test_without_a_command_the_commands_are_listed():
    run = python("", "-m", "kdkernels")
    assert run.returncode == 0 and "train" in run.stdout and "info" in run.stdout


TRITON = "from kdkernels import ops; print(ops._triton_obstacle())"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")
def test_triton_is_not_chosen_where_it_could_not_launch(tmp_path):
    """It builds a launcher for each kernel, so without a C compiler its first call would fail."""
    plain = {"TRITON_INTERPRET": "0", "CC": ""}
    assert python(TRITON, **plain, PATH=str(tmp_path)).stdout.startswith("triton needs a C compiler")
    assert python(TRITON, TRITON_INTERPRET="1", CC="", PATH=str(tmp_path)).stdout == "None\n"
