"""The losses in plain differentiable PyTorch: what each kernel is tested against, and what serves where no kernel does.

One file per loss, one function per file, under the public function's name and keywords. The functions take arguments
that were checked already (features as lists of levels), import torch alone, and are right to any order of derivative.
"""

from .binary_kl import binary_kl_loss
from .bounded_regression import bounded_regression_loss
from .decoupled_kl import decoupled_kl_loss
from .masked_mse import masked_mse_loss
from .pearson import pearson_loss
from .soft_cross_entropy import soft_cross_entropy_loss
from .temperature_kl import temperature_kl_loss

__all__ = [
    "binary_kl_loss",
    "bounded_regression_loss",
    "decoupled_kl_loss",
    "masked_mse_loss",
    "pearson_loss",
    "soft_cross_entropy_loss",
    "temperature_kl_loss",
]
