"""Recipes together, with unlike detectors, and with their keys; and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("sklearn")
pytest.importorskip("torchvision")

from recipe_parts import distillation, kl, masked, model, pairs, pictures, taught, teachers  # noqa: F401

import kdkernels as kd
from kdkernels.harness import FrozenTeacher
from kdkernels.harness.detectors.rescaled import Rescaled
from kdkernels.harness.distill import Call, Distillation, grouped
from kdkernels.harness.ensemble import TeacherEnsemble
from kdkernels.harness.recipes import Setup, parse


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
