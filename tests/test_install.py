"""What an installation leaves behind, and what the package does where the kernels cannot be had.

The quick part makes wheels without compiling and runs the package in processes of its own; the slow part is the real
thing, by pip, with the checkout deleted before the first use.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from cuda_house import make_nvcc

import kdkernels as kd
from kdkernels import native
from kdkernels.native import build as builder
from kdkernels.native import cache

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("setuptools", minversion="77", reason="making a wheel here needs setuptools >= 77")

# One loss by whatever serves it, then by its formula; the figures of both, and what happened.
CALL = """
import torch, kdkernels as kd
from kdkernels import native
student, teacher = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
kd.temperature_kl_loss(student, teacher).backward()
served, student.grad = student.grad, None
with kd.use_backend("reference"):
    kd.temperature_kl_loss(student, teacher).backward()
torch.testing.assert_close(served, student.grad)
print(kd.__file__, native.status("cpu").state, native.status("cpu").reason, sep=" | ")
"""


def run(*command: str, cwd: Path, **environment: str | None) -> subprocess.CompletedProcess:
    """A process in `cwd`, with variables added, or taken away by None."""
    changed = {**os.environ, **environment}
    kept = {name: value for name, value in changed.items() if value is not None}
    return subprocess.run(command, cwd=cwd, env=kept, capture_output=True, text=True)


@pytest.fixture
def checkout(tmp_path):
    """A copy of what a checkout holds, as it is in the working tree, without what a build leaves there."""
    copy = tmp_path / "checkout"
    unwanted = shutil.ignore_patterns("__pycache__", "lib", "*.so", "*.tmp")
    for name in ("kdkernels", "csrc", "tests", "benchmarks", ".ci"):
        shutil.copytree(ROOT / name, copy / name, ignore=unwanted)
    for path in ROOT.iterdir():
        if path.is_file() and path.suffix in (".py", ".toml", ".in", ".md", "") and path.name != ".git":
            shutil.copy(path, copy)
    return copy


def make(checkout: Path, what: str, **environment: str) -> subprocess.CompletedProcess:
    """Calls the build backend ("build_wheel" or "build_sdist") as pip does; the result is in checkout/dist."""
    code = f"from setuptools import build_meta; build_meta.{what}('dist')"
    return run(sys.executable, "-c", code, cwd=checkout, **environment)


def archive(checkout: Path) -> Path:
    (found,) = (checkout / "dist").iterdir()
    return found


def sources(folder: Path, *suffixes: str) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in suffixes}


# Archives.


def test_wheel_has_the_package_and_its_sources_and_nothing_else(checkout):
    stale = checkout / "build" / "lib" / "kdkernels"
    for name in ("native/lib/kdkernels_cpu.so", "removed_since.py"):
        (stale / name).parent.mkdir(parents=True, exist_ok=True)
        (stale / name).write_text("of an earlier build")
    result = make(checkout, "build_wheel", KDKERNELS_BUILD="0")
    assert result.returncode == 0, result.stderr
    wheel = archive(checkout)
    assert wheel.name == f"kdkernels-{kd.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {f"kdkernels/{name}" for name in sources(ROOT / "kdkernels", ".py")}
    csrc = {f"kdkernels/_csrc/{name}" for name in sources(ROOT / "csrc", ".h", ".cpp", ".cu", ".cuh")}
    metadata = {name for name in names if ".dist-info/" in name}
    assert names - metadata == package | csrc
    assert any(name.endswith("licenses/LICENSE") for name in metadata)


def test_wheel_in_which_nothing_could_be_built_is_for_any_platform(checkout):
    result = make(checkout, "build_wheel", CXX="false")
    assert result.returncode == 0, result.stderr
    assert archive(checkout).name.endswith("-py3-none-any.whl")
    assert re.search("kdkernels: the CPU kernels not built: .*; built on first use instead", result.stdout)


def test_required_kernels_that_cannot_be_built_fail_the_installation(checkout):
    result = make(checkout, "build_wheel", KDKERNELS_BUILD="require", CXX="no-such-compiler")
    assert result.returncode != 0 and not list((checkout / "dist").glob("*.whl"))
    assert "KDKERNELS_BUILD=require, but no C++ compiler ('no-such-compiler' of $CXX is not there)" in result.stderr


def test_source_archive_is_a_whole_checkout(checkout):
    result = make(checkout, "build_sdist")
    assert result.returncode == 0, result.stderr
    with tarfile.open(archive(checkout)) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
        tar.extractall(checkout.parent / "unpacked", filter="data")
    for folder in ("kdkernels", "csrc", "tests"):
        assert {f"{folder}/{name}" for name in sources(ROOT / folder, ".py", ".h", ".cpp", ".cu", ".cuh")} <= names
    assert {"LICENSE", "README.md", "setup.py", "pyproject.toml", "MANIFEST.in"} <= names
    (unpacked,) = (checkout.parent / "unpacked").iterdir()
    result = make(unpacked, "build_wheel", KDKERNELS_BUILD="0")
    assert result.returncode == 0, result.stderr


# What an installation decides to build: with scripts for the compilers, which make empty objects.

GPU = """#!/bin/sh
case "$*" in *compute_cap*) printf '9.0\\n8.6\\n9.0\\n';; esac
"""


@pytest.fixture
def hollow(tmp_path, monkeypatch) -> Path:
    """A folder for PATH, with nothing yet that says there is a GPU."""
    if builder.obstacle("cpu"):
        pytest.skip(f"no build here: {builder.obstacle('cpu')}")
    tools = tmp_path / "tools"
    monkeypatch.setenv("CXX", make_nvcc(tools / "compiler"))
    monkeypatch.setenv("NVCC", make_nvcc(tools / "toolkit"))
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    for name in ("KDKERNELS_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST", "KDKERNELS_BUILD"):
        monkeypatch.delenv(name, raising=False)
    (tools / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tools / "nvidia-smi").chmod(0o755)
    return tools


@pytest.mark.parametrize(
    "how, line",
    [
        ("list", "building the CUDA kernels for sm_80, sm_90, compute_90 (KDKERNELS_CUDA_ARCHS) ..."),
        ("torch's list", "building the CUDA kernels for sm_120 (TORCH_CUDA_ARCH_LIST) ..."),
        ("gpu", "building the CUDA kernels for sm_86, sm_90 (the GPUs here) ..."),
    ],
)
def test_cuda_kernels_are_built_for_what_is_asked_or_there(checkout, hollow, how, line):
    (hollow / "nvidia-smi").write_text(GPU)
    asked = {"list": {"KDKERNELS_CUDA_ARCHS": "8.0;9.0+PTX"}, "torch's list": {"TORCH_CUDA_ARCH_LIST": "7.5 12.0"}}
    result = make(checkout, "build_wheel", **asked.get(how, {}))
    assert result.returncode == 0 and f"kdkernels: {line}\n" in result.stdout, result.stdout + result.stderr
    names = zipfile.ZipFile(archive(checkout)).namelist()
    built = {name for name in names if name.startswith("kdkernels/native/lib/") and "_C" not in name}
    assert built == {f"kdkernels/native/lib/kdkernels_{x}.{y}" for x in ("cpu", "cuda") for y in ("so", "json")}
    assert "linux" in archive(checkout).name


@pytest.mark.skipif(bool(glob.glob("/dev/nvidia[0-9]*")), reason="torch is asked where nvidia-smi does not answer")
def test_without_a_gpu_only_the_cpu_kernels_are_built(checkout, hollow):
    result = make(checkout, "build_wheel", KDKERNELS_BUILD="require")
    assert result.returncode == 0, result.stderr
    assert (
        "the CUDA kernels not built: no GPU here, and KDKERNELS_CUDA_ARCHS is not set; built on first" in result.stdout
    )
    assert not [name for name in zipfile.ZipFile(archive(checkout)).namelist() if "kdkernels_cuda" in name]


@pytest.mark.parametrize(
    "environment, error",
    [
        ({"NVCC": "no-such-nvcc"}, "KDKERNELS_BUILD=require, but no nvcc ('no-such-nvcc' of $NVCC is not there)"),
        ({"KDKERNELS_CUDA_ARCHS": "75"}, "KDKERNELS_BUILD=require, but sm_75: 8.0 is the first that serves"),
        ({"KDKERNELS_CUDA_ARCHS": "pascal"}, "KDKERNELS_CUDA_ARCHS: expected the likes of"),
    ],
)
def test_required_cuda_kernels_that_cannot_be_built_fail_the_installation(checkout, hollow, environment, error):
    asked = {"KDKERNELS_BUILD": "require", "KDKERNELS_CUDA_ARCHS": "90", **environment}
    result = make(checkout, "build_wheel", **asked)
    assert result.returncode != 0 and error in result.stderr and not list((checkout / "dist").glob("*.whl"))
    if "pascal" not in asked.values():  # which is a mistake in any case
        assert make(checkout, "build_wheel", **{**asked, "KDKERNELS_BUILD": "1"}).returncode == 0


# Where the kernels cannot be had.


@pytest.mark.skipif(native.shipped("cpu").exists(), reason="this installation has its kernels")
@pytest.mark.parametrize(
    "environment, reason",
    [
        ({"KDKERNELS_JIT": "0"}, "KDKERNELS_JIT=0 forbids building now"),
        ({"PATH": "/nonexistent", "CXX": None}, "no C++ compiler (g++ or clang++)"),
        ({"CXX": "false"}, "false failed: [code=1]"),
        ({"KDKERNELS_CACHE_DIR": "/proc/nowhere"}, "KDKERNELS_CACHE_DIR=/proc/nowhere cannot be used"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_formulas_serve_and_one_line_says_why(tmp_path, environment, reason):
    if builder.obstacle("cpu") and "CXX" not in environment:
        pytest.skip(f"no build here for another reason: {builder.obstacle('cpu')}")
    ours = {"KDKERNELS_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT), **environment}
    result = run(sys.executable, "-c", CALL, cwd=tmp_path, **ours)
    assert result.returncode == 0, result.stderr
    assert " | failed | " in result.stdout and reason in result.stdout
    said = [line for line in result.stderr.splitlines() if "building the CPU kernels" not in line]
    assert len(said) == 1 and reason in said[0] and said[0].endswith("the PyTorch formulas serve instead")


def shipped(folder: Path, content: bytes, *, recorded: bool) -> Path:
    path = folder / builder.CPU_OBJECT
    path.write_bytes(content)
    if recorded:
        builder.record_of(path).write_text(f'{{"sha256": "{builder._checksum(path)}"}}')
    return path


@pytest.mark.parametrize("recorded", [False, True], ids=["damaged", "of another machine"])
def test_object_of_the_wheel_that_cannot_be_used_is_named_and_replaced(tmp_path, monkeypatch, capfd, recorded):
    assert native.load("cpu")
    good = native.status("cpu").path
    bad = shipped(tmp_path, b"not a shared object", recorded=recorded)
    monkeypatch.setattr(native, "_LIB", bad.parent)
    monkeypatch.setattr(cache, "obtain", lambda: good)
    monkeypatch.setitem(native._status, "cpu", native.Status())
    monkeypatch.delenv("KDKERNELS_JIT", raising=False)
    assert native.load("cpu")
    assert native.status("cpu").path == good and native.status("cpu").reason == "built on first use"
    assert re.search(f"what was built at install cannot be used .*{re.escape(str(bad))}", capfd.readouterr().err)


def test_object_of_the_cache_that_cannot_be_loaded_is_named(tmp_path, monkeypatch, capfd):
    bad = shipped(tmp_path, b"not a shared object", recorded=True)
    monkeypatch.setattr(native, "_LIB", tmp_path / "absent")
    monkeypatch.setattr(cache, "obtain", lambda: bad)
    monkeypatch.setitem(native._status, "cpu", native.Status())
    monkeypatch.setitem(native.failed, "cpu", False)
    monkeypatch.delenv("KDKERNELS_JIT", raising=False)
    assert not native.load("cpu") and native.failed["cpu"]
    assert str(bad) in native.status("cpu").reason
    assert capfd.readouterr().err.count("the PyTorch formulas serve instead") == 1
    assert not native.load("cpu") and capfd.readouterr().err == ""  # said once


# By pip.


@pytest.fixture
def fresh(tmp_path):
    """The Python of a new environment that shares this one's packages, torch among them, but not this installation."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    here = Path(pytest.__file__).parents[1]
    (packages,) = (tmp_path / "venv" / "lib").glob("*/site-packages")
    (packages / "shared.pth").write_text(f"{here}\n")
    return python


def pip_install(python: Path, *arguments: str, cwd: Path, **environment: str | None) -> None:
    command = [str(python), "-m", "pip", "install", "--no-deps", "--no-cache-dir", "--force-reinstall", *arguments]
    result = run(*command, cwd=cwd, PYTHONPATH=None, **environment)
    assert result.returncode == 0, result.stdout + result.stderr


def wheel_tag(python: Path) -> str:
    (path,) = python.parents[1].glob("lib/*/site-packages/kdkernels-*.dist-info/WHEEL")
    return re.search("^Tag: (.*)$", path.read_text(), re.M)[1]


@pytest.mark.slow
def test_pip_without_isolation_puts_the_kernels_into_the_wheel(tmp_path, checkout, fresh):
    cuda = builder.obstacle("cuda") is None
    asked = {"KDKERNELS_BUILD": "require", "KDKERNELS_CUDA_ARCHS": "90" if cuda else None}
    pip_install(fresh, "--no-build-isolation", ".", cwd=checkout, **asked)
    shutil.rmtree(checkout)
    assert "linux" in wheel_tag(fresh)
    code = CALL + "from kdkernels.native.lib import _C; print(_C.cpu_capability(), native.best_cpu_capability())"
    result = run(str(fresh), "-c", code, cwd=tmp_path, PYTHONPATH=None, KDKERNELS_JIT="0")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    file, state, reason = result.stdout.splitlines()[0].split(" | ")
    assert Path(file).is_relative_to(fresh.parents[1]) and (state, reason) == ("loaded", "built at install")
    assert len(set(result.stdout.splitlines()[1].split())) == 1
    table = run(str(fresh), "-m", "kdkernels", "info", cwd=tmp_path, PYTHONPATH=None).stdout
    assert "native module: g" in table or "native module: clang" in table
    assert re.search(r"temperature_kl +cpu +cpu +built at install", table)
    if cuda and not torch.cuda.is_available():
        assert re.search(r"temperature_kl +cuda +cuda .*on a GPU: built at install for sm_90 with CUDA", table)


@pytest.mark.slow
def test_pip_with_isolation_builds_on_first_use(tmp_path, checkout, fresh):
    """Needs the package index, from which pip fetches setuptools, pybind11 and ninja; torch is not among them."""
    pip_install(fresh, ".", cwd=checkout)
    shutil.rmtree(checkout)
    ours = {"PYTHONPATH": None, "KDKERNELS_CACHE_DIR": str(tmp_path / "cache")}
    table = run(str(fresh), "-m", "kdkernels", "info", cwd=tmp_path, **ours)
    assert re.search(r"temperature_kl +cpu +cpu +will be loaded from the cache or built on first use", table.stdout)
    assert table.stderr == ""
    result = run(str(fresh), "-c", CALL, cwd=tmp_path, **ours)
    assert result.returncode == 0 and " | loaded | built on first use" in result.stdout, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 2 and lines[0].startswith("kdkernels: building") and lines[1].startswith("kdkernels: built")
    assert run(str(fresh), "-c", CALL, cwd=tmp_path, **ours).stderr == ""


@pytest.mark.slow
def test_pip_editable_uses_the_checkout(tmp_path, checkout, fresh):
    pip_install(fresh, "--no-build-isolation", "-e", ".", cwd=checkout)
    result = run(str(fresh), "-c", CALL, cwd=tmp_path, PYTHONPATH=None, KDKERNELS_JIT="0")
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.split(" | ")[0]).is_relative_to(checkout)
    code = "from kdkernels.native import build; print(build.source_directory(), build.obstacle('cpu'))"
    assert run(str(fresh), "-c", code, cwd=tmp_path, PYTHONPATH=None).stdout.split()[0] == str(checkout / "csrc")
