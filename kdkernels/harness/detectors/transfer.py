"""Parts of a detector by name: inherited from a teacher, or frozen. Only these two live here."""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType

import torch
from torch import nn


def inherit(student: nn.Module, teacher: nn.Module, parts: Sequence[str]) -> list[str]:
    """Copy the teacher's tensors into the student's, part by part, where name and shape agree.

    A part is a name of the detector's ``parts`` ("backbone", "fpn", "rpn", "roi_heads"; one-stage detectors have "head"
    for the last two), or the path of a submodule. BatchNorm's statistics are copied with its factors.

    Returns:
        The names of what was copied, as ``part.name``.

    Raises:
        ValueError: a part that one of the two does not have, or of which no tensor has the same name and shape.
    """
    pairs = [(name, part_of(student, name, "student"), part_of(teacher, name, "teacher")) for name in parts]
    plan = []
    for name, mine, theirs in pairs:
        own, wanted = mine.state_dict(), theirs.state_dict()
        fitting = [key for key in own if key in wanted and own[key].shape == wanted[key].shape]
        if not any(own[key].dim() for key in fitting):  # BatchNorm's counters always fit, and are nothing alone
            raise ValueError(f"part {name!r}: no tensor of the student has the shape of the teacher's")
        plan.append((name, own, wanted, fitting))
    with torch.no_grad():
        for _, own, wanted, fitting in plan:
            for key in fitting:
                own[key].copy_(wanted[key])
    return [f"{name}.{key}" for name, _, _, fitting in plan for key in fitting]


def freeze(student: nn.Module, parts: Sequence[str], inherited: Sequence[str] = ()) -> list[str]:
    """Take the parts out of training: no gradients, and their BatchNorm stays in eval mode through ``train()``.

    Build the optimiser after it, from the parameters with ``requires_grad``.

    Args:
        inherited: what :func:`inherit` returned. Of a part of which something was inherited, only that is frozen: what
            did not fit is still as random as it began, and has to learn.

    Returns:
        The names of the student's parameters that are constant now.

    Raises:
        ValueError: a part that the student does not have.
    """
    constant: set[int] = set()
    for name in parts:
        module = part_of(student, name, "student")
        copied = {full.removeprefix(f"{name}.") for full in inherited if full.startswith(f"{name}.")}
        own = {key: p for key, p in module.named_parameters() if not copied or key in copied}
        for parameter in own.values():
            parameter.requires_grad_(False)
            constant.add(id(parameter))
        for path, layer in module.named_modules():
            prefix = f"{path}." if path else ""
            whole = all(f"{prefix}{key}" in copied for key, _ in layer.named_parameters(recurse=False))
            if isinstance(layer, nn.modules.batchnorm._BatchNorm) and (whole or not copied):
                layer.eval()
                # train() of whatever holds it calls train() of each module inside. A bound method is copied with its
                # module by deepcopy.
                layer.train = MethodType(_stay, layer)
    return [name for name, parameter in student.named_parameters() if id(parameter) in constant]


def _stay(self: nn.Module, mode: bool = True) -> nn.Module:
    return self


def part_of(detector: nn.Module, name: str, whose: str = "detector") -> nn.Module:
    """A part by its name among the detector's ``parts``, or by its path; ValueError where there is none."""
    parts = getattr(detector, "parts", {})
    if name in parts:
        return parts[name]
    try:
        if name:
            return detector.get_submodule(name)
    except AttributeError:
        pass
    known = ", ".join(parts) or ", ".join(child for child, _ in detector.named_children())
    raise ValueError(f"the {whose} has no part {name!r}; it has {known}")
