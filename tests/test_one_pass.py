"""The one-pass form: when it is taken, what it keeps, and that its gradient is right whatever becomes of it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from losses import FEATURES, LOSSES, Inputs, in_form, loss_and_gradients, op_calls
from numerics import bound, error
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import kdkernels as kd
from kdkernels import ops
from kdkernels.losses import one_pass

ALL = pytest.mark.parametrize("name", LOSSES)
EPS = torch.finfo(torch.float32).eps


def took_one_pass(loss: torch.Tensor) -> bool:
    return type(loss.grad_fn).__name__ == "_OnePassBackward"


def run(name: str, dtype: torch.dtype = torch.float32, form: bool | str = "auto", variant: str = "numbers"):
    inputs = in_form(LOSSES[name].inputs(dtype=dtype, variant=variant), form)
    students = inputs.leaves()
    return inputs, students, inputs(*students)


# Which form.


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_taken_where_it_can_be(name, dtype):
    assert took_one_pass(run(name, dtype)[2])
    assert not took_one_pass(run(name, dtype, False)[2])


@ALL
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_take_two_passes(name, dtype):
    assert not took_one_pass(run(name, dtype)[2])
    with pytest.raises(RuntimeError, match=rf"{name}: one_pass=True cannot be had: {dtype} takes two passes"):
        run(name, dtype, True)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - set(FEATURES)))
def test_one_value_per_row_takes_two_passes(name):
    assert not took_one_pass(run(name, variant="rows")[2])
    with pytest.raises(RuntimeError, match="one_pass=True cannot be had"):
        run(name, form=True, variant="rows")


@ALL
def test_the_formula_takes_two_passes(name):
    with kd.use_backend("reference"):
        assert not took_one_pass(run(name)[2])
        with pytest.raises(RuntimeError, match="'reference' has no one-pass kernel"):
            run(name, form=True)


@ALL
def test_without_a_gradient_none_is_formed(name):
    inputs = in_form(LOSSES[name].inputs(), True)
    students = inputs.leaves()
    with torch.no_grad():
        assert inputs(*students).grad_fn is None
    assert inputs(*inputs.students).grad_fn is None
    called = [str(op) for op, _, _ in recorded(lambda: inputs(*inputs.students))]
    assert called and not any("one_pass" in op or "detection_distillation" in op for op in called)


def recorded(call):
    from losses import OpCalls

    with OpCalls() as calls:
        call()
    return calls.calls


@ALL
@pytest.mark.parametrize("bad", ["yes", None, 1, "Auto"])
def test_a_form_that_does_not_exist_is_refused(name, bad):
    with pytest.raises(ValueError, match="one_pass: expected 'auto', True or False"):
        run(name, form=bad)


# What it gives.


@ALL
@pytest.mark.parametrize("variant", ["numbers", "tensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", ["small", "wide", "many"])
def test_both_forms_agree(name, dtype, variant, size):
    """The loss to a rounding of its own size; the gradient, which one more rounding separates in bfloat16."""
    inputs = LOSSES[name].inputs(size, dtype, variant)
    one, grads = loss_and_gradients(in_form(inputs, True), 0.75)
    two, expected = loss_and_gradients(in_form(inputs, False), 0.75)
    assert error(one, two) <= 4 * EPS
    for grad, wanted in zip(grads, expected):
        assert grad.dtype == wanted.dtype and grad.stride() == wanted.stride()
        assert error(grad, wanted) <= 4 * torch.finfo(dtype).eps


@ALL
def test_same_bits_for_any_number_of_threads(name):
    inputs = in_form(LOSSES[name].inputs("wide"), True)
    found = []
    for threads in (1, 2, 4, 7):
        torch.set_num_threads(threads)
        found.append(loss_and_gradients(inputs))
    for loss, grads in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert all(torch.equal(a, b) for a, b in zip(grads, found[0][1]))


@ALL
@pytest.mark.parametrize("upstream", [1.0, 2.0, 0.3])
def test_three_backwards_of_a_kept_graph(name, upstream):
    """In place, the second would multiply what the first had multiplied."""
    _, students, loss = run(name)
    factor = torch.tensor(upstream)
    first = torch.autograd.grad(loss, students, factor, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.zero_()  # what was handed out is nobody else's
    second = torch.autograd.grad(loss, students, 2 * factor, retain_graph=True)
    third = torch.autograd.grad(loss, students, factor)
    assert all(torch.equal(a, 2 * b) for a, b in zip(second, kept))
    assert all(torch.equal(a, b) for a, b in zip(third, kept))


@ALL
def test_a_freed_graph_says_so(name):
    _, _, loss = run(name)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@ALL
def test_gradients_accumulate(name):
    """Two steps into the same leaves; and the first step's .grad is not the node's own memory."""
    inputs, students, loss = run(name)
    loss.backward(retain_graph=True)
    once = [s.grad.clone() for s in students]
    loss.backward()
    assert all(torch.equal(s.grad, 2 * g) for s, g in zip(students, once))
    inputs(*students).backward()
    assert all(error(s.grad, 3 * g) <= 2 * EPS for s, g in zip(students, once))


@ALL
def test_an_unused_sibling_and_a_sum_of_uses(name):
    """The same student in two losses, of which one has another upstream gradient."""
    inputs = in_form(LOSSES[name].inputs(), True)
    students = inputs.leaves()
    (inputs(*students) + 3 * inputs(*students)).backward()
    _, grads = loss_and_gradients(inputs)
    assert all(error(s.grad, 4 * g) <= 4 * EPS for s, g in zip(students, grads))


@ALL
def test_gradscaler(name):
    inputs = in_form(LOSSES[name].inputs(), True)
    students = inputs.leaves()
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    optimiser = torch.optim.SGD(students, 0.0)
    scaler.scale(inputs(*students)).backward()
    scaler.unscale_(optimiser)
    _, grads = loss_and_gradients(inputs)
    assert all(torch.equal(s.grad, g) for s, g in zip(students, grads))


@ALL
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(name, reentrant):
    inputs = in_form(LOSSES[name].inputs(), True)
    students = inputs.leaves()
    checkpoint(lambda *s: inputs(*(2 * x for x in s)), *students, use_reentrant=reentrant).backward()
    again = inputs.leaves()
    inputs(*(2 * x for x in again)).backward()
    assert all(torch.equal(s.grad, a.grad) for s, a in zip(students, again))


@ALL
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_mode_and_saved_tensor_hooks(name):
    inputs = in_form(LOSSES[name].inputs(), True)
    _, expected = loss_and_gradients(inputs, 3.0)
    with torch.autograd.detect_anomaly(check_nan=True):
        _, grads = loss_and_gradients(inputs, 3.0)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        _, grads = loss_and_gradients(inputs, 3.0)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected))


@ALL
def test_neither_side_is_kept(name):
    inputs = in_form(LOSSES[name].inputs(), True)
    leaves = inputs.leaves()
    students = [2 * s for s in leaves]
    loss = inputs(*students)
    sides = [weakref.ref(s) for s in students]
    teacher = inputs.others[0]
    sides += [weakref.ref(t) for t in (teacher if isinstance(teacher, list) else [teacher])]
    del students, teacher, inputs
    gc.collect()
    assert not any(side() is not None for side in sides)
    loss.backward()


# Second derivatives.


def gradient_penalty(inputs: Inputs, *students: torch.Tensor) -> list[torch.Tensor]:
    grads = torch.autograd.grad(inputs(*students), students, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in grads), students)


@ALL
def test_second_derivatives_come_from_the_formula(name):
    inputs = LOSSES[name].inputs()
    found = gradient_penalty(in_form(inputs, True), *inputs.leaves())
    with kd.use_backend("reference"):
        wanted = gradient_penalty(inputs, *inputs.leaves())
    for a, b in zip(found, wanted):
        assert error(a, b) <= bound(EPS, torch.float32, 1)


@ALL
def test_second_derivatives_without_the_inputs_are_refused(name):
    inputs = in_form(LOSSES[name].inputs(), True)
    leaves = inputs.leaves()
    loss = inputs(*(2 * s for s in leaves))  # the students are gone
    with pytest.raises(RuntimeError, match="keep both until backward, or pass one_pass=False"):
        torch.autograd.grad(loss, leaves, create_graph=True)
    students = [2 * s for s in leaves]
    loss = inputs(*students)
    with torch.no_grad():
        students[0].zero_()
    with pytest.raises(RuntimeError, match="changed in place"):
        torch.autograd.grad(loss, leaves, create_graph=True)


@ALL
def test_inference_teachers(name):
    inputs = in_form(LOSSES[name].inputs(), True)
    with torch.inference_mode():
        others = pytree.tree_map_only(torch.Tensor, torch.clone, inputs.others[0])
    teacher_only = Inputs(
        inputs.function, inputs.students, [others, *inputs.others[1:]], inputs.keywords, inputs.listed
    )
    loss, grads = loss_and_gradients(teacher_only)
    expected, wanted = loss_and_gradients(inputs)
    assert torch.equal(loss, expected) and all(torch.equal(a, b) for a, b in zip(grads, wanted))
    found = gradient_penalty(teacher_only, *teacher_only.leaves())
    assert all(torch.equal(a, b) for a, b in zip(found, gradient_penalty(inputs, *inputs.leaves())))


# The ops.


@ALL
@pytest.mark.parametrize("variant", ["numbers", "tensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(name, dtype, variant):
    calls = op_calls(LOSSES[name].inputs(dtype=dtype, variant=variant), one_pass=True)
    assert [op._opname for op, _, _ in calls][-1] == "one_pass_scale_"
    for op, arguments, _ in calls:
        torch.library.opcheck(op, arguments)


@ALL
def test_fakes_have_the_real_shapes_dtypes_and_strides(name):
    inputs = LOSSES[name].inputs()
    if inputs.listed:
        inputs = inputs.to_layout(lambda x: x.to(memory_format=torch.channels_last))

    def layout(found):
        tensors = [x for x in pytree.tree_leaves(found) if isinstance(x, torch.Tensor)]
        return [(x.shape, x.dtype, x.stride()) for x in tensors]

    for op, arguments, real in op_calls(inputs, one_pass=True):
        with FakeTensorMode() as mode:
            fake = op(*pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments))
        assert layout(fake) == layout(real)


def test_scaling_refuses_what_it_cannot_do():
    scale, in_place = ops.OPS["one_pass_scale"]["cpu"], ops.OPS["one_pass_scale_"]["cpu"]
    grad, one = torch.randn(4, 6), torch.ones(())
    for op in (scale, in_place):
        for grads, upstream in (
            ([grad.double()], one),
            ([grad], one.double()),
            ([grad], torch.ones(2)),
            ([grad[:, ::2]], one),
            ([grad.int()], one),
        ):
            with pytest.raises(RuntimeError):
                op(grads, upstream)


def test_scaling_rounds_once():
    grad = torch.randn(5000).to(torch.bfloat16)
    factor = torch.tensor(0.3)
    expected = (grad.float() * factor).to(torch.bfloat16)
    (found,) = ops.OPS["one_pass_scale"]["cpu"]([grad], factor)
    assert torch.equal(found, expected)
    ops.OPS["one_pass_scale_"]["cpu"]([grad], factor)
    assert torch.equal(grad, expected)


def test_autograd_can_be_asked_whether_the_graph_is_kept():
    """A private name of PyTorch: without it each backward would copy."""
    assert "keep_graph" in one_pass._graph_is_kept.__name__
