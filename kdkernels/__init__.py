"""Fused kernels for knowledge-distillation losses of detectors. The public names, and nothing else."""

from . import masks
from .losses.masked_mse import MaskedMSELoss, masked_mse_loss
from .ops import backend_info, use_backend

__version__ = "0.1.0"

__all__ = [
    "MaskedMSELoss",
    "backend_info",
    "masked_mse_loss",
    "masks",
    "use_backend",
]
