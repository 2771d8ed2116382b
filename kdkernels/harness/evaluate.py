"""COCO mAP of a detector, through faster-coco-eval or pycocotools. Only running and scoring a detector lives here."""

from __future__ import annotations

import contextlib
import copy
import io
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.data import Dataset

from .data import evaluation_batches, to_device
from .extras import coco_tools


class Score(NamedTuple):
    """COCO box metrics in [0, 1]: mean over IoU .5 to .95, and at IoU .5."""

    mean_ap: float
    ap50: float


class Evaluator:
    """Score detectors on one set of pictures; the ground truth is indexed once.

    Args:
        pictures: a dataset of :mod:`kdkernels.harness.data`.
        batch_size, device, workers: how to run a detector over it.
    """

    def __init__(self, pictures: Dataset, batch_size: int, device: torch.device, workers: int = 0) -> None:
        self.pictures = pictures
        self.batch_size, self.device, self.workers = batch_size, device, workers
        coco_class, self._evaluator = coco_tools()
        with contextlib.redirect_stdout(io.StringIO()):
            self._truth = coco_class()
            # The index adds to what it is given, and pycocotools' loadRes copies "info".
            self._truth.dataset = {"info": {}, **copy.deepcopy(pictures.coco)}
            self._truth.createIndex()

    def __call__(self, detector: nn.Module) -> Score:
        """Run ``detector.detect`` over all pictures and score it; its mode (train or eval) is put back."""
        return self.score(self.detect(detector))

    def detect(self, detector: nn.Module) -> list[dict]:
        """Detections of all pictures as COCO results, in pixels of the pictures on disk."""
        was_training = detector.training
        detector.eval()
        try:
            results = []
            for pictures, targets in evaluation_batches(self.pictures, self.batch_size, self.workers):
                images, targets = to_device(pictures, targets, self.device)
                with torch.no_grad():
                    detections = detector.detect(images)
                for target, found in zip(targets, detections, strict=True):
                    results += coco_results(target, found, self.pictures.category_ids)
            return results
        finally:
            detector.train(was_training)

    def score(self, results: list[dict]) -> Score:
        """COCO mAP and AP50 of results; no result at all is 0."""
        if not results:
            return Score(0.0, 0.0)
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = self._evaluator(self._truth, self._truth.loadRes(results), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        # -1 stands for "no object at all to find"
        return Score(*(max(0.0, float(value)) for value in evaluation.stats[:2]))


def coco_results(target: dict, found: dict[str, torch.Tensor], category_ids: list[int]) -> list[dict]:
    """One picture's detections as COCO results: x, y, width, height in pixels of the picture on disk."""
    boxes = (found["boxes"] / target["scale"]).cpu()
    boxes[:, 2:] -= boxes[:, :2]
    rows = zip(boxes.tolist(), found["scores"].tolist(), found["labels"].tolist(), strict=True)
    return [
        {"image_id": target["image_id"], "category_id": category_ids[label - 1], "bbox": box, "score": score}
        for box, score, label in rows
    ]
