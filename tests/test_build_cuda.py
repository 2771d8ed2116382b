"""Which GPUs the CUDA kernels are built for, where nvcc is found, what a build depends on and how it is called: with a
script for nvcc, so that neither CUDA nor a GPU is needed. The real thing is in test_registration.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_house import make_house, make_nvcc

from kdkernels.native import build as builder
from kdkernels.native import cache, cuda

pytestmark = pytest.mark.skipif(builder.obstacle("cpu") is not None, reason=f"no build here: {builder.obstacle('cpu')}")

KNOWN = frozenset((75, 80, 86, 87, 89, 90, 100, 103, 120))


@pytest.fixture
def house(tmp_path, monkeypatch):
    """See cuda_house.py."""
    return make_house(tmp_path, monkeypatch)


# Architectures.


@pytest.mark.parametrize(
    "text, codes",
    [
        ("80;90", ["sm_80", "sm_90"]),
        ("8.0 9.0+PTX", ["sm_80", "sm_90", "compute_90"]),
        ("9.0a, 100f", ["sm_90a", "sm_100f"]),
        ("sm_86;compute_120", ["sm_86", "compute_120"]),
        ("12.0+ptx", ["sm_120", "compute_120"]),
        ("Hopper", ["sm_90", "compute_90"]),
        ("90;9.0", ["sm_90"]),
    ],
)
def test_architectures_are_read(text, codes):
    assert cuda.parse(text) == codes


@pytest.mark.parametrize("text", ["volta9", "9", "8.0;x", "90-a", "native;80"])
def test_architectures_that_cannot_be_read(text, house, monkeypatch):
    with pytest.raises(cuda.ArchitectureError, match="cannot read"):
        cuda.parse(text)
    monkeypatch.setenv("KDKERNELS_CUDA_ARCHS", text)
    with pytest.raises(builder.BuildError, match="cannot read"):
        builder.cuda_architectures(())


def test_the_environment_is_read_at_import():
    environment = {**os.environ, "KDKERNELS_CUDA_ARCHS": "volta9"}
    run = subprocess.run([sys.executable, "-c", "import kdkernels"], capture_output=True, text=True, env=environment)
    assert (
        run.returncode != 0 and "KDKERNELS_CUDA_ARCHS: expected the likes of" in run.stderr and "volta9" in run.stderr
    )


def test_all_is_what_this_nvcc_knows_of_the_list_and_ptx_of_the_newest():
    everything = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "compute_120"]
    assert cuda.wanted("all", KNOWN, ()) == everything
    assert cuda.wanted("ALL", frozenset((70, 80, 86, 89, 90)), ()) == [*everything[:4], "compute_90"]


@pytest.mark.parametrize(
    "present, codes",
    [
        ([(9, 0)], ["sm_90"]),
        ([(9, 0), (8, 0), (9, 0)], ["sm_80", "sm_90"]),
        ([(8, 7)], ["sm_87"]),
        ([(10, 7)], ["sm_103"]),  # the same family, the nearest older member
        ([(12, 1)], ["sm_120"]),
        ([(11, 0)], ["compute_103"]),  # a family that this nvcc does not know: translated by the driver
        ([(13, 0)], ["compute_120"]),
    ],
)
def test_what_the_present_gpus_need(present, codes):
    assert cuda.for_gpus(present, KNOWN) == codes == cuda.wanted("native", KNOWN, present)
    assert all(any(cuda.runs_on(code, gpu) for code in codes) for gpu in present)


def test_gpus_that_cannot_be_served():
    with pytest.raises(cuda.ArchitectureError, match=r"compute capability 7\.5: .* need 8\.0"):
        cuda.for_gpus([(9, 0), (7, 5)], KNOWN)
    with pytest.raises(cuda.ArchitectureError, match="knows nothing"):
        cuda.for_gpus([(8, 0)], frozenset((90,)))
    with pytest.raises(cuda.ArchitectureError, match='"native", but there is no GPU'):
        cuda.wanted("native", KNOWN, ())


def test_the_environment_decides_what_is_built(house, monkeypatch):
    """KDKERNELS_CUDA_ARCHS, then at install TORCH_CUDA_ARCH_LIST, then the GPUs."""
    gpu = ((9, 0),)
    assert builder.cuda_architectures(gpu) == (["sm_90"], "the GPUs here")
    with pytest.raises(builder.BuildError, match="no GPU here, and KDKERNELS_CUDA_ARCHS is not set"):
        builder.cuda_architectures(())
    # A list for all of torch: what is too old for these kernels, or too new for this nvcc, is left out.
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5;8.0;13.0+PTX")
    assert builder.cuda_architectures(gpu) == (["sm_90"], "the GPUs here")
    assert builder.cuda_architectures((), installing=True) == (["sm_80"], "TORCH_CUDA_ARCH_LIST")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0")
    assert builder.cuda_architectures(gpu, installing=True) == (["sm_90"], "the GPUs here")
    monkeypatch.setenv("KDKERNELS_CUDA_ARCHS", "8.6")
    assert builder.cuda_architectures(gpu, installing=True) == (["sm_86"], "KDKERNELS_CUDA_ARCHS")
    for text, why in {"75": "8.0 is the first that serves", "130": "this nvcc does not know it"}.items():
        monkeypatch.setenv("KDKERNELS_CUDA_ARCHS", text)
        with pytest.raises(builder.BuildError, match=f"sm_{text}: {why}"):
            builder.cuda_architectures(gpu)


@pytest.mark.parametrize(
    "code, runs, does_not",
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        ("sm_86", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("sm_90a", [(9, 0)], [(9, 1), (10, 0)]),
        ("sm_100f", [(10, 0), (10, 3)], [(12, 0)]),
        ("compute_90", [(9, 0), (10, 0), (12, 1)], [(8, 9)]),
        ("compute_90a", [(9, 0)], [(10, 0)]),
    ],
)
def test_what_runs_where(code, runs, does_not):
    assert all(cuda.runs_on(code, capability) for capability in runs)
    assert not any(cuda.runs_on(code, capability) for capability in does_not)


# nvcc.


def test_where_nvcc_is_looked_for(tmp_path, monkeypatch):
    places = {name: make_nvcc(tmp_path / name / "bin") for name in ("own", "home", "path", "site/nvidia/cu13")}
    for name in ("NVCC", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cuda, "_USUAL", str(tmp_path / "nothing"))
    (tmp_path / "site" / "nvidia").mkdir(exist_ok=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    monkeypatch.setenv("PATH", "/nonexistent")
    for module in [name for name in sys.modules if name.split(".")[0] == "nvidia"]:
        monkeypatch.delitem(sys.modules, module)
    assert cuda.nvcc() == [places["site/nvidia/cu13"]]
    monkeypatch.setenv("PATH", str(tmp_path / "path" / "bin"))
    assert cuda.nvcc() == [places["path"]]
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert cuda.nvcc() == [places["home"]]
    monkeypatch.setenv("NVCC", f"{places['own']} --threads 2")
    assert cuda.nvcc() == [places["own"], "--threads", "2"]


def test_an_nvcc_that_is_too_old_is_passed_over_or_named(tmp_path, monkeypatch):
    new = make_nvcc(tmp_path / "new" / "bin", "12.1")
    make_nvcc(tmp_path / "old" / "bin", "11.8")
    monkeypatch.delenv("NVCC", raising=False)
    monkeypatch.setattr(cuda, "_USUAL", str(tmp_path / "nothing"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "old"))
    monkeypatch.setenv("PATH", str(tmp_path / "new" / "bin"), prepend=os.pathsep)
    assert cuda.nvcc() == [new] and cuda.obstacle() is None
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "nvcc 11.8 is too old: 12.1" in cuda.obstacle()


@pytest.mark.parametrize("wanted", ["no-such-nvcc", "nvcc 'half a quote"])
def test_no_nvcc(house, monkeypatch, wanted):
    monkeypatch.setenv("NVCC", wanted)
    assert "no nvcc" in builder.obstacle("cuda") and "of $NVCC is not there" in builder.obstacle("cuda")
    assert builder.obstacle("cpu") is None
    with pytest.raises(builder.BuildError, match="no nvcc"):
        builder.build("cuda", house / "out", ["sm_90"])


def test_an_nvcc_that_does_not_run(house, monkeypatch):
    monkeypatch.setenv("NVCC", "false")
    assert "--version does not answer" in builder.obstacle("cuda")


# What the key of a build depends on.


@pytest.mark.parametrize(
    "changed, cpu, gpu",
    [
        ("arguments.h", True, True),
        ("math/one.h", True, True),
        ("torch/tensors.h", True, True),
        ("cpu/one.cpp", True, False),
        ("cpu/one.h", True, False),
        ("torch/one_cpu.cpp", True, False),
        ("cuda/one.cu", False, True),
        ("cuda/one.cuh", False, True),
        ("cuda/one.h", False, True),
        ("cuda/new.cu", False, True),
        ("torch/one_cuda.cpp", False, True),
        ("torch/cuda.h", False, True),
        ("python.cpp", False, False),
    ],
)
def test_each_object_depends_on_its_own_sources(house, changed, cpu, gpu):
    def keys():
        return [builder.cache_key(house / "csrc", name, ["sm_90"]) for name in ("cpu", "cuda")]

    before = keys()
    (house / "csrc" / changed).write_text("// something\n")
    assert [a != b for a, b in zip(before, keys())] == [cpu, gpu]


def test_the_cuda_key_changes_with_architectures_flags_nvcc_and_compiler(house, monkeypatch):
    def key(*codes):
        return builder.cache_key(house / "csrc", "cuda", codes)

    cpu, keys = builder.cache_key(house / "csrc"), [key("sm_90"), key("sm_80"), key("sm_90", "compute_90")]
    with monkeypatch.context() as changed:
        changed.setattr(builder, "CUDA_FLAGS", [*builder.CUDA_FLAGS, "-lineinfo"])
        keys.append(key("sm_90"))
    monkeypatch.setenv("NVCC", make_nvcc(house / "another"))
    keys.append(key("sm_90"))
    # A script that calls another nvcc from today on.
    versions = iter(["13.0", "13.1"])
    for release in versions:
        monkeypatch.setattr(cuda, "version_line", lambda nvcc, release=release: release)
        keys.append(key("sm_90"))
    assert builder.cache_key(house / "csrc") == cpu
    monkeypatch.setenv("CXX", f"{builder.compiler()[0]} -g")
    keys.append(key("sm_90"))
    assert len(set(keys)) == len(keys)


# Building.


def calls(house: Path) -> list[str]:
    return (house / "toolkit" / "calls").read_text().splitlines()


def test_built_once_then_found(house, capfd):
    target = cache.obtain("cuda", ["sm_80", "sm_90"])
    record = json.loads(builder.record_of(target).read_text())
    assert target.name == builder.CUDA_OBJECT and builder.intact(target)
    assert record["architectures"] == ["sm_80", "sm_90"] and record["cuda"] == "13.0"
    assert record["torch_target"] == builder.TORCH_TARGET and "release 13.0" in record["nvcc"]
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 2 and said[0].startswith("kdkernels: building the CUDA kernels for sm_80, sm_90 (once,")
    compiled, linked = calls(house)
    for words in (compiled, linked):
        assert "-gencode=arch=compute_80,code=sm_80" in words and "-gencode=arch=compute_90,code=sm_90" in words
    assert "one.cu" in compiled and "-DKD_CAPABILITY=cuda" in compiled and "--compress-mode=size" in compiled
    assert "fast" not in compiled and "-ccbin" not in compiled
    assert "-cudart static" in linked and "--exclude-libs=ALL" in linked and "-ltorch_cpu" in linked
    assert cache.obtain("cuda", ["sm_80", "sm_90"]) == target and len(calls(house)) == 2
    assert cache.obtain("cuda", ["sm_90"]) != target


def test_an_older_nvcc_is_not_asked_to_compress(house, monkeypatch):
    monkeypatch.setenv("NVCC", make_nvcc(house / "toolkit", "12.6"))
    cache.obtain("cuda", ["sm_90"])
    assert "compress" not in calls(house)[0]


@pytest.mark.parametrize("cxx, ccbin", [("c++", "c++"), ("ccache c++ -g", "c++")])
def test_the_compiler_of_the_environment_compiles_the_hosts_half(house, monkeypatch, cxx, ccbin):
    (house / "ccache").write_text('#!/bin/sh\nexec "$@"\n')
    (house / "ccache").chmod(0o755)
    monkeypatch.setenv("PATH", str(house), prepend=os.pathsep)
    monkeypatch.setenv("CXX", cxx)
    cache.obtain("cuda", ["sm_90"])
    assert all(f"-ccbin {shutil.which(ccbin)}" in words or f"-ccbin {ccbin}" in words for words in calls(house))
    monkeypatch.setenv("NVCC_CCBIN", "c++")  # nvcc reads this itself
    builder.build("cuda", house / "out", ["sm_90"])
    assert "-ccbin" not in calls(house)[-1]


@pytest.mark.parametrize(
    "log, line",
    [
        ("FAILED: x\none.cu(3): error: no such thing\n", "one.cu(3): error: no such thing"),
        ("nvcc fatal   : Unsupported gpu architecture\n", "nvcc fatal   : Unsupported gpu architecture"),
        (
            "ptxas /tmp/x.ptx, line 9; fatal   : Unsupported .version 9.5\nptxas fatal   : aborted\n",
            "ptxas /tmp/x.ptx, line 9; fatal   : Unsupported .version 9.5",
        ),
    ],
)
def test_first_error_of_nvcc(log, line):
    assert builder._first_error(log) == line
