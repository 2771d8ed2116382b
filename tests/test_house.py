"""What may stand in which file of the kernels' sources."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "csrc").is_dir():
    pytest.skip("csrc/ is not beside these tests", allow_module_level=True)

_COMMENTS = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_OF_THE_MACHINE = re.compile(
    r"\basm\b|cooperative_groups|\b__(shfl|ld(cs|g|cg|ca|lu|cv)|st(cs|cg|wb|wt)|sync|reduce|ballot|activemask|match)\w*"
    r"|\batomic\w+\s*\(|\b__(global|device|shared|launch_bounds)__|\b(threadIdx|blockIdx|blockDim|gridDim)\b|<<<"
    r"|\bcuda::|\bcuda(Launch|Malloc|Memcpy|Stream|Func)\w*"
)


@pytest.mark.parametrize("path", sorted((ROOT / "csrc" / "cuda").iterdir()), ids=lambda path: path.name)
def test_only_the_primitives_speak_to_the_machine(path):
    """So that every kernel's body runs on the host, and one file is to be changed for a new architecture."""
    text = _COMMENTS.sub("", path.read_text())
    assert not re.search(r"#include\s*[<\"](torch|ATen|c10)", text), "kernels are free of torch"
    if path.name != "primitives.cuh":
        assert [found.group() for found in _OF_THE_MACHINE.finditer(text)] == []


@pytest.mark.parametrize("path", sorted((ROOT / "kdkernels" / "triton").glob("*.py")), ids=lambda path: path.name)
def test_triton_kernels_have_no_atomics_no_assembly_and_no_autotuning(path):
    found = re.findall(r"\batomic_\w+|\binline_asm\w*|\bautotune\b", path.read_text())
    assert found == []


@pytest.mark.parametrize("path", sorted((ROOT / "kdkernels" / "triton").glob("*.py")), ids=lambda path: path.name)
def test_no_constant_of_the_triton_kernels_is_nan(path):
    """Before a launch Triton compares the constants that a kernel uses with what they were, and NaN equals nothing: on
    a GPU every launch would raise, which the interpreter does not show.
    """
    assert not re.search(r"^\w+ = .*\bnan\b", path.read_text(), re.MULTILINE | re.IGNORECASE)
