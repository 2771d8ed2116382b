"""What a run leaves behind: the printed table, and pictures of what was learnt. One file per picture."""

from .drawing import COLOURS
from .found_boxes import detections
from .gradient_norms import gradients, norms_of
from .heat_maps import features, heat_map
from .learning_curves import curves
from .results import ORDER, row, seen, table, write

__all__ = [
    "COLOURS",
    "ORDER",
    "curves",
    "detections",
    "features",
    "gradients",
    "heat_map",
    "norms_of",
    "row",
    "seen",
    "table",
    "write",
]
