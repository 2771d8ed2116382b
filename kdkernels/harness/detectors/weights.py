"""Checkpoints that lie on disk, into a detector. Only reading them and fitting their names lives here."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..extras import require

#: What the names of a file may lack: a torchvision detector is the adapter's ``model``, a ResNet its backbone's body.
_PREFIXES = ("", "model.", "model.backbone.body.")


class LeftOut(NamedTuple):
    """What a checkpoint and a detector do not share."""

    missing: list[str]  #: names of the detector that kept their values
    unexpected: list[str]  #: names of the file that the detector does not have
    mismatched: list[str]  #: names of both, in different shapes


def load_weights(detector: nn.Module, path: str | Path, *, strict: bool = True) -> LeftOut:
    """Load a state dict from a file on disk; nothing is downloaded, and no code from the file is run.

    The names may be those of the detector, of the torchvision model inside, or of a torchvision ResNet; that one fills
    the backbone, its classifier ``fc`` is passed over, and the rest of the detector keeps its values. A dict whose
    ``"model"`` is the state dict, as training scripts save it, is understood; so is a leading ``module.``.

    Args:
        detector: whose weights are replaced; where the call raises, it is left as it was.
        path: ``.safetensors``, or a file of ``torch.save`` (``.pth``, ``.pt``).
        strict: False loads what fits, and returns what was left out.

    Raises:
        ValueError: the file cannot be read or holds no state dict; with ``strict``, names or shapes that do not fit;
            without, no name that fits. The message begins with the path and names the first few.
    """
    path = Path(path)
    found = {name.removeprefix("module."): value for name, value in _read(path).items()}
    own = detector.state_dict()
    # Names of an older torchvision are mended while they are loaded, so that even the best prefix may fit only some.
    prefix = max(_PREFIXES, key=lambda prefix: sum(prefix + name in own for name in found))
    if prefix == _PREFIXES[-1]:
        found = {name: value for name, value in found.items() if not name.startswith("fc.")}
    found = {prefix + name: value for name, value in found.items()}
    mismatched = sorted(name for name in found.keys() & own.keys() if found[name].shape != own[name].shape)
    fitting = {name: value for name, value in found.items() if name not in mismatched}
    before = {name: value.clone() for name, value in own.items()}
    try:
        missing, unexpected = detector.load_state_dict(fitting, strict=False)
    except RuntimeError as error:  # shapes under a name of an older torchvision
        detector.load_state_dict(before)
        raise ValueError(f"{path}: {error}") from error
    if prefix == _PREFIXES[-1]:
        missing = [name for name in missing if name.startswith(prefix)]
    left = LeftOut(sorted(set(missing) - set(mismatched)), sorted(unexpected), mismatched)
    nothing = len(unexpected) + len(mismatched) == len(found)
    if nothing or (strict and any(left)):
        detector.load_state_dict(before)
        raise ValueError(f"{path} does not fit this {type(detector).__name__}: {_said(left, found, own)}")
    return left


def _read(path: Path) -> Mapping[str, Tensor]:
    """The state dict in a file."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    try:
        if path.suffix == ".safetensors":
            content: Any = require("safetensors.torch", "this checkpoint").load_file(path)
        else:
            # torchvision's training script keeps its command line, an argparse.Namespace, beside the weights.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise
    except Exception as error:  # by what is wrong with the file: many kinds, among them safetensors' own
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{path} cannot be read as weights: {reason[0]}") from error
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping) or not content or not all(map(torch.is_tensor, content.values())):
        raise ValueError(f"{path} holds no state dict")
    return content


def _said(left: LeftOut, found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """The first few of each kind that do not fit."""
    shapes = [f"{name} {tuple(found[name].shape)} for {tuple(own[name].shape)}" for name in left.mismatched]
    kinds = (("missing", left.missing), ("unexpected", left.unexpected), ("of another shape", shapes))
    return "; ".join(
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in kinds
        if names
    )
