"""The CUDA kernels of the one-pass form: masked MSE and Pearson in one pass, and the scaling of its gradients. On a GPU
where there is one, else in the emulator, where launches are counted and architectures can be chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import emulator_library
import on_gpu
import pytest
import torch
from case_inputs import channels_last, contiguous, expanded, misaligned, sliced
from numerics import bound, error
from torch import Tensor

import kdkernels as kd
from kdkernels import native, ops
from kdkernels.losses.feature_pass import (
    BACKGROUND,
    FOREGROUND,
    MASKED_MSE_NORM,
    OP,
    PEARSON,
    PEARSON_NORM,
    MaskedMSETerm,
    PearsonTerm,
    feature_pass,
)

GPU = torch.cuda.is_available()
NO_GPU = pytest.mark.skipif(GPU, reason="the kernels run on the GPU here, not in the emulator")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
PAIRS = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32)]
TERMS = {"masked_mse": (True, False), "pearson": (False, True), "both": (True, True)}


@pytest.fixture(autouse=True)
def cuda_ops(monkeypatch):
    """The ops of the backend "cuda" take the CPU's tensors."""
    if GPU:
        assert native.load("cuda"), native.status("cuda").reason
    else:
        emulator_library.load()
    for name in (OP, "one_pass_scale", "one_pass_scale_"):
        served = ops.OPS[name]
        op = on_gpu.remote(served["cuda"]) if GPU else emulator_library.op(name)
        monkeypatch.setitem(served, "cuda", op)


class Pyramid:
    """Levels of student, teacher and mask, and the terms over them."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, int, int, int]],
        dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32),
        terms: str = "both",
        layouts=(contiguous, contiguous),
        **keywords,
    ):
        g = torch.Generator().manual_seed(3)
        self.students = [layouts[0](torch.randn(s, generator=g).add(0.3).to(dtypes[0])) for s in shapes]
        self.teachers = [layouts[1](torch.randn(s, generator=g).mul(1.5).to(dtypes[1])) for s in shapes]
        masks = [(3 * torch.rand(n, h, w, generator=g) - 1).clamp(0, 1) for n, _, h, w in shapes]
        masked, pearson = TERMS[terms]
        levels = range(len(shapes))
        masked_levels, pearson_levels = keywords.pop("masked", levels), keywords.pop("pearson", levels)
        self.masked_mse = self.pearson = None
        if masked:
            self.masked_mse = MaskedMSETerm(
                list(masked_levels), [masks[i] for i in masked_levels], 3.0, 0.4, loss_weight=1.7
            )
        if pearson:
            self.pearson = PearsonTerm(list(pearson_levels), loss_weight=0.6)
        self.wanted = list(keywords.pop("wanted", levels))
        self.length = sum(s[0] * s[1] * s[2] * s[3] for s in shapes)
        assert not keywords

    def run(self, backend: str = "cuda", norms: bool = True):
        return feature_pass(
            backend, self.students, self.teachers, self.wanted, self.masked_mse, self.pearson, norms=norms
        )

    def formula(self, dtype: torch.dtype | None) -> tuple[Tensor, list[list[Tensor | None]]]:
        """The loss by the formula, and each term's gradients; in float64, or as it is in the tested dtype."""
        cast = (lambda x: x.to(dtype)) if dtype else (lambda x: x)
        students = [cast(s.detach()).requires_grad_() for s in self.students]
        teachers = [cast(t) for t in self.teachers]
        loss, grads = torch.zeros((), dtype=dtype or F32), []
        with kd.use_backend("reference"):
            for term in (self.masked_mse, self.pearson):
                if term is None:
                    grads.append([None] * len(students))
                    continue
                some = [students[i] for i in term.levels], [teachers[i] for i in term.levels]
                if isinstance(term, MaskedMSETerm):
                    masks = [m.to(dtype or F32) for m in term.masks]
                    part = kd.masked_mse_loss(*some, masks, foreground_weight=3.0, background_weight=0.4)
                else:
                    part = kd.pearson_loss(*some)
                part = part * term.loss_weight
                grads.append(list(torch.autograd.grad(part, students, allow_unused=True)))
                loss = loss + part.detach()
        return loss, grads

    def check(self) -> None:
        """Loss, gradients and norms within the bound of the grid."""
        loss, values, grads = self.run()
        truth, exact = self.formula(torch.float64)
        peer, near = self.formula(None)
        assert error(loss, truth) <= bound(error(peer, truth), F32, self.length)
        for level, grad in zip(self.wanted, grads, strict=True):
            student = self.students[level]
            assert grad.shape == student.shape and grad.dtype == student.dtype
            zero = torch.zeros(student.shape, dtype=torch.float64)
            x64 = sum((side[level] for side in exact if side[level] is not None), zero)
            both = sum((side[level].double() for side in near if side[level] is not None), zero)
            assert error(grad, x64) <= bound(error(both, x64), grad.dtype, self.length), f"gradient {level}"
        for column, side in ((MASKED_MSE_NORM, exact[0]), (PEARSON_NORM, exact[1])):
            squares = [0.0 if g is None else float(g.square().sum()) for g in side]
            torch.testing.assert_close(
                values[:-1, column].double(), torch.tensor(squares).double(), rtol=2e-5, atol=1e-12
            )


LEVELS = {
    "pyramid": [(2, 12, 25, 42), (2, 12, 13, 21), (2, 12, 7, 11)],
    "odd": [(3, 7, 5, 11)],
    "wide rows": [(1, 2, 3, 683)],
    "many channels": [(2, 70, 3, 5)],
    "one sample": [(1, 3, 1, 1), (2, 5, 1, 1)],
    "empty among others": [(2, 4, 3, 5), (2, 4, 0, 5), (0, 4, 2, 2)],
    "all empty": [(2, 4, 0, 5)],
    "many levels": [(1, 3, 5 + i % 4, 6) for i in range(53)],
}
LAYOUTS = {
    "channels_last": (channels_last, channels_last),
    "teacher channels_last": (contiguous, channels_last),
    "student channels_last": (channels_last, contiguous),
    "every second row": (sliced(2, 2, 0), sliced(2, 2, 0)),
    "columns from 1": (sliced(3), sliced(3)),
    "every second column": (sliced(3, 2), contiguous),
    "every second channel": (sliced(1, 2), sliced(1, 3)),
    "every second picture, channels_last": (lambda x: sliced(0, 2)(x).contiguous(memory_format=torch.channels_last),)
    * 2,
    "teacher expanded over pictures": (contiguous, expanded(0)),
    "misaligned": (misaligned, misaligned),
}


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("levels", LEVELS)
def test_error_bound(levels, terms, dtypes):
    Pyramid(LEVELS[levels], dtypes, terms).check()


@pytest.mark.parametrize("dtypes", [PAIRS[0], PAIRS[1], PAIRS[3]], ids=str)
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_error_bound_of_layouts(layout, terms, dtypes):
    Pyramid([(3, 9, 6, 10), (2, 40, 9, 15)], dtypes, terms, LAYOUTS[layout]).check()


def test_mixed_dtypes_in_one_call():
    parts = [Pyramid([(2, 9, 6, 10)], pair) for pair in PAIRS]
    both = Pyramid([(2, 9, 6, 10)] * len(PAIRS))
    both.students = [p.students[0] for p in parts]
    both.teachers = [p.teachers[0] for p in parts]
    both.check()


# Levels by what stays on chip where a float32 vector of student and teacher is 64 bytes.
SLICES = {
    (80, "whole"): (1, 2, 60, 160),
    (80, "a part"): (1, 2, 180, 200),
    (86, "a small part"): (2, 2, 110, 120),
    (90, "2 blocks"): (1, 2, 150, 160),
    (90, "4 blocks"): (2, 1, 150, 160),
    (90, "8 blocks"): (4, 1, 150, 161),
    (90, "8 blocks alone"): (1, 1, 401, 403),
    (90, "a part in 8 blocks"): (2, 1, 350, 352),
}


@NO_GPU
@pytest.mark.parametrize("case", SLICES, ids=str)
def test_channels_of_clusters_and_second_reads(case, emulator):
    emulator.kdkernels_emulator_capability(case[0])
    shape = SLICES[case]
    Pyramid([shape, (2, 3, 9, 11), (1, 70, 2, 3)], terms="both").check()
    Pyramid([shape, (2, 3, 9, 11)], (BF16, BF16), terms="pearson").check()


@NO_GPU
def test_channels_of_two_and_of_eight_blocks_in_one_launch(emulator):
    """A cluster has four channels of the second level, and each block adds up the parts of its own."""
    pyramid = Pyramid([(4, 1, 150, 161), (1, 6, 150, 160)])
    assert launches(emulator, pyramid.run) == 3
    pyramid.check()


@NO_GPU
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_the_order_of_threads_changes_nothing(terms, layout, emulator):
    """A race would change bits. The first level has two blocks per channel."""
    pyramid = Pyramid([(1, 2, 150, 160), (2, 9, 13, 17)], terms=terms, layouts=(layout, layout))
    found = []
    for seed in range(4):
        emulator.kdkernels_emulator_seed(seed)
        loss, values, grads = pyramid.run()
        found.append((loss, values, *grads))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


@NO_GPU
def test_code_without_clusters_on_a_gpu_that_has_them(emulator):
    emulator.kdkernels_emulator_code(80)
    Pyramid([(1, 2, 150, 160), (2, 9, 13, 17)]).check()


def _same_as_cpu(pyramid: Pyramid) -> None:
    assert native.load("cpu")
    for norms in (False, True):
        loss, values, grads = pyramid.run(norms=norms)
        expected = pyramid.run("cpu", norms=norms)
        torch.testing.assert_close(loss, expected[0], rtol=2e-6, atol=0)
        torch.testing.assert_close(values, expected[1], rtol=2e-5, atol=1e-12)
        for a, b in zip(grads, expected[2], strict=True):
            eps = torch.finfo(a.dtype).eps
            assert error(a, b) <= 8 * eps if a.numel() else a.shape == b.shape


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("dtypes", [PAIRS[0], PAIRS[1]], ids=str)
@pytest.mark.parametrize("levels", LEVELS)
def test_values_and_gradients_are_those_of_the_cpu(levels, dtypes, layout):
    _same_as_cpu(Pyramid(LEVELS[levels], dtypes, layouts=(layout, layout)))


SOME = {
    "one level has no pearson": {"pearson": (0, 1)},
    "one level has no masked_mse": {"masked": (0, 2)},
    "each has a level of its own": {"masked": (0,), "pearson": (1,), "wanted": (0, 1)},
    "frozen levels": {"wanted": (1,)},
    "no gradient": {"wanted": ()},
}


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("some", SOME)
def test_some_levels(some, layout):
    pyramid = Pyramid(LEVELS["pyramid"], layouts=(layout, layout), **SOME[some])
    pyramid.check()
    _same_as_cpu(pyramid)


def test_a_level_of_neither_term_has_no_gradient():
    pyramid = Pyramid(LEVELS["pyramid"], masked=(0,), pearson=(1,))
    grads = pyramid.run()[2]
    assert not grads[2].any() and grads[0].any() and grads[1].any()


@pytest.mark.parametrize("terms", TERMS)
def test_weights_on_the_device(terms):
    """They are read by the kernels: as tensors they give what they give as numbers."""
    pyramid = Pyramid(LEVELS["odd"], terms=terms)
    expected = pyramid.run()
    for term in (pyramid.masked_mse, pyramid.pearson):
        for name in ("foreground_weight", "background_weight", "loss_weight"):
            if hasattr(term, name):
                setattr(term, name, torch.tensor(getattr(term, name)))
    loss, values, grads = pyramid.run()
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(values, expected[1], rtol=1e-6, atol=0)
    for a, b in zip(grads, expected[2], strict=True):
        assert error(a, b) <= 4 * torch.finfo(F32).eps


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("normalizer", ["elements", "pixels", "batch"])
def test_options(normalizer, reduction):
    pyramid = Pyramid(LEVELS["pyramid"])
    pyramid.masked_mse.normalizer = normalizer
    pyramid.masked_mse.level_reduction = pyramid.pearson.level_reduction = reduction
    pyramid.students[0][:, 3] = 0.25  # a constant channel
    pyramid.pearson.on_constant = "reference" if reduction == "sum" else "zero"
    _same_as_cpu(pyramid)


def launches(emulator, run) -> int:
    before = emulator.kdkernels_emulator_launches()
    run()
    return emulator.kdkernels_emulator_launches() - before


@NO_GPU
@pytest.mark.parametrize("capability", [80, 90])
def test_launches(capability, emulator):
    emulator.kdkernels_emulator_capability(capability)
    five = [(2, 8, 25, 42), (2, 8, 13, 21), (2, 8, 7, 11), (2, 8, 4, 6), (2, 8, 2, 3)]
    last = {"layouts": (channels_last, channels_last)}
    assert launches(emulator, Pyramid(five).run) == 3
    assert launches(emulator, Pyramid(five, pearson=(0, 1, 2, 3)).run) == 3
    assert launches(emulator, Pyramid(five, masked=(0, 1), pearson=(1, 2), wanted=(0, 1, 2)).run) == 3
    assert launches(emulator, Pyramid(five, terms="masked_mse").run) == 3
    assert launches(emulator, Pyramid(five, terms="pearson").run) == 2
    assert launches(emulator, Pyramid(five, terms="masked_mse", **last).run) == 3
    assert launches(emulator, Pyramid(five, **last).run) == 5


# one_pass_scale and one_pass_scale_.

SCALE, SCALE_IN_PLACE = ops.OPS["one_pass_scale"], ops.OPS["one_pass_scale_"]
SIZES = [(2, 3, 5, 7), (1, 1, 1, 1), (3, 17, 33, 35), (0, 4, 2, 2), (1, 2, 64, 64)]


def gradients() -> list[Tensor]:
    found = []
    for dtype in (F32, BF16, F16):
        for layout in (contiguous, channels_last, misaligned):
            found += [layout(torch.randn(size).to(dtype)) for size in SIZES]
    return found


@pytest.mark.parametrize("upstream", [0.37, 1.0, 0.0, float("nan")])
def test_scale(upstream):
    factor = torch.tensor(upstream)
    grads = gradients()
    before = [g.clone() for g in grads]
    scaled = SCALE["cuda"](grads, factor)
    for g, b, s in zip(grads, before, scaled, strict=True):
        expected = (b.float() * factor).to(b.dtype)
        assert torch.equal(g, b)
        assert s.stride() == g.stride() and torch.equal(s.nan_to_num(7), expected.nan_to_num(7))
        assert s.numel() == 0 or s.data_ptr() != g.data_ptr()
    SCALE_IN_PLACE["cuda"](grads, factor)
    for g, s in zip(grads, scaled, strict=True):
        assert torch.equal(g.nan_to_num(7), s.nan_to_num(7))


@NO_GPU
def test_scale_is_one_launch_and_in_place_writes_nothing_for_1(emulator):
    grads = gradients()
    before = [g.clone() for g in grads]
    versions = [g.data_ptr() for g in grads]
    for factor in (1.0, 2.0):
        assert launches(emulator, lambda f=factor: SCALE_IN_PLACE["cuda"](grads, torch.tensor(f))) == 1
        assert launches(emulator, lambda f=factor: SCALE["cuda"](grads, torch.tensor(f))) == 1
        assert [g.data_ptr() for g in grads] == versions
        assert all(torch.equal(g.float(), factor * b.float()) for g, b in zip(grads, before, strict=True))
    assert launches(emulator, lambda: SCALE["cuda"]([], torch.tensor(1.0))) == 0
    many = [torch.randn(5) for _ in range(100)]
    assert launches(emulator, lambda: SCALE["cuda"](many, torch.tensor(3.0))) == 3
    assert all(torch.equal(s, 3 * g) for s, g in zip(SCALE["cuda"](many, torch.tensor(3.0)), many, strict=True))


def test_scale_refuses_what_it_cannot_scale():
    with pytest.raises(RuntimeError, match="float64"):
        SCALE["cuda"]([torch.zeros(3).double()], torch.tensor(1.0))
    with pytest.raises(RuntimeError, match="without gaps"):
        SCALE["cuda"]([torch.zeros(6)[::2]], torch.tensor(1.0))


def test_values_add_up():
    _, values, _ = Pyramid(LEVELS["pyramid"]).run()
    loss = Pyramid(LEVELS["pyramid"]).run()[0]
    total = values[-1, [FOREGROUND, BACKGROUND, PEARSON]].sum()
    torch.testing.assert_close(total, loss)
    torch.testing.assert_close(values[-1], values[:-1].sum(0))
