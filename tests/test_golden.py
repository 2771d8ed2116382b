"""The kernels against the golden values of the published losses, at each instruction set: value and gradient.

The table is golden.py's; test_reference_golden.py holds the formulas to it. Here the public functions are called as
a user calls them, on every backend.
"""

from __future__ import annotations

import pytest
import torch

import kdkernels as kd
from kdkernels.selfcheck.golden import CASES, Golden, projection, wave


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_golden(case: Golden, dtype: torch.dtype, backend):
    loss, student = case.loss(kd, dtype)
    (grad,) = torch.autograd.grad(loss, student)
    assert loss.dtype == dtype and grad.dtype == dtype and loss.shape == ()
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    assert loss.item() == pytest.approx(case.value, rel=tolerance, abs=0)
    assert grad.abs().max().item() == pytest.approx(case.largest, rel=tolerance, abs=0)
    # The projection sums terms of both signs: what it can lose is relative to the terms, not to what is left of them.
    terms = (grad.double() * wave(tuple(grad.shape), 1, 0.21, 0.9)).abs().sum().item()
    slack = 4 * torch.finfo(dtype).eps * terms
    assert projection(grad).item() == pytest.approx(case.projected, rel=tolerance, abs=slack)


def test_every_case_is_served_by_a_kernel():
    """Forced, so that a silent fall back to the formula would raise."""
    with kd.use_backend("cpu"):
        for case in CASES:
            for dtype in (torch.float64, torch.float32):
                loss, _ = case.loss(kd, dtype)
                assert loss.grad_fn is not None
