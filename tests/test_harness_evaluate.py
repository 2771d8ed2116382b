"""COCO mAP: what is perfect scores 1, what is not scores less, with either of the two packages."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("torchvision")

from harness_parts import SMALL

from kdkernels.harness import data, extras
from kdkernels.harness.evaluate import Evaluator, coco_results

PACKAGES = ("faster_coco_eval", "pycocotools")


@pytest.fixture(scope="module")
def pictures():
    return data.ScenePictures(SMALL, "val")


@pytest.fixture(params=PACKAGES)
def evaluator(request, pictures, monkeypatch):
    pytest.importorskip(request.param)
    for other in PACKAGES:
        if other != request.param:
            monkeypatch.setitem(sys.modules, other, None)
    made = Evaluator(pictures, 4, torch.device("cpu"))
    assert type(made._truth).__module__.startswith(request.param)
    return made


class Oracle(nn.Module):
    """Answers with the ground truth of the pictures in order, shifted by so many pixels."""

    def __init__(self, pictures, shift=0.0):
        super().__init__()
        self.pictures, self.shift, self.next = pictures, shift, 0

    def detect(self, images):
        assert not self.training and images.dtype == torch.float32
        found = []
        for _ in images:
            target = self.pictures[self.next][1]
            self.next += 1
            count = len(target["labels"])
            found.append(
                {"boxes": target["boxes"] + self.shift, "labels": target["labels"], "scores": torch.full((count,), 0.9)}
            )
        return found


def test_perfect_detections_score_one(evaluator, pictures):
    detector = Oracle(pictures).train()
    assert evaluator(detector)[:3] == pytest.approx((1.0, 1.0, 1.0), abs=1e-12)
    assert detector.training, "its mode is put back"


def test_shifted_detections_score_less(evaluator, pictures):
    score = evaluator(Oracle(pictures, shift=3.0))
    assert 0 < score.mean_ap < 0.95 and score.mean_ap < score.ap50


def test_wrong_labels_and_nothing_score_zero(evaluator, pictures):
    results = evaluator.detect(Oracle(pictures))
    wrong = [{**result, "category_id": (result["category_id"] + 1) % 10} for result in results]
    assert evaluator.score(wrong).ap50 < 0.2
    assert evaluator.score([])[:3] == (0.0, 0.0, 0.0)


def test_both_packages_agree(pictures, monkeypatch):
    scores = []
    for package, other in (PACKAGES, PACKAGES[::-1]):
        pytest.importorskip(package)
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, other, None)
            scores.append(Evaluator(pictures, 4, torch.device("cpu"))(Oracle(pictures, shift=4.0)))
    assert scores[0] == pytest.approx(scores[1], abs=1e-9)


def test_results_are_in_pixels_of_the_picture_on_disk():
    found = {"boxes": torch.tensor([[10.0, 20, 60, 50]]), "scores": torch.tensor([0.5]), "labels": torch.tensor([2])}
    (result,) = coco_results({"image_id": 7, "scale": (0.5, 0.5), "size": (64, 160)}, found, [3, 90])
    assert result == {"image_id": 7, "category_id": 90, "bbox": [20, 40, 100, 60], "score": 0.5}
    assert found["boxes"].tolist() == [[10, 20, 60, 50]]


def test_without_either_package_the_message_names_the_command(monkeypatch):
    for package in [*PACKAGES, "pycocotools.coco"]:
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r'pip install "kdkernels\[train\]"'):
        extras.coco_tools()


@pytest.mark.parametrize("package", ["torchvision", "sklearn", "matplotlib"])
def test_a_missing_package_is_named_before_any_work(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'{package}.*pip install "kdkernels\[train\]"'):
        extras.check()
