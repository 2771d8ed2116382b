"""Where a peer is faster, leaner or more accurate than our default way: found in the rows, never picked by hand.

A defeat is, in a case in which ours and a peer were both measured,
  in time     a smaller median of the peer in any mode, however small the difference;
  in memory   a forward that peaks, or keeps for the backward, more than 1 % and 1 KB less;
  in error    an error against float64 that is smaller by more than half an eps of the result's dtype, which is what the
              last rounding of an exact result can do by itself. A loss is float32, a gradient has the student's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from .cases import MODES, Case

EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}
MEMORY = {"peak memory": "forward_peak_bytes", "kept memory": "forward_kept_bytes"}
LEAST_PART, LEAST_BYTES = 0.01, 1000
ERRORS = {"loss error": "loss_error", "gradient error": "gradient_error"}
KINDS = (*MODES, *MEMORY, *ERRORS)


@dataclass(frozen=True)
class Defeat:
    """One row of the table: `kind` is one of KINDS, `ours` and `theirs` what was measured."""

    case: Case
    kind: str
    peer: str
    ours: float
    theirs: float

    @property
    def keys(self) -> list[str]:
        """Under which names a reason may stand, the narrowest first."""
        broad = f"{self.case.loss}/{self.kind}"
        narrow = f"{broad}/{self.case.kind(self.peer)}"
        return [f"{narrow}/{self.case.dtype}/{self.case.shape}", f"{narrow}/{self.case.dtype}", narrow, broad]

    @property
    def overlaps(self) -> bool:
        """Whether the middle 60 % of both samples overlap: then the next run may say the opposite."""
        if self.kind not in MODES:
            return False
        mine, theirs = self.case.ms(self.case.ours, self.kind, 20), self.case.ms(self.peer, self.kind, 80)
        return mine is not None and theirs is not None and theirs >= mine

    def explained_by(self, reasons: Mapping[str, str]) -> str | None:
        """The key of the narrowest reason that was written down, if any."""
        return next((key for key in self.keys if reasons.get(key)), None)

    def reason(self, reasons: Mapping[str, str]) -> str | None:
        """That reason."""
        return reasons.get(self.explained_by(reasons))


def _of(case: Case) -> Iterator[Defeat]:
    for peer in case.peers:
        for mode in MODES:
            mine, theirs = case.ms(case.ours, mode), case.ms(peer, mode)
            if mine is not None and theirs is not None and theirs < mine:
                yield Defeat(case, mode, peer, mine, theirs)
        for kind, column in MEMORY.items():
            mine, theirs = case.of(case.ours, column), case.of(peer, column)
            if mine is not None and theirs is not None and mine - theirs > max(LEAST_BYTES, LEAST_PART * mine):
                yield Defeat(case, kind, peer, mine, theirs)
        for kind, column in ERRORS.items():
            mine, theirs = case.of(case.ours, column), case.of(peer, column)
            wide = "float64" if case.dtype == "float64" else "float32"
            eps = EPS.get(wide if kind == "loss error" else case.dtype, 0.0)
            if mine is not None and theirs is not None and mine - theirs > eps / 2:
                yield Defeat(case, kind, peer, mine, theirs)


def find(cases: Sequence[Case]) -> list[Defeat]:
    """Every defeat, in the order of the cases."""
    return [defeat for case in cases if case.ours for defeat in _of(case)]


def undecided(case: Case) -> bool:
    """Whether in the mode of the sum the middle 60 % of ours and of the fastest peer overlap."""
    timed = [(ms, peer) for peer in case.peers if (ms := case.ms(peer, case.mode)) is not None]
    peer = min(timed)[1] if timed else None
    ours, theirs = ([case.ms(name, case.mode, q) for q in (20, 80)] for name in (case.ours, peer))
    return None not in (*ours, *theirs) and ours[0] <= theirs[1] and theirs[0] <= ours[1]


def other_ways(cases: Sequence[Case]) -> list[tuple[Case, str]]:
    """Ways of ours (a lower capability, two passes, one call per loss) that are faster than the default one."""
    found = []
    for case in cases:
        mine = case.ms(case.ours, case.mode)
        for name in case.rows:
            other = case.ms(name, case.mode)
            if case.kind(name) == "ours" and None not in (mine, other) and other < mine:
                found.append((case, name))
    return found


def too_large(cases: Sequence[Case], reasons: Mapping[str, str], small: str) -> list[str]:
    """A line for each defeat that `small`, the fixed cost of a call, shall explain, but that takes ours over twice as
    long as the fastest case of its loss, dtype and mode, which is hardly anything else: there it is less than half.
    """
    found = []
    for d in find(cases):
        alike = [case for case in cases if (case.loss, case.dtype) == (d.case.loss, d.case.dtype) and case.ours]
        if d.kind in MODES and d.reason(reasons) == small:
            least = min(ms for case in alike if (ms := case.ms(case.ours, d.kind)) is not None)
            if d.ours > 2 * least:
                slower = f"ours takes {d.ours / least:.1f} times as long as where it is fastest"
                found.append(f"{d.case.title}: {d.peer} wins in {d.kind}, not by the fixed cost of a call: {slower}")
    return found


def unneeded(defeats: Sequence[Defeat], reasons: Mapping[str, str]) -> list[str]:
    """A line for each reason that explains none of the defeats: it would explain the next one before anybody looked."""
    needed = {defeat.explained_by(reasons) for defeat in defeats}
    return [f"publish/reasons.py: no row needs '{key}': remove it" for key in reasons if key not in needed]


def unexplained(defeats: Sequence[Defeat], reasons: Mapping[str, str]) -> list[str]:
    """A line for each defeat without a reason."""
    return [
        f"{d.case.title}: {d.peer} wins in {d.kind} and publish/reasons.py has no reason: write one under '{d.keys[2]}'"
        for d in defeats
        if d.reason(reasons) is None
    ]
