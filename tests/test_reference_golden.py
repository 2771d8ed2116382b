"""The formulas against the golden values of the published losses: value and gradient, in float64 and float32."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kdkernels import reference
from kdkernels.selfcheck.golden import CASES, Golden, projection, wave


def _public(function):
    """The formula of a feature loss under the public calling convention: one tensor for one level."""
    return lambda *features, **keywords: function(*([x] for x in features), **keywords)


FORMULAS = SimpleNamespace(**{name: getattr(reference, name) for name in reference.__all__})
FORMULAS.masked_mse_loss = _public(reference.masked_mse_loss)
FORMULAS.pearson_loss = _public(reference.pearson_loss)


def test_the_inputs_are_the_published_ones():
    expected = torch.tensor([0, 0.361615431964962, 0.674287911628145, 0.895698685680048], dtype=torch.float64)
    torch.testing.assert_close(wave((2, 3, 4, 5), 1, 0.37, 0).flatten()[:4], expected, rtol=1e-14, atol=1e-15)


def test_every_loss_with_published_values_is_covered():
    assert {case.function for case in CASES} == set(reference.__all__) - {"binary_kl_loss"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_golden(case: Golden, dtype: torch.dtype):
    loss, student = case.loss(FORMULAS, dtype)
    (grad,) = torch.autograd.grad(loss, student)
    assert loss.dtype == dtype and grad.dtype == dtype and loss.shape == ()
    # The values are printed to 12 significant digits, half a unit of which is 5e-12 at worst: below either tolerance.
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    assert loss.item() == pytest.approx(case.value, rel=tolerance, abs=0)
    assert grad.abs().max().item() == pytest.approx(case.largest, rel=tolerance, abs=0)
    # The projection sums terms of both signs: what it can lose is relative to the terms, not to what is left of them.
    terms = (grad.double() * wave(tuple(grad.shape), 1, 0.21, 0.9)).abs().sum().item()
    slack = 4 * torch.finfo(dtype).eps * terms
    assert projection(grad).item() == pytest.approx(case.projected, rel=tolerance, abs=slack)
