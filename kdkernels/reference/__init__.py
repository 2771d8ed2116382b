"""The losses in plain differentiable PyTorch: what each kernel is tested against, and what serves where no kernel does.

One file per loss, one function per file, under the public function's name and keywords. The functions take arguments
that were checked already (features as lists of levels), import torch alone, and are right to any order of derivative.
"""

from .masked_mse import masked_mse_loss
from .temperature_kl import temperature_kl_loss

__all__ = ["masked_mse_loss", "temperature_kl_loss"]
