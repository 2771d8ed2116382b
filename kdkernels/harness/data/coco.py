"""COCO's format: one JSON file of instances beside a folder of pictures. Reading and writing it, and nothing else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..extras import require
from .listing import Listing, Object, Record, finite_box, positive
from .problems import DataError, Problems


def is_coco(root: Path, split: str) -> bool:
    """Whether there is anything of COCO's layout here."""
    return (root / "annotations").is_dir() or (root / f"{split}2017").is_dir()


def read_coco(root: Path, split: str, problems: Problems) -> Listing:
    """``<root>/annotations/instances_<split>2017.json`` and ``<root>/<split>2017/``, or both without the "2017".

    Pictures come by id; ids that are no integers of 64 bits are replaced by 1, 2, ... in the file's order.

    Raises:
        DataError: folder or file is missing, the file is no JSON of COCO's form, or lists no picture or category.
    """
    plain = not (root / "annotations" / f"instances_{split}2017.json").exists() and (root / split).is_dir()
    name = split if plain else f"{split}2017"
    folder, path = root / name, root / "annotations" / f"instances_{name}.json"
    for needed in (folder, path):
        if not needed.exists():
            raise DataError(f"{needed} does not exist; a COCO folder has it")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    try:
        document = json.loads(content)
        images, annotations = list(document["images"]), list(document["annotations"])
        categories = sorted((int(entry["id"]), str(entry.get("name", entry["id"]))) for entry in document["categories"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is not a COCO instances file: {type(error).__name__}: {error}") from error
    if not images or not categories:
        raise DataError(f"{path} lists {len(images)} images and {len(categories)} categories")
    if any(abs(number) >= 2**62 for number, _ in categories):
        raise DataError(f"{path} has a category id beyond 64 bits")
    if len(dict(categories)) < len(categories):
        raise DataError(f"{path} gives two categories the same id")
    by_id = _records(images, folder, path, problems)
    _add_objects(annotations, by_id, {number for number, _ in categories}, path, problems)
    records = list(by_id.values())
    if all(isinstance(key, int) and abs(key) < 2**62 for key in by_id):
        records.sort(key=lambda record: record.id)
    else:
        for number, record in enumerate(records, start=1):
            record.id = number
    return Listing(path, records, categories, hashlib.sha256(content).hexdigest())


def _records(images: list[Any], folder: Path, path: Path, problems: Problems) -> dict[Any, Record]:
    by_id: dict[Any, Record] = {}
    for index, image in enumerate(images):
        key = image.get("id") if isinstance(image, dict) else None
        name = image.get("file_name") if isinstance(image, dict) else None
        if not isinstance(key, (int, str)) or not isinstance(name, str) or not name or "\0" in name:
            problems.add("malformed entry", f"{path}, images[{index}]", f"id {key!r}, file_name {name!r}")
        elif key in by_id:
            problems.add("duplicate picture", f"{path}, images[{index}]", f"id {key!r} again, for {name}")
        else:
            by_id[key] = Record(folder / name, key, name, positive(image.get("width")), positive(image.get("height")))
    return by_id


def _add_objects(
    annotations: list[Any], by_id: dict[Any, Record], categories: set[int], path: Path, problems: Problems
) -> None:
    seen: dict[Any, int] = {}  # by id, the hash of what it was given to: sets have a million objects
    for index, entry in enumerate(annotations):
        where = f"{path}, annotations[{index}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("image_id"), (int, str)):
            problems.add("malformed entry", where, "no object with an image_id")
            continue
        picture, category = entry["image_id"], entry.get("category_id")
        if picture not in by_id:
            problems.add("unknown picture", where, f"image_id {picture!r} is not among the images")
            continue
        if not isinstance(category, int) or category not in categories:
            problems.add("unknown class", where, f"category_id {category!r} is not among the categories")
            continue
        values = finite_box(entry.get("bbox"), where, problems)
        if values is None:
            continue
        key, whole = entry.get("id"), hash((picture, category, values))
        if isinstance(key, (int, str)):
            if seen.get(key) == whole:
                problems.add("duplicate object", where, f"id {key!r} again, with the same box")
                continue
            if key in seen:
                problems.add("duplicate object id", where, f"id {key!r} again, for another object")
            seen[key] = whole
        x, y, width, height = values
        if width <= 0 or height <= 0:
            problems.add("empty box", where, f"width {width:g}, height {height:g}")
            continue
        area = entry.get("area")
        area = float(area) if isinstance(area, (int, float)) and 0 < area < 1e18 else None
        crowd, difficult = bool(entry.get("iscrowd", 0)), bool(entry.get("difficult", 0))
        box = (x, y, x + width, y + height)
        by_id[picture].objects.append(Object(box, category, crowd and not difficult, difficult, area))


def write_coco_folder(root: str | Path, split: str, pictures: Any, suffix: str = ".png") -> None:
    """Write a split of scenes as a COCO folder; ``suffix`` ".png" keeps every bit, ".jpg" does not."""
    image = require("PIL.Image")
    folder = Path(root) / f"{split}2017"
    folder.mkdir(parents=True, exist_ok=True)
    document = {**pictures.coco, "images": []}
    for entry, picture in zip(pictures.coco["images"], pictures.pictures, strict=True):
        name = Path(entry["file_name"]).with_suffix(suffix).name
        document["images"].append({**entry, "file_name": name})
        image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / name)
    annotations = Path(root) / "annotations"
    annotations.mkdir(exist_ok=True)
    (annotations / f"instances_{split}2017.json").write_text(json.dumps(document), encoding="utf-8")
