"""The sets of pictures: scenes in memory, folders with annotations, folders without.

A set gives a picture, uint8 ``(3, H, W)``, and a target dict: ``boxes`` (pixels of that picture), ``labels`` (1 to the
number of classes), ``image_id``, ``size`` (height and width of the picture without padding) and ``scale`` (x and y:
pixels of the picture per pixel of the file). A new kind is a class with ``coco``, ``category_ids``,
``category_names``, ``hflip`` (how often training mirrors a picture), ``__len__`` and ``__getitem__``; ``problems`` and
``read`` where its files can be broken.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..settings import SceneSettings
from .coco import is_coco, read_coco
from .files import SUFFIXES, Undecodable, checked, decode
from .geometry import Size, placed
from .listing import Listing, Record, joined
from .problems import DataError, Finding, Problems
from .scenes import compose
from .voc import layouts, read_voc

ON_BAD = ("skip", "refuse")


class ScenePictures(Dataset):
    """One split of the composed scenes, in memory."""

    hflip = 0.0  # a mirrored digit is none

    def __init__(self, settings: SceneSettings, split: str) -> None:
        self.pictures, self.targets = compose(settings, split)
        # Of the pixels, so that a change to how scenes are composed is seen as well.
        self.digest = hashlib.sha256(self.pictures.numpy()).hexdigest()
        self.category_ids = list(range(10))
        self.category_names = [str(digit) for digit in range(10)]
        size = settings.image_size
        for index, target in enumerate(self.targets):
            target.update(image_id=index, scale=(1.0, 1.0), size=(size, size))
        self.coco = coco_ground_truth(self.targets, size, self.category_ids, self.category_names)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, dict]:
        return self.pictures[index], self.targets[index]


class FolderPictures(Dataset):
    """Checked pictures on disk; see :func:`open_pictures`.

    Attributes:
        coco: the ground truth as a COCO document, in pixels of the files, without what was left out. Crowd regions and
            difficult objects have ``iscrowd`` 1 there, so that COCO's scoring ignores what is found inside them; VOC's
            also have ``difficult`` 1.
        problems: what was left out, and why.
        digest: of the annotations, and of what was left out.
    """

    def __init__(
        self, listing: Listing, *, size: Size, problems: Problems, on_bad: str = "skip", hflip: float = 0.5
    ) -> None:
        if on_bad not in ON_BAD:
            raise ValueError(f"on_bad must be one of {ON_BAD}, got {on_bad!r}")
        if not 0 <= hflip <= 1:
            raise ValueError(f"hflip must be a probability, got {hflip!r}")
        self.size, self.problems, self.on_bad, self.hflip = size, problems, on_bad, hflip
        # A refusal decodes everything now: it must not come an hour later.
        records = checked(listing.records, problems, pixels=on_bad == "refuse")
        if problems and on_bad == "refuse":
            raise DataError(f"{listing.source}: {problems}")
        if not records:
            raise DataError(f"{listing.source}: no picture can be used; {problems}")
        self.category_ids = [number for number, _ in listing.categories]
        self.category_names = listing.names
        self.paths = [str(record.path) for record in records]
        self.ids = [record.id for record in records]
        self._names = [(record.name, record.width, record.height) for record in records]
        self._objects = _Objects(records)
        self.digest = listing.digest
        if problems:
            used = [listing.digest, *(f"{record.name} {len(record.objects)}" for record in records)]
            self.digest = hashlib.sha256("\n".join(used).encode(errors="surrogateescape")).hexdigest()

    @property
    def coco(self) -> dict[str, Any]:
        return {
            "info": {},
            "images": [
                {"id": number, "file_name": name, "width": width, "height": height}
                for number, (name, width, height) in zip(self.ids, self._names, strict=True)
            ],
            "annotations": self._objects.annotations(self.ids),
            "categories": [
                {"id": number, "name": name}
                for number, name in zip(self.category_ids, self.category_names, strict=True)
            ],
        }

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> tuple[Tensor, dict]:
        """Picture and target; Undecodable where the file cannot be decoded."""
        picture = decode(Path(self.paths[index]))
        height, width = picture.shape[-2:]
        _, *known = self._names[index]
        if [width, height] != known:
            what = f"{width} x {height}, but {known[0]} x {known[1]} when the set was opened"
            raise Undecodable(Finding("undecodable picture", self.paths[index], what))
        boxes, categories = self._objects.trained(index)
        boxes = np.clip(boxes, 0, np.array([width, height, width, height], dtype=np.float32))
        picture, boxes, (new_height, new_width) = placed(picture, torch.from_numpy(boxes), self.size)
        return picture, {
            "boxes": boxes,
            "labels": torch.from_numpy(np.searchsorted(self.category_ids, categories).astype(np.int64) + 1),
            "image_id": self.ids[index],
            "scale": (new_width / width, new_height / height),
            "size": (new_height, new_width),
        }

    def __getitem__(self, index: int) -> tuple[Tensor, dict]:
        """As ``read``; the next picture that can be decoded stands in for one that cannot, and its target has the
        ``findings``, which the loaders count."""
        findings = []
        for step in range(len(self)):
            try:
                picture, target = self.read((index + step) % len(self))
            except Undecodable as error:
                if self.on_bad == "refuse":
                    raise DataError(str(error)) from error
                findings.append(error.finding)
                continue
            if findings:
                target["findings"] = findings
            return picture, target
        raise DataError(f"none of {len(self)} pictures can be decoded; {findings[0].where}: {findings[0].what}")


class UnlabeledPictures(FolderPictures):
    """All pictures of a folder and the folders below it, without annotations; targets are empty, ``unlabeled`` True.

    Files without a picture's ending, hidden ones, and links to folders are passed over.

    Args:
        folder: where to look.
        size, on_bad, hflip: as in :func:`open_pictures`.

    Raises:
        DataError: no such folder, no picture in it, or one of them is broken and ``on_bad`` is "refuse".
    """

    def __init__(self, folder: str | Path, size: Size, *, on_bad: str = "skip", hflip: float = 0.5) -> None:
        folder = Path(folder)
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder")
        paths = sorted(
            Path(place) / name
            for place, _, names in os.walk(folder)
            for name in names
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")
        )
        if not paths:
            raise DataError(f"{folder} has no picture ({', '.join(sorted(SUFFIXES))}) in it or below")
        records = [Record(path, number, str(path.relative_to(folder))) for number, path in enumerate(paths)]
        digest = hashlib.sha256("\n".join(record.name for record in records).encode(errors="surrogateescape"))
        listing = Listing(folder, records, [], digest.hexdigest())
        super().__init__(listing, size=size, problems=Problems(), on_bad=on_bad, hflip=hflip)

    def read(self, index: int) -> tuple[Tensor, dict]:
        picture, target = super().read(index)
        return picture, {**target, "unlabeled": True}


def open_pictures(
    paths: Iterable[str | Path] | str | Path,
    split: str,
    *,
    size: Size,
    on_bad: str = "skip",
    classes: Iterable[str] | None = None,
    hflip: float = 0.5,
) -> FolderPictures:
    """One split of one or more annotated folders, joined; in COCO's form, VOC's or that of ILSVRC's detection set.

    Every file's header and every box are looked at now, no pixels. What is wrong is left out and counted in
    ``problems`` (its text, ``str(problems)``, names the first of each kind); a file that turns out to be undecodable
    while training is replaced by the next good one, counted and named once. A damage that its decoder does not notice
    (JPEG data altered in the middle) is not noticed here.

    Args:
        paths: folders. COCO: ``annotations/instances_<split>2017.json``, ``<split>2017/``. VOC: ``JPEGImages``,
            ``Annotations``, ``ImageSets/Main/<split>.txt``, or ``VOCdevkit/VOC*`` with these, all years that have the
            split. ILSVRC: ``Data/DET/<split>``, ``Annotations/DET/<split>``, ``ImageSets/DET/<split>.txt``.
        split: "train", "val", "trainval", "test": as the files are named.
        size: what pictures become.
        on_bad: "skip", or "refuse": a DataError with the counts and the first of each kind; it also decodes every
            picture once, which takes minutes for large sets, so that nothing can go wrong later.
        classes: the ``category_names`` of the set that is trained on, where this is another split of it.
        hflip: probability that training mirrors a picture.

    Raises:
        DataError: a folder of neither form, a file that is missing or not of its format, no usable picture, or
            ``on_bad="refuse"`` and a problem.
    """
    problems, listings = Problems(), []
    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not paths:
        raise DataError("no folder is given")
    for path in map(Path, paths):
        if not path.is_dir():
            raise DataError(f"{path} is not a folder")
        found = layouts(path, split)
        if found:
            listings += [read_voc(layout, problems) for layout in found]
        elif is_coco(path, split):
            listings.append(read_coco(path, split, problems))
        else:
            raise DataError(
                f"{path} is no folder of COCO's form (annotations/instances_{split}2017.json, {split}2017/), of VOC's "
                f"(JPEGImages/, Annotations/, ImageSets/Main/{split}.txt; or VOCdevkit/VOC*) or of ILSVRC's (Data/DET/)"
            )
    listing = joined(listings, classes, problems)
    return FolderPictures(listing, size=size, problems=problems, on_bad=on_bad, hflip=hflip)


class _Objects:
    """The objects of all pictures in flat arrays: a million of them as Python objects would be a gigabyte, which worker
    processes copy as they touch it.
    """

    def __init__(self, records: list[Record]) -> None:
        flat = [item for record in records for item in record.objects]
        self.ends = np.cumsum([len(record.objects) for record in records])
        self.boxes = np.array([item.box for item in flat], dtype=np.float64).reshape(-1, 4)
        self.categories = np.array([item.category for item in flat], dtype=np.int64)
        self.crowd = np.array([item.crowd for item in flat], dtype=bool)
        self.difficult = np.array([item.difficult for item in flat], dtype=bool)
        widths, heights = (self.boxes[:, 2:] - self.boxes[:, :2]).T
        given = np.array([np.nan if item.area is None else item.area for item in flat], dtype=np.float64)
        self.areas = np.where(np.isnan(given), widths * heights, given)

    def trained(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes and category ids of a picture's targets: no crowd, nothing difficult."""
        of = slice(self.ends[index - 1] if index else 0, self.ends[index])
        keep = ~(self.crowd[of] | self.difficult[of])
        return self.boxes[of][keep].astype(np.float32), self.categories[of][keep]

    def annotations(self, ids: list[int]) -> list[dict[str, Any]]:
        """All of them as COCO's annotations."""
        picture = np.searchsorted(self.ends, np.arange(len(self.boxes)), side="right").tolist()
        extent = np.concatenate([self.boxes[:, :2], self.boxes[:, 2:] - self.boxes[:, :2]], axis=1)
        ignored = (self.crowd | self.difficult).astype(int)
        columns = (array.tolist() for array in (self.categories, extent, self.areas, ignored))
        annotations = [
            # Not the file's own id: pycocotools takes 0 for "no match".
            {"id": n, "image_id": ids[at], "category_id": category, "bbox": box, "area": area, "iscrowd": ignore}
            for n, (at, category, box, area, ignore) in enumerate(zip(picture, *columns, strict=True), start=1)
        ]
        for index in np.flatnonzero(self.difficult).tolist():
            annotations[index]["difficult"] = 1
        return annotations


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
