"""How good a detector is: COCO's scores through faster-coco-eval or pycocotools, and VOC's own average precision.

Only running and scoring a detector lives here.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from .data import evaluation_batches, to_device
from .extras import coco_tools


class Score(NamedTuple):
    """COCO's box scores, in [0, 1]: average precision over all classes, up to 100 detections per picture.

    ``ap_small``, ``ap_medium`` and ``ap_large`` are of objects below 32 x 32, up to 96 x 96 and above, in pixels of the
    file and by the annotated area; -1 where no object is of that size, as in pycocotools.
    """

    mean_ap: float  #: mean over IoU .5, .55, ... .95 (pycocotools: AP)
    ap50: float  #: at IoU .5
    ap75: float = -1.0  #: at IoU .75
    ap_small: float = -1.0
    ap_medium: float = -1.0
    ap_large: float = -1.0


class VocScore(NamedTuple):
    """VOC's scores, in [0, 1]."""

    mean_ap: float  #: mean of ``classes``; 0 where that is empty
    classes: dict[str, float]  #: average precision by class name; classes without an object that counts are not in it


class Evaluator:
    """Score detectors on one set of pictures; the ground truth is indexed once.

    Args:
        pictures: a dataset of :mod:`kdkernels.harness.data`.
        batch_size, device, workers: how to run a detector over it.
        limit: score the first so many pictures only.
    """

    def __init__(
        self,
        pictures: Dataset,
        batch_size: int,
        device: torch.device,
        workers: int = 0,
        limit: int | None = None,
    ) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        self.pictures, self.limit = pictures, limit
        self.batch_size, self.device, self.workers = batch_size, device, workers
        self._undecodable: set[int] = set()
        coco_class, self._evaluator = coco_tools()
        with contextlib.redirect_stdout(io.StringIO()):
            self._truth = coco_class()
            # The index adds to what it is given, and pycocotools' loadRes copies "info".
            self._truth.dataset = {"info": {}, **copy.deepcopy(first_pictures(pictures.coco, limit))}
            self._truth.createIndex()

    def __len__(self) -> int:
        """Number of pictures that are scored."""
        return len(self._truth.dataset["images"])

    def __call__(self, detector: nn.Module) -> Score:
        """Run ``detector.detect`` over all pictures and score it; its mode (train or eval) is put back."""
        return self.score(self.detect(detector))

    def detect(self, detector: nn.Module) -> list[dict]:
        """Detections of all pictures as COCO results, in pixels of the pictures on disk."""
        was_training = detector.training
        detector.eval()
        try:
            results = []
            for pictures, targets in evaluation_batches(self.pictures, self.batch_size, self.workers, self.limit):
                images, targets = to_device(pictures, targets, self.device)
                with torch.no_grad():
                    detections = detector.detect(images)
                for target, found in zip(targets, detections, strict=True):
                    if target.get("undecodable"):
                        self._undecodable.add(target["image_id"])
                    else:
                        results += coco_results(target, found, self.pictures.category_ids)
            return results
        finally:
            detector.train(was_training)

    def score(self, results: list[dict]) -> Score:
        """COCO's scores of results; no result at all is 0. Pictures that ``detect`` could not decode do not count."""
        if not results:
            return Score(0.0, 0.0, 0.0, *(0.0 if count else -1.0 for count in self._sizes()))
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = self._evaluator(self._truth, self._truth.loadRes(results), "bbox")
            evaluation.params.imgIds = [i for i in evaluation.params.imgIds if i not in self._undecodable]
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        stats = [float(value) for value in evaluation.stats[:6]]
        # -1 stands for "no object at all to find"
        return Score(*(max(0.0, value) for value in stats[:3]), *stats[3:])

    def _sizes(self) -> list[int]:
        """Objects that count, by COCO's three sizes."""
        areas = [a["area"] for a in self._truth.dataset["annotations"] if not a["iscrowd"]]
        bounds = ((0, 32**2), (32**2, 96**2), (96**2, 1e10))
        return [sum(low <= area <= high for area in areas) for low, high in bounds]


def first_pictures(document: dict, limit: int | None) -> dict:
    """A COCO document of the first ``limit`` pictures and what is in them."""
    if limit is None:
        return document
    images = document["images"][:limit]
    ids = {image["id"] for image in images}
    return {**document, "images": images, "annotations": [a for a in document["annotations"] if a["image_id"] in ids]}


def coco_results(target: dict, found: dict[str, torch.Tensor], category_ids: list[int]) -> list[dict]:
    """One picture's detections as COCO results: x, y, width, height in pixels of the picture on disk.

    Boxes are clipped to the picture; what lies in a batch's padding alone is no detection.
    """
    height, width = target["size"]
    boxes = found["boxes"].cpu()
    boxes = torch.stack([boxes[:, i].clamp(0, side) for i, side in enumerate((width, height, width, height))], dim=1)
    keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    boxes = (boxes / boxes.new_tensor(target["scale"] * 2))[keep]
    boxes[:, 2:] -= boxes[:, :2]
    rows = zip(boxes.tolist(), found["scores"].cpu()[keep].tolist(), found["labels"].cpu()[keep].tolist(), strict=True)
    return [
        {"image_id": target["image_id"], "category_id": category_ids[label - 1], "bbox": box, "score": score}
        for box, score, label in rows
    ]


def voc_ap(results: list[dict], truth: dict[str, Any], *, iou: float = 0.5, eleven_point: bool = False) -> VocScore:
    """Average precision by the rules of the Pascal VOC challenge.

    Detections of a class go by falling score (equal ones in the order given). Each is compared with the object of its
    class in its picture that it overlaps most: right where their IoU is at least ``iou`` and the object was not found
    before, wrong where it was or the IoU is less. A detection of a difficult object is neither, and difficult objects
    are not counted among those to find. The area under the precision, made to fall, over the recall, as from 2010 on;
    ``eleven_point``: the mean of the best precision at a recall of at least 0, .1, ... 1, as until 2009.

    Args:
        results: COCO results, as ``Evaluator.detect`` gives them.
        truth: a COCO document (``pictures.coco``); objects with ``difficult`` or ``iscrowd`` are difficult.
        iou: overlap from which on a detection is right, in (0, 1].

    Raises:
        ValueError: ``iou`` out of range, or a result for a picture or class that ``truth`` does not have.

    Source: Everingham et al., The Pascal Visual Object Classes challenge, IJCV 2010, and its development kits.
    """
    if not 0 < iou <= 1:
        raise ValueError(f"iou must be in (0, 1], got {iou}")
    names = {category["id"]: category["name"] for category in truth["categories"]}
    pictures = {image["id"] for image in truth["images"]}
    objects: dict[int, dict[int, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for entry in truth["annotations"]:
        objects[entry["category_id"]][entry["image_id"]].append(entry)
    found: dict[int, list[dict]] = defaultdict(list)
    for result in results:
        if result["image_id"] not in pictures or result["category_id"] not in names:
            raise ValueError(
                f"results: picture {result['image_id']}, category {result['category_id']} is not in the ground truth"
            )
        found[result["category_id"]].append(result)
    classes = {}
    for number, name in names.items():
        wanted = sum(not _difficult(entry) for entries in objects[number].values() for entry in entries)
        if wanted:
            right = _right(sorted(found[number], key=lambda result: -result["score"]), objects[number], iou)
            classes[name] = _average_precision(right, wanted, eleven_point)
    return VocScore(float(np.mean(list(classes.values()))) if classes else 0.0, classes)


def _right(results: list[dict], objects: dict[int, list[dict]], iou: float) -> np.ndarray:
    """1 for each detection that is right, 0 for each that is wrong; those of difficult objects are left out."""
    taken: set[int] = set()
    right = []
    for result in results:
        overlaps = [_iou(result["bbox"], entry["bbox"]) for entry in objects.get(result["image_id"], ())]
        best = int(np.argmax(overlaps)) if overlaps else -1
        if best < 0 or overlaps[best] < iou:
            right.append(0)
            continue
        entry = objects[result["image_id"]][best]
        if _difficult(entry):
            continue
        right.append(int(id(entry) not in taken))
        taken.add(id(entry))
    return np.array(right, dtype=np.int64)


def _average_precision(right: np.ndarray, wanted: int, eleven_point: bool) -> float:
    if not len(right):
        return 0.0
    hits = np.cumsum(right)
    precision = hits / np.arange(1, len(right) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]  # from here on
    if eleven_point:
        # In integers: 3 of 10 must be a recall of 0.3.
        reached = [np.flatnonzero(10 * hits >= tenth * wanted) for tenth in range(11)]
        return float(sum(best[at[0]] if len(at) else 0.0 for at in reached) / 11)
    return float((best * right).sum() / wanted)


def _difficult(entry: dict) -> bool:
    return bool(entry.get("difficult") or entry.get("iscrowd"))


def _iou(a: list[float], b: list[float]) -> float:
    """IoU of two boxes given as x, y, width, height."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    union = a[2] * a[3] + b[2] * b[3] - shared
    return shared / union if union > 0 else 0.0
