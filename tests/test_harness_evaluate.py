"""COCO mAP: what is perfect scores 1, what is not scores less, with either of the two packages."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("torchvision")

from harness_parts import SMALL

from kdkernels.harness import data, extras
from kdkernels.harness.evaluate import Evaluator, Score, coco_results, voc_ap

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
    assert 0 < scores[0].mean_ap < 1 and scores[0].ap_medium > 0 and scores[0].ap_large == -1
    assert Score._fields == ("mean_ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


class Listed:
    """Pictures that exist as annotations only: three classes, every size, crowds, pictures without objects."""

    category_ids = [3, 7, 8]

    def __init__(self):
        random = np.random.default_rng(0)
        annotations = []
        for number in range(160):
            width, height = (2 ** random.uniform(2, 8, 2)).tolist()
            entry = {"image_id": int(random.integers(30)), "category_id": int(random.choice(self.category_ids))}
            x, y = random.uniform(0, 100, 2).tolist()
            crowd = int(random.random() < 0.1)
            entry |= {"id": number + 1, "bbox": [x, y, width, height], "area": 0.8 * width * height, "iscrowd": crowd}
            annotations.append(entry)
        self.coco = {
            "images": [{"id": number, "file_name": str(number)} for number in range(32)],
            "annotations": annotations,
            "categories": [{"id": number, "name": str(number)} for number in self.category_ids],
        }
        self.results = [
            {
                "image_id": entry["image_id"],
                "category_id": entry["category_id"],
                "bbox": (np.array(entry["bbox"]) * random.uniform(0.9, 1.1, 4)).tolist(),
                "score": round(float(random.random()), 1),  # with ties
            }
            for entry in annotations * 3
            if random.random() < 0.6
        ]


def test_both_packages_agree_on_every_size_on_crowds_and_ties(monkeypatch):
    pictures, scores = Listed(), []
    for package, other in (PACKAGES, PACKAGES[::-1]):
        pytest.importorskip(package)
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, other, None)
            scores.append(Evaluator(pictures, 4, torch.device("cpu")).score(pictures.results))
    assert scores[0] == pytest.approx(scores[1], abs=1e-9)
    assert all(0.05 < value < 0.95 for value in scores[0])


def test_a_limit_scores_the_first_pictures_alone(evaluator, pictures):
    limited = Evaluator(pictures, 4, torch.device("cpu"), limit=2)
    results = limited.detect(Oracle(pictures))
    assert {result["image_id"] for result in results} == {0, 1} and len(limited) == 2 and len(evaluator) == 6
    assert limited.score(results).mean_ap == pytest.approx(1) and evaluator.score(results).mean_ap < 0.9
    with pytest.raises(ValueError, match="limit must be at least 1"):
        Evaluator(pictures, 4, torch.device("cpu"), limit=0)


def test_sizes_are_those_of_the_annotated_areas(evaluator):
    evaluator._truth.dataset["annotations"] = [{"area": area, "iscrowd": 0} for area in (10, 1024, 2000)]
    assert evaluator.score([])[3:] == (0.0, 0.0, -1.0)


def test_results_are_in_pixels_of_the_picture_on_disk():
    found = {"boxes": torch.tensor([[10.0, 20, 60, 50]]), "scores": torch.tensor([0.5]), "labels": torch.tensor([2])}
    (result,) = coco_results({"image_id": 7, "scale": (0.5, 0.5), "size": (64, 160)}, found, [3, 90])
    assert result == {"image_id": 7, "category_id": 90, "bbox": [20, 40, 100, 60], "score": 0.5}
    assert found["boxes"].tolist() == [[10, 20, 60, 50]]


def test_what_lies_in_the_padding_is_no_detection():
    found = {
        "boxes": torch.tensor([[100.0, 20, 160, 90], [0, 70, 50, 90], [10, 10, 20, 20]]),
        "scores": torch.tensor([0.5, 0.6, 0.7]),
        "labels": torch.tensor([1, 2, 1]),
    }
    target = {"image_id": 7, "scale": (0.5, 0.25), "size": (64, 140)}
    first, second = coco_results(target, found, [3, 90])
    assert first["bbox"] == [200, 80, 80, 176] and first["score"] == 0.5
    assert second["bbox"] == [20, 40, 20, 40] and second["score"] == pytest.approx(0.7)


# --- VOC


def truth(*objects, names=("a", "b")):
    """``objects``: picture, category, x, difficult; each 10 x 10 at (x, 0)."""
    return {
        "images": [{"id": number} for number in sorted({1, 2, *(entry[0] for entry in objects)})],
        "categories": [{"id": number, "name": name} for number, name in enumerate(names, start=1)],
        "annotations": [
            {"image_id": image, "category_id": category, "bbox": [x, 0, 10, 10], "difficult": difficult, "iscrowd": 0}
            for image, category, x, difficult in objects
        ],
    }


def found(*detections):
    """``detections``: picture, category, x, score."""
    return [
        {"image_id": image, "category_id": category, "bbox": [x, 0, 10, 10], "score": score}
        for image, category, x, score in detections
    ]


def test_voc_worked_by_hand():
    """Three objects. By falling score: right, wrong, right, twice the same: recall 1/3, 1/3, 2/3, 2/3 at precision
    1, 1/2, 2/3, 1/2."""
    objects = truth((1, 1, 0, 0), (1, 1, 100, 0), (2, 1, 0, 0))
    results = found((1, 1, 50, 0.8), (1, 1, 1, 0.9), (2, 1, 0, 0.7), (2, 1, 1, 0.6))
    score = voc_ap(results, objects)
    assert score.classes == {"a": pytest.approx(1 / 3 + 2 / 9)} and score.mean_ap == pytest.approx(5 / 9)
    # recalls 0, .1, .2, .3 at best precision 1; .4, .5, .6 at 2/3; none beyond
    assert voc_ap(results, objects, eleven_point=True).mean_ap == pytest.approx((4 + 3 * 2 / 3) / 11)


def test_voc_precision_is_made_to_fall():
    """wrong, right, right of two objects: precision 0, 1/2, 2/3, and so 2/3 at every recall."""
    objects = truth((1, 1, 0, 0), (2, 1, 0, 0))
    results = found((1, 1, 50, 0.9), (1, 1, 0, 0.8), (2, 1, 0, 0.7))
    assert voc_ap(results, objects).mean_ap == pytest.approx(2 / 3)
    assert voc_ap(results, objects, eleven_point=True).mean_ap == pytest.approx(2 / 3)


def test_voc_recall_of_three_tenths_counts_as_point_three():
    objects = truth(*((1, 1, 20 * i, 0) for i in range(10)))
    results = found(*((1, 1, 20 * i, 0.9) for i in range(3)))
    assert voc_ap(results, objects, eleven_point=True).mean_ap == pytest.approx(4 / 11)
    assert voc_ap(results, objects).mean_ap == pytest.approx(0.3)


def test_voc_difficult_objects_are_neither_to_find_nor_wrong():
    objects = truth((1, 1, 0, 0), (1, 1, 100, 1), (2, 2, 0, 1))
    results = found((1, 1, 100, 0.9), (1, 1, 101, 0.85), (1, 1, 0, 0.8), (2, 2, 0, 0.9))
    assert voc_ap(results, objects) == (1.0, {"a": 1.0}), "class b has nothing to find"
    crowd = truth((1, 1, 0, 0), (1, 1, 100, 0))
    crowd["annotations"][1]["iscrowd"] = 1
    assert voc_ap(results[:3], crowd).mean_ap == 1


def test_voc_overlap_is_with_the_best_object_and_at_least_the_bound():
    objects = truth((1, 1, 0, 0), (1, 1, 4, 0))
    # Both overlap most with the first object: the second of them is wrong, though the other object is free.
    assert voc_ap(found((1, 1, 0, 0.9), (1, 1, 1, 0.8)), objects).mean_ap == pytest.approx(0.5)
    third = found((1, 1, 5, 0.9))  # 5 x 10 of 15 x 10
    assert voc_ap(third, truth((1, 1, 0, 0)), iou=1 / 3).mean_ap == 1
    assert voc_ap(third, truth((1, 1, 0, 0)), iou=0.34).mean_ap == 0


def test_voc_nothing_found_nothing_to_find_and_bad_input(pictures):
    objects = truth((1, 1, 0, 0))
    assert voc_ap([], objects) == (0.0, {"a": 0.0}) and voc_ap(found((1, 2, 0, 0.9)), objects).mean_ap == 0
    assert voc_ap([], truth()) == (0.0, {})
    for bad in (found((9, 1, 0, 0.9)), found((1, 9, 0, 0.9))):
        with pytest.raises(ValueError, match="not in the ground truth"):
            voc_ap(bad, objects)
    for iou in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="iou must be"):
            voc_ap([], objects, iou=iou)
    results = Evaluator(pictures, 4, torch.device("cpu")).detect(Oracle(pictures))
    assert voc_ap(results, pictures.coco).mean_ap == pytest.approx(1)


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
