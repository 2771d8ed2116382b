"""What autograd promises: any upstream gradient, kept graphs, second derivatives, transforms, checkpoints, modules."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from losses import FEATURES, LOSSES, ROWS, VARIANTS, Inputs, loss_and_gradients
from numerics import FLOAT64_BOUND, bound, error
from torch.utils.checkpoint import checkpoint

import kdkernels as kd
from kdkernels import ops
from kdkernels.losses import one_pass

EPS = torch.finfo(torch.float32).eps
ALL = pytest.mark.parametrize("name", LOSSES)


@pytest.fixture(autouse=True, params=["one pass", "two passes"])
def form(request, monkeypatch):
    """Every promise holds for both forms."""
    if request.param == "two passes":
        monkeypatch.setattr(one_pass, "_DTYPES", ())
    return request.param


def with_formula(inputs: Inputs, upstream: float = 1.0):
    with kd.use_backend("reference"):
        return loss_and_gradients(inputs, upstream)


def assert_close(x: torch.Tensor, y: torch.Tensor, length: int = 1000) -> None:
    """Two float32 computations of one number: each within `length` summed roundings of it at the worst, root of that in
    practice."""
    assert error(x, y) <= 8 * EPS * length**0.5


@ALL
@pytest.mark.parametrize("upstream", [0.0, -3.0, 65536.0, 1e-20])
def test_any_upstream_gradient(name, upstream):
    """The gradient is linear in it: a power of two exactly, others to a few roundings of its largest value."""
    inputs = LOSSES[name].inputs()
    _, once = loss_and_gradients(inputs)
    _, scaled = loss_and_gradients(inputs, upstream)
    for a, b in zip(once, scaled):
        wanted = a.double() * upstream
        if upstream in (0.0, 65536.0):
            assert torch.equal(b.double(), wanted)
        else:
            assert error(b, wanted) <= 4 * EPS


@ALL
@pytest.mark.parametrize("upstream", [float("inf"), float("nan")])
def test_a_broken_upstream_gradient_is_passed_on(name, upstream):
    """GradScaler finds an overflow by it."""
    _, grads = loss_and_gradients(LOSSES[name].inputs(), upstream)
    assert not any(g.isfinite().all() for g in grads)


@ALL
@pytest.mark.parametrize("variant", VARIANTS)
def test_backward_twice_gives_the_same_bits(name, variant):
    inputs = LOSSES[name].inputs(variant=variant)
    students = inputs.leaves()
    loss = inputs(*students).sum()
    first = torch.autograd.grad(loss, students, retain_graph=True)
    second = torch.autograd.grad(loss, students)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, students)


@ALL
def test_gradients_accumulate(name):
    inputs = LOSSES[name].inputs()
    students = inputs.leaves()
    inputs(*students).backward()
    once = [s.grad.clone() for s in students]
    inputs(*students).backward()
    assert all(torch.equal(s.grad, 2 * g) for s, g in zip(students, once))


def double_inputs(name: str, variant: str) -> Inputs:
    """Small float64 inputs, for numeric differences. The batch is cut: their cost is its square."""
    inputs = LOSSES[name].inputs(dtype=torch.float64, variant=variant)
    if name == "bounded_regression":  # keep away from the gate's step, where no difference quotient is a derivative
        inputs.keywords["gate"] = "batch"
    return inputs


@ALL
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(name, variant):
    inputs = double_inputs(name, variant)
    assert torch.autograd.gradcheck(inputs, inputs.leaves(), fast_mode=True)


@ALL
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradgradcheck(name, variant):
    inputs = double_inputs(name, variant)
    assert torch.autograd.gradgradcheck(inputs, inputs.leaves(), fast_mode=True)


@ALL
def test_gradient_penalty(name):
    """loss + |gradient|^2: the second-order term would be dropped silently if backward were not differentiable."""
    inputs = LOSSES[name].inputs(dtype=torch.float64, variant="tensors")

    def penalised(create_graph: bool = True):
        students = inputs.leaves()
        loss = inputs(*students)
        grads = torch.autograd.grad(loss, students, create_graph=create_graph)
        return torch.autograd.grad(loss + 100 * sum(g.square().sum() for g in grads), students)

    got = penalised()
    with kd.use_backend("reference"):
        wanted = penalised()
    _, first_order = loss_and_gradients(inputs)
    for a, b, plain in zip(got, wanted, first_order):
        assert error(a, b) <= FLOAT64_BOUND
        assert error(a, plain) > 1e-3  # the penalty is felt


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_levels(name, frozen):
    """The other level's gradient is what it is with both."""
    inputs = LOSSES[name].inputs()
    _, both = loss_and_gradients(inputs)
    students = inputs.leaves()
    students[frozen].requires_grad_(False)
    inputs(*students).backward()
    assert students[frozen].grad is None
    assert torch.equal(students[1 - frozen].grad, both[1 - frozen])


@ALL
def test_nothing_to_differentiate(name):
    inputs = LOSSES[name].inputs()
    expected, _ = loss_and_gradients(inputs)
    loss = inputs(*inputs.students)
    assert not loss.requires_grad and torch.equal(loss, expected)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(inputs(*inputs.leaves()), expected)


@ALL
def test_student_and_teacher_of_one_memory(name):
    """Self-distillation: the teacher is the detached student."""
    inputs = LOSSES[name].inputs()

    def run():
        students = inputs.leaves()
        teacher = inputs.student(*(s.detach() for s in students))
        loss = inputs.function(inputs.student(*students), teacher, *inputs.others[1:], **inputs.keywords)
        return loss.detach(), torch.autograd.grad(loss, students)

    loss, grads = run()
    usual_loss, usual_grads = loss_and_gradients(inputs)
    with kd.use_backend("reference"):
        formula_loss, formula_grads = run()
    if name in ("soft_cross_entropy", "bounded_regression"):
        assert_close(loss, formula_loss)
        for g, f in zip(grads, formula_grads):
            assert_close(g, f)
    else:  # every one of these has its minimum here: 0 up to the roundings of the two terms that cancel
        assert abs(loss) <= 8 * EPS * usual_loss
        assert all(g.abs().max() <= 8 * EPS * u.abs().max() for g, u in zip(grads, usual_grads))


@ALL
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(name, reentrant):
    inputs = LOSSES[name].inputs(variant="tensors")
    loss, grads = loss_and_gradients(inputs)
    students = inputs.leaves()
    again = checkpoint(inputs, *students, use_reentrant=reentrant)
    again.backward()
    assert torch.equal(again, loss)
    assert all(torch.equal(s.grad, g) for s, g in zip(students, grads))


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(name, dtype):
    inputs = LOSSES[name].inputs(dtype=dtype)
    loss, grads = loss_and_gradients(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, inside_grads = loss_and_gradients(inputs)
    assert inside.dtype == torch.float32 and torch.equal(inside, loss)
    assert all(g.dtype == dtype and torch.equal(g, h) for g, h in zip(inside_grads, grads))


@ALL
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_mode(name):
    inputs = LOSSES[name].inputs()
    _, grads = loss_and_gradients(inputs)
    with torch.autograd.detect_anomaly(check_nan=True):
        _, watched = loss_and_gradients(inputs)
    assert all(torch.equal(a, b) for a, b in zip(watched, grads))


def on_first(inputs: Inputs):
    """A function of the first level alone."""
    return lambda x: inputs(x, *inputs.students[1:])


@ALL
def test_functional_grad_jvp_and_hessian(name):
    inputs = LOSSES[name].inputs(dtype=torch.float64, variant="tensors")
    function, x = on_first(inputs), inputs.students[0]
    direction = torch.randn_like(x)

    def everything():
        loss, slope = torch.func.jvp(function, (x,), (direction,))
        _, curvature = torch.func.jvp(torch.func.grad(function), (x,), (direction,))
        return [loss, slope, torch.func.grad(function)(x), curvature]

    got = everything()
    with kd.use_backend("reference"):
        wanted = everything()
    _, grads = loss_and_gradients(inputs)
    assert all(error(a, b) <= FLOAT64_BOUND for a, b in zip(got, wanted))
    assert error(got[2], grads[0]) <= FLOAT64_BOUND
    assert error(got[1], (grads[0] * direction).sum()) <= FLOAT64_BOUND


@pytest.mark.parametrize("name", ["temperature_kl", "bounded_regression"])
def test_hessian(name):
    inputs = LOSSES[name].inputs(dtype=torch.float64)
    x = inputs.students[0]
    hessian = torch.func.hessian(on_first(inputs))(x)
    by_autograd = torch.autograd.functional.hessian(on_first(inputs), x)
    assert error(hessian, by_autograd) <= FLOAT64_BOUND
    assert hessian.abs().max() > 0


@ALL
def test_vmap(name):
    inputs = LOSSES[name].inputs(dtype=torch.float64)
    stack = torch.stack([inputs.students[0] * k for k in (0.5, 1.0, 2.0)])
    losses = torch.func.vmap(on_first(inputs))(stack)
    grads = torch.func.vmap(torch.func.grad(on_first(inputs)))(stack)
    for i in range(3):
        one = Inputs(inputs.function, [stack[i], *inputs.students[1:]], inputs.others, inputs.keywords, inputs.listed)
        loss, (grad, *_) = loss_and_gradients(one)
        assert error(losses[i], loss) <= FLOAT64_BOUND
        assert error(grads[i], grad) <= FLOAT64_BOUND


def test_the_predicate_of_functorch_is_there():
    """A private name of torch; without it transforms would be wrong, not slow."""
    seen = []
    torch.func.vmap(lambda x: seen.append(ops.functorch_active()) or x)(torch.ones(2))
    assert seen == [True] and not ops.functorch_active()


WEIGHTED = [(name, key) for name, loss in LOSSES.items() for key in (*loss.scalars, *(["weight"] * (name in ROWS)))]


@pytest.mark.parametrize("name, key", [*WEIGHTED, ("soft_cross_entropy", "class_weight")])
def test_a_weight_that_asks_for_a_gradient_gets_it(name, key):
    """Learned loss weights: kernels serve the student alone, so the formula steps in."""
    inputs = LOSSES[name].inputs(dtype=torch.float64, variant="tensors")
    plain, plain_grads = loss_and_gradients(inputs)
    learned = inputs.keywords[key].clone().requires_grad_()
    inputs.keywords[key] = learned
    students = inputs.leaves()
    loss = inputs(*students)
    *grads, slope = torch.autograd.grad(loss, [*students, learned])
    # The weights are float32, so the loss they enter is exact to float64's roundings all the same.
    assert error(loss, plain) <= FLOAT64_BOUND
    assert all(error(a, b) <= FLOAT64_BOUND for a, b in zip(grads, plain_grads))
    assert slope.shape == learned.shape and slope.dtype == learned.dtype
    # Linear in every weight but avg_factor, whose slope is -loss / avg_factor.
    if key == "avg_factor":
        wanted = -plain / learned.detach()
    else:
        moved = {}
        for step in (-0.5, 0.5):
            inputs.keywords[key] = learned.detach() + step
            moved[step] = inputs(*inputs.students)
        wanted = moved[0.5] - moved[-0.5]
        slope = slope.sum()
    assert error(slope, wanted) <= bound(0.0, torch.float32, 1)
    assert wanted != 0


def module_of(name: str, inputs: Inputs, loss_weight) -> torch.nn.Module:
    keywords = {k: v for k, v in inputs.keywords.items() if k not in ("target", "weight")}
    return LOSSES[name].module(**keywords, loss_weight=loss_weight)


def call(module: torch.nn.Module, inputs: Inputs, *students):
    of_call = {k: v for k, v in inputs.keywords.items() if k in ("target", "weight")}
    return module(inputs.student(*students), *inputs.others, **of_call)


@ALL
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("loss_weight", [2.0, "tensor"])
def test_modules_equal_functions(name, variant, loss_weight):
    inputs = LOSSES[name].inputs(variant=variant)
    loss, grads = loss_and_gradients(inputs, 2.0)
    module = module_of(name, inputs, torch.tensor(2.0) if loss_weight == "tensor" else loss_weight)
    students = inputs.leaves()
    value = call(module, inputs, *students)
    assert torch.equal(value, 2 * loss)
    ramp = torch.linspace(1, 2, value.numel()).view(value.shape) if value.dim() else 1.0
    value.backward(torch.ones_like(value) * ramp)
    assert all(torch.equal(s.grad, g) for s, g in zip(students, grads))


@ALL
def test_modules_copy_pickle_and_save(name):
    inputs = LOSSES[name].inputs(variant="tensors")
    module = module_of(name, inputs, torch.tensor(0.5))
    expected = call(module, inputs, *inputs.students)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    for other in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(saved, weights_only=False),
    ):
        assert repr(other) == repr(module)
        assert torch.equal(call(other, inputs, *inputs.students), expected)
    assert not module.state_dict()  # adding a loss must not break anybody's checkpoints


@ALL
def test_the_tensors_of_a_module_follow_it(name):
    inputs = LOSSES[name].inputs(variant="tensors")
    module = module_of(name, inputs, torch.tensor(0.5))
    tensors = dict(module.named_buffers())
    kept = {k for k, v in inputs.keywords.items() if isinstance(v, torch.Tensor) and k not in ("target", "weight")}
    assert set(tensors) == kept | {"loss_weight"}
    module.to("meta")
    assert all(b.device.type == "meta" for b in module.buffers())


@ALL
def test_a_module_in_half_precision_gives_the_same_kind_of_loss(name):
    """`model.half()` leaves weights as precise as they were: an avg_factor of 1e5 would become infinite."""
    inputs = LOSSES[name].inputs(variant="tensors")
    module = module_of(name, inputs, torch.tensor(0.5)).to(torch.bfloat16)
    assert all(b.dtype == torch.float32 for b in module.buffers() if b.is_floating_point())
    value = call(module, inputs, *inputs.leaves())
    assert value.dtype == torch.float32 and value.isfinite()


def test_modules_refuse_unknown_keywords():
    with pytest.raises(TypeError, match="temprature"):
        kd.TemperatureKLLoss(temprature=2.0)
