"""``Adapter``: the convolutions that take a student's channels to the teacher's. Only that class lives here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Adapter(nn.Module):
    """A convolution per pyramid level, from the student's channels to the teacher's.

    Only levels whose channels differ get one, unless ``always``; other levels pass through as they are, so an adapter
    between equal pyramids has no parameters. Give its parameters to the optimiser together with the student's, and
    leave them out of what you ship.

    Args:
        student, teacher: channels of every level (an int), or of each level (a sequence).
        levels: number of levels, where both are ints.
        always: a convolution on every level, equal channels or not.
        kernel_size: 1 or 3 (padded by 1).
        relu: whether a ReLU follows (FGFI, and DeFeat on the backbone's stages).
        init: ``"default"``, PyTorch's, or ``"small"``: weights from the standard normal distribution, brought into
            (-2, 2) by the remainder of a division by 2, times 1e-4 (DeFeat's code; FGFI's is a truncated normal of the
            same deviation).

    Raises:
        ValueError: the two sequences, or ``levels``, disagree in length; a level count is missing; an unknown
            ``kernel_size`` or ``init``.
    """

    def __init__(
        self,
        student: int | Sequence[int],
        teacher: int | Sequence[int],
        levels: int | None = None,
        *,
        always: bool = False,
        kernel_size: int = 1,
        relu: bool = False,
        init: str = "default",
    ) -> None:
        super().__init__()
        lengths = {len(side) for side in (student, teacher) if not isinstance(side, int)}
        lengths |= {levels} if levels is not None else set()
        if len(lengths) != 1:
            raise ValueError(f"student, teacher and levels must agree in one number of levels, got {sorted(lengths)}")
        if kernel_size not in (1, 3):
            raise ValueError(f"kernel_size: expected 1 or 3, got {kernel_size!r}")
        if init not in ("default", "small"):
            raise ValueError(f"init: expected 'default' or 'small', got {init!r}")
        (count,) = lengths
        pairs = zip(*([side] * count if isinstance(side, int) else side for side in (student, teacher)), strict=True)
        levels_of = []
        for inside, outside in pairs:
            if not always and inside == outside:
                levels_of.append(nn.Identity())
                continue
            convolution = nn.Conv2d(inside, outside, kernel_size, padding=kernel_size // 2)
            if init == "small":
                with torch.no_grad():
                    nn.init.normal_(convolution.weight).fmod_(2).mul_(1e-4)
            levels_of.append(nn.Sequential(convolution, nn.ReLU()) if relu else convolution)
        self.levels = nn.ModuleList(levels_of)

    def forward(self, features: Mapping[str, Tensor] | Sequence[Tensor]) -> Any:
        """Adapt every level; a mapping comes back as a dict with its names, a sequence as a list."""
        values = list(features.values()) if isinstance(features, Mapping) else list(features)
        if len(values) != len(self.levels):
            raise ValueError(f"features has {len(values)} levels, the adapter was built for {len(self.levels)}")
        adapted = [level(value) for level, value in zip(self.levels, values, strict=True)]
        return dict(zip(features, adapted, strict=True)) if isinstance(features, Mapping) else adapted
