"""Fused kernels for knowledge-distillation losses of detectors. The public names, and nothing else."""

from . import masks
from .losses.binary_kl import BinaryKLLoss, binary_kl_loss
from .losses.bounded_regression import BoundedRegressionLoss, bounded_regression_loss
from .losses.decoupled_kl import DecoupledKLLoss, decoupled_kl_loss
from .losses.detection_distillation import DetectionDistillationLoss, DistillationResult
from .losses.masked_mse import MaskedMSELoss, masked_mse_loss
from .losses.pearson import PearsonLoss, pearson_loss
from .losses.soft_cross_entropy import SoftCrossEntropyLoss, soft_cross_entropy_loss
from .losses.temperature_kl import TemperatureKLLoss, temperature_kl_loss
from .ops import backend_info, use_backend

__version__ = "0.1.0"

__all__ = [
    "BinaryKLLoss",
    "BoundedRegressionLoss",
    "DecoupledKLLoss",
    "DetectionDistillationLoss",
    "DistillationResult",
    "MaskedMSELoss",
    "PearsonLoss",
    "SoftCrossEntropyLoss",
    "TemperatureKLLoss",
    "backend_info",
    "binary_kl_loss",
    "bounded_regression_loss",
    "decoupled_kl_loss",
    "masked_mse_loss",
    "masks",
    "pearson_loss",
    "soft_cross_entropy_loss",
    "temperature_kl_loss",
    "use_backend",
]
