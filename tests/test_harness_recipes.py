"""Every recipe on every detector that it applies to: its terms by the papers' formulas, what it trains, what it
refuses.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("sklearn")
pytest.importorskip("torchvision")

from harness_parts import batch

import kdkernels as kd
from kdkernels.harness import FrozenTeacher
from kdkernels.harness.detectors import load_model
from kdkernels.harness.detectors.rescaled import Rescaled
from kdkernels.harness.distill import Call, Distillation, grouped
from kdkernels.harness.ensemble import TeacherEnsemble
from kdkernels.harness.recipes import RECIPES, Setup, parse
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


def test_every_recipe_is_here():
    assert set(APPLIES) == set(RECIPES)


# --- formulas


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
    if rows.activation == "softmax":
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


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_terms_are_the_papers_formulas(name, kind, teachers, pictures):
    student, teacher = model(kind).train(), teachers[kind]
    distil = distillation(name, student, teacher, steps=1000)
    with torch.no_grad():
        step = step_of(name, distil, student, pictures)
        found = distil(step)
        (recipe,) = distil.recipes
        wanted = expected(name, recipe, step)
        if name == "chen2017":
            levels, _ = pairs(step, recipe.pairs, recipe.hint_adapter)
            wanted = wanted + 0.5 * sum((s - t).square().mean() for s, t in levels) / len(levels)
    assert found.terms and math.isclose(float(found.total), float(wanted), rel_tol=2e-5), (found.total, wanted)
    assert math.isclose(sum(float(x) for x in found.terms.values()), float(found.total), rel_tol=1e-5)


# --- training


@pytest.mark.parametrize("steps", [4, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_recipe_trains_the_student_and_its_adapters_and_nothing_else(name, kind, steps, teachers, pictures):
    """Without the detector's own losses: the terms fall, and every gradient is where it belongs."""
    student, teacher = model(kind).train(), teachers[kind]
    distil = distillation(TEXTS.get(name, name), student, teacher, preset="scenes", steps=1000)
    before = {key: value.clone() for key, value in teacher.detector.state_dict().items()}
    parameters = [*student.parameters(), *distil.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=3e-4)
    losses = []
    for index in range(steps):
        total = distil(step_of(name, distil, student, pictures, index)).total
        losses.append(float(total.detach()))
        optimizer.zero_grad()
        total.backward()
        if index == 0:
            reached = [p for p in student.parameters() if p.grad is not None and p.grad.abs().max() > 0]
            assert len(reached) > 10, "the student learns"
            for key, parameter in distil.named_parameters():
                assert parameter.grad is not None and parameter.grad.abs().max() > 0, key
        optimizer.step()
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0], losses
    assert all(p.grad is None and not p.requires_grad for p in teacher.detector.parameters())
    for key, value in teacher.detector.state_dict().items():
        assert torch.equal(value, before[key]), key


# --- recipes together, and what is refused


def test_recipes_that_compare_the_same_read_it_once(teachers, pictures):
    """DeFeat and PKD without adapters are one objective; Mimic, whose term is DeFeat's, is another."""
    student, teacher = model("faster_rcnn").train(), teachers["faster_rcnn"]
    setup = Setup(student, teacher.detector)
    texts = ("defeat:adapter=auto", "pkd", "mimic:adapter=auto", "hinton")
    distil = Distillation([parse(text).build(setup) for text in texts], teacher, base_size=10.0, limit=16)
    with torch.no_grad():
        step = distil.step(student, *pictures)
        together, one_by_one = distil(step), distil(step, together=False)
        groups = grouped([Call(label, r.terms, r.inputs(step), 1.0) for label, r in zip(distil.labels, distil.recipes)])
        apart = sum(float(distillation(text, student, teacher)(step).total) for text in texts)
    assert [[call.label for call in group] for group in groups] == [["defeat", "pkd"], ["mimic", "hinton"]]
    assert set(together.terms) == {
        "defeat/masked_mse", "defeat/decoupled_kl", "pkd/pearson", "mimic/masked_mse", "hinton/temperature_kl"
    }  # fmt: skip
    assert {"defeat/masked_mse/foreground", "pkd/pearson/P2"} <= set(together.details)
    for found in (one_by_one.total, apart):
        assert math.isclose(float(together.total), float(found), rel_tol=1e-5)


def test_norms_are_told_when_asked_for(teachers, pictures):
    student, teacher = model("retinanet").train(), teachers["retinanet"]
    distil = distillation("pkd", student, teacher)
    step, leaves = distil.step(student, *pictures).cut()
    found = distil(step, norms=True)
    found.total.backward()
    wanted = sum(float(leaf.grad.double().square().sum()) for _, leaf in leaves if leaf.grad is not None)
    assert math.isclose(float(found.gradient_norms["pkd/pearson"]), wanted, rel_tol=1e-4)
    levels = [float(x) for name, x in found.gradient_norms.items() if name.count("/") == 2]
    assert len(levels) == 4 and math.isclose(sum(levels), wanted, rel_tol=1e-4)
    assert not distil(distil.step(student, *pictures)).gradient_norms


def test_pyramids_of_different_kinds_meet_at_equal_strides(teachers, pictures):
    """P2 to P6 of the student, P3 to P7 of the teacher: P3 to P6, and P6's grids may differ by a cell."""
    student, teacher = model("faster_rcnn").train(), teachers["retinanet"]
    distil = distillation("pkd", student, teacher)
    assert [pair.name for pair in distil.recipes[0].pairs] == ["P3", "P4", "P5", "P6"]
    step = distil.step(student, *pictures)
    matching = step.matching(distil.recipes[0].pairs)
    for name, level in matching.student.items():
        assert level.shape == matching.teacher[name].shape
    distil(step).total.backward()


def test_a_student_of_half_size_pictures_pairs_one_level_up(teachers, pictures):
    student = Rescaled(model("faster_rcnn"), 0.5).train()
    images, targets = pictures
    images = F.interpolate(images, size=(128, 128))
    distil = distillation("combined:adapter=auto", student, teachers["faster_rcnn"])
    pairs = distil.recipes[0].pairs
    assert [(pair.student, pair.teacher) for pair in pairs] == [("0", "1"), ("1", "2"), ("2", "3"), ("3", "pool")]
    step = distil.step(student, images, targets)
    assert all(a.shape[-2:] == b.shape[-2:] for a, b in ((step.features["0"], step.teacher_features["1"]),))
    rows = step.rows()
    inner = student.detector.head(step.features, [boxes / 2 for boxes in rows.proposals])[0]
    assert torch.equal(inner, rows.student_logits)
    result = distil(step).total + sum(student.losses(step.features, targets).values())
    result.backward()
    assert torch.isfinite(result)
    with torch.no_grad():
        whole, scaled = (student.eval().proposals(step.features), student.detector.proposals(step.features))
    assert torch.equal(whole[0], scaled[0] * 2)


def test_an_ensemble_teaches_its_mean(pictures):
    images, targets = pictures
    members = [taught(model("faster_rcnn", seed=seed), images).eval() for seed in (1, 2)]
    teacher = FrozenTeacher(TeacherEnsemble(members))
    distil = distillation("combined:adapter=auto", model("faster_rcnn").train(), teacher)
    with torch.no_grad():
        features = [member.features(images) for member in members]
        step = distil.step(model("faster_rcnn").train(), images, targets)
        rows = step.rows()
        logits = [m.head(own, rows.proposals)[0] for m, own in zip(members, features)]
        for name, level in step.teacher_features.items():
            torch.testing.assert_close(level, (features[0][name] + features[1][name]) / 2)
    torch.testing.assert_close(rows.teacher_logits, (logits[0] + logits[1]) / 2)
    with pytest.raises(ValueError, match="pyramids differ"):
        TeacherEnsemble([members[0], model("retinanet")])
    with pytest.raises(ValueError, match="at least one"):
        TeacherEnsemble([])


@pytest.mark.parametrize(
    ("text", "student", "teacher", "why"),
    [
        ("chen2017", "fcos", "fcos", "two stages"),
        ("hinton", "faster_rcnn", "retinanet", "row by row"),
        ("logits", "retinanet", "faster_rcnn", "row by row"),
        ("objectness", "faster_rcnn", "faster_rcnn", "these detectors have two"),
        ("pkd", "ssdlite", "retinanet", "channels must agree"),
        ("defeat:backbone=true", "ssdlite", "ssdlite", "has no stage_strides"),
        ("defeat:neck=false", "retinanet", "retinanet", "two detectors of two stages"),
        ("defeat:rows=pos", "retinanet", "retinanet", "for two detectors of two stages"),
        ("defeat:backbone=true,masks=fine", "faster_rcnn", "faster_rcnn", "needs anchors"),
        ("fitnets:level=9", "retinanet", "retinanet", "expected 0 to 4"),
        ("fitnets:hint_steps=1,hint_epochs=1", "retinanet", "retinanet", "give one of them"),
        ("soft-labels", "retinanet", "retinanet", "--unlabeled-path"),
        ("hinton:alpha=2", "retinanet", "retinanet", r"\[0, 1\]"),
    ],
)
def test_pairs_that_make_no_sense_are_refused_with_a_sentence(text, student, teacher, why):
    with pytest.raises(ValueError, match=why) as error:
        parse(text).build(Setup(model(student), model(teacher)))
    assert str(error.value).startswith(text.partition(":")[0])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("nothing", "no recipe 'nothing'; expected one of combined"),
        ("defeat:mask=gt", "defeat: no key 'mask'; expected neck, backbone"),
        ("defeat:masks=box", "defeat: masks: expected one of gt, fine"),
        ("defeat:foreground=many", "defeat: foreground: expected float"),
        ("defeat:foreground=inf", "finite"),
        ("defeat:neck=perhaps", "true or false"),
        ("defeat:neck", "key=value"),
        ("defeat:neck=true,neck=true", "twice"),
        ("pkd:levels=1.5", "expected int"),
        ("pkd:preset=mine", "published, scenes"),
    ],
)
def test_bad_texts_name_what_is_wrong(text, why):
    with pytest.raises(ValueError, match=why):
        parse(text)


def test_presets_and_keys():
    assert parse("defeat").options.background == 16 and parse("defeat", "scenes").options.background == 0.5
    assert parse("defeat:preset=published", "scenes").options.background == 16
    assert parse("defeat:background=2", "scenes").options.background == 2
    assert parse("chen2017:lambda=2").options.lambda_ == 2
    assert parse("pkd:weight=none").options.weight is None and parse("pkd:adapter=auto").options.adapter == "auto"


def test_fitnets_learns_hints_first(teachers, pictures):
    student, teacher = model("retinanet").train(), teachers["retinanet"]
    distil = distillation("fitnets:hint_epochs=2", student, teacher, steps=100, epoch_steps=5)
    hint, task = (distil.step(student, *pictures, index=index) for index in (9, 10))
    assert distil(hint).terms and distil.task_weight("classification", hint) == 0
    assert not distil(task).terms and distil.task_weight("classification", task) == 1


def test_weights_of_the_detectors_own_losses():
    setup = Setup(model("faster_rcnn"), model("faster_rcnn"))
    own = ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg", "another")
    weights = {text: [parse(text).build(setup).task_weight(x, None) for x in own] for text in ("hinton", "chen2017")}
    assert weights == {"hinton": [0.5, 1, 1, 1, 1], "chen2017": [0, 0, 0, 0, 1]}


@pytest.mark.parametrize("region", ["both", "fg", "bg"])
@pytest.mark.parametrize("masks", ["gt", "fine", "gaussian", "random", "all"])
def test_defeats_masks_and_regions(masks, region, teachers, pictures):
    student, teacher = model("faster_rcnn").train(), teachers["faster_rcnn"]
    distil = distillation(f"defeat:head=false,adapter=auto,masks={masks},region={region}", student, teacher)
    with torch.no_grad():
        step = distil.step(student, *pictures)
        (recipe,) = distil.recipes
        levels, _ = pairs(step, recipe.pairs)
        found = distil(step)
        recipe.random.manual_seed(3)
        drawn = list(recipe.inputs(step)["masks"].values())
    weights = {"both": (4, 16), "fg": (4, 0), "bg": (0, 16)}[region]
    assert math.isclose(float(found.total), float(masked(levels, drawn, *weights)), rel_tol=1e-5, abs_tol=1e-12)
    if masks == "random":
        wanted = kd.masks.ground_truth_masks(
            [t["boxes"] for t in step.targets], [m.shape[-2:] for m in drawn], [4, 8, 16, 32, 64], base_size=10.0
        )
        assert [m.sum((1, 2)).tolist() for m in drawn] == [m.sum((1, 2)).tolist() for m in wanted]
        assert not all(torch.equal(a, b) for a, b in zip(drawn, wanted))


@pytest.mark.parametrize("rows", ["all", "pos", "neg", "subneg"])
@pytest.mark.parametrize("source", ["teacher", "student"])
def test_defeats_rows_and_proposals(rows, source, teachers, pictures):
    student, teacher = model("faster_rcnn").train(), teachers["faster_rcnn"]
    images, targets = pictures
    with torch.no_grad():  # a random teacher's proposals as objects, so that some rows are foreground
        boxes = teacher.proposals(teacher.features(images))
    targets = [{"boxes": b[:2].clone(), "labels": torch.tensor([1, 2])} for b in boxes]
    distil = distillation(f"defeat:neck=false,rows={rows},proposals={source}", student, teacher)
    with torch.no_grad():
        step = distil.step(student, images, targets)
        (recipe,) = distil.recipes
        found = distil(step)
        given = step.rows(source)
        inside = given.foreground
        sharp, flat = (kl(given.student_logits, given.teacher_logits, t) for t in (3.0, 1.0))
        positive = 0.05 * (sharp * inside).sum() / max(1, int(inside.sum()))
        recipe.random.manual_seed(3)
        weight = recipe._sampled(inside) if rows == "subneg" else torch.ones(len(inside))
    negative = 2 * (flat * weight * ~inside).sum() / max(1, int((~inside).sum()))
    wanted = {"all": positive + negative, "pos": positive, "neg": negative, "subneg": positive + negative}[rows]
    assert math.isclose(float(found.total), float(wanted), rel_tol=1e-5)
    if rows == "subneg":
        assert int(((weight > 0) & ~inside).sum()) == min(max(1, int(inside.sum())), int((~inside).sum()))


@pytest.mark.parametrize(
    "key", ["classes=plain", "classes=hard", "boxes=l2", "boxes=none", "hint=plain", "hint_loss=l1"]
)
def test_chens_switches_change_what_they_say(key, teachers, pictures):
    student, teacher = model("faster_rcnn").train(), teachers["faster_rcnn"]
    with torch.no_grad():
        step = distillation("chen2017", student, teacher).step(student, *pictures)
        torch.manual_seed(0)
        usual = distillation("chen2017:margin=100", student, teacher)(step).terms
        torch.manual_seed(0)
        other = distillation(f"chen2017:margin=100,{key}", student, teacher)(step).terms
    same = {name for name in usual.keys() & other.keys() if torch.equal(usual[name], other[name])}
    changed = {name.removeprefix("chen2017/") for name in usual.keys() | other.keys()} - {
        name.removeprefix("chen2017/") for name in same
    }
    wanted = {
        "classes": {"soft_cross_entropy", "rpn_classes"},
        "boxes": {"bounded_regression", "rpn_boxes"} | ({"l2", "rpn_l2"} if key == "boxes=l2" else set()),
        "hint": {"masked_mse"},
        "hint_loss": {"masked_mse", "hint"},
    }[key.partition("=")[0]]
    assert changed == wanted
