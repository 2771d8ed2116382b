"""What a mutant is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """`after` in place of `before`, which occurs exactly once in csrc/`file`, judged by the tests of `loss`.

    `unit` is the source in csrc/cuda that has the loss's kernels, if it is not named after the loss. `equivalent`
    explains why no test can notice; empty for all others.
    """

    name: str
    file: str
    loss: str
    before: str
    after: str
    unit: str = ""
    equivalent: str = ""
