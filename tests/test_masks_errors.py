"""What kdkernels.masks refuses, and that the message names the argument and its shape."""

from __future__ import annotations

import pytest
import torch
from masks_oracle import NAN, SIZES, STRIDES, grid_anchors

import kdkernels as kd

ONE = [torch.zeros(1, 4)]


@pytest.mark.parametrize(
    "error, match, boxes, sizes, strides, keywords",
    [
        (ValueError, r"boxes\[1\].*\(n, 4\).*\(3, 5\)", [torch.zeros(0, 4), torch.zeros(3, 5)], SIZES, STRIDES, {}),
        (ValueError, r"boxes\[0\].*\(4,\)", [torch.zeros(4)], SIZES, STRIDES, {}),
        (ValueError, r"boxes.*\(M, 5\).*\(3, 4\)", torch.zeros(3, 4), SIZES, STRIDES, {"batch_size": 1}),
        (ValueError, "batch_size: required", torch.zeros(3, 5), SIZES, STRIDES, {}),
        (ValueError, "batch_size = 2.*1 images", ONE, SIZES, STRIDES, {"batch_size": 2}),
        (ValueError, "batch_size.*-1", torch.zeros(3, 5), SIZES, STRIDES, {"batch_size": -1}),
        (TypeError, "batch_size", torch.zeros(3, 5), SIZES, STRIDES, {"batch_size": 2.0}),
        (TypeError, "boxes: .*str", "boxes", SIZES, STRIDES, {}),
        (TypeError, r"boxes\[0\]: .*list", [[0, 0, 1, 1]], SIZES, STRIDES, {}),
        (TypeError, r"boxes\[0\].*bool", [torch.zeros(1, 4, dtype=torch.bool)], SIZES, STRIDES, {}),
        (TypeError, r"boxes\[0\].*complex", [torch.zeros(1, 4, dtype=torch.complex64)], SIZES, STRIDES, {}),
        (ValueError, r"boxes\[1\]: on meta", [*ONE, torch.zeros(1, 4, device="meta")], SIZES, STRIDES, {}),
        (ValueError, "sizes has 5 levels, strides has 4", ONE, SIZES, STRIDES[:4], {}),
        (TypeError, "sizes: .*int", ONE, 3, STRIDES, {}),
        (TypeError, r"sizes\[0\]", ONE, [(2.0, 3)], [4], {}),
        (ValueError, r"sizes\[0\].*-2", ONE, [(-2, 3)], [4], {}),
        (TypeError, r"strides\[0\]", ONE, [(2, 3)], ["4"], {}),
        (ValueError, r"strides\[1\].*0", ONE, [(2, 3), (1, 1)], [4, 0], {}),
        (ValueError, r"strides\[0\].*nan", ONE, [(2, 3)], [NAN], {}),
        (ValueError, "assign.*'both'", ONE, SIZES, STRIDES, {"assign": "both"}),
        (ValueError, "base_size.*-1", ONE, SIZES, STRIDES, {"base_size": -1}),
        (ValueError, "base_size.*0", ONE, SIZES, STRIDES, {"base_size": 0}),
        (TypeError, "base_size", ONE, SIZES, STRIDES, {"base_size": "56"}),
        (TypeError, "image_size", ONE, SIZES, STRIDES, {"image_size": 800}),
        (ValueError, r"sizes\[0\].*image_size = \(800, 1333\)", ONE, SIZES, STRIDES, {"image_size": (800, 1333)}),
        (ValueError, r"sizes\[0\].*image_size = \(1344, 800\)", ONE, SIZES, STRIDES, {"image_size": (1344, 800)}),
    ],
)
def test_errors(error, match, boxes, sizes, strides, keywords):
    for draw in (kd.masks.ground_truth_masks, kd.masks.gaussian_masks):
        with pytest.raises(error, match=match):
            draw(boxes, sizes, strides, **keywords)
    with pytest.raises(error, match=match):
        kd.masks.fine_grained_masks(boxes, grid_anchors(SIZES, STRIDES, ((1, 1),)), sizes, strides, **keywords)


@pytest.mark.parametrize(
    "error, match, anchors, threshold",
    [
        (ValueError, "threshold.*1.5", torch.zeros(6, 4), 1.5),
        (ValueError, "threshold.*nan", torch.zeros(6, 4), NAN),
        (TypeError, "threshold", torch.zeros(6, 4), "0.5"),
        (TypeError, "anchors: .*int", 3, 0.5),
        (TypeError, r"anchors\[0\]: .*bool", torch.zeros(6, 4, dtype=torch.bool), 0.5),
        (ValueError, "anchors has 2 levels, sizes has 1", [torch.zeros(6, 4)] * 2, 0.5),
        (ValueError, r"anchors\[0\].*\(2, 3\).*\(7, 4\)", torch.zeros(7, 4), 0.5),
        (ValueError, r"anchors\[0\].*\(3, 2, 1, 4\)", torch.zeros(3, 2, 1, 4), 0.5),
        (ValueError, r"anchors\[0\]: on meta", torch.zeros(6, 4, device="meta"), 0.5),
    ],
)
def test_errors_of_anchors_and_threshold(error, match, anchors, threshold):
    with pytest.raises(error, match=match):
        kd.masks.fine_grained_masks(ONE, anchors, [(2, 3)], [4], threshold=threshold)


def test_image_size_accepts_floor_and_ceil_only():
    for h in range(9, 16):
        draw = lambda h=h: kd.masks.ground_truth_masks(ONE, [(h, 21)], [64], image_size=(800, 1344))  # noqa: E731
        if h in (12, 13):  # 12.5 cells
            assert draw()[0].shape == (1, h, 21)
        else:
            with pytest.raises(ValueError, match="image_size"):
                draw()
