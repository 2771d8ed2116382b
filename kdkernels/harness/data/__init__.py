"""Pictures with ground truth: the composed scenes, and folders in COCO's form, VOC's, or without annotations."""

from .coco import write_coco_folder
from .geometry import Size
from .loaders import collate, evaluation_batches, to_device, training_batches
from .pictures import FolderPictures, ScenePictures, UnlabeledPictures, coco_ground_truth, open_pictures
from .problems import DataError, Problems
from .voc import write_voc_folder

__all__ = [
    "DataError",
    "FolderPictures",
    "Problems",
    "ScenePictures",
    "Size",
    "UnlabeledPictures",
    "coco_ground_truth",
    "collate",
    "evaluation_batches",
    "open_pictures",
    "to_device",
    "training_batches",
    "write_coco_folder",
    "write_voc_folder",
]
