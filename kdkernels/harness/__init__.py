"""The reference training: distil one detector into another, around the library's public losses.

Public here: :class:`FrozenTeacher`, :class:`Adapter` and :func:`shared_proposals`, the three parts that every
distillation of a detector needs and that are easily got wrong. They work with any detector that follows the protocol
in :mod:`kdkernels.harness.detectors`. The rest (scenes, data, loop, evaluation, report) serves
``python -m kdkernels train``. Nothing outside this folder imports it; torchvision is imported on use only.
"""

from .distill import Adapter, shared_proposals
from .teacher import FrozenTeacher

__all__ = ["Adapter", "FrozenTeacher", "shared_proposals"]
