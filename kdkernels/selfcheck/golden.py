"""Golden values of the published losses, as data that runs on any implementation.

`CASES` is a table: what is computed, from which inputs, and the loss and gradient that the published code gives. A
case is called with a namespace that has the seven public functions under their public names and calling convention
(features: one tensor), so one table serves the formulas, the compiled kernels and whatever comes later.

The values may be corrected against their source, never fitted to an implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Loss = Callable[[Any, Tensor], Tensor]  # (namespace of functions, student) -> loss


def wave(shape: tuple[int, ...], a: float, b: float, c: float) -> Tensor:
    """a * sin(b * k + c) in float64, k the row-major index from 0."""
    return (a * torch.sin(b * torch.arange(torch.Size(shape).numel(), dtype=torch.float64) + c)).reshape(shape)


def projection(grad: Tensor) -> Tensor:
    """One number that every gradient element moves: sum(grad * wave)."""
    return (grad.double() * wave(tuple(grad.shape), 1, 0.21, 0.9)).sum()


@dataclass(frozen=True)
class Golden:
    """Expected loss, projection of the gradient and largest absolute gradient, printed to 12 significant digits."""

    name: str
    function: str  # the public function that the case calls
    student: Callable[[], Tensor]
    formula: Callable[[Any, Tensor, torch.dtype], Tensor]
    value: float
    projected: float
    largest: float

    def loss(self, functions: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The loss in `dtype`, and the student leaf that its gradient belongs to."""
        student = self.student().to(dtype).requires_grad_()
        return self.formula(functions, student, dtype), student


def _features() -> Tensor:
    return wave((2, 3, 4, 5), 1, 0.37, 0)


def _small_features() -> Tensor:
    return wave((2, 3, 8, 10), 1, 0.37, 0)


def _teacher_features(dtype: torch.dtype) -> Tensor:
    return wave((2, 3, 4, 5), 1.3, 0.53, 0.4).to(dtype)


def _mask() -> Tensor:
    mask = torch.zeros(2, 4, 5)
    mask[0, 0:2, 0:3] = 1
    mask[1, 1:4, 3:5] = 1
    mask[1, 0, 0] = 1
    return mask


def _masked(mask: Callable[[], Tensor] = _mask, **keywords: Any):
    return lambda f, s, dtype: f.masked_mse_loss(s, _teacher_features(dtype), mask(), **keywords)


def _pearson(f: Any, s: Tensor, dtype: torch.dtype) -> Tensor:
    return f.pearson_loss(s, _teacher_features(dtype))


def _channel_wise(tau: float):
    """CWD: each channel's map is one row of classes; mmrazor divides by N * C, which are our rows."""
    return lambda f, s, dtype: f.temperature_kl_loss(s.flatten(2), _teacher_features(dtype).flatten(2), temperature=tau)


def _logits() -> Tensor:
    return wave((6, 5), 2, 0.7, 0.1)


def _teacher_logits(dtype: torch.dtype) -> Tensor:
    return wave((6, 5), 2.5, 1.1, 0.3).to(dtype)


LABELS = torch.tensor([0, 1, 4, 4, 2, 4])  # 4 is the background


def _decoupled(**keywords: Any):
    return lambda f, s, dtype: f.decoupled_kl_loss(s, _teacher_logits(dtype), LABELS < 4, **keywords)


def _kl(**keywords: Any):
    return lambda f, s, dtype: f.temperature_kl_loss(s, _teacher_logits(dtype), **keywords)


def _soft(f: Any, s: Tensor, dtype: torch.dtype) -> Tensor:
    class_weight = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.5])
    return f.soft_cross_entropy_loss(s, _teacher_logits(dtype), class_weight=class_weight)


def _hard(f: Any, s: Tensor, dtype: torch.dtype) -> Tensor:
    return f.soft_cross_entropy_loss(s, _teacher_logits(dtype), target=LABELS, hard_weight=1.0)


def _deltas() -> Tensor:
    return wave((6, 4), 1, 0.9, 0.2)


def _bounded(**keywords: Any):
    keywords = {"bound_weight": 1.0, "smooth_l1_weight": 0.0, **keywords}

    def formula(f: Any, s: Tensor, dtype: torch.dtype) -> Tensor:
        teacher, target = wave((6, 4), 0.9, 0.5, 0.2).to(dtype), wave((6, 4), 0.5, 0.4, 0.7).to(dtype)
        return f.bounded_regression_loss(s, teacher, target, **keywords)

    return formula


def _times_four(name: str, gate: str, margin: float, value: float, projected: float, largest: float) -> Golden:
    """The published batch and element gates average over all 4 K elements. Ours sum the four coordinates and divide
    by K, so our loss and gradient are the published ones times 4."""
    formula = _bounded(gate=gate, margin=margin)
    return Golden(name, "bounded_regression_loss", _deltas, formula, 4 * value, 4 * projected, 4 * largest)


def _case(
    name: str,
    function: str,
    student: Callable[[], Tensor],
    formula: Any,
    value: float,
    projected: float,
    largest: float,
) -> Golden:
    return Golden(name, function + "_loss", student, formula, value, projected, largest)


# fmt: off
CASES: list[Golden] = [
    _case("DeFeat foreground", "masked_mse", _features, _masked(background_weight=0.0),
          0.578701662149, -0.0579296938715, 0.0563768042135),
    _case("DeFeat background", "masked_mse", _features, _masked(foreground_weight=0.0),
          0.703987776231, 0.0193373252834, 0.0280405945086),
    _case("DeFeat 3 and 12", "masked_mse", _features, _masked(foreground_weight=3.0, background_weight=12.0),
          10.1839583012, 0.0582588217866, 0.336487134103),
    # The published weight of 0.01 is part of the value.
    _case("FGFI", "masked_mse", _features,
          _masked(foreground_weight=0.01, background_weight=0.0, normalizer="pixels"),
          0.0173610498645, -0.00173789081615, 0.00169130412641),
    _case("Mimic, mask of ones", "masked_mse", _features, _masked(lambda: torch.ones(2, 4, 5)),
          0.663269789154, -0.00577445594193, 0.0189274012933),
    _case("PKD", "pearson", _features, _pearson, 0.962787884007, 0.0550485147687, 0.0208851271212),
    _case("PKD, student resized", "pearson", _small_features, _pearson,
          1.03066767245, 0.0735401644295, 0.0193088676325),
    _case("CWD, tau 1", "temperature_kl", _features, _channel_wise(1.0),
          0.531229466283, 0.0465364619715, 0.0210400195574),
    _case("CWD, tau 4", "temperature_kl", _features, _channel_wise(4.0),
          0.632345092049, 0.0400809675858, 0.0192606965262),
    _case("DeFeat KL foreground, T 3", "decoupled_kl", _logits,
          _decoupled(background_weight=0.0, foreground_temperature=3.0),
          2.8408294359, -0.245037870884, 0.323225036334),
    _case("DeFeat KL background, T 1", "decoupled_kl", _logits, _decoupled(foreground_weight=0.0),
          0.809391522121, 0.14449599804, 0.139813661378),
    _case("DeFeat KL, paper's mix", "decoupled_kl", _logits,
          _decoupled(foreground_weight=0.05, background_weight=2.0, foreground_temperature=3.0),
          1.76082451604, 0.276740102536, 0.279627322755),
    _case("KL, T 3", "temperature_kl", _logits, _kl(temperature=3.0),
          2.10759271522, 0.00537753483683, 0.161612518167),
    _case("mmdet KD KL, T 10", "temperature_kl", _logits, _kl(temperature=10.0, reduction="mean"),
          0.457221091768, 0.00553069523669, 0.0325543608198),
    _case("Chen soft cross-entropy", "soft_cross_entropy", _logits, _soft,
          2.62134350612, -0.0603176177371, 0.187285334878),
    _case("hard cross-entropy", "soft_cross_entropy", _logits, _hard,
          2.08467039039, 0.0199245935768, 0.163071283647),
    _case("bound, row gate, margin -0.6", "bounded_regression", _deltas, _bounded(margin=-0.6),
          1.78542550869, 0.40611117834, 0.483620115984),
    _case("bound, row gate, margin 0", "bounded_regression", _deltas, _bounded(margin=0.0),
          2.36381297769, 0.411768817852, 0.483620115984),
    _case("bound, row gate, margin 0.6", "bounded_regression", _deltas, _bounded(margin=0.6),
          2.5554055143, 0.305766576584, 0.483620115984),
    _times_four("bound, batch gate, margin 0", "batch", 0.0, 0.638851378576, 0.0764416441459, 0.120905028996),
    _times_four("bound, batch gate, margin -0.6", "batch", -0.6, 0.0, 0.0, 0.0),
    _times_four("bound, element gate, margin 0", "element", 0.0, 0.589262264919, 0.0329128586885, 0.120905028996),
    _case("smooth L1", "bounded_regression", _deltas, _bounded(bound_weight=0.0, smooth_l1_weight=1.0),
          1.23854393245, 0.0570190836502, 0.166666666667),
]
# fmt: on
