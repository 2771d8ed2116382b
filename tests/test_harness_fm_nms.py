"""Feature-map NMS against its definition, candidate by candidate."""

from __future__ import annotations

import pytest
import torch

from kdkernels.harness import fm_nms


def defined(objectness, classes, reach):
    keep = torch.ones_like(objectness, dtype=torch.bool)
    pictures, anchors, height, width = objectness.shape
    places = [(a, y, x) for a in range(anchors) for y in range(height) for x in range(width)]
    for n in range(pictures):
        for own in places:
            for other in places:
                near = abs(own[1] - other[1]) <= reach and abs(own[2] - other[2]) <= reach
                if other == own or not near or classes[(n, *other)] != classes[(n, *own)]:
                    continue
                mine, theirs = objectness[(n, *own)], objectness[(n, *other)]
                if theirs > mine or (theirs == mine and other < own):
                    keep[(n, *own)] = False
    return keep


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 1, 1, 6), (2, 2, 2, 1), (1, 4, 1, 1)])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_by_definition(shape, kernel_size):
    torch.manual_seed(0)
    objectness = torch.randint(4, shape) / 4  # with ties
    classes = torch.randint(3, shape)
    found = fm_nms(objectness, classes, kernel_size=kernel_size)
    assert torch.equal(found, defined(objectness, classes, kernel_size // 2))
    one = fm_nms(objectness, class_agnostic=True, kernel_size=kernel_size)
    assert torch.equal(one, defined(objectness, torch.zeros_like(classes), kernel_size // 2))


def test_one_winner_of_a_flat_map_and_none_of_an_empty_one():
    assert fm_nms(torch.ones(1, 2, 3, 3), class_agnostic=True, kernel_size=7).sum() == 1
    assert fm_nms(torch.ones(0, 2, 3, 3), class_agnostic=True).shape == (0, 2, 3, 3)
    assert fm_nms(torch.ones(1, 2, 0, 3), class_agnostic=True).numel() == 0
    found = fm_nms(torch.tensor([[[[float("nan"), 0.5]]]]), class_agnostic=True)
    assert found.tolist() == [[[[False, True]]]]


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda x: fm_nms(x[0], x[0].long()), "objectness: expected shape"),
        (lambda x: fm_nms(x), "classes: needed"),
        (lambda x: fm_nms(x, x[..., :1].long()), "classes: expected shape"),
        (lambda x: fm_nms(x, x.long(), kernel_size=2), "kernel_size"),
        (lambda x: fm_nms(x, x.long(), kernel_size=-1), "kernel_size"),
    ],
)
def test_bad_arguments_are_named(call, why):
    with pytest.raises(ValueError, match=why):
        call(torch.zeros(1, 1, 2, 2))
