"""Loss and gradient of the row losses in one pass: equal to two passes, and to the formula, for every kernel that has
the form. test_one_pass.py has what all losses promise about it; the grid of each loss runs in this form as well.
"""

from __future__ import annotations

import importlib

import emulator_library
import pytest
import torch
from case_inputs import product
from cases import CASES
from grid import answers, tensors, zero_with_graph
from numerics import Result, error, evaluate, exact, faults, formula, leaves, mutants

import kdkernels as kd
from kdkernels import native, ops
from kdkernels.losses import one_pass

ROWS = ("temperature_kl", "decoupled_kl", "soft_cross_entropy", "binary_kl", "bounded_regression")
PAIRS = ("float32", "bfloat16", "bfloat16-float32")
EPS = torch.finfo(torch.float32).eps
INF, NAN = float("inf"), float("nan")

every_loss = pytest.mark.parametrize("loss", ROWS)
every_engine = pytest.mark.parametrize("backend", ["base", "avx2", "avx512", "cuda"], indirect=True)
gpu_engine = pytest.mark.parametrize("backend", ["cuda"], indirect=True)


@pytest.fixture(autouse=True)
def one_pass_kernels(request, monkeypatch):
    """Every kernel takes part, whatever the grid leaves to two passes."""
    if "backend" in request.fixturenames:
        request.getfixturevalue("backend")
    monkeypatch.setattr(one_pass, "_DTYPES", (torch.float32, torch.bfloat16))
    monkeypatch.setattr(ops, "has_kernel", lambda op, backend: backend in ("cpu", "cuda"))


def in_form(loss, form, loss_weight=1.0):
    """The public function in one form. Of the formula, which has none, nothing is asked."""
    weighted = importlib.import_module(f"kdkernels.losses.{loss}").weighted

    def function(student, *inputs, **keywords):
        asked = False if ops._forced == "reference" else form
        weight = loss_weight
        if isinstance(weight, torch.Tensor) and student.dtype == torch.float64:
            weight = weight.double()
        result = weighted(student, *inputs, one_pass=asked, loss_weight=weight, **keywords)
        assert isinstance(result, one_pass.Plan) == (asked is True and student.requires_grad)
        return one_pass.value(result)

    return function


def reduced(keywords):
    """One value per row has no such form."""
    return {k: v for k, v in keywords.items() if (k, v) != ("reduction", "none")}


def check_same(loss, inputs, keywords, what, upstream=None, loss_weight=1.0):
    """Both forms of one call, apart by no more than roundings: a bfloat16 gradient has one rounding more."""
    single = evaluate(in_form(loss, True, loss_weight), *inputs, upstream=upstream, **keywords)
    double = evaluate(in_form(loss, False, loss_weight), *inputs, upstream=upstream, **keywords)
    assert error(single.loss, double.loss) <= 64 * EPS, what
    (grad,), (other,) = single.grads, double.grads
    assert grad.dtype == other.dtype and grad.stride() == other.stride(), what
    assert error(grad, other) <= 4 * torch.finfo(grad.dtype).eps + 64 * EPS, what
    assert torch.equal(grad.isnan(), other.isnan()), what
    return single


def small_cases(loss, pair):
    """Without those that differ in the reduction alone, and the largest."""
    return [c for c in CASES[loss] if pair in c.pairs and not c.slow and c.length <= 2e4 and "none" not in c.name]


@every_engine
@every_loss
@pytest.mark.parametrize("pair", PAIRS)
def test_both_forms_are_equal(loss, pair, backend):
    """All shapes, layouts, values and keywords of the grid."""
    for case in small_cases(loss, pair):
        inputs, keywords = case.inputs(pair)
        before = [x.clone() for x in tensors([inputs, keywords])]
        check_same(loss, inputs, reduced(keywords), case.name)
        assert all(torch.equal(x, y) for x, y in zip(tensors([inputs, keywords]), before)), case.name


WEIGHTS = {"number": 0.37, "tensor": torch.tensor(2.6), "negative": -3.0, "zero": 0.0}


@every_engine
@every_loss
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_loss_weight_against_the_formula(kind, pair, loss, backend):
    """The weight enters in the kernel, in loss and gradient."""
    names = ("mixed dtypes", "avg factor mean tensor", "weights as tensors", "row weight", "77x81", "77x4")
    for case in [c for c in CASES[loss] if c.name in names and pair in c.pairs]:
        inputs, keywords = case.inputs(pair)
        function = in_form(loss, True, WEIGHTS[kind])
        truth, peer = exact(function, *inputs, **keywords), formula(function, *inputs, **keywords)
        problems = faults(evaluate(function, *inputs, **keywords), truth, peer, case.length)
        assert not problems, f"{case.name}: {problems}"
        check_same(loss, inputs, keywords, case.name, loss_weight=WEIGHTS[kind])


@every_engine
@every_loss
def test_mutants_are_caught(loss, backend):
    """What is judged with a loss weight as well: one that is left out of the gradient, or enters twice."""
    (case,) = [c for c in CASES[loss] if c.name == ("77x4" if loss == "bounded_regression" else "77x81")]
    inputs, keywords = case.inputs("float32")
    function = in_form(loss, True, 0.37)
    truth, peer = exact(function, *inputs, **keywords), formula(function, *inputs, **keywords)
    good = evaluate(function, *inputs, **keywords)
    assert not faults(good, truth, peer, case.length)
    broken = [*mutants(function, *inputs, **keywords)]
    broken += [(f"weight {x}", Result(good.loss, [g * x for g in good.grads])) for x in (0.37, 1 / 0.37)]
    for what, mutant in broken:
        assert any(p.startswith("gradient 0:") for p in faults(mutant, truth, peer, case.length)), what


@every_engine
@every_loss
@pytest.mark.parametrize("upstream", [0.0, 1.0, -3.0, 65536.0])
def test_any_upstream_gradient(upstream, loss, backend):
    for pair in ("float32", "bfloat16"):
        (case,) = [c for c in CASES[loss] if c.name == ("77x4" if loss == "bounded_regression" else "77x81")]
        inputs, keywords = case.inputs(pair)
        check_same(loss, inputs, keywords, case.name, upstream=torch.tensor(upstream))


def hard_rows(width):
    """What a kernel might treat as the rule and is not: -inf on either side and both, NaN, equal and close rows."""
    s, t = torch.randn(10, width) * 3, torch.randn(10, width) * 3
    s[0], t[1], s[2], t[2] = -INF, -INF, -INF, -INF
    t[3, 0], s[4, 0], t[4, 0] = -INF, -INF, -INF
    s[5] = t[5]
    s[6] = t[6] + 1e-3 * torch.randn(width)
    s[7], t[7] = 1e4 + s[7], t[7] - 1e4
    return s, t


@every_engine
@pytest.mark.parametrize("loss", ROWS[:4])
@pytest.mark.parametrize("width", [1, 2, 17, 81, 1000, 2100])
def test_hard_rows(width, loss, backend):
    s, t = hard_rows(width)
    inputs = [torch.arange(10) % 2 == 0] if loss == "decoupled_kl" else []
    keywords = {"temperature": 2.0} if loss != "decoupled_kl" else {"foreground_temperature": 3.0}
    result = check_same(loss, [s, t, *inputs], {**keywords, "reduction": "sum"}, "finite")
    assert result.loss.isfinite() == (loss != "binary_kl") or width == 1
    if loss != "binary_kl":
        assert (result.grads[0][:3] == 0).all() and result.grads[0].isfinite().all()
    s[8, 0], t[9, width - 1] = -INF, NAN
    result = check_same(loss, [s, t, *inputs], {**keywords, "reduction": "sum"}, "NaN and infinity")
    assert result.loss.isnan() and result.grads[0][9].isnan().any() and not result.grads[0][5:8].isnan().any()


@every_engine
@pytest.mark.parametrize("width", [3, 81, 2100])
@pytest.mark.parametrize("hard", [0.0, 0.4, 1.0])
def test_labels_of_soft_cross_entropy(hard, width, backend):
    """Ignored rows have no gradient, whatever their logits; a label out of range makes its row NaN."""
    s, t = torch.randn(8, width) * 3, torch.randn(8, width) * 3
    target = torch.tensor([0, width - 1, -100, 1, -100, 2, 0, 1])
    s[2], t[4] = NAN, NAN
    keywords = {"target": target, "hard_weight": hard, "temperature": 2.0, "class_weight": torch.rand(width) + 0.5}
    result = check_same("soft_cross_entropy", [s, t], keywords, "ignored")
    assert result.loss.isfinite() and (result.grads[0][[2, 4]] == 0).all() and result.grads[0].isfinite().all()
    for label in (width, -1, 2**40):
        target[5] = label
        result = check_same("soft_cross_entropy", [s, t], keywords, "out of range")
        assert result.loss.isnan() and result.grads[0][5].isnan().all()
        assert not result.grads[0][[0, 1, 2, 3, 4, 6, 7]].isnan().any()


@every_engine
@every_loss
@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4)])
def test_no_rows(shape, loss, backend):
    student = torch.randn(shape, requires_grad=True)
    inputs = {"decoupled_kl": [torch.zeros(shape[:-1], dtype=torch.bool)], "bounded_regression": [torch.randn(shape)]}
    value = in_form(loss, True, 2.0)(student, torch.randn(shape), *inputs.get(loss, []))
    zero_with_graph(loss, [student], value)


@every_engine
@pytest.mark.parametrize("width", [17, 2100])
def test_parts_of_decoupled_kl(width, backend):
    """The plan's details: weighted, and together the loss."""
    s, t, rows = torch.randn(40, width), torch.randn(40, width), torch.rand(40) < 0.3
    options = {"foreground_weight": 0.7, "background_weight": torch.tensor(2.0), "foreground_temperature": 3.0}
    module = importlib.import_module("kdkernels.losses.decoupled_kl")
    plan = module.weighted(s.requires_grad_(), t, rows, loss_weight=0.5, one_pass=True, **options)
    loss = one_pass.value(plan).detach()
    details = plan.details
    for name, weights in (("foreground", {"background_weight": 0.0}), ("background", {"foreground_weight": 0.0})):
        alone = exact(kd.decoupled_kl_loss, s, t, rows, **{**options, **weights}).loss * 0.5
        torch.testing.assert_close(details[f"decoupled_kl/{name}"].double(), alone, rtol=1e-5, atol=0)
    torch.testing.assert_close(sum(details.values()), loss)
    assert not any(x.requires_grad for x in details.values())


@gpu_engine
@pytest.mark.parametrize("loss", ROWS[:4])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("rows", [1, 3])
def test_wide_rows_of_several_blocks(rows, capability, loss, backend):
    """A cluster per row, or blocks that a second launch joins: each writes its share of the gradient."""
    if torch.cuda.is_available():
        pytest.skip("a GPU has its own capability")
    library = emulator_library.load()
    library.kdkernels_emulator_capability(capability)
    try:
        for width in (16384, 50257):
            s, t = torch.randn(rows, width) * 3, torch.randn(rows, width) * 3
            if rows > 1:  # alone it would be judged by its own size, which is that of its roundings
                s[0] = t[0] + 1e-3 * torch.randn(width)
            inputs = [torch.arange(rows) == 1] if loss == "decoupled_kl" else []
            check_same(loss, [s, t, *inputs], {}, width)
    finally:
        library.kdkernels_emulator_capability(90)


@gpu_engine
@every_loss
def test_thread_order_does_not_matter(loss, backend):
    """Nor which warp runs ahead: what a row's threads replace in shared memory, nobody else still reads."""
    if torch.cuda.is_available():
        pytest.skip("a GPU's threads run in no order")
    library = emulator_library.load()
    found = []
    try:
        for seed in range(4):
            library.kdkernels_emulator_seed(seed)
            results = []
            for case in [c for c in CASES[loss] if c.name in ("77x81", "77x4", "3x2049", "misaligned", "3x1000")]:
                inputs, keywords = case.inputs("bfloat16")
                result = evaluate(in_form(loss, True), *inputs, **keywords)
                results += [result.loss, *result.grads]
            found.append(results)
    finally:
        library.kdkernels_emulator_seed(0)
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other))


@pytest.mark.parametrize("loss", ROWS)
@pytest.mark.parametrize("shape", [(501, 81), (37, 2500)])
def test_the_same_bits_for_any_number_of_threads(shape, loss):
    if loss == "bounded_regression":
        shape = (product(shape) // 4, 4)
    s, t = torch.randn(shape), torch.randn(shape)
    inputs = {"decoupled_kl": [torch.rand(shape[0]) < 0.5], "bounded_regression": [torch.randn(shape)]}.get(loss, [])
    assert native.load("cpu")
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(evaluate(in_form(loss, True, 0.3), s, t, *inputs))
    for other in results[1:]:
        assert torch.equal(results[0].loss, other.loss) and torch.equal(results[0].grads[0], other.grads[0])


@every_loss
def test_second_derivatives_have_the_weight(loss):
    """create_graph=True: the formula, times the loss weight."""
    name = "77x4" if loss == "bounded_regression" else "3x17"
    (case,) = [c for c in CASES[loss] if c.name == name]
    inputs, keywords, *_ = answers(loss, case, "float32")
    found = []
    for form in (True, False):
        student = leaves(inputs[0])
        value = in_form(loss, form, torch.tensor(0.37))(student, *inputs[1:], **keywords)
        (grad,) = torch.autograd.grad(value, [student], create_graph=True)
        (second,) = torch.autograd.grad((grad * torch.linspace(0, 1, grad.numel()).view_as(grad)).sum(), [student])
        found += [grad.detach(), second]
    torch.testing.assert_close(found[0], found[2])
    torch.testing.assert_close(found[1], found[3])
