"""Backbones and settings, the choice of a detector by a text, and a detector of one's own."""

from __future__ import annotations

import re
import sys

import pytest
import torch

pytest.importorskip("torchvision")
import own_detector
from torchvision import models

from kdkernels.harness import detectors
from kdkernels.harness.detectors import build, load_model, parse, settings_of
from kdkernels.harness.detectors.backbones import NarrowResNet
from kdkernels.harness.settings import DetectorSettings

KINDS = ("faster_rcnn", "retinanet", "fcos", "ssdlite")


def small(kind="faster_rcnn", seed=0, **settings):
    torch.manual_seed(seed)
    return build(DetectorSettings(**{"kind": kind, "width": 1 / 8, "channels": 32, "hidden": 16, **settings}))


# --- backbones


@pytest.mark.parametrize("depth", (18, 50))
@pytest.mark.parametrize("norm", ("batch", "frozen"))
def test_a_full_width_resnet_is_torchvisions(depth, norm):
    with torch.device("meta"):
        mine = NarrowResNet(depth, 1.0, norm).state_dict()
        theirs = getattr(models, f"resnet{depth}")(weights=None).state_dict()
    wanted = {name: value.shape for name, value in theirs.items() if not name.startswith("fc.")}
    if norm == "frozen":
        wanted = {name: shape for name, shape in wanted.items() if not name.endswith("num_batches_tracked")}
    assert {name: value.shape for name, value in mine.items()} == wanted


@pytest.mark.parametrize("depth", (34, 101, 152))
def test_other_depths_are_torchvisions(depth):
    with torch.device("meta"):
        mine = NarrowResNet(depth, 1.0).state_dict()
        theirs = getattr(models, f"resnet{depth}")(weights=None).state_dict()
    assert [*mine, "fc.weight", "fc.bias"] == list(theirs)
    assert all(value.shape == theirs[name].shape for name, value in mine.items())


def test_width_and_norm():
    quarter = NarrowResNet(50, 0.25)
    assert quarter.stage_channels == [64, 128, 256, 512] and quarter.conv1.out_channels == 16
    frozen = NarrowResNet(18, 1 / 8, "frozen")
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in frozen.modules())
    assert all("bn" not in name and "downsample.1" not in name for name, _ in frozen.named_parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "yolo"}, "kind must be one of.*'yolo'"),
        ({"depth": 20}, "depth must be one of"),
        ({"kind": "ssdlite", "norm": "group"}, "norm must be one of"),
        ({"width": 0.0}, "width"),
        ({"kind": "retinanet", "channels": 0}, "channels"),
        ({"kind": "fcos", "channels": 48}, "channels must be a multiple of 32.*48"),
        ({"classes": 0}, "classes"),
        ({"image_size": 100}, "image_size"),
    ],
)
def test_settings_that_cannot_be_built_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        build(DetectorSettings(**settings))


def test_anchors_and_ranges_scale_with_the_pictures():
    for kind in KINDS[:3]:
        sizes = []
        for image_size in (160, 320):
            model = small(kind, image_size=image_size).model
            sizes.append((model.rpn if kind == "faster_rcnn" else model).anchor_generator.sizes)
        assert len(sizes[0]) == 5
        for level, twice in zip(*sizes, strict=True):
            assert all(abs(2 * side - double) <= 1 for side, double in zip(level, twice, strict=True))
    assert small("fcos").model.anchor_generator.sizes == ((4,), (8,), (16,), (32,), (64,))


# --- by a text


def test_a_text_becomes_settings_of_the_right_types():
    text = "retinanet:depth=50,width=0.25,channels=256,norm=frozen,anchors=8/16/32/64/128,ratios=0.5/1/2"
    assert parse(text) == {
        "kind": "retinanet", "depth": 50, "width": 0.25, "channels": 256, "norm": "frozen",
        "anchors": (8, 16, 32, 64, 128), "ratios": (0.5, 1.0, 2.0),
    }  # fmt: skip
    assert parse("ssdlite") == {"kind": "ssdlite"}
    base = DetectorSettings(width=0.5, hidden=7)
    wanted = DetectorSettings(kind="fcos", width=0.5, hidden=7, depth=34, classes=3, image_size=320)
    assert settings_of("fcos:depth=34", base=base, classes=3, image_size=320) == wanted
    assert settings_of("fcos:depth=34", depth=50).depth == 50
    assert settings_of("own_detector:build") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("retinant", "unknown kind 'retinant' (did you mean 'retinanet'?)"),
        ("", "unknown kind ''"),
        ("fcos:depth", "'depth' is not name=value"),
        ("fcos:dept=50", "fcos has no 'dept' (did you mean 'depth'?)"),
        ("ssdlite:depth=50", "ssdlite has no 'depth'; it has width"),
        ("fcos:depth=fifty", "depth must be of type int, got 'fifty'"),
        ("fcos:width=-1", "width must be a positive number"),
        ("fcos:width=nan", "width must be a positive number"),
        ("fcos:depth=18,depth=50", "depth is given twice"),
        ("retinanet:anchors=8/16", "anchors needs 5 numbers"),
        ("retinanet:anchors=8/16/0/1/2", "anchors must be positive"),
        ("fcos:depth=19", "depth must be one of"),
        ("fcos:channels=40", "channels must be a multiple of 32"),
        ("no_such_module_at_all:build", "cannot be imported"),
        ("own_detector:no_such_name", "own_detector has no 'no_such_name'"),
        ("own_detector:block", "cannot be called with classes=... and image_size=..."),
        ("torch:nn.Module", "unknown kind 'torch'"),
        ("builders:number", "'builders:number' gave a int; a detector is an nn.Module"),
        ("builders:half", "gave a Half without channels, losses, detect; a detector has strides, channels"),
        ("builders:levels", "strides and channels must name the same levels"),
    ],
)
def test_a_text_that_names_no_detector_is_told_why(text, message, tmp_path, monkeypatch):
    (tmp_path / "builders.py").write_text(
        "import own_detector\nfrom torch import nn\n"
        "class Half(nn.Module):\n    strides = {}\n    def features(self, images): pass\n"
        "def number(classes, image_size): return 3\n"
        "def half(classes, image_size): return Half()\n"
        "def levels(**sizes):\n    d = own_detector.build(**sizes)\n    d.channels = {'other': 1}\n    return d\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "builders", raising=False)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_model(text, classes=10, image_size=160)
    assert repr(text) in str(error.value)


def test_models_by_text_and_what_they_are():
    detector = load_model("fcos:width=0.125,channels=32", classes=4, image_size=96)
    assert type(detector) is detectors.TorchvisionFCOS
    assert detector.model.head.classification_head.num_classes == 5
    assert type(load_model("own_detector:build", classes=4, image_size=96)) is own_detector.OwnDetector
    with pytest.raises(AttributeError, match="TorchvisionYOLO"):
        _ = detectors.TorchvisionYOLO


def test_without_torchvision_a_text_is_read_and_building_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert settings_of("fcos:depth=50").depth == 50
    with pytest.raises(ImportError, match=r"kdkernels\[train\]"):
        build(DetectorSettings())
    with pytest.raises(ImportError, match=r"kdkernels\[train\]"):
        _ = detectors.TorchvisionFCOS


# --- one's own


def scene():
    images = torch.full((2, 3, 64, 96), 0.5)
    boxes = torch.tensor([[[8.0, 8.0, 30.0, 28.0]], [[40.0, 12.0, 88.0, 60.0]]])
    for picture, (box,) in zip(images, boxes.int().tolist(), strict=True):
        picture[:, box[1] : box[3], box[0] : box[2]] = 1.0
    return images, [{"boxes": box, "labels": torch.tensor([label])} for box, label in zip(boxes, (1, 3), strict=True)]


def test_ones_own_detector_learns_and_detects():
    torch.manual_seed(0)
    detector = load_model("own_detector:build", classes=3, image_size=64).train()
    assert isinstance(detector, detectors.Detector) and isinstance(detector, detectors.HasDense)
    assert not isinstance(detector, detectors.HasProposals)
    images, targets = scene()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=5e-3)
    losses = []
    for _ in range(60):
        loss = sum(detector.losses(detector.features(images), targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    for found, target in zip(detector.eval().detect(images), targets, strict=True):
        assert found["labels"][0] == target["labels"][0] and found["scores"][0] > 0.5
        torch.testing.assert_close(found["boxes"][:1], target["boxes"], atol=4.0, rtol=0)


def test_ones_own_detector_keeps_the_order_of_its_cells():
    detector = own_detector.build(classes=3, image_size=64)
    images, targets = scene()
    features = detector.features(images)
    dense, anchors = detector.dense(features), torch.cat(detector.anchors(features))
    labels, deltas = detector.matched(features, targets)
    assert dense.logits.shape == (2, len(anchors), 3) and dense.grids == [(8, 12, 1), (4, 6, 1), (2, 3, 1)]
    assert set(labels[0].tolist()) == {0, 1} and set(labels[1].tolist()) == {0, 3}
    for picture, target in enumerate(targets):
        inside = labels[picture] > 0
        centres, stride = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
        found = deltas[picture] * stride.repeat(1, 2)
        boxes = torch.cat([centres - found[:, :2], centres + found[:, 2:]], 1)[inside]
        torch.testing.assert_close(boxes, target["boxes"].expand_as(boxes))
    empty = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}] * 2
    assert all(torch.isfinite(loss) for loss in detector.losses(features, empty).values())
    assert not detector.matched(features, empty).labels.any()
