"""FrozenTeacher's promises, and the teachers kept on disk."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from kdkernels.harness.cache import TeacherCache, default_folder, key_of
from kdkernels.harness.teacher import FrozenTeacher


class Net(nn.Module):
    """All that could go wrong in a teacher: BatchNorm, dropout, a buffer, a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.out = nn.Linear(4, 2)

    def features(self, images):
        return {"0": self.body(images)}

    def proposals(self, features):
        return [level.mean() * torch.ones(2, 4) for level in features["0"]]

    def head(self, features, proposals):
        return self.out(features["0"].mean((2, 3))), torch.stack([p[0] for p in proposals])

    def detect(self, images):
        return [{"boxes": p} for p in self.proposals(self.features(images))]

    def forward(self, images):
        return self.body(images)


class Student(nn.Module):
    def __init__(self, teacher) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)
        self.teacher = FrozenTeacher(teacher)


@pytest.fixture
def images():
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()


def test_eval_is_held_through_train(images):
    teacher = Net()
    student = Student(teacher)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    first = student.teacher.features(images)["0"]
    for break_it in (student.train, student.teacher.train, teacher.train, teacher.body[1].train, teacher.body[2].train):
        break_it()
        assert torch.equal(student.teacher.features(images)["0"], first), "BatchNorm or dropout moved"
        assert not any(module.training for module in teacher.modules())
    assert student.training and student.net.training
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_nothing_has_a_gradient(images):
    frozen = FrozenTeacher(Net())
    features = frozen.features(images)
    logits, deltas = frozen.head(features, frozen.proposals(features))
    for out in (features["0"], logits, deltas, frozen(images), frozen.detect(images)[0]["boxes"]):
        assert not out.requires_grad and out.grad_fn is None
    assert not any(parameter.requires_grad for parameter in frozen.detector.parameters())
    assert torch.is_grad_enabled()


def test_it_is_invisible_to_whoever_holds_it():
    student = Student(Net())
    assert set(student.state_dict()) == {"net.weight", "net.bias"}
    assert {name for name, _ in student.named_parameters()} == {"net.weight", "net.bias"}
    assert not list(student.teacher.parameters()) and not list(student.teacher.buffers())
    assert not any(isinstance(module, Net) for module in student.modules())
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0, weight_decay=1.0)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2
    # a checkpoint of a student without a teacher loads into one with it, strictly
    student.load_state_dict({"net.weight": torch.zeros(2, 2), "net.bias": torch.zeros(2)}, strict=True)
    # an initialisation applied to the student leaves the teacher alone
    weight = student.teacher.detector.out.weight.clone()
    student.apply(lambda module: [nn.init.zeros_(p) for p in module.parameters(recurse=False)])
    assert torch.equal(student.teacher.detector.out.weight, weight)


def test_it_moves_with_the_student_and_is_copied_with_it(images):
    student = Student(Net()).double()
    assert {p.dtype for p in student.teacher.detector.parameters()} == {torch.float64}
    other = copy.deepcopy(student)
    assert other.teacher.detector is not student.teacher.detector
    images = images.double()
    assert torch.equal(other.teacher(images), student.teacher(images))


def test_only_a_module_can_be_a_teacher():
    with pytest.raises(TypeError, match=r"nn\.Module"):
        FrozenTeacher(lambda images: images)


def test_key_depends_on_every_setting_and_on_no_order():
    settings = {"data": {"seed": 0, "sizes": (1, 2)}, "training": {"lr": 2e-3}}
    assert key_of(settings) == key_of(dict(reversed(settings.items())))
    assert key_of(settings) != key_of({**settings, "training": {"lr": 1e-3}})
    assert key_of(settings) != key_of({**settings, "data": {"seed": 1, "sizes": (1, 2)}})


def test_cache_gives_back_what_it_was_given(tmp_path):
    cache, key = TeacherCache(tmp_path / "new" / "folder"), key_of({"a": 1})
    net, other = Net(), Net()
    assert cache.load(key, other) is None
    path = cache.save(key, net, {"steps": 4, "scores": [(1, 2.0)]})
    assert cache.load(key, other) == {"steps": 4, "scores": [(1, 2.0)]}
    for name, value in net.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    assert [entry.name for entry in path.parent.iterdir()] == [f"{key}.pt"], "no temporary file is left"


def _truncated(path, key):
    path.write_bytes(path.read_bytes()[:-200])


def _no_file_of_torch(path, key):
    path.write_bytes(b"\x00" * 100)


def _other_key(path, key):
    torch.save({"key": "0" * 16, "state": Net().state_dict(), "record": {}}, path)


def _other_detector(path, key):
    torch.save({"key": key, "state": nn.Linear(2, 2).state_dict(), "record": {}}, path)


def _not_finite(path, key):
    state = Net().state_dict()
    state["out.bias"].fill_(float("nan"))
    torch.save({"key": key, "state": state, "record": {}}, path)


class Code:
    """Unpickled, it would run code."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('code from a cache file was run')",))


def _code(path, key):
    torch.save({"key": key, "state": Net().state_dict(), "record": Code()}, path)


@pytest.mark.parametrize(
    "damage", [_truncated, _no_file_of_torch, _other_key, _other_detector, _not_finite, _code], ids=lambda f: f.__name__
)
def test_a_damaged_cache_file_is_refused_with_its_path(tmp_path, damage):
    cache, key = TeacherCache(tmp_path), key_of({"a": 1})
    path = cache.save(key, Net(), {})
    damage(path, key)
    net = Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=str(path)):
        cache.load(key, net)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), "a refused file must not change the detector"


def test_default_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "kdkernels" / "teachers"
