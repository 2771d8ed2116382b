"""``FrozenTeacher``: a teacher that cannot be wrong by construction. Only that class lives here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


class FrozenTeacher(nn.Module):
    """Hold a trained detector as a teacher that stays in eval mode, gives no gradient and owns no state.

    * ``train()`` of this module, or of a student that holds it, leaves the teacher in eval mode: its BatchNorm
      statistics and dropout never move. Each call checks this again, so that ``teacher.detector.train()`` does not
      last either.
    * Its parameters lose ``requires_grad`` and every call runs under ``torch.no_grad()``; what comes back is constant.
    * ``parameters()``, ``buffers()``, ``modules()`` and ``state_dict()`` do not contain it: an optimiser, a checkpoint,
      DistributedDataParallel and gradient clipping of a student that holds it never see it.
    * ``to()``, ``cuda()``, ``half()`` move it with the module that holds it.

    Args:
        detector: any module; what the harness's protocol asks of a detector is served where it has it. It is held, not
            copied, and frozen in place. ``features`` runs no head: a recipe of feature losses pays for no more.
        dtype: None, or what the teacher computes in under autocast, ``torch.bfloat16`` or ``torch.float16``: half the
            time where the device has units for it. Features then come in that dtype; the harness's own detectors
            compute their heads in float32 all the same.

    Raises:
        TypeError: ``detector`` is not an ``nn.Module``.
        ValueError: another dtype.

    Example:
        >>> student.teacher = FrozenTeacher(teacher)      # no new key in student.state_dict()
        >>> features = student.teacher.features(images)   # eval mode, no graph
    """

    def __init__(self, detector: nn.Module, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if not isinstance(detector, nn.Module):
            raise TypeError(f"detector must be an nn.Module, got {type(detector).__name__}")
        if dtype not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype: expected None, torch.bfloat16 or torch.float16, got {dtype}")
        self.dtype = dtype
        detector.requires_grad_(False)
        detector.eval()
        # Past nn.Module.__setattr__, which would register it as a child.
        object.__setattr__(self, "_detector", detector)

    @property
    def detector(self) -> nn.Module:
        """The module inside."""
        return self._detector

    def features(self, images: Any) -> Any:
        """The detector's features of ``images``, without a graph."""
        return self._call(self._detector.features, images)

    def stages(self, images: Any) -> Any:
        """The stages of the detector's backbone."""
        return self._call(self._detector.stages, images)

    def neck(self, stages: Any) -> Any:
        """The detector's features from its stages."""
        return self._call(self._detector.neck, stages)

    def proposals(self, features: Any) -> list[Tensor]:
        """The detector's proposals, one ``(n, 4)`` tensor per picture."""
        return self._call(self._detector.proposals, features)

    def head(self, features: Any, proposals: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The detector's class logits and box deltas of ``proposals``."""
        return self._call(self._detector.head, features, proposals)

    def dense(self, features: Any) -> Any:
        """The detector's predictions of its anchors."""
        return self._call(self._detector.dense, features)

    def anchors(self, features: Any) -> list[Tensor]:
        """The anchors of each level."""
        return self._call(self._detector.anchors, features)

    def detect(self, images: Any) -> list[dict[str, Tensor]]:
        """The detector's final boxes, as in evaluation."""
        return self._call(self._detector.detect, images)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the detector itself."""
        return self._call(self._detector, *args, **kwargs)

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Change nothing about the teacher: it stays in eval mode whatever ``mode`` says."""
        super().train(mode)
        self._detector.eval()
        return self

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if any(module.training for module in self._detector.modules()):
            self._detector.eval()
        with torch.no_grad(), self._precision(args):
            return function(*args, **kwargs)

    def _precision(self, args: tuple[Any, ...]) -> contextlib.AbstractContextManager:
        if self.dtype is None:
            return contextlib.nullcontext()
        tensors = (x for x in pytree.tree_leaves(args) if isinstance(x, Tensor))
        device = next((x.device.type for x in tensors), "cpu")
        return torch.autocast(device, self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenTeacher:
        super()._apply(fn, recurse)
        self._detector._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        return f"frozen {type(self._detector).__name__}"
