"""What the tests of recipes share: small detectors, teachers that say something, and the papers' formulas in float64.

No test lives here.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness_parts import batch

import kdkernels as kd
from kdkernels.harness import FrozenTeacher
from kdkernels.harness.detectors import load_model
from kdkernels.harness.distill import Distillation
from kdkernels.harness.recipes import Setup, parse
from kdkernels.harness.recipes.objectness import kept, objectness

KINDS = ("faster_rcnn", "retinanet", "fcos", "ssdlite")
TWO_STAGES, ONE_STAGE = KINDS[:1], KINDS[1:]
# Recipes and the detectors that they apply to.
APPLIES = {
    "combined": KINDS,
    "defeat": KINDS,
    "pkd": KINDS,
    "chen2017": TWO_STAGES,
    "mimic": KINDS,
    "fgfi": KINDS,
    "tadf": KINDS,
    "fitnets": KINDS,
    "cwd": KINDS,
    "hinton": KINDS,
    "logits": KINDS,
    "noisy-teacher": KINDS,
    "soft-labels": KINDS,
    "objectness": ONE_STAGE,
}
CASES = [(recipe, kind) for recipe, kinds in APPLIES.items() for kind in kinds]
# The small beginnings of a published adapter leave nothing to be seen of a gradient behind it.
TEXTS = {"defeat": "defeat:adapter=auto", "fgfi": "fgfi:adapter=auto,weight=1", "fitnets": "fitnets:hint_steps=1000"}


def model(kind, seed=0, classes=10):
    torch.manual_seed(seed)
    text = f"{kind}:width=0.125" + ("" if kind == "ssdlite" else ",channels=32")
    return load_model(text, classes=classes, image_size=96)


@pytest.fixture(scope="module")
def pictures():
    images, targets = batch(2)
    # Two stages need a few objects, all a small picture.
    return F.interpolate(images, size=(96, 96)), [{**t, "boxes": t["boxes"] * 0.6} for t in targets]


@pytest.fixture(scope="module")
def teachers(pictures):
    return {kind: FrozenTeacher(taught(model(kind, seed=1), pictures[0])) for kind in KINDS}


def taught(teacher, images):
    """A random detector that says something: with statistics of its own, and last layers that are not nearly 0."""
    for module in teacher.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches so far
    with torch.no_grad():
        teacher.train().features(images)
        for name, parameter in teacher.named_parameters():
            if parameter.dim() > 1 and any(part in name for part in ("cls", "bbox", "head")):
                parameter.add_(0.05 * torch.randn_like(parameter))
    return teacher


def distillation(text, student, teacher, preset="published", **how):
    recipe = parse(text, preset).build(Setup(student, teacher.detector, seed=3, unlabeled=True))
    return Distillation([recipe], teacher, base_size=10.0, limit=16, **how)


def step_of(name, distil, student, pictures, index=0):
    images, targets = pictures
    unlabeled = name == "soft-labels"
    if unlabeled:
        targets = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)} for _ in targets]
    return distil.step(student, images, targets, index, unlabeled=unlabeled)


def pairs(step, recipe, adapter=None, kind="features"):
    """Student and teacher levels in float64, with their masks' geometry."""
    matching = step.matching(recipe, adapter, kind)
    return [(s.double(), t.double()) for s, t in zip(matching.student.values(), matching.teacher.values())], matching


def masked(levels, masks, foreground, background, pixels=False):
    total = 0
    for (s, t), mask in zip(levels, masks):
        m = mask.double()[:, None].expand_as(s)
        d = (s - t).square()
        for weight, region in ((foreground, m), (background, 1 - m)):
            count = 2 * region.sum() / (s.shape[1] if pixels else 1)
            total = total + weight * (d * region).sum() / max(1.0, float(count))
    return total / len(levels)


def boxes_masks(kind, step, matching):
    boxes = [t["boxes"] for t in step.targets]
    how = {"base_size": step.base_size, "batch_size": len(boxes)}
    if kind == "all":
        return [torch.ones(len(s), *s.shape[-2:]) for s in matching.student.values()]
    draw = kd.masks.ground_truth_masks if kind == "gt" else kd.masks.gaussian_masks
    return draw(boxes, matching.sizes, matching.strides, **how)


def kl(s, t, temperature):
    s, t = s.double() / temperature, t.double() / temperature
    return temperature**2 * (t.softmax(-1) * (t.log_softmax(-1) - s.log_softmax(-1))).sum(-1)


def binary_kl(s, t):
    s, t = s.double(), t.double()
    p = t.sigmoid()
    on, off = F.logsigmoid(t) - F.logsigmoid(s), F.logsigmoid(-t) - F.logsigmoid(-s)
    return (p * on + (1 - p) * off).sum(-1)


def rows_kl(student, rows, temperature=1.0):
    if hasattr(student, "head") or student.activation == "softmax":
        return kl(rows.student, rows.teacher, temperature)
    return temperature**2 * binary_kl(rows.student / temperature, rows.teacher / temperature)


def pearson(s, t):
    s, t = (x.transpose(0, 1).flatten(1) for x in (s, t))
    s, t = ((x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-6) for x in (s, t))
    return (s - t).square().mean() / 2


def smooth_l1(d):
    return torch.where(d.abs() < 1, d.square() / 2, d.abs() - 0.5).sum(-1)


def bound(s, t, y, margin=0.0):
    own, other = (s - y).square().sum(-1), (t - y).square().sum(-1)
    return torch.where(own + margin > other, own, 0.0)


def expected(name, recipe, step):
    """The sum of a recipe's terms, from the papers, in float64."""
    o = recipe.options
    if name in ("mimic", "fitnets", "fgfi"):
        levels, matching = pairs(step, recipe.pairs, recipe.neck_adapter)
        masks = boxes_masks("all", step, matching)
        if name == "fgfi":
            masks = list(step.masks(matching, "fine").values())
        return masked(levels, masks, o.weight, 0, pixels=name == "fgfi")
    if name == "pkd":
        levels, _ = pairs(step, recipe.pairs)
        weight = 6 if hasattr(step.student, "head") else 10
        return weight * sum(pearson(s, t) for s, t in levels[:4])
    if name == "cwd":
        levels, _ = pairs(step, recipe.pairs, recipe.neck_adapter)
        return 10 * sum(kl(s.flatten(2), t.flatten(2), 1.0).mean() for s, t in levels)
    if name in ("defeat", "tadf", "combined"):
        levels, matching = pairs(step, recipe.pairs, recipe.neck_adapter)
        masks = boxes_masks("gaussian" if name == "tadf" else "gt", step, matching)
        weights = (o.features, 0) if name == "tadf" else (4, 16)
        total = masked(levels, masks, *weights)
        if hasattr(step.student, "head"):
            rows = step.rows()
            inside = rows.foreground
            regions = ((1.0, 1.0, inside),) if name == "tadf" else ((0.05, 3.0, inside), (2.0, 1.0, ~inside))
            for weight, temperature, region in regions:
                values = kl(rows.student_logits, rows.teacher_logits, temperature)
                total = total + weight * (values * region).sum() / max(1, int(region.sum()))
            if name != "defeat":  # the bound
                deltas = (rows.student_deltas, rows.teacher_deltas, rows.target_deltas)
                value = bound(*(x.double() for x in deltas)) * inside
                total = total + (o.boxes if name == "tadf" else 0.5) * value.mean()
        if name == "combined":
            total = total + 6 * sum(pearson(s, t) for s, t in levels)
        return total
    if name == "hinton":
        rows = step.class_rows()
        return 0.5 * (rows_kl(step.student, rows, 2.0) * (rows.labels >= 0)).sum() / float(rows.average)
    if name == "logits":
        rows = step.class_rows()
        value = (rows.student.double() - rows.teacher.double()).square().sum(-1) / 2
        return (value * (rows.labels >= 0)).sum() / float(rows.average)
    if name == "noisy-teacher":
        rows = step.class_rows()
        random = torch.Generator().manual_seed(3)
        noise = torch.randn(rows.teacher.shape, generator=random) * 0.3
        noise = noise * (torch.rand((len(noise), 1), generator=random) < 0.5)
        teacher = rows.teacher * (1 + noise)
        value = (rows.student.double() - teacher.double()).square().sum(-1) / 2
        return (value * (rows.labels >= 0)).sum() / float(rows.average)
    if name == "objectness":
        mine, theirs = step.dense()
        scale = (objectness(theirs) * kept(theirs, 3, False)).double()
        rows_of = kl(mine.logits, theirs.logits, 1.0) if mine.activation == "softmax" else binary_kl(*step_logits(step))
        boxes = smooth_l1(mine.deltas.double() - theirs.deltas.double())
        total = (scale * (rows_of + boxes)).mean()
        if mine.quality is not None:
            p, q = theirs.quality.double().sigmoid(), mine.quality.double()
            total = total - (p * F.logsigmoid(q) + (1 - p) * F.logsigmoid(-q)).mean()
        return total
    if name == "soft-labels":
        return soft_labels(step)
    if name == "chen2017":
        return chen2017(step)
    raise AssertionError(name)


def step_logits(step):
    return [x.logits for x in step.dense()]


def soft_labels(step):
    if hasattr(step.student, "head"):
        rows = step.rows(labels="teacher")
        p = rows.teacher_logits.double().softmax(-1)
        classes = -(p * rows.student_logits.double().log_softmax(-1)).sum(-1).mean()
        boxes = smooth_l1(rows.student_deltas.double() - rows.teacher_deltas.double())
        total = classes + (boxes * (rows.labels > 0)).mean()
    else:
        total = 0
    mine, theirs = step.dense()
    sure = objectness(theirs).double()
    if mine.activation == "softmax":
        p = theirs.logits.double().softmax(-1)
        values = -(p * mine.logits.double().log_softmax(-1)).sum(-1)
    else:
        values = binary_kl(mine.logits, theirs.logits)
    boxes = smooth_l1(mine.deltas.double() - theirs.deltas.double())
    return total + (values.sum() + (sure * boxes).sum()) / max(1.0, float(sure.sum()))


def chen2017(step):
    def classes(s, t, target, valid):
        weight = torch.ones(s.shape[-1], dtype=torch.float64)
        weight[0] = 1.5
        log = s.double().log_softmax(-1)
        soft = -(weight * t.double().softmax(-1) * log).sum(-1)
        hard = -log.gather(1, target.clamp(min=0)[:, None])[:, 0]
        return ((0.5 * hard + 0.5 * soft) * valid).sum() / valid.sum()

    def boxes(s, t, y, inside, count):
        s, t, y = (x.double() for x in (s, t, y))
        return ((smooth_l1(s - y) + 0.5 * bound(s, t, y)) * inside).sum() / count

    rows = step.rows(with_truth=True)
    everything = torch.ones(len(rows.labels), dtype=torch.bool)
    total = classes(rows.student_logits, rows.teacher_logits, rows.labels, everything)
    deltas = (rows.student_deltas, rows.teacher_deltas, rows.target_deltas)
    total = total + boxes(*deltas, rows.foreground, len(rows.labels))
    mine, theirs = step.dense()
    matched = step.matched()
    from kdkernels.harness.recipes.chen2017 import drawn

    labels = drawn(matched.labels, 256, torch.Generator().manual_seed(3)).flatten()
    valid = labels >= 0
    z = [torch.stack([torch.zeros_like(x), x], -1) for x in (mine.logits.flatten(), theirs.logits.flatten())]
    total = total + classes(*z, labels, valid)
    deltas = [x.flatten(0, 1) for x in (mine.deltas, theirs.deltas, matched.deltas)]
    return total + boxes(*deltas, labels > 0, valid.sum())
