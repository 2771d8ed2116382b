"""What the pictures of a run share: matplotlib, colours, which validation pictures are shown. No whole picture."""

from __future__ import annotations

from typing import Any

from ..extras import require

#: One colour per run, the same in all pictures; told apart by the colour-blind too (Okabe and Ito).
COLOURS = {
    "teacher": "#000000",
    "alone": "#0072B2",
    "alone, equal time": "#56B4E9",
    "inherited": "#009E73",
    "distilled": "#D55E00",
}
#: For runs of other names, in this order.
MORE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def pyplot() -> Any:
    """matplotlib.pyplot, which draws into files: nobody needs a screen."""
    require("matplotlib").use("Agg")
    return require("matplotlib.pyplot")


def plain(axes: Any) -> None:
    """The looks of every axes with lines."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def shortened(name: str, most: int) -> str:
    """A name of at most so many characters: rows that begin alike often differ at their ends, so the middle goes."""
    if len(name) <= most:
        return name
    head = most // 2
    return f"{name[:head]}…{name[head + 1 - most :]}"


def show(axes: Any, picture: Any) -> None:
    """A picture, uint8 ``(3, H, W)``, without ticks, in coordinates of its pixels."""
    height, width = picture.shape[-2:]
    axes.imshow(picture.permute(1, 2, 0).numpy())
    axes.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))


def box(axes: Any, corners: list[float], colour: str, *, dashed: bool = False, text: str = "") -> None:
    """A box in pixels, and a text above it, or inside where there is no room above."""
    x1, y1, x2, y2 = corners
    rectangle = require("matplotlib.patches").Rectangle
    style = {"fill": False, "edgecolor": colour, "linewidth": 1.8, "linestyle": (0, (3, 2)) if dashed else "-"}
    axes.add_patch(rectangle((x1, y1), x2 - x1, y2 - y1, **style))
    if text:
        below = y1 < 0.08 * axes.get_ylim()[0]
        axes.text(
            x1, y1, text, fontsize=8, color="black", va="top" if below else "bottom", clip_on=True,
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.0},
        )  # fmt: skip


def most_objects(val: Any, count: int) -> list[int]:
    """The pictures to show: by number of objects among the first 50, the most first; the same whatever was trained.

    Raises:
        ValueError: there is none, or none is wanted.
    """
    if len(val) == 0:
        raise ValueError("val: expected at least one picture")
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    first = range(min(50, len(val)))
    return sorted(first, key=lambda index: (-len(val[index][1]["labels"]), index))[:count]
