"""``TeacherEnsemble``: several trained detectors as one teacher, whose outputs are their mean. Only that class here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .detectors.protocol import Dense


class Members(dict):
    """The mean of several detectors' features, by level, and each member's own, which its heads need."""

    def __init__(self, members: Sequence[Any]) -> None:
        super().__init__({name: torch.stack([m[name] for m in members]).mean(0) for name in members[0]})
        self.members = list(members)


class TeacherEnsemble(nn.Module):
    """Detectors of one architecture, for :class:`~kdkernels.harness.FrozenTeacher` (Bucila et al. 2006; Hinton et al.
    2015, section 1: an ensemble is taught as the mean of what its members say).

    Features, stages, logits and deltas are means over the members. Proposals, anchors and the matching of anchors are
    the first member's; every member's head sees the same proposals.

    Raises:
        ValueError: no member, or members whose levels or channels differ.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        if not members:
            raise ValueError("members: expected at least one detector")
        first = members[0]
        for other in members[1:]:
            if dict(other.channels) != dict(first.channels) or dict(other.strides) != dict(first.strides):
                raise ValueError(
                    f"members: their pyramids differ, {dict(first.channels)} at {dict(first.strides)} and "
                    f"{dict(other.channels)} at {dict(other.strides)}; a mean needs equal ones"
                )
        self.members = nn.ModuleList(members)
        for name in ("strides", "channels", "stage_strides", "stage_channels"):
            if hasattr(first, name):
                setattr(self, name, getattr(first, name))
        # Only what all members can do, so that a recipe sees at once what this teacher lacks.
        for name in ("stages", "neck", "proposals", "head", "dense", "matched", "anchors"):
            if all(hasattr(member, name) for member in members):
                setattr(self, name, getattr(self, f"_{name}"))

    def features(self, images: Tensor) -> Members:
        """The mean of the members' levels."""
        return Members([member.features(images) for member in self.members])

    def detect(self, images: Tensor) -> list[dict[str, Tensor]]:
        """The first member's detections."""
        return self.members[0].detect(images)

    def _stages(self, images: Tensor) -> Members:
        return Members([member.stages(images) for member in self.members])

    def _neck(self, stages: Members) -> Members:
        return Members([m.neck(own) for m, own in zip(self.members, stages.members, strict=True)])

    def _proposals(self, features: Members) -> list[Tensor]:
        return self.members[0].proposals(features.members[0])

    def _head(self, features: Members, proposals: list[Tensor]) -> tuple[Tensor, Tensor]:
        pairs = zip(self.members, features.members, strict=True)
        logits, deltas = zip(*(member.head(own, proposals) for member, own in pairs), strict=True)
        return torch.stack(logits).mean(0), torch.stack(deltas).mean(0)

    def _dense(self, features: Members) -> Dense:
        found = [member.dense(own) for member, own in zip(self.members, features.members, strict=True)]
        logits, deltas = (torch.stack([getattr(x, name) for x in found]).mean(0) for name in ("logits", "deltas"))
        quality = None if found[0].quality is None else torch.stack([x.quality for x in found]).mean(0)
        return found[0]._replace(logits=logits, deltas=deltas, quality=quality)

    def _matched(self, features: Members, targets: list[dict[str, Tensor]]) -> Any:
        return self.members[0].matched(features.members[0], targets)

    def _anchors(self, features: Members) -> list[Tensor]:
        return self.members[0].anchors(features.members[0])
