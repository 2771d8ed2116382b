"""The whole objective: any of the distillation losses of a detector together, for one read of the features."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import sharded
from .arguments import Features, Scalar, check_loss_weight
from .joint_pass import joined
from .objective_parts import FEATURES, TERMS, Part, Told, feature_parts, head_part
from .one_pass import OnePass, Plan, check_one_pass, value

# Keywords of the single functions that a call gives, not the configuration.
_OF_A_CALL = ("one_pass", "weight", "target")


class DistillationResult(NamedTuple):
    """What :class:`DetectionDistillationLoss` returns. Nothing in it is read on the host."""

    total: Tensor  #: 0-d, the sum of the terms, with the graph
    terms: dict[str, Tensor]  #: by name, 0-d, weighted and detached; they add up to the total
    details: dict[str, Tensor]  #: the same apart: regions and levels, 0-d, weighted and detached
    #: With ``gradient_norms=True``: squared, at the features; ``term`` of all levels together, ``term/level`` of one.
    gradient_norms: dict[str, Tensor]


def _keywords(name: str) -> list[str]:
    parameters = inspect.signature(getattr(TERMS[name], f"{name}_loss")).parameters.values()
    own = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in _OF_A_CALL]
    return [*own, "loss_weight", *(["levels"] if name in FEATURES else [])]


def _check_term(name: str, given: Any) -> dict[str, Any] | None:
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise TypeError(f"{name}: expected a dict of keywords or None, got {type(given).__name__}")
    allowed = _keywords(name)
    for key in given:
        if key not in allowed:
            raise TypeError(f"{name}: no keyword {key!r}; expected {', '.join(allowed)}")
    check_loss_weight(f"{name}.loss_weight", given.get("loss_weight", 1.0))
    if given.get("reduction") == "none":
        raise ValueError(f"{name}: reduction='none' gives one value per row, which cannot be added to a total")
    return dict(given)


def _total(parts: list[Part], given: Mapping[str, Any]) -> tuple[Tensor, Told]:
    """The sum of the parts with its graph, and what the parts tell, with their factors and detached."""
    plans = [part for part in parts if isinstance(part.result, Plan)]
    total: Tensor | None = None
    told = Told({})
    # Plans whose weight is in them are one node, as far as they are of one backend.
    for backend in dict.fromkeys(part.result.backend for part in plans):
        together = [p.result for p in plans if p.result.backend == backend and _is_one(p.factor)]
        if together:
            loss = value(joined(together))
            total = loss if total is None else total + loss
    for part in parts:
        if isinstance(part.result, Plan) and _is_one(part.factor):
            loss, details = part.result.loss, part.result.details
        else:
            loss = value(part.result)
            details = part.result.details if isinstance(part.result, Plan) else {}
            weighted = loss if _is_one(part.factor) else part.factor * loss
            total = weighted if total is None else total + weighted
        # A term that is the total itself gets memory of its own: whoever divides the total leaves it.
        found = part.told(loss.detach().clone() if loss is total else loss.detach(), details)
        for kept, new in ((told.terms, found.terms), (told.details, found.details)):
            kept |= {name: x if _is_one(part.factor) else (part.factor * x).detach() for name, x in new.items()}
        told.norms |= {
            name: x if _is_one(part.factor) else (part.factor**2 * x).detach() for name, x in found.norms.items()
        }
    return _nothing(given) if total is None else total, told


def _is_one(factor: Any) -> bool:
    return isinstance(factor, (int, float)) and factor == 1


def _nothing(given: Mapping[str, Any]) -> Tensor:
    """0, in the graph of whatever the student gave: no term was computed."""
    names = ("student_logits", "student_deltas", "student_features")
    found = [x for name in names for x in pytree.tree_leaves(given[name]) if isinstance(x, Tensor)]
    for x in sorted(found, key=lambda x: not x.requires_grad)[:1]:
        return x.reshape(-1)[:0].sum(dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.zeros(())


class DetectionDistillationLoss(nn.Module):
    r"""The sum of a detector's distillation losses, each feature read once and each gradient written once.

    .. math:: L = \sum_k w_k L_k

    over the configured terms, each as its own function defines it. Masked MSE and Pearson read the same levels in one
    pass that also forms the gradient; the heads' terms are single functions in the same graph node.

    Args:
        masked_mse, pearson: None, or a dict of :func:`masked_mse_loss`'s or :func:`pearson_loss`'s keywords, with
            ``loss_weight`` (a number or 0-d tensor, 1) and ``levels`` (places or, for a dict of features, keys; all):
            PKD takes four levels of FPN, DeFeat five.
        decoupled_kl, temperature_kl, soft_cross_entropy, binary_kl: the same for the logits. Rows, targets and
            row weights come with each call.
        bounded_regression: the same for the deltas.
        one_pass: ``"auto"`` (where it can), True (or RuntimeError) or False, as for the single functions.
        gradient_norms: whether the result also has the squared norm of each feature term's gradient, at all of its
            levels together and at each (frozen ones included; at the resized copy where Pearson resizes the student),
            weighted, before its rounding to the student's dtype and before the upstream gradient.
        process_group: makes every divisor, the regions' counts and Pearson's moments global over the ranks of a
            ``torch.distributed`` process group. Every rank then returns the global loss, and its own gradient times the
            number of ranks, so that DistributedDataParallel's mean equals the joined batch. Two passes.

    Call arguments, all by keyword:
        student_features, teacher_features: (N, C, H, W), or a list, tuple or dict of levels.
        masks: one (N, H, W) per level of the student, as :func:`masked_mse_loss` takes them; or instead
        boxes, strides: the objects' boxes in pixels and the levels' strides, of which
            :func:`kdkernels.masks.ground_truth_masks` makes masks. On CUDA the first launch draws them; flat boxes
            (M, 5), contiguous and float32, need nothing before it.
        student_logits, teacher_logits: (..., C), for all logit terms. foreground: bool per row (``decoupled_kl``);
            target: int64 per row (``soft_cross_entropy``'s hard part); row_weight: a number per row.
        student_deltas, teacher_deltas, target_deltas: (K, 4); delta_weight: a number per row.
        loss_weights: dict of term name -> weight, which replaces the configured ``loss_weight`` in this call.

    Returns :class:`DistillationResult`. A term whose weight is the number 0 is not computed, and its inputs may be
    missing; its entry is 0. Empty inputs (no boxes, no rows, empty levels) give 0, with a graph.

    Raises:
        TypeError, ValueError: a keyword that the term does not have, a configured term whose input is not given (it is
            named), and whatever the single functions raise.
        RuntimeError: one_pass=True where a term cannot take it.
    """

    def __init__(
        self,
        *,
        masked_mse: Mapping[str, Any] | None = None,
        pearson: Mapping[str, Any] | None = None,
        decoupled_kl: Mapping[str, Any] | None = None,
        temperature_kl: Mapping[str, Any] | None = None,
        soft_cross_entropy: Mapping[str, Any] | None = None,
        binary_kl: Mapping[str, Any] | None = None,
        bounded_regression: Mapping[str, Any] | None = None,
        one_pass: OnePass = "auto",
        gradient_norms: bool = False,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        given = {
            "masked_mse": masked_mse,
            "pearson": pearson,
            "decoupled_kl": decoupled_kl,
            "temperature_kl": temperature_kl,
            "soft_cross_entropy": soft_cross_entropy,
            "binary_kl": binary_kl,
            "bounded_regression": bounded_regression,
        }
        checked = {name: _check_term(name, keywords) for name, keywords in given.items()}
        self.configured = {name: keywords for name, keywords in checked.items() if keywords is not None}
        if not self.configured:
            raise ValueError(f"no term is configured; expected at least one of {', '.join(TERMS)}")
        if process_group is not None and (one_pass is True or gradient_norms):
            raise ValueError("process_group: global statistics take two passes and give no gradient norms")
        for name, keywords in self.configured.items():
            for key, x in keywords.items():
                if isinstance(x, nn.Parameter):
                    self.register_parameter(f"{name}_{key}", x)
        self.one_pass = check_one_pass(one_pass)
        self.gradient_norms = gradient_norms
        self.process_group = process_group

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DetectionDistillationLoss:
        # Weights that are tensors follow the module to its device, and stay as precise as they are. They have no state.
        for keywords in self.configured.values():
            for key, x in keywords.items():
                if isinstance(x, Tensor) and not isinstance(x, nn.Parameter):
                    keywords[key] = x.to(fn(x).device)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        options = [f"{name}={keywords}" for name, keywords in self.configured.items()]
        return ", ".join([*options, f"one_pass={self.one_pass!r}"])

    def forward(
        self,
        *,
        student_features: Features | None = None,
        teacher_features: Features | None = None,
        masks: Features | None = None,
        boxes: Tensor | Sequence[Tensor] | None = None,
        strides: Sequence[float] | None = None,
        student_logits: Tensor | None = None,
        teacher_logits: Tensor | None = None,
        foreground: Tensor | None = None,
        target: Tensor | None = None,
        row_weight: Tensor | None = None,
        student_deltas: Tensor | None = None,
        teacher_deltas: Tensor | None = None,
        target_deltas: Tensor | None = None,
        delta_weight: Tensor | None = None,
        loss_weights: Mapping[str, Scalar] | None = None,
    ) -> DistillationResult:
        """The losses of one step; see the class."""
        given = {
            "student_features": student_features,
            "teacher_features": teacher_features,
            "masks": masks,
            "boxes": boxes,
            "strides": strides,
            "student_logits": student_logits,
            "teacher_logits": teacher_logits,
            "foreground": foreground,
            "target": target,
            "row_weight": row_weight,
            "student_deltas": student_deltas,
            "teacher_deltas": teacher_deltas,
            "target_deltas": target_deltas,
            "delta_weight": delta_weight,
        }
        if loss_weights is not None and not isinstance(loss_weights, Mapping):
            raise TypeError(f"loss_weights: expected a dict of weights by term, got {type(loss_weights).__name__}")
        for name, weight in (loss_weights or {}).items():
            check_loss_weight(f"loss_weights[{name!r}]", weight)
            if name not in self.configured:
                raise ValueError(f"loss_weights: {name!r} is not a configured term, which are {list(self.configured)}")
        active, idle = {}, []
        for name, keywords in self.configured.items():
            weight = (loss_weights or {}).get(name, keywords.get("loss_weight", 1.0))
            if isinstance(weight, (int, float)) and weight == 0:
                idle.append(name)
            else:
                active[name] = {**keywords, "loss_weight": weight}
        parts = self._parts(active, given)
        total, told = _total(parts, given)
        terms = {**told.terms, **{name: torch.zeros_like(total.detach()) for name in idle}}
        return DistillationResult(total, {name: terms[name] for name in self.configured}, told.details, told.norms)

    def _parts(self, active: dict[str, dict[str, Any]], given: dict[str, Any]) -> list[Part]:
        if self.process_group is not None:
            return sharded.parts(active, given, self.process_group)
        parts = []
        features = {name: keywords for name, keywords in active.items() if name in FEATURES}
        if features:
            parts += feature_parts(features, given, self.one_pass, self.gradient_norms)
        for name, keywords in active.items():
            if name not in FEATURES:
                parts.append(head_part(name, keywords, given, self.one_pass))
        return parts
