"""Which shapes are timed: the named sets of a benchmark, those that several losses share, and what --shapes may say.

A shape belongs to one set of a benchmark, so that a row's `set` tells what it is for: `default` is what a run without
options times, `more` what else users have, `large` what a CPU is spared, `scaling` a ladder from launch-bound to
bandwidth-bound, `quick` a smoke test. Shapes may be added freely; rows of a shape that left its set stay readable.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]
NAMES = ("default", "all", "scaling", "quick")
# A case's inputs on a CPU, counted in float32 whatever the dtype: the float64 answer takes several times as much.
CPU_BYTES = 640e6


@dataclass(frozen=True)
class Shapes:
    """The sets of one benchmark."""

    quick: Shape
    default: Sequence[Shape]
    more: Sequence[Shape] = ()
    large: Sequence[Shape] = ()
    scaling: Sequence[Shape] = ()

    def each(self) -> Iterator[tuple[str, Shape]]:
        """Set and shape of everything."""
        for name in ("default", "more", "large", "scaling"):
            yield from ((name, shape) for shape in getattr(self, name))
        yield "quick", self.quick

    def fits(self, shape: Shape) -> bool:
        """Whether it has the dimensions of the others, and their last one where all share it, as the four of a box."""
        last = {known[-1] for _, known in self.each()}
        return len(shape) == len(self.quick) and (len(last) > 1 or shape[-1] in last)

    def chosen(self, asked: Sequence[str | Shape], device: str) -> list[tuple[str, Shape]]:
        """Set and shape of what was asked for; a GPU's default set has the large shapes, too."""
        sets = {name: {name} for name in NAMES}
        sets["default"] |= {"large"} if device == "cuda" else set()
        sets["all"] = {"default", "more", "large"}
        found: dict[Shape, str] = {}
        for one in asked:
            if isinstance(one, str):
                found |= {shape: name for name, shape in self.each() if name in sets[one]}
            elif self.fits(one):
                found[one] = next((name for name, shape in self.each() if shape == one), "given")
        return [(name, shape) for shape, name in found.items()]


def parse(text: str) -> str | Shape:
    """A set's name, or a shape such as 2x256x100x152; for argparse."""
    if text in NAMES:
        return text
    if not re.fullmatch(r"\d+(x\d+)+", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither one of {', '.join(NAMES)} nor a shape such as 2x256x100x152"
        )
    return tuple(int(x) for x in text.split("x"))


# One level of a pyramid: pictures of 800 x 1344 at strides 4 to 64, pictures of 640 x 640 at strides 4 to 32.
FEATURES = Shapes(
    quick=(2, 8, 12, 20),
    default=[
        *[(2, 256, 200, 336), (2, 256, 100, 152), (2, 256, 13, 21), (8, 64, 160, 160), (2, 1024, 50, 84)],
        (3, 255, 67, 101),
    ],
    more=[
        *[(2, 256, 100, 168), (2, 256, 50, 84), (2, 256, 25, 42), (8, 256, 100, 168), (8, 256, 50, 84)],
        *[
            (16, 256, 100, 168),
            (16, 256, 50, 84),
            (8, 256, 25, 42),
            (16, 256, 25, 42),
            (8, 64, 200, 336),
            (2, 1024, 100, 168),
        ],
        *[(2, 256, 160, 160), (8, 256, 80, 80), (16, 256, 80, 80), (16, 256, 40, 40), (16, 256, 20, 20)],
    ],
    large=[(8, 256, 200, 336), (16, 256, 200, 336), (8, 1024, 100, 168)],
    scaling=[(1, 16, 8, 8), (1, 64, 16, 16), (1, 256, 32, 32), (2, 256, 64, 64), (4, 256, 96, 96), (4, 256, 160, 160)],
)
# Proposals of two-stage heads over VOC's, COCO's and LVIS's classes with background; anchors of one-stage heads.
HEADS = Shapes(
    quick=(64, 81),
    default=[(512, 21), (512, 81), (1024, 81), (2000, 1204), (100_000, 80)],
    more=[(1000, 81), (2000, 21), (2000, 81), (512, 1204), (1024, 1204), (777, 1203)],
    large=[(1_000_000, 81)],
    scaling=[(16, 64), (128, 64), (1024, 64), (8192, 64), (65_536, 64), (262_144, 64)],
)
