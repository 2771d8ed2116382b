"""What a detector costs at inference: parameters, floating-point operations, time. Only this measurement."""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


class Cost(NamedTuple):
    """What ``detect`` costs for one picture."""

    parameters: int  #: frozen ones too
    gflops: float  #: 1e9 floating-point operations; a multiply-add counts as two
    milliseconds: float  #: median


def cost(
    detector: nn.Module,
    image_size: int | tuple[int, int],
    device: torch.device | str | None = None,
    *,
    repeats: int = 10,
) -> Cost:
    """Measure ``detect`` of one picture of noise, the same each time.

    The operations are those that torch counts, convolutions and matrix products; norms, RoIAlign and NMS are not among
    them. A picture of noise gives a two-stage detector as many proposals as it can have.

    Args:
        detector: left as it was: its mode, and the device of its parameters.
        image_size: side, or height and width.
        device: where to measure; by default where the detector is.
        repeats: calls of which the median is taken, after two to warm up.

    Raises:
        ValueError: ``repeats`` below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    home = next((parameter.device for parameter in detector.parameters()), torch.device("cpu"))
    device = home if device is None else torch.device(device)
    modes = [(module, module.training) for module in detector.modules()]
    try:
        detector.to(device).eval()
        images = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)).to(device)
        with torch.no_grad():
            with FlopCounterMode(display=False) as counter:
                detector.detect(images)
            detector.detect(images)
            milliseconds = statistics.median(_timed(detector, images, device) for _ in range(repeats))
    finally:
        detector.to(home)
        for module, training in modes:
            module.training = training
    parameters = sum(parameter.numel() for parameter in detector.parameters())
    return Cost(parameters, counter.get_total_flops() / 1e9, milliseconds)


def _timed(detector: nn.Module, images: torch.Tensor, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    detector.detect(images)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - begin)
