"""Pictures with ground truth: the composed scenes, and folders on disk."""

from .pictures import (
    CocoPictures,
    DataError,
    ScenePictures,
    coco_ground_truth,
    collate,
    evaluation_batches,
    to_device,
    training_batches,
    write_coco_folder,
)

__all__ = [
    "CocoPictures",
    "DataError",
    "ScenePictures",
    "coco_ground_truth",
    "collate",
    "evaluation_batches",
    "to_device",
    "training_batches",
    "write_coco_folder",
]
