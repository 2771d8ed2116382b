"""torchvision's detectors behind the protocol are equal to torchvision's own."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("torchvision")
from torchvision.ops import box_iou

from kdkernels.harness import detectors as kinds
from kdkernels.harness.detectors import HasDense, HasProposals, HasStages, build
from kdkernels.harness.settings import DetectorSettings

KINDS = ("faster_rcnn", "retinanet", "fcos", "ssdlite")
each_kind = pytest.mark.parametrize("kind", KINDS)
#: Neither side is a multiple of 64 or 128: the coarse levels are rounded up.
SIZE = (96, 160)


def small(kind, seed=0, **settings):
    torch.manual_seed(seed)
    return build(DetectorSettings(**{"kind": kind, "width": 1 / 8, "channels": 32, "hidden": 16, **settings}))


def lively(kind, **settings):
    """Random, but with detections: untrained heads of torchvision find nothing at all."""
    detector = small(kind, **settings)
    if kind in ("retinanet", "fcos"):
        head = detector.model.head.classification_head.cls_logits
        with torch.no_grad():
            head.weight.normal_(std=0.3)
            head.bias.fill_(-1.0)
            head.bias.view(-1, 11)[:, 0] = -100.0  # column 0 stands for nothing, which torchvision's own does not know
    return detector


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def targets():
    boxes = torch.tensor([[10.0, 10.0, 40.0, 52.0], [60.0, 20.0, 150.0, 90.0], [100.0, 4.0, 117.0, 20.0]])
    first = {"boxes": boxes, "labels": torch.tensor([1, 10, 4])}
    return [first, {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}]


def own(detector):
    """torchvision's model, whose transform is left nothing but to normalise."""
    model = copy.deepcopy(detector.model)
    model.transform.resize = lambda image, target=None: (image, target)
    return model


# --- equal to torchvision's own


@each_kind
def test_losses_are_the_models_own(kind, images, targets):
    detector = small(kind).train()
    model = own(detector)
    torch.manual_seed(5)  # the samplers of Faster R-CNN draw
    wanted = model(list(images), copy.deepcopy(targets))
    torch.manual_seed(5)
    losses = detector.losses(detector.features(images), targets)
    assert losses.keys() == wanted.keys() and len(losses) >= 2
    for name in losses:
        torch.testing.assert_close(losses[name], wanted[name], rtol=1e-5, atol=0)
        assert losses[name] > 0
    sum(losses.values()).backward()
    sum(wanted.values()).backward()
    for (name, mine), theirs in zip(detector.model.named_parameters(), model.parameters(), strict=True):
        assert mine.grad is not None, name
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5 * float(theirs.grad.abs().max()))


@each_kind
def test_detections_are_the_models_own(kind, images):
    detector = lively(kind).eval()
    model = own(detector).eval()
    with torch.no_grad():
        wanted = model(list(images))
    found = detector.detect(images)
    assert len(found) == 2 and all(len(one["labels"]) > 5 for one in found)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.keys() == theirs.keys() and mine["labels"].min() >= 1
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-5, atol=1e-4)


@each_kind
def test_dense_is_what_the_models_own_head_says(kind, images):
    detector = lively(kind).eval()
    features = detector.features(images)
    dense = detector.dense(features)
    levels = list(features.values())
    anchors = detector.anchors(features)
    assert [(h, w) for h, w, _ in dense.grids] == [tuple(level.shape[-2:]) for level in levels]
    assert [h * w * a for h, w, a in dense.grids] == [len(boxes) for boxes in anchors]
    count = sum(map(len, anchors))
    assert dense.deltas.shape == (2, count, 4) and dense.logits.shape[:2] == (2, count)
    assert dense.logits.requires_grad and dense.deltas.requires_grad
    assert (dense.quality is not None) == (kind == "fcos")
    assert dense.activation == ("softmax" if kind == "ssdlite" else "sigmoid")
    assert dense.logits.shape[2] == {"faster_rcnn": 1, "ssdlite": 11}.get(kind, 10)
    if kind == "faster_rcnn":
        maps, boxes = detector.model.rpn.head(levels)
    elif kind == "ssdlite":
        heads = detector.model.head.classification_head, detector.model.head.regression_head
        maps, boxes = ([layer(x) for layer, x in zip(head.module_list, levels, strict=True)] for head in heads)
    else:
        heads = detector.model.head.classification_head, detector.model.head.regression_head
        maps = [heads[0].cls_logits(heads[0].conv(x)) for x in levels]
        boxes = [heads[1].bbox_reg(heads[1].conv(x)) for x in levels]
        boxes = [level.relu() for level in boxes] if kind == "fcos" else boxes
    # one anchor of each level, addressed by its picture, cell and place in the cell
    begin = 0
    for (height, width, cell), scores, deltas in zip(dense.grids, maps, boxes, strict=True):
        y, x, a = height - 1, width // 2, cell - 1
        row = begin + (y * width + x) * cell + a
        classes = scores.shape[1] // cell
        wanted = scores[1, a * classes : (a + 1) * classes, y, x]
        torch.testing.assert_close(dense.logits[1, row], wanted[classes - dense.logits.shape[2] :])
        torch.testing.assert_close(dense.deltas[1, row], deltas[1, 4 * a : 4 * a + 4, y, x])
        begin += height * width * cell
    if kind == "fcos":
        cell = detector.model.head.regression_head
        assert torch.equal(dense.quality[1, -1], cell.bbox_ctrness(cell.conv(levels[-1]))[1, 0, -1, -1])


@each_kind
def test_anchors_are_the_models_own(kind, images):
    """As its own forward makes them for these pictures, though ``features`` alone are known here."""
    detector = small(kind).eval()
    model = own(detector).eval()
    generator = model.rpn.anchor_generator if kind == "faster_rcnn" else model.anchor_generator
    forward, seen = generator.forward, []
    generator.forward = lambda *arguments: seen.append(forward(*arguments)) or seen[-1]
    with torch.no_grad():
        model(list(images))
    features = detector.features(images)
    levels = detector.anchors(features)
    assert torch.equal(torch.cat(levels), seen[0][0]) and torch.equal(torch.cat(levels), seen[0][1])


@each_kind
def test_matched_deltas_lead_to_the_objects(kind, images, targets):
    detector = small(kind)
    features = detector.features(images)
    anchors = torch.cat(detector.anchors(features))
    labels, deltas = detector.matched(features, targets)
    assert labels.dtype == torch.int64 and labels.shape == (2, len(anchors)) and deltas.shape == (2, len(anchors), 4)
    assert not deltas.requires_grad and (labels[1] == 0).all() and (deltas[1] == 0).all()
    inside = labels[0] > 0
    assert (deltas[0][~inside] == 0).all() and torch.isfinite(deltas).all()
    wanted = {1} if kind == "faster_rcnn" else {1, 10, 4}
    assert set(labels[0][inside].tolist()) == wanted
    assert (labels == -1).any() == (kind in ("faster_rcnn", "retinanet"))
    coder = detector.model.rpn.box_coder if kind == "faster_rcnn" else detector.model.box_coder
    if kind == "fcos":
        boxes = coder.decode(deltas[0][inside], anchors[inside])
    else:
        boxes = coder.decode_single(deltas[0][inside], anchors[inside])
    overlap, index = box_iou(boxes, targets[0]["boxes"]).max(1)
    assert overlap.min() > 0.999
    if kind != "faster_rcnn":
        assert torch.equal(targets[0]["labels"][index], labels[0][inside])


@each_kind
def test_matched_is_what_the_models_own_loss_uses(kind, images, targets):
    """The box loss is 0 on deltas as ``matched`` gives them, and its gradient is where the labels are positive."""
    detector = small(kind)
    features = detector.features(images)
    labels, deltas = detector.matched(features, targets)
    given = deltas.clone().requires_grad_()
    if kind == "faster_rcnn":
        rpn = detector.model.rpn
        rpn.fg_bg_sampler.batch_size_per_image = 10**6  # every anchor that is trained on
        flat, wanted = labels.flatten().float(), deltas.reshape(-1, 4)
        logits = torch.zeros(len(flat), 1, requires_grad=True)
        _, loss = rpn.compute_loss(logits, given.reshape(-1, 4), [flat], [wanted])
        anchors = detector._all_anchors(features)
        assert torch.equal(torch.stack(rpn.assign_targets_to_anchors(anchors, targets)[0]).long(), labels)
        assert loss == 0
        return
    outputs = detector._outputs(features)
    logits = outputs["cls_logits"].detach().requires_grad_()
    detector._outputs = lambda features: {**outputs, "cls_logits": logits, "bbox_regression": given}
    losses = detector.losses(features, targets)
    assert losses["bbox_regression"].detach().abs() < 1e-5, "nothing is left to learn about the boxes"
    if kind != "ssdlite":
        losses["classification"].backward()
        # focal loss pushes the logit of the right class up, all others down, and leaves label -1 alone
        up = logits.grad < 0
        wanted = torch.nn.functional.one_hot(labels.clamp(min=0), 11).bool() & (labels > 0)[..., None]
        assert torch.equal(up, wanted)
        assert torch.equal((logits.grad == 0).all(-1), labels == -1)


@each_kind
def test_losses_from_dense_are_the_same_and_run_no_head_again(kind, images, targets, monkeypatch):
    detector = small(kind).train()
    features = detector.features(images)
    torch.manual_seed(5)
    wanted = detector.losses(features, targets)
    dense = detector.dense(features)
    head = detector.model.rpn.head if kind == "faster_rcnn" else detector.model.head
    monkeypatch.setattr(head, "forward", lambda *_: pytest.fail("the head is run a second time"))
    torch.manual_seed(5)
    losses = detector.losses(features, targets, dense)
    assert {name: float(loss.detach()) for name, loss in losses.items()} == {
        name: float(loss.detach()) for name, loss in wanted.items()
    }
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
    if kind != "faster_rcnn":
        with pytest.raises(TypeError, match="dense must be"):
            detector.losses(features, targets, dense._replace(quality=None))


@pytest.mark.parametrize("kind", ("retinanet", "fcos"))
def test_label_0_is_never_found(kind, images):
    detector = lively(kind).eval()
    with torch.no_grad():
        detector.model.head.classification_head.cls_logits.bias.view(-1, 11)[:, 0] = 5.0
    assert all(len(found["labels"]) and found["labels"].min() >= 1 for found in detector.detect(images))


# --- the protocol


@each_kind
def test_what_each_kind_can_do(kind, images):
    detector = small(kind)
    assert isinstance(detector, kinds.Detector) and isinstance(detector, HasDense)
    assert isinstance(detector, HasStages) == (kind != "ssdlite")
    assert isinstance(detector, HasProposals) == (kind == "faster_rcnn")
    detector.eval()
    features = detector.features(images)
    assert list(features) == list(detector.strides) == list(detector.channels)
    height, width = SIZE
    for (name, level), stride in zip(features.items(), detector.strides.values(), strict=True):
        assert level.shape == (2, detector.channels[name], -(-height // stride), -(-width // stride))
    if kind != "ssdlite":
        stages = detector.stages(images)
        assert list(stages) == list(detector.stage_strides) == list(detector.stage_channels)
        for name, stage in stages.items():
            stride = detector.stage_strides[name]
            assert stage.shape == (2, detector.stage_channels[name], height // stride, width // stride)
        for level, wanted in zip(detector.neck(stages).values(), features.values(), strict=True):
            assert torch.equal(level, wanted)


@each_kind
def test_sizes_and_modes_that_cannot_be_are_refused(kind, images, targets):
    detector = small(kind)
    with pytest.raises(ValueError, match="multiples of 32, got 96 x 100"):
        detector.features(images[..., :100])
    with pytest.raises(RuntimeError, match=r"detect.*eval mode"):
        detector.detect(images)
    features = detector.features(images)
    with pytest.raises(RuntimeError, match=r"losses.*training mode"):
        detector.eval().losses(features, targets)


def test_one_picture_alone_does_not_train_ssdlite(images):
    detector = small("ssdlite").train()
    with pytest.raises(ValueError, match="images must be at least 2"):
        detector.features(images[:1])
    assert detector.eval().features(images[:1])


def test_proposals_are_the_same_in_both_modes(images):
    detector = small("faster_rcnn", proposals=20).train()
    features = detector.features(images)
    detector.model.rpn._post_nms_top_n["training"] = 7
    boxes = detector.proposals(features)
    assert detector.training and detector.model.rpn.training and detector.model.rpn.head.training
    wanted = detector.eval().proposals(features)
    for mine, theirs in zip(boxes, wanted, strict=True):
        assert torch.equal(mine, theirs) and 7 < len(mine) <= 20 and not mine.requires_grad


@each_kind
def test_boxes_are_exact_under_autocast(kind, images, targets):
    """In bfloat16 a coordinate of 150 pixels would be off by half a pixel, and one of 1,300 by four."""
    detector = lively(kind).eval()
    with torch.autocast("cpu", torch.bfloat16):
        features = detector.features(images)
        dense, matched = detector.dense(features), detector.matched(features, targets)
        anchors = torch.cat(detector.anchors(features))
        found = detector.detect(images)
    assert next(iter(features.values())).dtype == torch.bfloat16, "the backbone is what autocast is for"
    plain = detector.features(images)
    assert torch.equal(anchors, torch.cat(detector.anchors(plain)))
    assert torch.equal(matched.deltas, detector.matched(plain, targets).deltas)
    for tensor in (dense.logits, dense.deltas, *(one["boxes"] for one in found)):
        assert tensor.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector.train().losses(detector.features(images), targets)
    assert all(loss.dtype == torch.float32 and torch.isfinite(loss) for loss in losses.values())


def _compiled(kind, images):
    detector = small(kind).eval()
    torch._dynamo.reset()
    compiled = torch.compile(detector.features, fullgraph=True, backend="eager")(images)
    for level, wanted in zip(compiled.values(), detector.features(images).values(), strict=True):
        assert torch.equal(level, wanted)


def test_features_compile_without_a_break(images):
    _compiled("retinanet", images)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("faster_rcnn", "fcos", "ssdlite"))
def test_features_of_the_others_compile_without_a_break(kind, images):
    _compiled(kind, images)
