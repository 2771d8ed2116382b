"""torch.compile and torch.export: whole graphs, kernels inside them, few recompilations, nothing built while tracing.

The default tier traces with aot_eager, which runs what Inductor would compile; Inductor itself is in the slow tier.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from losses import FEATURES, LOSSES, ROWS, VARIANTS, Inputs, in_form, loss_and_gradients
from numerics import error
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

import kdkernels as kd
from kdkernels import native

ALL = pytest.mark.parametrize("name", LOSSES)
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def fresh_dynamo():
    assert native.load("cpu")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(inputs: Inputs, backend="aot_eager", **options) -> Inputs:
    """The same inputs through a compiled function, which must be one graph."""
    function = torch.compile(inputs.function, fullgraph=True, backend=backend, **options)
    return Inputs(function, inputs.students, inputs.others, inputs.keywords, inputs.listed)


class KeepOps:
    """A backend like aot_eager that keeps which ops of this library the graphs call."""

    def __init__(self):
        self.ops: list[str] = []
        self.backend = aot_autograd(fw_compiler=self._keep, bw_compiler=self._keep)

    def _keep(self, graph, examples):
        self.ops += [str(n.target) for n in graph.graph.nodes if "kdkernels" in str(n.target)]
        return make_boxed_func(graph.forward)


def assert_compiles(name: str, variant: str, keep: bool = True, **options) -> None:
    inputs = LOSSES[name].inputs(variant=variant)
    loss, grads = loss_and_gradients(in_form(inputs, False), 0.75)  # as compiled graphs do
    keeper = KeepOps()
    got, got_grads = loss_and_gradients(compiled(inputs, keeper.backend if keep else "inductor", **options), 0.75)
    if keep:
        assert keeper.ops == [f"kdkernels.{name}.default", f"kdkernels.{name}_backward.default"]
    assert torch.equal(got, loss)
    assert all(torch.equal(a, b) for a, b in zip(got_grads, grads, strict=True))


@ALL
@pytest.mark.parametrize("variant", VARIANTS)
def test_fullgraph_forward_and_backward(name, variant):
    assert_compiles(name, variant)


@ALL
def test_fullgraph_with_dynamic_shapes(name):
    assert_compiles(name, "tensors", dynamic=True)


@pytest.mark.slow
@ALL
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor(name, dynamic):
    assert_compiles(name, "tensors", keep=False, dynamic=dynamic)


@pytest.mark.parametrize("name", ROWS)
def test_dynamic_shapes_share_one_graph(name):
    counter, once = CompileCounterWithBackend("aot_eager"), 0
    function = torch.compile(LOSSES[name].function, fullgraph=True, backend=counter, dynamic=True)
    for rows in (7, 6, 5, 4, 3):
        inputs = LOSSES[name].inputs(variant="tensors")
        # Copies: a view's base would have a size of its own, which Dynamo at first takes for the student's.
        cut = [x[:rows].clone() for x in (inputs.students[0], *inputs.others)]
        for key in ("weight", "target"):
            if key in inputs.keywords:
                inputs.keywords[key] = inputs.keywords[key][:rows].clone()
        student = cut[0].requires_grad_()
        loss = function(student, *cut[1:], **inputs.keywords)
        loss.backward()
        assert torch.equal(loss, inputs.function(student, *cut[1:], **inputs.keywords))
        # The temperature is tried as an input first and then made a constant, which compiles twice, once.
        once = counter.frame_count if rows == 7 else once
    assert counter.frame_count == once <= 2


# The first scalar of each loss at once, the others in the slow tier.
SCALARS = [
    pytest.param(name, key, marks=[pytest.mark.slow] * (i > 0))
    for name, loss in LOSSES.items()
    for i, key in enumerate(loss.scalars)
]


@pytest.mark.parametrize("name, key", SCALARS)
def test_twenty_values_of_a_weight_tensor_are_one_graph(name, key):
    inputs = LOSSES[name].inputs(variant="tensors")
    counter = CompileCounterWithBackend("aot_eager")
    graph = compiled(inputs, counter)
    for step in range(20):
        graph.keywords = {**inputs.keywords, key: torch.tensor(0.5 + step / 16)}
        expected = loss_and_gradients(Inputs(inputs.function, *vars_of(graph)))
        got = loss_and_gradients(graph)
        assert torch.equal(got[0], expected[0])
        assert all(torch.equal(a, b) for a, b in zip(got[1], expected[1]))
    assert counter.frame_count == 1


def vars_of(inputs: Inputs) -> tuple:
    return inputs.students, inputs.others, inputs.keywords, inputs.listed


@pytest.mark.parametrize("name, key", SCALARS)
def test_python_floats_are_part_of_the_graph(name, key):
    """An op's `float` is a constant of the graph: each value is right and costs a compilation. Hence 0-d tensors."""
    inputs = LOSSES[name].inputs()
    counter = CompileCounterWithBackend("aot_eager")
    graph = compiled(inputs, counter)
    for step in (0, 1, 2, 1, 0):
        graph.keywords = {**inputs.keywords, key: 0.5 + step / 16}
        expected = loss_and_gradients(Inputs(inputs.function, *vars_of(graph)))
        assert torch.equal(loss_and_gradients(graph)[0], expected[0])
    assert counter.frame_count <= 4  # three values, and one try with the number as an input


@ALL
def test_modules_compile(name):
    inputs = LOSSES[name].inputs(variant="tensors")
    keywords = {k: v for k, v in inputs.keywords.items() if k not in ("target", "weight")}
    of_call = {k: v for k, v in inputs.keywords.items() if k in ("target", "weight")}
    module = LOSSES[name].module(**keywords, loss_weight=torch.tensor(2.0))
    student = inputs.student(*inputs.students)
    graph = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(graph(student, *inputs.others, **of_call), module(student, *inputs.others, **of_call))


class Exported(torch.nn.Module):
    """A loss with everything but the student's levels bound, as torch.export wants it."""

    def __init__(self, inputs: Inputs):
        super().__init__()
        self.inputs = inputs

    def forward(self, *students):
        return self.inputs(*students)


@ALL
def test_export(name):
    inputs = LOSSES[name].inputs(variant="tensors")
    expected, _ = loss_and_gradients(inputs)
    program = torch.export.export(Exported(inputs), tuple(inputs.students))
    called = [str(node.target) for node in program.graph.nodes if "kdkernels" in str(node.target)]
    assert called == [f"kdkernels.{name}.default"]
    assert torch.equal(program.module()(*inputs.students), expected)


@ALL
def test_a_teacher_computed_without_gradient_inside_the_graph(name):
    """The usual training step: both models, the loss and nothing else in one compiled function."""
    inputs = LOSSES[name].inputs()

    def step(scale, students, teacher):
        with torch.no_grad():
            teacher = [t * 2 for t in teacher] if inputs.listed else teacher * 2
        return inputs.function(inputs.student(*(s * scale for s in students)), teacher, *inputs.others[1:])

    def run(function):
        scale = torch.tensor(1.5, requires_grad=True)
        loss = function(scale, inputs.students, inputs.others[0])
        return loss.detach(), *torch.autograd.grad(loss, scale)

    loss, slope = run(step)
    got, got_slope = run(torch.compile(step, fullgraph=True, backend="aot_eager"))
    assert torch.equal(got, loss)
    assert error(got_slope, slope) <= 16 * EPS  # the sum over the student is torch's own, and may be ordered otherwise


@ALL
def test_transforms_inside_a_graph(name):
    """compile(func.grad(loss)): the custom backward must not be dropped silently."""
    inputs = LOSSES[name].inputs(dtype=torch.float64)
    _, grads = loss_and_gradients(inputs)
    graph = torch.compile(
        torch.func.grad(lambda x: inputs(x, *inputs.students[1:])), fullgraph=True, backend="aot_eager"
    )
    assert error(graph(inputs.students[0]), grads[0]) <= 1e-9


@pytest.mark.parametrize("name", FEATURES)
def test_channels_last_gradients_keep_their_format_in_a_graph(name):
    inputs = LOSSES[name].inputs().to_layout(lambda x: x.to(memory_format=torch.channels_last))
    _, grads = loss_and_gradients(inputs)
    _, got = loss_and_gradients(compiled(inputs))
    assert [g.stride() for g in got] == [g.stride() for g in grads]
    assert all(torch.equal(a, b) for a, b in zip(got, grads))


SCRIPT = """
import torch
import kdkernels as kd
from kdkernels import native

loss = torch.compile(kd.temperature_kl_loss, fullgraph=True, backend="aot_eager")
student, teacher = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
assert native.status("cpu").state == "unloaded"
torch.export.export(kd.TemperatureKLLoss(), (student.detach(), teacher))
assert native.status("cpu").state == "unloaded", "tracing loaded or built"
value = loss(student, teacher)
value.backward()
assert native.status("cpu").state == "loaded"
expected = kd.temperature_kl_loss(student.detach(), teacher)
assert torch.equal(value.detach(), expected), (value, expected)
print("right")
"""


def test_compile_before_any_eager_call():
    """A trace builds nothing; the first execution loads the kernels."""
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == "right\n", run.stderr


FAILING = """
import torch
import kdkernels as kd
loss = torch.compile(kd.temperature_kl_loss, fullgraph=True, backend="aot_eager")
student, teacher = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
for _ in range(2):
    try:
        value = loss(student, teacher)
        print("value", bool(value.isfinite()))
    except RuntimeError as error:
        print("refused", "the next call" in str(error).lower())
"""


def test_a_build_that_fails_after_the_trace(tmp_path):
    """The first execution says so; the next call traces the formula."""
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    environment = {**os.environ, "CXX": str(broken), "KDKERNELS_CACHE_DIR": str(tmp_path / "cache")}
    if (Path(native.__file__).parent / "lib" / "kdkernels_cpu.so").exists():
        pytest.skip("built at install: nothing is built on first use")
    run = subprocess.run([sys.executable, "-c", FAILING], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["refused", "True", "value", "True"]
    assert "no compiled CPU kernels" in run.stderr


def test_switching_the_backend_retraces():
    """The choice is part of the graph's guards."""
    inputs = LOSSES["temperature_kl"].inputs()
    keeper = KeepOps()
    graph = compiled(inputs, keeper.backend)
    with kd.use_backend("reference"):
        graph(*inputs.students)
    assert keeper.ops == []
    graph(*inputs.students)
    assert keeper.ops == ["kdkernels.temperature_kl.default"]
