"""Small annotated folders that the tests of the harness's data share. No test lives here."""

from __future__ import annotations

import copy
import json

import numpy as np
from PIL import Image

from kdkernels.harness import data

SIZE = data.Size(square=64)
DOCUMENT = {
    "images": [{"id": i, "file_name": f"{i}.jpg", "width": 96, "height": 64} for i in (1, 2, 3)],
    "annotations": [
        {"id": i, "image_id": i, "category_id": 5, "bbox": [8, 8, 40, 40], "area": 1600, "iscrowd": 0}
        for i in (1, 2, 3)
    ],
    "categories": [{"id": 5, "name": "thing"}],
}
XML = "<annotation><size><width>96</width><height>64</height></size>{}</annotation>"


def coco_folder(root):
    """A COCO folder of three pictures, 96 x 64, without a fault; ``change`` edits its annotations."""
    noise = np.random.default_rng(0).integers(0, 256, (3, 64, 96, 3), dtype=np.uint8)
    (root / "train2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    for index, pixels in enumerate(noise, start=1):
        Image.fromarray(pixels).save(picture(root, index))
    change(root, lambda document: None)
    return root


def change(root, edit):
    document = copy.deepcopy(DOCUMENT)
    edit(document)
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(document))


def opened(root, **keywords):
    return data.open_pictures(root, "train", size=SIZE, **keywords)


def picture(root, number=2):
    return root / "train2017" / f"{number}.jpg"


def voc_folder(root, names=("a", "b")):
    """A VOC folder of pictures of 96 x 64 without objects."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for name in names:
        Image.new("RGB", (96, 64)).save(root / "JPEGImages" / f"{name}.png")
        (root / "Annotations" / f"{name}.xml").write_text(XML.format(""))
    (root / "ImageSets" / "Main" / "train.txt").write_text("\n\n".join(names))
    return root
