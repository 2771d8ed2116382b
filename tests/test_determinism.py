"""The same input gives the same bits: run to run, with any number of threads, and over memory that holds NaN."""

from __future__ import annotations

import pytest
import torch
from losses import LOSSES, SIZES, Inputs, loss_and_gradients

import kdkernels as kd

ALL = pytest.mark.parametrize("name", LOSSES)


@pytest.fixture(autouse=True)
def kernels():
    """The promise is the kernels' own: the formula inherits torch's."""
    with kd.use_backend("cpu"):
        yield


@pytest.fixture
def poisoned():
    """torch.empty returns NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


def bits(inputs: Inputs) -> list[torch.Tensor]:
    loss, grads = loss_and_gradients(inputs, 0.7)
    return [loss, *grads]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def cases(name: str) -> list[Inputs]:
    loss = LOSSES[name]
    found = [loss.inputs(size, dtype) for size in SIZES for dtype in (torch.float32, torch.bfloat16)]
    found += [loss.inputs("wide", torch.float64, "tensors"), loss.inputs("many", variant="rows")]
    if loss.features:
        found += [i.to_layout(lambda x: x.to(memory_format=torch.channels_last)) for i in found[2:4]]
    return found


@ALL
def test_ten_runs(name):
    for inputs in cases(name):
        first = bits(inputs)
        assert all(same(bits(inputs), first) for _ in range(9))


@ALL
def test_any_number_of_threads(name):
    for inputs in cases(name):
        torch.set_num_threads(1)
        first = bits(inputs)
        for threads in (2, 4, 7):
            torch.set_num_threads(threads)
            assert same(bits(inputs), first), f"{threads} threads"


@ALL
def test_every_value_is_written(name, poisoned):
    """Outputs are allocated full of NaN here: an element that no kernel writes would stay NaN."""
    for inputs in cases(name):
        assert all(x.isfinite().all() for x in bits(inputs))


@ALL
def test_deterministic_mode_changes_nothing(name, request):
    inputs = LOSSES[name].inputs("many")
    plain = bits(inputs)
    request.getfixturevalue("poisoned")
    assert same(bits(inputs), plain)


@ALL
def test_where_the_tensors_lie_does_not_matter(name):
    """Alignment: the same values at an address 4 bytes further give the same bits."""

    def shifted(x: torch.Tensor) -> torch.Tensor:
        room = torch.empty(x.numel() + 1, dtype=x.dtype)
        return room[1:].view(x.shape).copy_(x)

    inputs = LOSSES[name].inputs("wide")
    assert same(bits(inputs.to_layout(shifted)), bits(inputs))
