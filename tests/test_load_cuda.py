"""What a process does with the CUDA object that is there: loads it, builds another, or says in one warning why not; and
what backend_info tells of it. A script stands for nvcc, and the GPUs are made up.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from cuda_house import make_house

from kdkernels import choices, native, ops
from kdkernels.native import build as builder
from kdkernels.native import cuda

pytestmark = pytest.mark.skipif(builder.obstacle("cpu") is not None, reason=f"no build here: {builder.obstacle('cpu')}")


def h200(driver: tuple[int, int] | None = (13, 0), *capabilities: cuda.Capability) -> cuda.Gpus:
    return cuda.Gpus(capabilities or ((9, 0),), ("NVIDIA H200",) * max(len(capabilities), 1), driver)


REGISTER = native._register


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A process with one H200, in which nothing is loaded yet. A script's object is not loaded really."""
    house = make_house(tmp_path, monkeypatch)
    monkeypatch.setattr(native, "_LIB", house / "lib")
    monkeypatch.setattr(native, "gpus", h200)
    monkeypatch.setitem(native._status, "cuda", native.Status())
    monkeypatch.setitem(native.failed, "cuda", False)
    monkeypatch.setattr(native, "_register", lambda name, path: path)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return house


def ship(machine: Path, codes: list[str], toolkit: str = "13.0", content: bytes = b"not a shared object") -> Path:
    path = machine / "lib" / builder.CUDA_OBJECT
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    record = {"sha256": builder._checksum(path), "architectures": codes, "cuda": toolkit}
    builder.record_of(path).write_text(json.dumps(record))
    return path


def load_and_listen() -> list[str]:
    """Loads the CUDA kernels twice; every warning of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert native.load("cuda") == native.load("cuda")
    return [str(warning.message) for warning in caught]


def test_the_wheels_object_serves_if_it_fits(machine, capfd):
    path = ship(machine, ["sm_80", "sm_90"])
    assert native.expected("cuda") and native.prospects("cuda") == (
        True,
        "built at install for sm_80, sm_90 with CUDA 13.0",
    )
    assert load_and_listen() == [] and native.status("cuda").state == "loaded"
    assert native.status("cuda").path == path and native.status("cuda").reason == "built at install"
    assert capfd.readouterr().err == "" and not (machine / "toolkit" / "calls").exists()


def test_else_it_is_built_for_these_gpus(machine, capfd):
    ship(machine, ["sm_80"])
    assert native.expected("cuda") and not (machine / "toolkit" / "calls").exists()
    assert load_and_listen() == [] and native.status("cuda").reason == "built on first use"
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 3 and "was built for sm_80 with CUDA 13.0, but GPU 0 (NVIDIA H200) has" in said[0]
    assert "building the CUDA kernels for sm_90 (" in said[1]
    assert native.prospects("cuda") == (True, "built on first use for sm_90 with CUDA 13.0")


MISFITS = {
    "older GPU": (["sm_90"], "13.0", h200((13, 0), (8, 0)), "GPU 0 (NVIDIA H200) has compute capability 8.0"),
    "newer GPU": (["sm_90"], "13.0", h200((13, 0), (12, 0)), "has compute capability 12.0"),
    "second GPU": (["sm_90"], "13.0", h200((13, 0), (9, 0), (8, 6)), "GPU 1 (NVIDIA H200) has compute capability 8.6"),
    "old driver": (["sm_90"], "13.0", h200((12, 8)), "the driver here runs CUDA 12.8 at most"),
    "old driver for PTX": (["compute_80"], "13.2", h200((13, 0)), "the driver here translates PTX up to CUDA 13.0"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_an_object_that_does_not_fit_gives_one_warning_with_both_versions(machine, monkeypatch, capfd, case):
    codes, toolkit, here, why = MISFITS[case]
    path = ship(machine, codes, toolkit)
    monkeypatch.setattr(native, "gpus", lambda: here)
    monkeypatch.setenv("KDKERNELS_JIT", "0")
    assert not native.expected("cuda")
    (said,) = load_and_listen()
    assert f"{path} was built for {codes[0]} with CUDA {toolkit}, but " in said and why in said
    assert "KDKERNELS_JIT=0 forbids building now" in said and said.endswith(
        "Triton or the PyTorch formulas serve instead"
    )
    assert native.status("cuda").state == "failed" and native.failed["cuda"] and capfd.readouterr().err == ""


def test_what_fits_though_versions_differ(machine, monkeypatch):
    """Machine code of a newer minor version, an unknown driver, PTX of an older version."""
    for codes, toolkit, here in (
        (["sm_90"], "13.2", h200((13, 0))),
        (["sm_80", "sm_90"], "13.0", h200(None)),
        (["compute_80"], "12.9", h200((13, 0))),
    ):
        ship(machine, codes, toolkit)
        monkeypatch.setattr(native, "gpus", lambda here=here: here)
        monkeypatch.setitem(native._status, "cuda", native.Status())
        assert load_and_listen() == [] and native.status("cuda").state == "loaded"


@pytest.mark.parametrize("record", [None, "[]", "{}", '{"architectures": ["sm_90"], "cuda": 13}'])
def test_an_object_without_a_good_record_is_not_trusted(machine, monkeypatch, record):
    path = ship(machine, ["sm_90"])
    builder.record_of(path).unlink() if record is None else builder.record_of(path).write_text(record)
    monkeypatch.setenv("KDKERNELS_JIT", "0")
    (said,) = load_and_listen()
    assert f"{path} has no record of what it was built with" in said


def test_a_driver_too_old_for_this_nvcc(machine, monkeypatch):
    monkeypatch.setattr(native, "gpus", lambda: h200((12, 8)))
    assert not native.expected("cuda")
    (said,) = load_and_listen()
    assert "would be built for sm_90 with CUDA 13.0, but the driver here runs CUDA 12.8 at most" in said
    assert not (machine / "toolkit" / "calls").exists()


def test_an_object_that_this_torch_cannot_load(machine, monkeypatch):
    path = ship(machine, ["sm_90"])
    with pytest.raises(native.Misfit) as caught:
        REGISTER("cuda", path)
    text = str(caught.value)
    assert f"{path}, built for sm_90 with CUDA 13.0, cannot be loaded by torch {torch.__version__} (CUDA " in text
    path.write_bytes(b"damaged")
    with pytest.raises(builder.BuildError, match="is damaged"):
        REGISTER("cuda", path)


@pytest.mark.parametrize(
    "name, value, reason",
    [
        ("KDKERNELS_JIT", "0", "not built at install, and KDKERNELS_JIT=0 forbids building now"),
        ("NVCC", "no-such-nvcc", "no nvcc ('no-such-nvcc' of $NVCC is not there)"),
        ("CXX", "false", "nvcc failed: "),
        ("KDKERNELS_CUDA_ARCHS", "75", "sm_75: 8.0 is the first that serves"),
    ],
)
def test_where_nothing_can_be_had_one_line_says_why(machine, monkeypatch, capfd, name, value, reason):
    monkeypatch.setenv(name, value)
    assert native.expected("cuda") == (name == "CXX")
    assert load_and_listen() == [] and not native.expected("cuda")
    said = [line for line in capfd.readouterr().err.splitlines() if "building" not in line or reason in line]
    assert len(said) == 1 and reason in said[0] and said[0].endswith(" formulas serve instead")
    assert reason in native.status("cuda").reason and native.status("cuda").state == "failed"


def test_without_a_gpu_nothing_is_tried_or_said(machine, monkeypatch, capfd):
    monkeypatch.setattr(native, "gpus", lambda: "torch sees no GPU")
    assert not native.expected("cuda") and load_and_listen() == [] and capfd.readouterr().err == ""
    assert native.status("cuda").state == "unloaded" and native.status("cuda").reason == "torch sees no GPU"
    assert not (machine / "toolkit" / "calls").exists()


def test_nothing_is_loaded_or_built_while_a_graph_is_captured(machine, monkeypatch):
    """A warning, and the way out; once the kernels are loaded, a capture has them."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    said = load_and_listen()
    assert (
        len(set(said)) == 1 and "a CUDA graph is being captured" in said[0] and "call the loss once before" in said[0]
    )
    assert native.status("cuda").state == "unloaded" and not (machine / "toolkit" / "calls").exists()
    assert not native.failed["cuda"] and "captured" in native.status("cuda").reason
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert load_and_listen() == [] and native.status("cuda").state == "loaded"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert native.load("cuda")


def test_build_ahead_without_a_gpu(machine, monkeypatch):
    monkeypatch.setattr(native, "gpus", lambda: "torch sees no GPU")
    assert "no GPU here, and KDKERNELS_CUDA_ARCHS is not set" in native.build_ahead()
    monkeypatch.setenv("KDKERNELS_CUDA_ARCHS", "80;90")
    assert native.build_ahead().endswith("kdkernels_cuda.so, built for sm_80, sm_90 with CUDA 13.0")


def test_a_damaged_object_is_named(machine, monkeypatch, capfd):
    path = ship(machine, ["sm_90"])
    path.write_bytes(b"truncated")
    monkeypatch.setattr(native, "_register", REGISTER)
    monkeypatch.setenv("KDKERNELS_JIT", "0")
    assert load_and_listen() == []
    (said,) = capfd.readouterr().err.splitlines()
    assert f"{path} is damaged; and a new one cannot be built: " in said and "KDKERNELS_JIT=0" in said


def test_the_drivers_version(monkeypatch):
    class Driver:
        @staticmethod
        def cuDriverGetVersion(pointer):
            pointer._obj.value = 13020
            return 0

    def absent(name):
        raise OSError(name)

    for library, version in ((lambda name: Driver, (13, 2)), (absent, None)):
        monkeypatch.setattr(native.ctypes, "CDLL", library)
        native._driver.cache_clear()
        assert native._driver() == version
    native._driver.cache_clear()


def test_this_machines_gpus():
    """What torch says, in our words; a message where there is none."""
    here = native.gpus()
    if not torch.cuda.is_available():
        assert here == "torch sees no GPU"
        return
    assert len(here.capabilities) == len(here.names) == torch.cuda.device_count()
    assert here.driver is None or here.driver >= (12, 0)


# backend_info.


def cuda_row() -> tuple[str, str]:
    return ops.backend_info()["pearson"]["cuda"]


def test_backend_info_on_a_gpu(machine, monkeypatch):
    ship(machine, ["sm_90"])
    monkeypatch.setattr(ops, "_triton_obstacle", lambda: None)
    backend, why = cuda_row()
    assert backend == "cuda" and why.startswith("built at install for sm_90 with CUDA 13.0; chosen over triton, ")
    assert why.endswith("float64: the formula")
    assert native.load("cuda") and not native.registered("pearson", "cuda")  # the script's object has no kernels
    backend, why = cuda_row()
    assert backend == "triton" and "not cuda: this build has no kernel for this loss" in why


def test_backend_info_where_nothing_fits(machine, monkeypatch):
    monkeypatch.setenv("NVCC", "no-such-nvcc")
    monkeypatch.setattr(ops, "_triton_obstacle", lambda: None)
    backend, why = cuda_row()
    assert backend == "triton" and "triton is installed" in why and "not cuda: no nvcc" in why
    monkeypatch.setattr(ops, "_triton_obstacle", lambda: "there is none")
    backend, why = cuda_row()
    assert backend == "reference" and "not cuda: no nvcc" in why and "not triton: there is none" in why


def test_backend_info_without_a_gpu(machine, monkeypatch):
    monkeypatch.setattr(native, "gpus", lambda: "torch sees no GPU")
    backend, why = cuda_row()
    assert backend == "cuda" and why.startswith("torch sees no GPU; on a GPU: will be loaded from the cache or built")
    assert "by nvcc 13.0" in why


def test_backend_info_says_what_was_measured_and_from_which_size(machine, monkeypatch):
    large = choices.Choice("triton", loss="pearson", major=9, elements=1000, measured="timed on an H200")
    monkeypatch.setattr(choices, "TABLE", [choices.Choice("cuda"), large])
    assert "chosen over triton, not measured on a GPU; from 1000 elements triton, timed on an H200" in cuda_row()[1]


@pytest.mark.parametrize("forced", ["cpu", "cuda", "triton"])
def test_backend_info_under_a_forced_backend(machine, monkeypatch, forced):
    monkeypatch.setattr(ops, "_triton_obstacle", lambda: None)
    with ops.use_backend(forced):
        row = ops.backend_info()["pearson"]
    assert row["cuda"][0] == ("none" if forced == "cpu" else forced)
    assert row["cpu"][0] == ("cpu" if forced == "cpu" else "none")
