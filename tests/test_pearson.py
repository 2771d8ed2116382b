"""Temperature KL: the error bound over the grid, the edges, the gradient's form, and bad input."""

from __future__ import annotations

import pytest
import torch
from grid import ALIKE, check_case, grid

LOSS = "pearson"


@pytest.mark.parametrize(("case", "pair"), grid(LOSS))
def test_error_bound(case, pair, backend):
    check_case(LOSS, case, pair)
