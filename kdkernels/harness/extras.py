"""Imports of the optional packages behind ``kdkernels[train]``, with one clear message where they are missing.

Only the import helpers live here; a package that the harness newly needs is added to ``NEEDED``.
"""

from __future__ import annotations

import importlib
from types import ModuleType

INSTALL = 'pip install "kdkernels[train]"'
NEEDED = {
    "torchvision": "the detectors",
    "PIL": "reading pictures",
    "sklearn": "the scenes",
    "matplotlib": "the pictures of a run",
    "safetensors": "the students' weights",
}


def require(module: str, why: str = "the reference training") -> ModuleType:
    """Import ``module``, or raise an ImportError that names the command which installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module.partition('.')[0]}, needed for {why}, cannot be imported ({error}); {INSTALL}"
        ) from error


def coco_tools() -> tuple[type, type]:
    """The classes ``(COCO, COCOeval)`` of faster-coco-eval, or of pycocotools where the first is missing."""
    try:
        from faster_coco_eval import COCO, COCOeval_faster

        return COCO, COCOeval_faster
    except ImportError:
        pass
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return COCO, COCOeval
    except ImportError as error:
        raise ImportError(
            f"COCO mAP needs faster-coco-eval or pycocotools, and neither can be imported ({error}); {INSTALL}"
        ) from error


def check(scenes: bool = True) -> None:
    """Raise the ImportError of the first missing package now, before any work is done and lost."""
    for module, why in NEEDED.items():
        if scenes or module != "sklearn":
            require(module, why)
    coco_tools()
