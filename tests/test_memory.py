"""What a loss allocates: a few values per row or channel in the forward, one gradient per wanted level in the backward.

Tensors are counted at torch's allocator. What C++ takes from malloc is invisible there, so a process of its own is
held to its peak of resident memory.
"""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from losses import FEATURES, LOSSES, ROWS, Inputs, in_form
from objective_cases import TERMS, inputs_of, with_leaves
from torch.profiler import ProfilerActivity, profile

import kdkernels as kd
from kdkernels import native

ALL = pytest.mark.parametrize("name", LOSSES)
# Per row or channel: at most eight float32 statistics (soft cross-entropy) and, with reduction="none", the loss.
VALUES = 9
# Constants that do not grow with the input: 0-d tensors, each rounded up to the allocator's 64 bytes.
CONSTANT = 1024


@pytest.fixture(autouse=True)
def kernels():
    with kd.use_backend("cpu"):
        yield


def allocated(function) -> int:
    """Bytes that torch's CPU allocator handed out while `function` ran, whether or not they were freed again."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        function()
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    return sum(e.nbytes() for e in events if e.nbytes() > 0)


def rows_or_channels(inputs: Inputs) -> int:
    if inputs.listed:
        return sum(s.shape[1] + 2 for s in inputs.students)
    return math.prod(inputs.students[0].shape[:-1])


def bytes_of(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def test_the_measure_sees_allocations():
    assert allocated(lambda: torch.empty(1000).add(1)) >= 8000


@ALL
@pytest.mark.parametrize("size", ["wide", "many"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_keeps_a_few_values_per_row(name, size, dtype):
    inputs = in_form(LOSSES[name].inputs(size, dtype), one_pass=False)
    students = inputs.leaves()
    inputs(*students)  # loads the library
    assert allocated(lambda: inputs(*students)) <= 4 * VALUES * rows_or_channels(inputs) + CONSTANT


@ALL
@pytest.mark.parametrize("layout", ["contiguous", "other"])
def test_backward_allocates_the_gradient_and_nothing_else(name, layout):
    inputs = in_form(LOSSES[name].inputs("wide", torch.bfloat16), one_pass=False)
    if layout == "other":
        other = torch.channels_last if inputs.listed else None
        inputs = inputs.to_layout(
            (lambda x: x.to(memory_format=other)) if other else (lambda x: x.t().contiguous().t())
        )
    students = [s.detach().requires_grad_() for s in inputs.students]
    loss = inputs(*students)
    gradient = sum(map(bytes_of, students))
    upstream = torch.ones_like(loss)
    found = allocated(lambda: torch.autograd.grad(loss, students, upstream))
    assert gradient <= found <= gradient + CONSTANT


@pytest.mark.parametrize("name", FEATURES)
def test_frozen_levels_cost_no_gradient(name):
    inputs = in_form(LOSSES[name].inputs("many"), one_pass=False)
    students = inputs.leaves()
    for s in students[1:]:
        s.requires_grad_(False)
    loss = inputs(*students)
    upstream = torch.ones_like(loss)
    found = allocated(lambda: torch.autograd.grad(loss, students[:1], upstream))
    assert found <= bytes_of(students[0]) + CONSTANT


@ALL
@pytest.mark.parametrize("size", ["wide", "many"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_pass_allocates_the_gradient_and_a_few_values(name, size, dtype):
    """In the forward; the backward that hands it on allocates nothing, whatever the upstream gradient is."""
    inputs = in_form(LOSSES[name].inputs(size, dtype), one_pass=True)
    students = inputs.leaves()
    inputs(*students)  # loads the library
    losses = []
    gradient = sum(map(bytes_of, students))
    found = allocated(lambda: losses.append(inputs(*students)))
    # Of bounded regression the one pass makes the gradient and nothing else.
    few = 0 if name == "bounded_regression" else 4 * VALUES * rows_or_channels(inputs)
    assert gradient <= found <= gradient + few + CONSTANT
    upstream = torch.full_like(losses[0], 3.0)
    assert allocated(lambda: torch.autograd.grad(losses[0], students, upstream)) <= CONSTANT


@pytest.mark.parametrize("name", FEATURES)
def test_one_pass_forms_no_gradient_for_frozen_levels(name):
    inputs = in_form(LOSSES[name].inputs("many"), one_pass=True)
    students = inputs.leaves()
    for s in students[1:]:
        s.requires_grad_(False)
    inputs(*students)
    found = allocated(lambda: inputs(*students))
    assert found <= bytes_of(students[0]) + 4 * VALUES * rows_or_channels(inputs) + CONSTANT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_objective_allocates_one_gradient_per_input(dtype):
    """In the forward; its backward allocates nothing."""
    given, leaves = with_leaves(inputs_of([(2, 16, 40, 50), (2, 16, 20, 25)], 2000, dtype))
    terms = {name: TERMS[name] for name in ("masked_mse", "decoupled_kl", "bounded_regression")}
    objective = kd.DetectionDistillationLoss(**terms, pearson={})
    objective(**given)
    results = []
    found = allocated(lambda: results.append(objective(**given)))
    gradients = sum(map(bytes_of, leaves))
    weights = 2 * 2000 * 4
    assert gradients <= found <= gradients + weights + 4 * VALUES * 2000 + 8 * CONSTANT
    upstream = torch.full((), 3.0)
    assert allocated(lambda: torch.autograd.grad(results[0].total, leaves, upstream)) <= CONSTANT


@ALL
def test_a_student_without_gradient_keeps_nothing(name):
    inputs = LOSSES[name].inputs()
    loss = inputs(*inputs.students)
    assert loss.grad_fn is None


SCRIPT = """
import sys, torch
import kdkernels as kd
torch.set_num_threads(2)
name, rows = sys.argv[1], sys.argv[2] == "rows"
shape = (1024, 32768) if rows else (2, 64, 512, 512)
layout = torch.channels_last if sys.argv[2] == "channels_last" else torch.contiguous_format
student, teacher = (torch.full(shape, 0.5, dtype=torch.bfloat16).to(memory_format=layout) for _ in range(2))
small = [x.narrow(0, 0, 1).narrow(1, 0, 8) for x in (student, teacher)]
arguments = {"masked_mse": lambda s: [torch.ones(s.shape[0], *s.shape[2:])],
             "decoupled_kl": lambda s: [torch.ones(s.shape[0], dtype=torch.bool)]}.get(name, lambda s: [])
loss = getattr(kd, name + "_loss")
def peak():
    return 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
extra, few = arguments(student), arguments(small[0])
with kd.use_backend(sys.argv[3]):
    loss(*small, *few)  # library, threads and their stacks
    open("/proc/self/clear_refs", "w").write("5")  # the peak falls to what is resident now
    before = peak()
    loss(student, teacher, *extra)
    after = peak()
print(after - before, student.numel() * student.element_size())
"""


def grown_by(name: str, layout: str, backend: str) -> float:
    """By how much the forward raised the peak, as a share of one side's 64 MiB."""
    command = [sys.executable, "-c", SCRIPT, name, layout, backend]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    grown, side = map(int, run.stdout.split())
    assert side == 64 << 20
    return grown / side


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@linux
def test_the_peak_sees_copies():
    """The formula makes float32 copies of both sides."""
    assert grown_by("temperature_kl", "rows", "reference") > 2


@linux
@pytest.mark.parametrize(
    "name, layout",
    [
        ("masked_mse", "contiguous"),
        ("masked_mse", "channels_last"),
        ("pearson", "contiguous"),
        ("pearson", "channels_last"),
        ("temperature_kl", "rows"),
        *(
            pytest.param(name, "rows", marks=pytest.mark.slow)
            for name in ROWS
            if name not in ("temperature_kl", "bounded_regression")  # of the latter no row is wider than its statistics
        ),
    ],
)
def test_peak_memory_of_the_forward(name, layout):
    """A copy of either side in any precision, or a mask at feature size, would be one side (64 MiB) or more. Half
    of that is allowed, for what the process itself touches for the first time."""
    assert native.load("cpu")
    assert grown_by(name, layout, "cpu") < 0.5
