"""The composed scenes: seeded, with tight boxes in range, and nothing shared between training and validation."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
box_iou = pytest.importorskip("torchvision.ops").box_iou

from kdkernels.harness.data import scenes  # noqa: E402
from kdkernels.harness.settings import SceneSettings  # noqa: E402

SETTINGS = SceneSettings(train=40, val=40)


@pytest.fixture(scope="module")
def composed():
    return {split: scenes.compose(SETTINGS, split) for split in scenes.SPLITS}


def test_same_settings_same_pixels_and_a_short_set_begins_a_long_one(composed):
    pictures, targets = scenes.compose(dataclasses.replace(SETTINGS, train=9), "train")
    assert torch.equal(pictures, composed["train"][0][:9])
    for mine, other in zip(targets, composed["train"][1], strict=False):
        assert torch.equal(mine["boxes"], other["boxes"]) and torch.equal(mine["labels"], other["labels"])


def test_other_seed_or_split_other_pixels(composed):
    other, _ = scenes.compose(dataclasses.replace(SETTINGS, train=3, seed=1), "train")
    assert not torch.equal(other, composed["train"][0][:3])
    assert not torch.equal(composed["val"][0][:3], composed["train"][0][:3])


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_boxes_are_in_range(composed, split):
    pictures, targets = composed[split]
    assert pictures.shape == (40, 3, 160, 160) and pictures.dtype == torch.uint8
    seen = set()
    for target in targets:
        boxes, labels = target["boxes"], target["labels"]
        assert 1 <= len(boxes) == len(labels) <= 5
        assert boxes.min() >= 0 and boxes.max() <= 160
        height = boxes[:, 3] - boxes[:, 1]
        # A cell of a digit is at most 64 / 8 pixels; its rim moves by up to half of one.
        assert height.min() >= 24 - 4 and height.max() <= 64 + 4
        assert (boxes[:, 2] > boxes[:, 0]).all()
        overlap = box_iou(boxes, boxes).fill_diagonal_(0)
        assert overlap.max() <= SETTINGS.max_iou + 1e-6
        seen |= set(labels.tolist())
    assert seen == set(range(1, 11))


def test_a_digit_touches_all_four_sides_of_its_box():
    _, digits, _ = scenes._sources()
    for digit in digits[:50]:
        alpha = scenes.draw_digit(digit, 41, 37)
        for side in (alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]):
            assert side.max() >= scenes.INK
        assert alpha.min() >= 0 and alpha.max() <= 1


def test_pixels_change_inside_the_boxes_only(monkeypatch):
    """On a plain background and without noise, whatever differs from the background is a digit inside its box."""
    plain = SceneSettings(train=10, noise=0.0)
    monkeypatch.setattr(scenes, "_background", lambda size, split, rng: torch.full((3, size, size), 0.4))
    pictures, targets = scenes.compose(plain, "train")
    for picture, target in zip(pictures, targets, strict=True):
        changed = (picture != round(0.4 * 255)).any(dim=0)
        inside = torch.zeros_like(changed)
        for x1, y1, x2, y2 in target["boxes"].int().tolist():
            inside[y1:y2, x1:x2] = True
            box = changed[y1:y2, x1:x2]
            assert box[0].any() and box[-1].any() and box[:, 0].any() and box[:, -1].any()
        assert not (changed & ~inside).any()


def test_splits_share_no_digit(monkeypatch):
    train, val = (set(scenes.digit_indices(split).tolist()) for split in scenes.SPLITS)
    assert not train & val and train | val == set(range(1797)) and len(val) == 360
    _, digits, _ = scenes._sources()
    known = {split: {digits[i].numpy().tobytes() for i in scenes.digit_indices(split)} for split in scenes.SPLITS}
    drawn = []
    draw = scenes.draw_digit
    monkeypatch.setattr(scenes, "draw_digit", lambda ink, h, w: drawn.append(ink.numpy().tobytes()) or draw(ink, h, w))
    for split in scenes.SPLITS:
        drawn.clear()
        scenes.compose(SETTINGS, split)
        assert drawn and set(drawn) <= known[split]


def test_splits_share_no_column_of_a_photograph(monkeypatch):
    """A photograph whose brightness is its column: every pixel of a scene says where it was cropped."""
    ramp = torch.linspace(0, 1, 640).expand(3, 427, 640)
    monkeypatch.setattr(scenes, "_sources", lambda: ([ramp], None, None))
    rng = np.random.default_rng(0)
    spans = {
        split: torch.stack([scenes._background(160, split, rng) for _ in range(50)]) / scenes.DIM
        for split in scenes.SPLITS
    }
    assert spans["train"].max() < spans["val"].min()
    # and both strips are used: the crops come within a tenth of the photograph of the outer borders
    assert spans["train"].min() < 0.1 and spans["val"].max() > 0.9


def test_unknown_split():
    with pytest.raises(ValueError, match="split"):
        scenes.compose(SETTINGS, "test")
