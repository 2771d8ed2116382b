"""A step of distillation: adapter, the teacher's proposals through both heads, and where gradients go."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sklearn")
box_iou = pytest.importorskip("torchvision.ops").box_iou

from harness_parts import SMALL, batch, detector  # noqa: E402
from torchvision.models.detection._utils import BoxCoder  # noqa: E402

from kdkernels.harness import Adapter, FrozenTeacher, data, shared_proposals, split  # noqa: E402
from kdkernels.harness.detectors import Detector  # noqa: E402
from kdkernels.harness.distill import Distillation, distilled  # noqa: E402
from kdkernels.harness.proposals import encode, gather_deltas  # noqa: E402
from kdkernels.harness.recipes import Setup, parse  # noqa: E402
from kdkernels.harness.settings import KdSettings, TrainSettings  # noqa: E402


@pytest.fixture(scope="module")
def scene_batch():
    return batch(3)


def shared(student, teacher, images, targets, **keywords):
    teacher = FrozenTeacher(teacher)
    rows = shared_proposals(student, teacher, student.features(images), teacher.features(images), targets, **keywords)
    return rows, teacher


# --- adapter


def test_adapter_only_where_channels_differ():
    adapter = Adapter((8, 16), 16)
    features = {"a": torch.rand(1, 8, 4, 4), "b": torch.rand(1, 16, 2, 2)}
    adapted = adapter(features)
    assert list(adapted) == ["a", "b"] and adapted["a"].shape == (1, 16, 4, 4)
    assert adapted["b"] is features["b"]
    assert {name for name, _ in adapter.named_parameters()} == {"levels.0.weight", "levels.0.bias"}


def test_adapter_between_equal_pyramids_is_nothing_unless_asked():
    assert not list(Adapter(8, 8, 3).parameters())
    always = Adapter(8, 8, 3, always=True)
    assert len(list(always.parameters())) == 6
    assert isinstance(always([torch.rand(1, 8, 2, 2)] * 3), list)


def test_adapter_refuses_levels_that_disagree():
    with pytest.raises(ValueError, match="levels"):
        Adapter((8, 8), (16, 16, 16))
    with pytest.raises(ValueError, match="levels"):
        Adapter(8, 16)
    with pytest.raises(ValueError, match="2 levels"):
        Adapter(8, 16, 3)([torch.rand(1, 8, 2, 2)] * 2)


# --- shared proposals


def test_detectors_follow_the_protocol():
    assert isinstance(detector(), Detector)


def test_rows_are_the_same_boxes_in_every_field(scene_batch):
    images, targets = scene_batch
    teacher, student = detector(width=0.5).eval(), detector(seed=1).train()
    rows, frozen = shared(student, teacher, images, targets)
    wanted = frozen.proposals(frozen.features(images))
    count = sum(len(boxes) for boxes in wanted)
    assert count > 0 and [len(boxes) for boxes in rows.proposals] == [len(boxes) for boxes in wanted]
    assert rows.student_logits.shape == rows.teacher_logits.shape == (count, 11)
    for deltas in (rows.student_deltas, rows.teacher_deltas, rows.target_deltas):
        assert deltas.shape == (count, 4)
    assert rows.labels.shape == (count,) and rows.foreground.dtype == torch.bool
    begin = 0
    for boxes, target in zip(wanted, targets, strict=True):
        overlap, index = box_iou(boxes, target["boxes"]).max(1)
        labels = rows.labels[begin : begin + len(boxes)]
        assert torch.equal(labels, torch.where(overlap >= 0.5, target["labels"][index], 0))
        coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
        for row in torch.nonzero(labels).flatten().tolist():
            decoded = coder.decode(rows.target_deltas[begin + row][None], [boxes[row][None]]).flatten()
            torch.testing.assert_close(decoded, target["boxes"][index[row]], atol=1e-3, rtol=0)
        begin += len(boxes)
    assert (rows.target_deltas[~rows.foreground] == 0).all()
    assert rows.student_logits.requires_grad and rows.student_deltas.requires_grad
    assert not rows.teacher_logits.requires_grad and not rows.teacher_deltas.requires_grad


def test_equal_detectors_give_equal_rows(scene_batch):
    """Any shift between student's and teacher's rows would show here, foreground rows included."""
    images, targets = scene_batch
    student, teacher = detector().eval(), detector().eval()
    own = FrozenTeacher(teacher)
    boxes = own.proposals(own.features(images))
    targets = [{"boxes": b[:2].clone(), "labels": torch.tensor([3, 9])} for b in boxes]
    rows, _ = shared(student, teacher, images, targets)
    assert rows.foreground.sum() >= 6
    assert torch.equal(rows.student_logits, rows.teacher_logits)
    assert torch.equal(rows.student_deltas, rows.teacher_deltas)


def test_pictures_without_objects_and_limit(scene_batch):
    images, targets = scene_batch
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    rows, _ = shared(detector(), detector(width=0.5), images, [empty, *targets[1:]], limit=10)
    assert [len(boxes) for boxes in rows.proposals] == [10, 10, 10]
    assert (rows.labels[:10] == 0).all() and (rows.target_deltas[:10] == 0).all()


def test_deltas_are_those_of_the_rows_label():
    deltas = torch.arange(2 * 12.0).reshape(2, 12)
    assert gather_deltas(deltas, torch.tensor([0, 2])).tolist() == [[0, 1, 2, 3], [20, 21, 22, 23]]
    agnostic = torch.rand(2, 4)
    assert gather_deltas(agnostic, torch.tensor([0, 2])) is agnostic


def test_encode_is_what_torchvision_decodes():
    torch.manual_seed(0)
    boxes, truth = (torch.cat([xy, xy + 5 + 50 * torch.rand(20, 2)], 1) for xy in torch.rand(2, 20, 2) * 100)
    weights = (10.0, 10.0, 5.0, 5.0)
    decoded = BoxCoder(weights).decode(encode(boxes, truth, weights), [boxes]).squeeze(1)
    torch.testing.assert_close(decoded, truth, atol=1e-3, rtol=0)


def test_different_classes_are_refused(scene_batch):
    images, targets = scene_batch
    with pytest.raises(ValueError, match="same classes"):
        shared(detector(classes=5), detector(width=0.5), images, targets)
    with pytest.raises(ValueError, match="targets"):
        shared(detector(), detector(width=0.5), images, targets[:2])


# --- the step


def distillation_of(student, teacher, recipe="combined"):
    kind = parse(recipe, "scenes")
    return Distillation([kind.build(Setup(student, teacher))], FrozenTeacher(teacher), base_size=16, limit=64)


def test_gradient_reaches_every_part_of_the_student_and_nothing_of_the_teacher(scene_batch):
    images, targets = scene_batch
    teacher, student = detector(width=0.5), detector(channels=32).train()
    distillation = distillation_of(student, teacher)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    losses, told, noted, task = distilled(student, distillation)(images, targets, 0)
    assert all(torch.isfinite(loss) for loss in [*losses.values(), *told.values()])
    assert {name.partition("/")[0] for name in losses} == {"task", "distill"} and len(losses) == 5
    assert len(told) == 4 and torch.allclose(sum(told.values()), losses["distill"].detach())
    assert torch.allclose(task, sum(value.detach() for name, value in losses.items() if name != "distill"))
    assert "combined/masked_mse/foreground" in noted and "combined/pearson/P2" in noted
    sum(losses.values()).backward()
    for name, parameter in [*student.named_parameters(), *distillation.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert not any(parameter.grad is not None for parameter in teacher.parameters())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("loss", "parts"),
    [
        ("pearson", ("backbone",)),
        ("masked_mse", ("backbone",)),
        ("decoupled_kl", ("backbone", "box_head", "cls_score")),
        ("bounded_regression", ("backbone", "box_head", "bbox_pred")),
    ],
)
def test_each_distillation_loss_alone_reaches_its_parts(scene_batch, loss, parts):
    images, _ = scene_batch
    student = detector().train()
    distillation = distillation_of(student, detector(width=0.5))
    # The teacher's own proposals as objects: some rows are foreground whatever a random teacher proposes.
    boxes = distillation.teacher.proposals(distillation.teacher.features(images))
    targets = [{"boxes": b[:3].clone(), "labels": torch.tensor([1, 2, 3])} for b in boxes]
    (recipe,) = distillation.recipes
    recipe.terms = {loss: recipe.terms[loss]}
    result = distillation(distillation.step(student, images, targets))
    assert set(result.terms) == {f"combined/{loss}"}
    result.total.backward()
    touched = [name for name, p in student.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    for part in parts:
        assert any(part in name for name in touched), part


def test_a_batch_without_objects_trains(scene_batch):
    images, targets = scene_batch
    student = detector().train()
    distillation = distillation_of(student, detector(width=0.5))
    empty = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)} for _ in targets]
    losses, told, *_ = distilled(student, distillation)(images, empty, 0)
    total = sum(losses.values())
    total.backward()
    assert torch.isfinite(total) and told["distill/combined/bounded_regression"] == 0


def test_features_are_computed_once_per_step(scene_batch, monkeypatch):
    images, targets = scene_batch
    student, teacher = detector().train(), detector(width=0.5)
    for recipe in ("combined", "defeat:backbone=true"):
        distillation = distillation_of(student, teacher, recipe)
        calls = []
        for name, module in (("student", student.model.backbone.body), ("teacher", teacher.model.backbone.body)):
            forward = type(module).forward
            monkeypatch.setattr(
                module, "forward", lambda x, name=name, m=module, f=forward, calls=calls: calls.append(name) or f(m, x)
            )
        distilled(student, distillation)(images, targets, 0)
        assert sorted(calls) == ["student", "teacher"]


def test_a_second_batch_without_labels_is_taught_by_the_teacher(scene_batch):
    images, targets = scene_batch
    student, teacher = detector().train(), detector(width=0.5)
    recipe = parse("soft-labels").build(Setup(student, teacher, unlabeled=True))
    distillation = Distillation([recipe], FrozenTeacher(teacher), base_size=16, limit=16)
    asked = []
    objective = distilled(student, distillation, unlabeled=lambda index: asked.append(index) or images)
    losses, told, *_ = objective(images, targets, 0)
    assert len(asked) == 1 and len(losses) == 5
    assert {name.rpartition("/")[2] for name in told} == {
        "soft_cross_entropy", "bounded_regression", "rpn_classes", "rpn_boxes"
    }  # fmt: skip
    torch.testing.assert_close(sum(told.values()), losses["distill"].detach())


def test_gradient_norms_are_recorded_every_so_many_steps(scene_batch):
    images, targets = scene_batch
    student = detector().train()
    objective = distilled(student, distillation_of(student, detector(width=0.5)), norms_every=2)
    noted = [objective(images, targets, index).noted for index in range(3)]
    names = {f"gradient norm at the features/combined/{term}" for term in ("pearson", "masked_mse")}
    assert names <= set(noted[0]) and names <= set(noted[2]) and not names & set(noted[1])
    assert all(noted[0][name] > 0 for name in names)


@pytest.mark.parametrize("recipe", ["combined", "defeat:backbone=true,adapter=true", "hinton", "chen2017"])
def test_split_measures_every_part_and_leaves_no_trace(recipe):
    pictures = data.ScenePictures(SMALL, "train")
    student = detector().train()
    distillation = distillation_of(student, detector(width=0.5), recipe)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    settings = TrainSettings(batch_size=2)
    parts = split.measure(student, distillation, pictures, settings, torch.device("cpu"), steps=1)
    times = {"teacher", "student", "losses", "separate", "distilled", "alone"}
    assert parts.keys() == times | {"memory", "memory_alone"} and all(value > 0 for value in parts.values())
    assert parts["memory"] > parts["memory_alone"]
    assert all(parameter.grad is None for parameter in student.parameters())
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_split_of_a_frozen_student_that_ends_its_distillation_early():
    """Memory is of a step that distils; a step alone trains what only this student has frozen."""
    pictures, student = data.ScenePictures(SMALL, "train"), detector().train()
    distillation = distillation_of(student, detector(width=0.5))
    distillation.schedule, distillation.steps = KdSettings(stop=1), 10
    how = (pictures, TrainSettings(batch_size=2), torch.device("cpu"))
    frozen = list(student.parameters())[:-4]
    for parameter in frozen:
        parameter.requires_grad_(False)
    still = split.measure(student, distillation, *how, steps=2)
    parts = split.measure(student, distillation, *how, steps=2, frozen=frozen)
    assert parts["memory_alone"] > 1.2 * still["memory_alone"]
    assert still["memory"] > 1.2 * still["memory_alone"]
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in frozen)


@pytest.mark.parametrize("recipe", ["combined", "defeat:backbone=true,adapter=true", "hinton"])
def test_split_steps_with_the_same_gradient(scene_batch, recipe):
    """The losses cut off the graph and joined again are the step that training takes."""
    images, targets = scene_batch
    teacher = detector(width=0.5)
    gradients = []
    for cut in (False, True):
        student = detector(channels=32).train()
        distillation = distillation_of(student, teacher, recipe)
        torch.manual_seed(5)
        for parameter in distillation.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        keys = split._asked_for(student, distillation, images, targets)
        torch.manual_seed(6)
        if cut:
            timed = split._TimedTeacher(distillation.teacher, lambda: 0.0)
            split._step(student, distillation, timed, images, targets, keys)
        else:
            sum(distilled(student, distillation)(images, targets, 0).summed.values()).backward()
        gradients.append([p.grad for p in [*student.parameters(), *distillation.parameters()]])
    for joined, whole in zip(gradients[1], gradients[0], strict=True):
        # the same sums in another order
        assert (joined - whole).abs().max() <= 1e-4 * whole.abs().max()
