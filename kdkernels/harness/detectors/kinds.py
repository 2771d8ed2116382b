"""From settings or a text to a detector: the kinds that are built in, and detectors of one's own by name.

A text is ``KIND``, ``KIND:depth=50,width=0.25,norm=frozen`` or ``package.module:function``. Only the choice lives here;
each kind's file builds it, and is imported when it is asked for.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from dataclasses import fields, replace
from typing import Any

from torch import nn

from ..extras import require
from ..settings import DetectorSettings

_RESNET = ("depth", "width", "norm", "channels", "anchors", "detections")
#: What each kind can be told in a text; the rest of the settings plays no part in it.
KINDS = {
    "faster_rcnn": (
        *_RESNET, "ratios", "hidden", "pooled", "proposals", "proposals_before_nms", "rpn_batch", "box_batch"
    ),
    "retinanet": (*_RESNET, "ratios"),
    "fcos": _RESNET,
    "ssdlite": ("width", "norm", "detections"),
}  # fmt: skip
NEEDED = ("strides", "channels", "features", "losses", "detect")


def build(settings: DetectorSettings) -> nn.Module:
    """Build a randomly initialised detector (torch's global generator); nothing is downloaded.

    Raises:
        ValueError: unknown kind, depth or norm; a size that cannot be; ``image_size`` not a multiple of 32.
    """
    if settings.kind not in KINDS:
        raise ValueError(f"kind must be one of {list(KINDS)}, got {settings.kind!r}")
    require("torchvision", "the detectors")
    return importlib.import_module(f".{settings.kind}", __package__).build(settings)


def parse(text: str) -> dict[str, Any]:
    """What ``KIND[:name=value,...]`` says, as settings by name with values of their types.

    Values of ``anchors`` and ``ratios`` are separated by slashes: ``anchors=8/16/32/64/128``.

    Raises:
        ValueError: unknown kind, a name that this kind does not have or that comes twice, a value of another type.
    """
    kind, _, rest = text.partition(":")
    if kind not in KINDS:
        raise ValueError(f"{text!r}: unknown kind {kind!r}{_near(kind, KINDS)}; kinds are {', '.join(KINDS)}")
    types = {field.name: field.default for field in fields(DetectorSettings)}
    settings: dict[str, Any] = {"kind": kind}
    for pair in filter(None, rest.split(",")):
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not equals:
            raise ValueError(f"{text!r}: {pair!r} is not name=value")
        if name not in KINDS[kind]:
            known = KINDS[kind]
            raise ValueError(f"{text!r}: {kind} has no {name!r}{_near(name, known)}; it has {', '.join(known)}")
        if name in settings:
            raise ValueError(f"{text!r}: {name} is given twice")
        settings[name] = _value(text, name, value, types[name])
    return settings


def settings_of(text: str, *, base: DetectorSettings | None = None, **overrides: Any) -> DetectorSettings | None:
    """The settings that a text stands for, or None for a detector of one's own, which has none.

    Args:
        text: as above.
        base: where settings come from that the text does not name; by default the defaults.
        overrides: settings that hold whatever the text says, like ``classes`` and ``image_size``.

    Raises:
        ValueError: as in :func:`parse`.
    """
    if _is_own(text):
        return None
    return replace(base or DetectorSettings(), **{**parse(text), **overrides})


def load_model(text: str, *, classes: int, image_size: int, base: DetectorSettings | None = None) -> nn.Module:
    """Build the detector that a text names; one's own is called as ``function(classes=..., image_size=...)``.

    Raises:
        ValueError: as in :func:`parse` and :func:`build`; one's own function cannot be imported or called so, or what
            it returns does not follow :class:`~kdkernels.harness.detectors.Detector`. The message begins with the text.
    """
    settings = settings_of(text, base=base, classes=classes, image_size=image_size)
    if settings is not None:
        try:
            return build(settings)
        except ValueError as error:
            raise ValueError(f"{text!r}: {error}") from error
    module, _, name = text.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ValueError(f"{text!r}: {module} cannot be imported ({error})") from error
    except AttributeError as error:
        raise ValueError(f"{text!r}: {module} has no {name!r}") from error
    try:
        inspect.signature(function).bind(classes=classes, image_size=image_size)
    except TypeError as error:
        raise ValueError(f"{text!r} cannot be called with classes=... and image_size=...: {error}") from error
    detector = function(classes=classes, image_size=image_size)
    check_detector(detector, repr(text))
    return detector


def check_detector(detector: Any, name: str) -> None:
    """Raise a ValueError that says what ``detector``, called ``name`` in the message, lacks to be a detector."""
    if not isinstance(detector, nn.Module):
        raise ValueError(f"{name} gave a {type(detector).__name__}; a detector is an nn.Module")
    missing = [needed for needed in NEEDED if not hasattr(detector, needed)]
    if missing:
        raise ValueError(
            f"{name} gave a {type(detector).__name__} without {', '.join(missing)}; a detector has {', '.join(NEEDED)}"
        )
    if list(detector.strides) != list(detector.channels):
        raise ValueError(
            f"{name}: strides and channels must name the same levels in one order, got {list(detector.strides)} and "
            f"{list(detector.channels)}"
        )


def _is_own(text: str) -> bool:
    """Whether a text names a function: a path of Python names, a colon, a name."""
    module, _, name = text.partition(":")
    return module not in KINDS and name.isidentifier() and all(part.isidentifier() for part in module.split("."))


def _value(text: str, name: str, value: str, default: Any) -> Any:
    kind = type(default[0]) if isinstance(default, tuple) else type(default)
    try:
        if isinstance(default, tuple):
            values = tuple(kind(part) for part in value.split("/"))
            if name == "anchors" and len(values) != len(default):
                raise ValueError(f"{text!r}: {name} needs {len(default)} numbers, one per level, got {value!r}")
            if not all(0 < part < float("inf") for part in values):
                raise ValueError(f"{text!r}: {name} must be positive numbers, got {value!r}")
            return values
        found = kind(value)
    except ValueError as error:
        if str(error).startswith(repr(text)):
            raise
        raise ValueError(f"{text!r}: {name} must be of type {kind.__name__}, got {value!r}") from error
    if kind is not str and not 0 < found < float("inf"):
        raise ValueError(f"{text!r}: {name} must be a positive number, got {value!r}")
    return found


def _near(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), 1, cutoff=0.7)  # below it, "width" is near "depth"
    return f" (did you mean {near[0]!r}?)" if near else ""
