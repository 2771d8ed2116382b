"""Tables of cases: the headline, the objective, everything about one case, defeats. Each figure is one of the CSV's,
or the ratio of two of them; nothing is smoothed or picked, and a range is that of all cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from . import defeats as lost
from .cases import MODES, Case, by_loss, largest
from .document import Table

TITLES = {
    "masked_mse": "masked MSE",
    "pearson": "Pearson",
    "temperature_kl": "temperature KL",
    "decoupled_kl": "decoupled KL",
    "soft_cross_entropy": "soft cross-entropy",
    "binary_kl": "binary KL",
    "bounded_regression": "bounded regression",
    "masks": "masks from boxes",
    "masked_mse_boxes": "masked MSE with its boxes",
    "detection_distillation": "whole objective",
    "detection_distillation_features": "objective, features alone",
    "detection_distillation_heads": "objective, heads alone",
}
NAMES = {"eager": "eager", "compiled": "`torch.compile`", "liger": "Liger"}
MODE_NAMES = {"both": "forward + backward", "no_grad": "without a graph", "replay": "CUDA graph replay"}
LIGER_HAS = ("temperature_kl",)
NOTHING = "-"


def title(loss: str) -> str:
    """A loss as people call it."""
    return TITLES.get(loss, loss.replace("_", " "))


def figures(value: float | None, wanted: int = 3) -> str:
    """Three figures, without an exponent where a reader would have to count."""
    if value is None:
        return NOTHING
    if 10 ** (wanted - 1) <= abs(value) < 1e7:
        return f"{value:.0f}"
    return f"{value:#.{wanted}g}".rstrip(".")


def size(count: float | None) -> str:
    """Bytes in a unit that fits."""
    if count is None:
        return NOTHING
    if abs(count) < 1000:
        return f"{count:.0f} B"
    for unit in ("KB", "MB"):
        count /= 1000
        if abs(count) < 999.5:
            return f"{figures(count)} {unit}"
    count /= 1000
    return f"{figures(count)} GB"


def span(values: Sequence[float | None]) -> str:
    """Least and most of those that there are."""
    there = sorted(v for v in values if v is not None)
    if not there:
        return NOTHING
    low, high = figures(there[0]), figures(there[-1])
    return low if low == high else f"{low} - {high}"


def _percent(part: float | None) -> str:
    return NOTHING if part is None else f"{figures(100 * part)} %"


def share(case: Case, name: str | None, which: str) -> float | None:
    """The copy's time over the provider's, in the mode that sums the case up."""
    ms, floor = case.ms(name, case.mode), case.floor(which)
    return floor / ms if ms and floor else None


def _peer(loss: str, cases: Sequence[Case], kind: str) -> str:
    found = span([case.times(case.ours, case.fastest(kind)) for case in cases])
    if found == NOTHING and kind == "liger":
        return f"{NOTHING} (needs a GPU)" if loss in LIGER_HAS and not cases[0].on_gpu else NOTHING
    return found


def headline(cases: Sequence[Case]) -> Table:
    """A line per loss and dtype over all of its shapes, and the largest of them in full."""
    header = ["loss", "dtype", "shapes", *(f"x {NAMES[kind]}" for kind in NAMES), "largest shape", "ms (p20 - p80)"]
    header += ["share of a copy: touched / fresh", "forward memory: ours / eager / compiled"]
    body = []
    for loss, of_loss in by_loss([case for case in cases if case.ours]).items():
        for dtype in dict.fromkeys(case.dtype for case in of_loss):
            chosen = [case for case in of_loss if case.dtype == dtype]
            case = largest(chosen)
            memory = (case.of(name, "forward_peak_bytes") for name in (case.ours, *map(case.fastest, list(NAMES)[:2])))
            line = [title(loss), dtype, str(len(chosen)), *(_peer(loss, chosen, kind) for kind in NAMES)]
            line += [case.shape.replace("x", " x "), quantiles(case, case.ours, case.mode)]
            line += [" / ".join(_percent(share(case, case.ours, which)) for which in ("touched", "fresh"))]
            body.append([*line, " / ".join(map(size, memory))])
    return Table(header, body)


def objective(cases: Sequence[Case]) -> Table:
    """Everybody on the whole objective, at its largest shape; of ours the other ways, not the lower capabilities."""
    header = ["dtype", "provider", "ms (p20 - p80)", "x eager", "x `torch.compile`"]
    header += ["share of a copy: touched / fresh", "forward memory"]
    body = []
    for dtype in dict.fromkeys(case.dtype for case in cases):
        case = largest([case for case in cases if case.dtype == dtype])
        for name in case.rows:
            if case.kind(name) == "ours" and name != case.ours and "," not in name:
                continue
            line = [dtype, name, quantiles(case, name, case.mode)]
            line += [figures(case.times(name, case.fastest(kind))) for kind in ("eager", "compiled")]
            line += [" / ".join(_percent(share(case, name, which)) for which in ("touched", "fresh"))]
            body.append([*line, size(case.of(name, "forward_peak_bytes"))])
    return Table(header, body)


def quantiles(case: Case, name: str, mode: str) -> str:
    """Median (p20 - p80)."""
    low, middle, high = (case.ms(name, mode, q) for q in (20, 50, 80))
    return NOTHING if middle is None else f"{figures(middle)} ({figures(low)} - {figures(high)})"


def case_line(case: Case) -> str:
    """What stands above a case's table."""
    line = f"**{case.title}**"
    line += "" if case.set == "default" else f" (set {case.set})"
    line += f": moves at least {size(case.bytes)}" if case.bytes else ""
    touched, fresh = case.floor("touched"), case.floor("fresh")
    if touched is not None:
        line += f"; the copy takes {figures(touched)} ms into touched memory"
        line += "" if fresh is None else f", {figures(fresh)} ms into fresh pages"
    line += "" if case.peers else "; no peer is here: none was asked for, or its numbers were wrong and it was refused"
    line += "; it was disturbed: that copy should be over four times as fast" if case.disturbed else ""
    return line + "."


def whole_case(case: Case) -> Table:
    """Everything that was measured of one case, a line per provider."""
    modes = dict.fromkeys([*MODES, *(mode for rows in case.rows.values() for mode in rows)])
    modes = [mode for mode in modes if any(mode in rows for rows in case.rows.values())]
    peers = [kind for kind in NAMES if case.fastest(kind)]
    columns: dict[str, Callable[[str], str]] = {"provider": str}
    for mode in modes:
        columns[f"{MODE_NAMES.get(mode, mode)}, ms"] = lambda name, mode=mode: quantiles(case, name, mode)
    for kind in peers:
        columns[f"x {NAMES[kind]}"] = lambda name, kind=kind: figures(case.times(name, case.fastest(kind)))
    columns["share of a copy: touched"] = lambda name: _percent(share(case, name, "touched"))
    columns["fresh"] = lambda name: _percent(share(case, name, "fresh"))
    columns["GB/s"] = lambda name: figures(case.of(name, "gb_per_s"))
    if any(case.of(name, "host_us") is not None for name in case.rows):
        columns["launching it, us"] = lambda name: figures(case.of(name, "host_us"))
    for text, column in {"forward memory: peak": "peak", "kept": "kept", "process": "resident"}.items():
        columns[text] = lambda name, column=column: size(case.of(name, f"forward_{column}_bytes"))
    for text, column in {"error: loss": "loss_error", "gradient": "gradient_error"}.items():
        columns[text] = lambda name, column=column: _error(case.of(name, column))
    return Table(list(columns), [[show(name) for show in columns.values()] for name in case.rows])


def _error(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1e}"


def _measured(kind: str, value: float) -> str:
    if kind in lost.MEMORY:
        return size(value)
    return _error(value) if kind in lost.ERRORS else f"{figures(value)} ms"


def of_defeats(found: Sequence[lost.Defeat], reasons: Mapping[str, str]) -> list[tuple[str, Table]]:
    """The defeats by their reason: a reason, and a table with a line per defeat."""
    header = ["loss", "shape", "dtype", "in", "peer", "ours", "peer's", "ours / peer's", "spreads"]
    parts: dict[str, list[list[str]]] = {}
    for d in found:
        line = [title(d.case.loss), d.case.shape, d.case.dtype, MODE_NAMES.get(d.kind, d.kind), d.peer]
        line += [_measured(d.kind, d.ours), _measured(d.kind, d.theirs)]
        line += [figures(d.ours / d.theirs) if d.theirs else NOTHING, "overlap" if d.overlaps else NOTHING]
        parts.setdefault(d.reason(reasons) or "Not explained yet.", []).append(line)
    return [(why, Table(header, body)) for why, body in parts.items()]


def of_other_ways(found: Sequence[tuple[Case, str]]) -> Table:
    """A line per way of ours that beats the default one."""
    body = []
    for case, name in found:
        line = [title(case.loss), case.shape, case.dtype, name, quantiles(case, name, case.mode)]
        body.append([*line, quantiles(case, str(case.ours), case.mode), figures(case.times(name, case.ours))])
    return Table(["loss", "shape", "dtype", "way", "ms (p20 - p80)", "default way, ms", "times as fast"], body)
