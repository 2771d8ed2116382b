"""What every op of a GPU backend promises beside its numbers, seen where there is no GPU: CUDA in the emulator, Triton
in its interpreter. Fakes, bits, memory that is written, graphs, and that a call keeps its backend.
"""

from __future__ import annotations

import pytest
import torch
from losses import FEATURES, LOSSES, VARIANTS, in_form, loss_and_gradients
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import kdkernels as kd
from kdkernels import ops

ALL = pytest.mark.parametrize("name", LOSSES)
GPU = pytest.mark.parametrize("backend", ["cuda", "triton"], indirect=True)


class Recorded:
    """An op that keeps the arguments and results of its calls."""

    def __init__(self, op):
        self.op, self.calls = op, []

    def __call__(self, *arguments):
        result = self.op(*arguments)
        self.calls.append((arguments, result))
        return result


@pytest.fixture
def record(backend, monkeypatch):
    """Calls of a loss's ops in two passes: {op name: [(arguments, result)]}."""

    def run(inputs, name: str):
        recorders = {}
        for op_name in (name, f"{name}_backward"):
            recorders[op_name] = Recorded(ops.OPS[op_name][backend])
            monkeypatch.setitem(ops.OPS[op_name], backend, recorders[op_name])
        loss_and_gradients(in_form(inputs, False), 0.75)
        return {op_name: recorder.calls for op_name, recorder in recorders.items()}

    return run


def layout_of(x) -> list[tuple]:
    return [(t.shape, t.dtype, t.stride()) for t in pytree.tree_leaves(x) if isinstance(t, Tensor)]


def layouts(name: str) -> dict:
    if LOSSES[name].features:
        return {"channels_last": lambda x: x.to(memory_format=torch.channels_last)}
    return {"strided": lambda x: torch.stack([x, x], -1)[..., 0]}


@GPU
@ALL
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fakes_have_the_real_shapes_dtypes_and_strides(name, variant, dtype, backend, record):
    """A traced graph plans its memory by the fakes of the schema that the CPU's and the GPU's kernels share."""
    inputs = LOSSES[name].inputs("small", dtype, variant)
    calls = record(inputs, name)
    assert all(len(found) == 1 for found in calls.values())
    for op_name, found in calls.items():
        namespace = torch.ops.kdkernels_triton if backend == "triton" else torch.ops.kdkernels
        for arguments, real in found:
            with FakeTensorMode() as mode:
                fake = getattr(namespace, op_name).default(*pytree.tree_map_only(Tensor, mode.from_tensor, arguments))
            assert layout_of(fake) == layout_of(real)


@GPU
@ALL
def test_ops_leave_their_arguments_alone(name, backend, record):
    """Nothing mutates, and no output shares memory with an argument: what the schema says."""
    inputs = LOSSES[name].inputs("small", variant="tensors")
    before = [s.clone() for s in inputs.students], pytree.tree_map_only(Tensor, Tensor.clone, inputs.others)
    for found in record(inputs, name).values():
        for arguments, real in found:
            given = {t.untyped_storage().data_ptr() for t in pytree.tree_leaves(arguments) if isinstance(t, Tensor)}
            made = [t for t in pytree.tree_leaves(real) if isinstance(t, Tensor) and t.numel()]
            assert not given & {t.untyped_storage().data_ptr() for t in made}
    after = inputs.students, inputs.others
    for a, b in zip(pytree.tree_leaves(after), pytree.tree_leaves(before), strict=True):
        assert not isinstance(a, Tensor) or torch.equal(a, b)


@GPU
@ALL
def test_runs_give_the_same_bits_over_memory_that_holds_nan(name, backend):
    """Every element is written: outputs and workspaces are allocated full of NaN here."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    for layout in (None, *layouts(name).values()):
        inputs = LOSSES[name].inputs("small", torch.bfloat16)
        inputs = inputs if layout is None else inputs.to_layout(layout)
        loss, grads = loss_and_gradients(inputs, 0.7)
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            again, grads_again = loss_and_gradients(inputs, 0.7)
        finally:
            torch.use_deterministic_algorithms(False)
            torch.utils.deterministic.fill_uninitialized_memory = before
        assert loss.isfinite().all() and torch.equal(loss, again)
        assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))


@GPU
@ALL
def test_the_backward_follows_the_forward(name, backend, record, monkeypatch):
    """A call keeps its backend, whatever is forced when its backward runs."""
    inputs = in_form(LOSSES[name].inputs(), False)
    recorders = {n: Recorded(ops.OPS[n][backend]) for n in (name, f"{name}_backward")}
    for op_name, recorder in recorders.items():
        monkeypatch.setitem(ops.OPS[op_name], backend, recorder)
    loss = inputs(*inputs.leaves())
    with kd.use_backend("reference"):
        loss.sum().backward()
    assert [len(recorder.calls) for recorder in recorders.values()] == [1, 1]


@ALL
@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
def test_the_backward_of_one_pass_follows_the_forward(name, backend, monkeypatch):
    recorder = Recorded(ops.OPS["one_pass_scale_"][backend])
    monkeypatch.setitem(ops.OPS["one_pass_scale_"], backend, recorder)
    inputs = in_form(LOSSES[name].inputs(), True)
    loss = inputs(*inputs.leaves())
    with kd.use_backend("reference"):
        loss.backward()
    assert len(recorder.calls) == 1


@GPU
@ALL
def test_second_derivatives_are_the_formulas(name, backend):
    inputs = LOSSES[name].inputs("small", variant="rows")
    found = []
    for chosen in (backend, "reference"):
        with kd.use_backend(chosen):
            students = inputs.leaves()
            grads = torch.autograd.grad(inputs(*students).sum(), students, create_graph=True)
            found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), students))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


@GPU
@pytest.mark.parametrize("name", FEATURES)
def test_frozen_levels_get_none(name, backend):
    inputs = LOSSES[name].inputs("small")
    students = inputs.leaves()
    inputs(*students).backward()
    some = inputs.leaves()
    some[0].requires_grad_(False)
    inputs(*some).backward()
    assert some[0].grad is None and torch.equal(some[1].grad, students[1].grad)


@GPU
@ALL
def test_a_teacher_from_inference_mode(name, backend):
    with torch.inference_mode():
        constant = LOSSES[name].inputs().others[0]
        constant = [t.clone() for t in constant] if isinstance(constant, list) else constant.clone()
    inputs = LOSSES[name].inputs()
    inputs.others[0] = constant
    loss, grads = loss_and_gradients(inputs)
    assert loss.isfinite().all() and all(g.isfinite().all() for g in grads)


@GPU
@ALL
def test_float64_is_refused_by_force_and_served_by_the_formula_otherwise(name, backend):
    x = torch.zeros(3, 4, dtype=torch.float64)
    assert not ops.kernel_dtypes(x.dtype, x.dtype, backend)


@GPU
@ALL
def test_a_traced_graph_holds_the_ops(name, backend):
    """torch.compile with fullgraph, forward and backward."""
    if torch.cuda.is_available():
        pytest.skip("test_gpu.py compiles the real ones")
    inputs = in_form(LOSSES[name].inputs(), False)  # as a compiled graph
    expected, expected_grads = loss_and_gradients(inputs)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *students: inputs(*students), fullgraph=True, backend="aot_eager")
    students = inputs.leaves()
    loss = compiled(*students)
    loss.backward(torch.ones_like(loss) * (torch.linspace(1, 2, loss.numel()).view(loss.shape) if loss.dim() else 1.0))
    assert torch.equal(loss.detach(), expected)
    assert all(torch.equal(s.grad, g) for s, g in zip(students, expected_grads, strict=True))
