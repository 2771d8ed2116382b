"""The objective over data-parallel ranks: counts, divisors and Pearson's moments of the joined batch.

Ranks exchange a few numbers per level, or per channel, with all-gathers, and add or merge them in the order of the
ranks, so that every rank computes the same bits. Each rank then has the global loss, and the gradient of its own
inputs times the number of ranks: the mean that DistributedDataParallel takes is the gradient of the joined batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ops
from .objective_parts import (
    FEATURES,
    TERMS,
    FeatureTerm,
    Given,
    Part,
    Told,
    check_term,
    head_call,
    read_levels,
    told_by_values,
    values_again,
)
from .one_pass import value

# A few channels at a time are copied in float64 for Pearson's moments: at most this many values of either side.
_CHUNK = 1 << 22


def gathered(x: Tensor, group: Any) -> Tensor:
    """Every rank's x, stacked in the order of the ranks."""
    x = x.contiguous()
    found = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, x, group=group)
    return torch.stack(found)


class _Global(torch.autograd.Function):
    """The sum of the ranks' losses; the gradient is the rank's own, times the number of ranks."""

    @staticmethod
    def forward(ctx, local, group):
        ctx.ranks = dist.get_world_size(group)
        return gathered(local, group).sum(0)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.ranks, None


def parts(active: dict[str, dict[str, Any]], given: Given, group: Any) -> list[Part]:
    """One part per term. All ranks must call this with the same terms, in the same order."""
    found = []
    features = [name for name in active if name in FEATURES]
    levels = read_levels(features[0], given) if features else None
    for name, keywords in active.items():
        if name not in FEATURES:
            found.append(_head(name, keywords, given, group))
            continue
        term = check_term(name, keywords, levels, given)
        names = [levels.names[i] for i in term.places]
        found.append(_masked_mse(term, names, group) if name == "masked_mse" else _pearson(term, names, group))
    return found


# Heads.


def _head(name: str, keywords: dict[str, Any], given: Given, group: Any) -> Part:
    inputs, keywords, factor = head_call(name, keywords, given)
    student = inputs[0]
    if keywords.get("gate") == "batch":
        raise ValueError("bounded_regression: gate='batch' compares means of a rank's own rows; no process_group")
    regions = {}
    if name == "decoupled_kl":
        keywords |= _region_weights(inputs[2], keywords, group)
        regions = {
            f"{name}/{region}": {f"{other}_weight": 0.0}
            for region, other in (("foreground", "background"), ("background", "foreground"))
        }
    elif keywords.get("reduction") != "sum" and keywords.get("avg_factor") is None:
        keywords = {**keywords, "avg_factor": _rows(student, keywords, group)}

    def local(**changed):
        return value(TERMS[name].weighted(*inputs, one_pass=False, **{**keywords, **changed}))

    loss = _Global.apply(local(), group)
    with torch.no_grad():
        details = {key: gathered(local(**changed), group).sum(0) for key, changed in regions.items()}
    return Part(loss, lambda loss, _: Told({name: loss}, details), factor)


def _rows(student: Tensor, keywords: Mapping[str, Any], group: Any) -> Tensor:
    """The rows of all ranks that a mean divides by."""
    target = keywords.get("target")
    if target is None:
        rows = student[..., 0].numel() if student.shape[-1] else 0
        counted = torch.full((), float(rows), device=student.device)
    else:
        counted = (target != keywords.get("ignore_index", -100)).sum().float()
    return gathered(counted, group).sum(0)


def _region_weights(foreground: Tensor, keywords: Mapping[str, Any], group: Any) -> dict[str, Any]:
    """decoupled_kl's weights, changed so that its division by the rank's own rows becomes one by those of all."""
    if keywords.get("reduction", "mean") != "mean":
        return {}
    inside = foreground.sum().float()
    own = torch.stack([inside, foreground.numel() - inside])
    every = gathered(own, group).sum(0)
    share = own.clamp(min=1) / every.clamp(min=1)
    return {
        f"{region}_weight": keywords.get(f"{region}_weight", 1.0) * share[i]
        for i, region in enumerate(("foreground", "background"))
    }


# Features.


def _masked_mse(term: FeatureTerm, names: list[Any], group: Any) -> Part:
    options = term.term
    counts = torch.stack([torch.stack([m.double().sum(), (1 - m.double()).sum()]) for m in options.masks])
    pictures = counts.new_full((), float(term.students[0].shape[0]))
    every = gathered(counts, group).sum(0)
    all_pictures = gathered(pictures, group).sum(0)
    local: Tensor | float = 0.0
    rows = []
    for i, (student, teacher) in enumerate(zip(term.students, term.teachers)):
        # The single function is told to divide by its own pictures; the weights turn that into the global divisor.
        own = max(1.0, 2.0 * student.shape[0])
        divisor = {
            "elements": 2 * every[i] * student.shape[1],
            "pixels": 2 * every[i],
            "batch": 2 * all_pictures.expand(2),
        }[options.normalizer].clamp(min=1)
        share = own / divisor / (len(names) if options.level_reduction == "mean" else 1)
        one = replace(
            options,
            levels=[0],
            masks=[options.masks[i]],
            foreground_weight=(options.foreground_weight * share[0]).float(),
            background_weight=(options.background_weight * share[1]).float(),
            normalizer="batch",
        )
        level = replace(term, students=[student], teachers=[teacher], term=one)
        local = local + FEATURES["masked_mse"].two_passes(term.backend, [student], [teacher], one)
        rows.append(values_again(level, False)[0])
    loss = _Global.apply(local, group)
    values = gathered(torch.stack([*rows, torch.stack(rows).sum(0)]), group).sum(0)

    def told(loss, _):
        details = told_by_values(values, {"masked_mse": list(range(len(names)))}, names, False).details
        return Told({"masked_mse": loss}, details)

    return Part(loss, told, term.factor)


def _pearson(term: FeatureTerm, names: list[Any], group: Any) -> Part:
    losses = _Pearson.apply(term.term, group, len(names), *term.students, *term.teachers)
    total = losses.sum() * term.term.loss_weight
    detached = losses.detach() * term.term.loss_weight

    def told(loss, _):
        return Told({"pearson": loss}, {f"pearson/{name}": detached[i] for i, name in enumerate(names)})

    return Part(total, told, term.factor)


def _chunks(x: Tensor) -> list[slice]:
    step = max(1, _CHUNK // max(1, x[:, :1].numel()))
    return [slice(c, c + step) for c in range(0, x.shape[1], step)]


def _channels(x: Tensor, chosen: slice) -> Tensor:
    """(channels, samples) in float64."""
    return x[:, chosen].detach().transpose(0, 1).flatten(1).double()


class _Pearson(torch.autograd.Function):
    """Each level's loss from the moments of all ranks."""

    @staticmethod
    def forward(ctx, term, group, count, *features):
        students, teachers = features[:count], features[count:]
        own = torch.cat([_moments(s, t) for s, t in zip(students, teachers)])
        merged = _merged(gathered(own, group))
        samples, mean_s, squares_s, mean_t, squares_t = merged.unbind(1)
        standards = []
        for mean, squares in ((mean_s, squares_s), (mean_t, squares_t)):
            deviation = (squares / (samples - 1).clamp(min=1)).sqrt()
            scale = torch.where(deviation + term.eps > 0, 1 / (deviation + term.eps), 0.0)
            standards.append((mean, deviation, scale))
        starts = [0]
        for s in students:
            starts.append(starts[-1] + s.shape[1])
        spans = [slice(a, b) for a, b in itertools.pairwise(starts)]
        sums = [_differences(s, t, standards, span) for s, t, span in zip(students, teachers, spans)]
        u, v = gathered(torch.cat(sums), group).sum(0).unbind(1)
        channels = torch.cat([samples.new_full((s.shape[1],), float(s.shape[1])) for s in students])
        share = 1 / (channels * samples.clamp(min=1))
        if term.level_reduction == "mean":
            share = share / count
        enough = samples >= 2
        losses = torch.where(enough, 0.5 * share * u, 0.0)
        (_, deviation, scale), _ = standards
        kappa = v / (scale * (samples - 1) * deviation)
        flat = deviation == 0
        factor_s = torch.where(enough & ~flat, share * (1 - kappa) * scale, 0.0)
        constant = 0.0 if term.on_constant == "zero" else share * scale
        factor_t = torch.where(enough, torch.where(flat, constant, share * scale), 0.0)
        ops.save(ctx, *features, factor_s, factor_t, *(x for standard in standards for x in standard))
        ctx.options = (dist.get_world_size(group), count, spans)
        dtype = torch.promote_types(torch.float32, torch.promote_types(students[0].dtype, teachers[0].dtype))
        return torch.stack([losses[span].sum() for span in spans]).to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_losses):
        ranks, count, spans = ctx.options
        *features, factor_s, factor_t, mean_s, _, scale_s, mean_t, _, scale_t = ops.saved(ctx)
        students, teachers = features[:count], features[count:]
        grads: list[Tensor | None] = [None] * count
        for i, (s, t, span) in enumerate(zip(students, teachers, spans)):
            if not ctx.needs_input_grad[3 + i]:
                continue
            grads[i] = torch.empty_like(s)
            for chosen in _chunks(s):
                c = slice(span.start + chosen.start, min(span.start + chosen.stop, span.stop))
                a = (_channels(s, chosen) - mean_s[c, None]) * scale_s[c, None]
                b = (_channels(t, chosen) - mean_t[c, None]) * scale_t[c, None]
                grad = (factor_s[c, None] * a - factor_t[c, None] * b) * (ranks * grad_losses[i].double())
                grads[i][:, chosen] = grad.view(len(grad), s.shape[0], *s.shape[2:]).transpose(0, 1).to(s.dtype)
        return (None, None, None, *grads, *([None] * count))


def _moments(student: Tensor, teacher: Tensor) -> Tensor:
    """(channels, 5): samples, and mean and centred squares of either side."""
    rows = []
    for chosen in _chunks(student):
        row = []
        for x in (_channels(student, chosen), _channels(teacher, chosen)):
            samples = x.shape[1]
            mean = x.sum(1) / max(1, samples)
            row += [mean, (x - mean[:, None]).square().sum(1)]
        rows.append(torch.stack([torch.full_like(row[0], float(samples)), *row], 1))
    return torch.cat(rows) if rows else student.new_zeros((0, 5), dtype=torch.float64)


def _merged(moments: Tensor) -> Tensor:
    """(ranks, channels, 5) of several ranks as (channels, 5) of all, in the order of the ranks."""
    total = moments[0]
    for other in moments[1:]:
        n, more = total[:, 0], other[:, 0]
        count = n + more
        safe = count.clamp(min=1)
        merged = [count]
        for mean, squares in ((1, 2), (3, 4)):
            delta = other[:, mean] - total[:, mean]
            merged.append(torch.where(n > 0, total[:, mean] + delta * (more / safe), other[:, mean]))
            merged.append(total[:, squares] + other[:, squares] + delta * delta * (n * more / safe))
        total = torch.stack(merged, 1)
    return total


def _differences(student: Tensor, teacher: Tensor, standards: list[tuple[Tensor, ...]], span: slice) -> Tensor:
    """(channels, 2): sums of (s^ - t^)^2 and s^ (s^ - t^) over the rank's own samples."""
    rows = []
    (mean_s, _, scale_s), (mean_t, _, scale_t) = standards
    for chosen in _chunks(student):
        c = slice(span.start + chosen.start, min(span.start + chosen.stop, span.stop))
        a = (_channels(student, chosen) - mean_s[c, None]) * scale_s[c, None]
        difference = a - (_channels(teacher, chosen) - mean_t[c, None]) * scale_t[c, None]
        rows.append(torch.stack([difference.square().sum(1), (a * difference).sum(1)], 1))
    return torch.cat(rows) if rows else mean_s.new_zeros((0, 2))
