"""Pictures with COCO-format ground truth, from scenes or from a folder on disk, and the loaders over them.

Both kinds give square pictures of one size, so that batches are plain tensors: ``(3, S, S)`` uint8, and a target dict
with ``boxes`` (pixels of that square), ``labels`` (1 to the number of classes), ``image_id`` and ``scale`` (pixels of
the square per pixel of the picture on disk). A new source is a class with ``coco``, ``category_ids``,
``category_names``, ``__len__`` and ``__getitem__``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from ..extras import require
from ..settings import SceneSettings
from .scenes import compose


class DataError(ValueError):
    """A data folder that cannot be used; the message names the file and what is wrong with it."""


class ScenePictures(Dataset):
    """One split of the composed scenes, in memory."""

    def __init__(self, settings: SceneSettings, split: str) -> None:
        self.pictures, self.targets = compose(settings, split)
        # Of the pixels, so that a change to how scenes are composed is seen as well.
        self.digest = hashlib.sha256(self.pictures.numpy()).hexdigest()
        self.category_ids = list(range(10))
        self.category_names = [str(digit) for digit in range(10)]
        for index, target in enumerate(self.targets):
            target.update(image_id=index, scale=1.0)
        self.coco = coco_ground_truth(self.targets, settings.image_size, self.category_ids, self.category_names)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, dict]:
        return self.pictures[index], self.targets[index]


class CocoPictures(Dataset):
    """One split of a COCO-format folder: ``<root>/<split>2017/`` and ``<root>/annotations/instances_<split>2017.json``.

    Each picture is scaled so that its longer side is ``image_size`` and padded below and to the right with grey.
    Crowd regions and empty boxes are left out of the targets; evaluation sees the annotation file as it is.
    """

    def __init__(self, root: str | Path, split: str, image_size: int) -> None:
        root = Path(root)
        self.folder = root / f"{split}2017"
        annotations = root / "annotations" / f"instances_{split}2017.json"
        for path in (self.folder, annotations):
            if not path.exists():
                raise DataError(f"{path} does not exist; a COCO folder has it")
        content = annotations.read_bytes()
        self.digest = hashlib.sha256(content).hexdigest()
        try:
            self.coco = json.loads(content)
            self.images = sorted(self.coco["images"], key=lambda image: image["id"])
            categories = sorted(self.coco["categories"], key=lambda category: category["id"])
            self.category_ids = [category["id"] for category in categories]
            self.category_names = [str(category.get("name", category["id"])) for category in categories]
            label_of = {category: label for label, category in enumerate(self.category_ids, start=1)}
            self.objects: dict[int, list[tuple[list[float], int]]] = {image["id"]: [] for image in self.images}
            for annotation in self.coco["annotations"]:
                x, y, width, height = annotation["bbox"]
                if annotation.get("iscrowd", 0) or width <= 0 or height <= 0:
                    continue
                entry = ([x, y, x + width, y + height], label_of[annotation["category_id"]])
                self.objects[annotation["image_id"]].append(entry)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{annotations} is not a COCO instances file: {type(error).__name__}: {error}") from error
        if not self.images or not self.category_ids:
            raise DataError(f"{annotations} lists {len(self.images)} images and {len(self.category_ids)} categories")
        missing = next((i["file_name"] for i in self.images if not (self.folder / i["file_name"]).is_file()), None)
        if missing is not None:
            raise DataError(f"{self.folder / missing} is listed in {annotations} and does not exist")
        self.image_size = image_size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict]:
        image = self.images[index]
        path = self.folder / image["file_name"]
        try:
            with require("PIL.Image").open(path) as opened:
                picture = torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1)
        except OSError as error:
            raise DataError(f"{path} cannot be read as a picture: {error}") from error
        height, width = picture.shape[-2:]
        size = self.image_size
        scale = size / max(height, width)
        scaled = (max(1, round(height * scale)), max(1, round(width * scale)))
        if scaled != (height, width):
            picture = F.interpolate(picture[None].float(), size=scaled, mode="bilinear", antialias=True)[0]
            picture = picture.round().clamp(0, 255).to(torch.uint8)
        picture = F.pad(picture, (0, size - scaled[1], 0, size - scaled[0]), value=114)
        objects = self.objects[image["id"]]
        boxes = torch.tensor([box for box, _ in objects], dtype=torch.float32).reshape(-1, 4) * scale
        labels = torch.tensor([label for _, label in objects], dtype=torch.int64)
        return picture, {"boxes": boxes, "labels": labels, "image_id": image["id"], "scale": scale}


def coco_ground_truth(targets: list[dict], size: int, ids: list[int], names: list[str]) -> dict:
    """The COCO ``instances`` document of in-memory targets (square pictures of side ``size``)."""
    annotations = []
    for target in targets:
        for (x1, y1, x2, y2), label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": target["image_id"],
                    "category_id": ids[label - 1],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                }
            )
    return {
        "info": {"description": "scenes composed from the digits and photographs of scikit-learn"},
        "images": [
            {"id": t["image_id"], "file_name": f"{t['image_id']:06d}.png", "width": size, "height": size}
            for t in targets
        ],
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in zip(ids, names, strict=True)],
    }


def write_coco_folder(root: str | Path, split: str, pictures: ScenePictures) -> None:
    """Write a split of scenes as the COCO-format folder that ``CocoPictures`` (and ``--data-path``) reads."""
    image = require("PIL.Image")
    folder = Path(root) / f"{split}2017"
    folder.mkdir(parents=True, exist_ok=True)
    for entry, picture in zip(pictures.coco["images"], pictures.pictures, strict=True):
        image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / entry["file_name"])
    annotations = Path(root) / "annotations"
    annotations.mkdir(exist_ok=True)
    (annotations / f"instances_{split}2017.json").write_text(json.dumps(pictures.coco), encoding="utf-8")


def collate(samples: list[tuple[Tensor, dict]]) -> tuple[Tensor, list[dict]]:
    """Stack the pictures, keep the targets as a list."""
    return torch.stack([picture for picture, _ in samples]), [dict(target) for _, target in samples]


def to_device(pictures: Tensor, targets: list[dict], device: torch.device) -> tuple[Tensor, list[dict]]:
    """Move a batch, and turn its pictures into float32 in [0, 1]."""
    moved = [{**t, "boxes": t["boxes"].to(device), "labels": t["labels"].to(device)} for t in targets]
    return pictures.to(device).float() / 255, moved


def training_batches(
    pictures: Dataset, steps: int, batch_size: int, seed: int, workers: int = 0
) -> Iterator[tuple[Tensor, list[dict]]]:
    """Exactly ``steps`` batches in a seeded order: one permutation of the pictures after the other."""
    order = torch.Generator().manual_seed(seed)
    sampler = RandomSampler(pictures, num_samples=steps * batch_size, generator=order)
    # The loader draws its workers' base seed from this generator; without one it would move the global state.
    seeds = torch.Generator().manual_seed(seed)
    loader = DataLoader(pictures, batch_size, sampler=sampler, num_workers=workers, collate_fn=collate, generator=seeds)
    return iter(loader)


def evaluation_batches(pictures: Dataset, batch_size: int, workers: int = 0) -> DataLoader:
    """All pictures once, in order."""
    return DataLoader(pictures, batch_size, num_workers=workers, collate_fn=collate)
