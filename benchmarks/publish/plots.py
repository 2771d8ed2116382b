"""Pictures of cases, by matplotlib, which is imported when one is drawn.

Colours are Okabe and Ito's, safe for the colour-blind; providers also differ by marker, for prints without colour.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .cases import Case, by_loss, largest
from .tables import figures, title

# Colour and marker of each provider, and of the copy.
LOOKS = {
    "ours": ("#0072B2", "o"),
    "eager": ("#D55E00", "s"),
    "compiled": ("#E69F00", "^"),
    "liger": ("#CC79A7", "D"),
}
LABELS = {"ours": "kdkernels", "eager": "eager PyTorch", "compiled": "torch.compile", "liger": "Liger"}
FLOOR_LINES = {"touched": ("#555555", "--"), "fresh": ("#999999", ":")}
FEWEST_SIZES = 3
DPI = 110


def pyplot() -> Any:
    """matplotlib.pyplot, drawing into files; ModuleNotFoundError with what to install."""
    try:
        import matplotlib
    except ImportError:
        raise ModuleNotFoundError("pictures of benchmarks need matplotlib: pip install 'kdkernels[bench]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _look(kind: str) -> tuple[str, str]:
    return LOOKS.get(kind, ("#009E73", "v"))


def _kinds(cases: Sequence[Case]) -> list[str]:
    there = {case.kind(name) for case in cases for name in case.rows}
    return [kind for kind in (*LOOKS, *sorted(there - set(LOOKS))) if kind in there]


def _name(case: Case, kind: str) -> str | None:
    return case.ours if kind == "ours" else case.fastest(kind)


def ladder(cases: Sequence[Case]) -> list[Case]:
    """The cases of one loss and dtype that a scaling plot joins, by size: its own set where there is one."""
    own = [case for case in cases if case.set == "scaling"]
    chosen = own if len({case.bytes for case in own}) >= FEWEST_SIZES else cases
    return sorted((case for case in chosen if case.bytes), key=lambda case: case.bytes)


def ladders(cases: Sequence[Case]) -> Mapping[str, Mapping[str, list[Case]]]:
    """loss -> dtype -> cases by size, of those that have sizes enough to show a line."""
    found: dict[str, dict[str, list[Case]]] = {}
    for loss, of_loss in by_loss(cases).items():
        for dtype in dict.fromkeys(case.dtype for case in of_loss):
            steps = ladder([case for case in of_loss if case.dtype == dtype])
            if len({case.bytes for case in steps}) >= FEWEST_SIZES:
                found.setdefault(loss, {})[dtype] = steps
    return found


def scaling(loss: str, dtypes: Mapping[str, Sequence[Case]], path: Path) -> None:
    """Time against bytes moved, a panel per dtype, with the copies' lines: from launch-bound to bandwidth-bound."""
    plt = pyplot()
    figure, panels = plt.subplots(
        1, len(dtypes), figsize=(1.2 + 4.4 * len(dtypes), 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (dtype, cases) in zip(panels[0], dtypes.items()):
        for which, (colour, style) in FLOOR_LINES.items():
            points = [(case.bytes, floor) for case in cases if (floor := case.floor(which))]
            if points:
                label = f"copy into {'touched memory' if which == 'touched' else 'fresh pages'}"
                axes.plot(*zip(*points), style, color=colour, linewidth=1.3, label=label)
        for kind in _kinds(cases):
            colour, marker = _look(kind)
            points = [(case, ms) for case in cases if (ms := case.ms(_name(case, kind), case.mode))]
            if points:
                x, y = [case.bytes for case, _ in points], [ms for _, ms in points]
                axes.plot(x, y, "-", color=colour, marker=marker, markersize=5, label=LABELS.get(kind, kind))
                low, high = ([case.ms(_name(case, kind), case.mode, q) or ms for case, ms in points] for q in (20, 80))
                axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.set(xscale="log", yscale="log", title=dtype, xlabel="bytes that must move")
        axes.xaxis.set_major_formatter(lambda x, _: _bytes(x))
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axes.grid(True, which="major", color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
    mode = next(iter(dtypes.values()))[0].mode
    panels[0][0].set_ylabel(f"{'forward + backward' if mode == 'both' else mode.replace('_', ' ')}, ms")
    handles, labels = max((axes.get_legend_handles_labels() for axes in panels[0]), key=lambda pair: len(pair[0]))
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False)
    figure.suptitle(f"{title(loss)}: time against size, median and p20 to p80")
    _save(figure, path)


def _bytes(x: float) -> str:
    for unit in ("B", "KB", "MB"):
        if x < 999.5:
            return f"{x:g} {unit}"
        x /= 1000
    return f"{x:g} GB"


def _overview_cases(cases: Sequence[Case]) -> dict[tuple[str, str], dict[str, Case]]:
    """(loss, shape) -> dtype -> case: of each loss and dtype the largest shape."""
    found: dict[tuple[str, str], dict[str, Case]] = {}
    for loss, of_loss in by_loss([case for case in cases if case.ours and case.floor("touched")]).items():
        for dtype in dict.fromkeys(case.dtype for case in of_loss):
            case = largest([case for case in of_loss if case.dtype == dtype])
            found.setdefault((loss, case.shape), {})[dtype] = case
    return found


def overview(cases: Sequence[Case], path: Path) -> None:
    """Bars: how many copies' time each provider needs, for each loss at its largest shape, a panel per dtype."""
    plt = pyplot()
    lines = _overview_cases(cases)
    dtypes = list(dict.fromkeys(dtype for of_line in lines.values() for dtype in of_line))
    kinds = _kinds([case for of_line in lines.values() for case in of_line.values()])
    height = 0.8 / len(kinds)
    size = (2.4 + 3.6 * len(dtypes), 1.5 + 0.62 * len(lines))
    figure, panels = plt.subplots(
        1, len(dtypes), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axes, dtype in zip(panels[0], dtypes):
        chosen = [(j, of_line[dtype]) for j, of_line in enumerate(lines.values()) if dtype in of_line]
        for i, kind in enumerate(kinds):
            bars = [(j, ms / case.floor("touched")) for j, case in chosen if (ms := _median(case, kind))]
            at = [j + height * (i - (len(kinds) - 1) / 2) for j, _ in bars]
            label = LABELS.get(kind, kind)
            drawn = axes.barh(at, [x for _, x in bars], 0.92 * height, color=_look(kind)[0], label=label)
            axes.bar_label(drawn, [figures(x) for _, x in bars], padding=3, fontsize=8)
        axes.axvline(1, color="#333333", linewidth=1.2, linestyle="--", label="copy into touched memory")
        axes.set(xscale="log", title=dtype)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.margins(x=0.15, y=0.02)
        axes.grid(True, axis="x", color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
    texts = [f"{title(loss)}\n{shape.replace('x', ' x ')}" for loss, shape in lines]
    panels[0][0].set_yticks(range(len(lines)), texts, fontsize=8.5)
    panels[0][0].invert_yaxis()
    figure.supxlabel("time of forward + backward, in copies of both inputs (log scale; less is better)", fontsize=10)
    handles, labels = max((axes.get_legend_handles_labels() for axes in panels[0]), key=lambda pair: len(pair[0]))
    figure.legend(handles, labels, loc="outside upper center", ncols=3 + (size[0] > 7), frameon=False)
    _save(figure, path)


def _median(case: Case, kind: str) -> float | None:
    return case.ms(_name(case, kind), case.mode)


def has_overview(cases: Sequence[Case]) -> bool:
    """Whether there is anything for `overview` to draw."""
    return bool(_overview_cases(cases))


def _save(figure: Any, path: Path) -> None:
    from PIL import Image  # which matplotlib itself needs

    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DPI)
    pyplot().close(figure)
    # A palette: half the size, and no difference to the eye.
    Image.open(drawn).convert("RGB").quantize(128).save(path, format="PNG", optimize=True)
