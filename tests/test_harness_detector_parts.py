"""Checkpoints from disk, parts from a teacher, and what a detector costs."""

from __future__ import annotations

import argparse
import copy
import re

import pytest
import torch

pytest.importorskip("torchvision")
import own_detector
from torch import nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn, retinanet_resnet50_fpn

from kdkernels.harness import detectors
from kdkernels.harness.detectors import build, freeze, inherit, load_weights
from kdkernels.harness.detectors.backbones import NarrowResNet
from kdkernels.harness.settings import DetectorSettings

KINDS = ("faster_rcnn", "retinanet", "fcos", "ssdlite")


def small(kind="faster_rcnn", seed=0, **settings):
    torch.manual_seed(seed)
    return build(DetectorSettings(**{"kind": kind, "width": 1 / 8, "channels": 32, "hidden": 16, **settings}))


# --- checkpoints


def save(state, path):
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        torch.save(state, path)
    return path


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("name", ("w.pth", "w.pt", "w.safetensors"))
@pytest.mark.parametrize("kind", ("faster_rcnn", "ssdlite"))
def test_weights_come_back_from_every_format(name, kind, tmp_path):
    first, second = small(kind), small(kind, seed=1)
    assert load_weights(second, save(first.state_dict(), tmp_path / name)) == ([], [], [])
    assert same(first.state_dict(), second.state_dict())


def test_weights_of_a_training_script_are_understood(tmp_path):
    """torchvision's references keep the model's state, their own arguments and the optimiser in one file."""
    first, second = small(), small(seed=1)
    state = {f"module.{name}": value for name, value in first.model.state_dict().items()}
    saved = {"model": state, "optimizer": {"state": {}}, "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    load_weights(second, save(saved, tmp_path / "checkpoint.pth"))
    assert same(first.state_dict(), second.state_dict())


def test_a_resnets_checkpoint_fills_the_backbone_alone(tmp_path):
    body, detector = NarrowResNet(18, 1 / 8), small("fcos")
    head = {name: value.clone() for name, value in detector.model.head.state_dict().items()}
    path = save({**body.state_dict(), "fc.weight": torch.zeros(10, 64), "fc.bias": torch.zeros(10)}, tmp_path / "r.pth")
    assert load_weights(detector, path) == ([], [], [])
    assert same(body.state_dict(), detector.parts["backbone"].state_dict())
    assert same(head, detector.model.head.state_dict())
    incomplete = save(dict(list(body.state_dict().items())[5:]), tmp_path / "part.pth")
    with pytest.raises(ValueError, match=r"5 missing \(model.backbone.body"):
        load_weights(detector, incomplete)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ("batch", "frozen"))
@pytest.mark.parametrize(
    ("kind", "make"), [("faster_rcnn", fasterrcnn_resnet50_fpn), ("retinanet", retinanet_resnet50_fpn)]
)
def test_torchvisions_own_detectors_load(kind, make, norm, tmp_path):
    """Also with the names that torchvision's released weights have, from before its blocks were renamed."""
    kind = "retinanet" if make is retinanet_resnet50_fpn else "faster_rcnn"
    settings = DetectorSettings(
        kind=kind, depth=50, width=1.0, norm=norm, classes=90, channels=256, hidden=1024, pooled=7,
        ratios=(0.5, 1.0, 2.0),
    )  # fmt: skip
    model, detector = make(weights=None, weights_backbone=None), build(settings)
    state = {}
    for name, value in model.state_dict().items():
        name = re.sub(r"(fpn.\w+_blocks.\d).0", r"\1", name)
        name = re.sub(r"(rpn.head.conv).0.0", r"\1", name)
        name = re.sub(r"(_head.conv).(\d).0", lambda found: f"{found[1]}.{2 * int(found[2])}", name)
        if not name.endswith("num_batches_tracked"):
            state[name] = value
    assert not state.keys() & {"backbone.fpn.inner_blocks.0.0.weight", "rpn.head.conv.0.0.weight"}
    load_weights(detector, save(state, tmp_path / "w.pth"))
    loaded = detector.model.state_dict()
    assert all(
        torch.equal(v, loaded[n]) for n, v in model.state_dict().items() if not n.endswith("num_batches_tracked")
    )


def _missing(state):
    del state["model.backbone.fpn.inner_blocks.0.0.bias"], state["model.roi_heads.box_head.fc6.weight"]


def _unexpected(state):
    state["model.mask_head.weight"] = torch.zeros(3)


def _other_shape(state):
    state["model.roi_heads.box_predictor.cls_score.bias"] = torch.zeros(91)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_missing, r"2 missing \(model.backbone.fpn.inner_blocks.0.0.bias, model.roi_heads.box_head.fc6.weight\)"),
        (_unexpected, r"1 unexpected \(model.mask_head.weight\)"),
        (_other_shape, r"1 of another shape \(model.roi_heads.box_predictor.cls_score.bias \(91,\) for \(11,\)\)"),
    ],
)
def test_weights_that_do_not_fit_are_named_or_left_out(change, message, tmp_path):
    first, second = small(), small(seed=1)
    state = first.state_dict()
    changed = copy.deepcopy(state)
    change(changed)
    path = save(changed, tmp_path / "w.pth")
    before = copy.deepcopy(second.state_dict())
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} does not fit.*{message}"):
        load_weights(second, path)
    assert same(before, second.state_dict()), "a refused file must not change the detector"
    left = load_weights(second, path, strict=False)
    assert [bool(names) for names in left] == [change is _missing, change is _unexpected, change is _other_shape]
    kept = {*left.missing, *left.mismatched}
    for name, value in second.state_dict().items():
        assert torch.equal(value, before[name] if name in kept else state[name]), name


class Code:
    """Unpickled, it would run code."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('code from a checkpoint was run')",))


@pytest.mark.parametrize("strict", (True, False))
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("none.pth", None),
        ("text.pth", b"no weights"),
        ("text.safetensors", b"no weights"),
        ("list.pth", [torch.zeros(1)]),
        ("empty.pth", {}),
        ("code.pth", {"model": Code()}),
        ("other.pth", {"a": torch.zeros(1), "b": torch.zeros(2)}),
    ],
)
def test_a_file_without_weights_is_refused_with_its_path(name, content, strict, tmp_path):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_weights(small(), path, strict=strict)


# --- parts


def test_inherited_parts_are_the_teachers_where_shapes_agree():
    teacher, student = small("retinanet", width=1 / 4), small("retinanet", seed=1)
    teacher.parts["fpn"].extra_blocks.p6.bias.data.fill_(0.5)
    before = copy.deepcopy(student.state_dict())
    copied = inherit(student, teacher, ["fpn", "head"])
    assert "fpn.extra_blocks.p6.bias" in copied and "head.regression_head.bbox_reg.weight" in copied
    assert "fpn.inner_blocks.0.0.weight" not in copied, "the stages below differ in width"
    assert same(teacher.model.head.state_dict(), student.model.head.state_dict())
    assert (student.parts["fpn"].extra_blocks.p6.bias == 0.5).all()
    assert same(
        {name: value for name, value in student.state_dict().items() if "backbone.body" in name},
        {name: value for name, value in before.items() if "backbone.body" in name},
    )
    student.parts["fpn"].extra_blocks.p6.bias.data.fill_(1.0)
    assert (teacher.parts["fpn"].extra_blocks.p6.bias == 0.5).all(), "copied, not shared"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["rpn"], "the student has no part 'rpn'; it has backbone, fpn, head"),
        ([""], "no part ''"),
        (["head", "backbone"], "part 'backbone': no tensor"),
    ],
)
def test_parts_that_cannot_be_inherited_are_named(parts, message):
    teacher, student = small("retinanet", width=1 / 4), small("retinanet", seed=1)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(ValueError, match=message):
        inherit(student, teacher, parts)
    assert same(before, student.state_dict()), "all or nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_parts_and_all_of_them_cover_it(kind):
    detector = small(kind)
    covered = {id(p) for part in detector.parts.values() for p in part.parameters()}
    assert covered == {id(p) for p in detector.parameters()}
    own = own_detector.build(classes=3, image_size=64)
    assert inherit(own, own_detector.build(classes=4, image_size=64), ["blocks.0"])[0] == "blocks.0.0.weight"


def test_frozen_parts_stay_as_they_are():
    detector = small("fcos")
    names = freeze(detector, ["backbone"])
    assert names and all(name.startswith("model.backbone.body.") for name in names)
    assert not any(p.requires_grad for p in detector.parts["backbone"].parameters())
    for one in (detector, copy.deepcopy(detector)):
        one.train()
        before = copy.deepcopy(one.parts["backbone"].state_dict())
        loss = sum(level.square().mean() for level in one.features(torch.rand(2, 3, 64, 64)).values())
        loss.backward()
        assert same(before, one.parts["backbone"].state_dict()), "BatchNorm's statistics moved"
        assert one.parts["fpn"].inner_blocks[0][0].weight.grad is not None
        norms = [m for m in one.modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms and not any(norm.training for norm in norms) and one.model.head.training
    with pytest.raises(ValueError, match="the student has no part 'neck'; it has backbone, fpn, head"):
        freeze(detector, ["neck"])


# --- what it costs


class OneConvolution(nn.Module):
    """A detector of one convolution, whose operations can be counted by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 5, 3, padding=1)

    def detect(self, images):
        assert not self.training and not torch.is_grad_enabled() and images.shape == (1, 3, 32, 64)
        self.convolution(images)


def test_operations_are_counted_as_two_per_multiply_add():
    detector = OneConvolution().train()
    found = detectors.cost(detector, (32, 64), repeats=1)
    assert found.parameters == 3 * 5 * 9 + 5 and detector.training
    assert found.gflops == pytest.approx(2 * 3 * 5 * 9 * 32 * 64 / 1e9)
    assert found.milliseconds > 0
    with pytest.raises(ValueError, match="repeats"):
        detectors.cost(detector, 32, repeats=0)


def test_a_wider_detector_costs_more():
    narrow, wide = (detectors.cost(small("retinanet", width=w), 64, repeats=1) for w in (1 / 8, 1 / 4))
    assert wide.parameters > narrow.parameters and wide.gflops > narrow.gflops > 0
