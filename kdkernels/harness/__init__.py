"""The reference training: distil one detector into another, around the library's public losses.

Public here: :class:`FrozenTeacher`, :class:`Adapter`, :func:`shared_proposals` and :func:`fm_nms`, the parts that
distillations of detectors need and that are easily got wrong. They work with any detector that follows the protocol in
:mod:`kdkernels.harness.detectors`. The rest (data, recipes, loop, evaluation, report) serves
``python -m kdkernels train``. Nothing outside this folder imports it; torchvision is imported on use only.
"""

from .adapter import Adapter
from .fm_nms import fm_nms
from .proposals import shared_proposals
from .teacher import FrozenTeacher

__all__ = ["Adapter", "FrozenTeacher", "fm_nms", "shared_proposals"]
