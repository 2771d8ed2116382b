"""Pascal VOC's format: one XML file per picture, and lists of names. Reading and writing it, and nothing else."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from ..extras import require
from .listing import Listing, Object, Record, finite_box, positive
from .problems import DataError, Problems

CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor"
).split()
SUFFIXES = (".jpg", ".jpeg", ".JPEG", ".JPG", ".png", ".PNG", ".bmp")


class Layout(NamedTuple):
    """Where one set keeps its pictures, its XML files, its list of names, and its class names."""

    pictures: Path
    annotations: Path
    names: Path
    classes: tuple[Path, ...]


def layouts(root: Path, split: str) -> list[Layout]:
    """Every set of VOC's form in ``root``: the folder itself, ``VOCdevkit/VOC*`` or ``VOC*`` below it (all that have
    the split), or ILSVRC's detection set (``Data/DET/<split>``, in ``root`` or ``root/ILSVRC``).
    """
    years = [root, *sorted(root.glob("VOC[0-9]*")), *sorted((root / "VOCdevkit").glob("VOC[0-9]*"))]
    years = [year for year in years if (year / "Annotations").is_dir() and (year / "JPEGImages").is_dir()]
    if years:
        found = [
            Layout(
                year / "JPEGImages",
                year / "Annotations",
                year / "ImageSets" / "Main" / f"{split}.txt",
                (year / "classes.txt", root / "classes.txt"),
            )
            for year in years
        ]
        return [layout for layout in found if layout.names.is_file()] or found[:1]
    for base in (root, root / "ILSVRC"):
        if (base / "Data" / "DET").is_dir():
            names = base / "ImageSets" / "DET" / f"{split}.txt"
            folders = (base / "Data" / "DET" / split, base / "Annotations" / "DET" / split)
            return [Layout(*folders, names, (base / "classes.txt", root / "classes.txt"))]
    return []


def read_voc(layout: Layout, problems: Problems) -> Listing:
    """One set of VOC's form.

    XML boxes count pixels from 1 and include both ends; xmin - 1, ymin - 1, xmax, ymax are their edges, so that an area
    is the number of pixels, as in VOC's own scoring. Classes are those of ``classes.txt`` (a name per line) where there
    is one, VOC's 20 where all names are among them, and else the names found, sorted.

    Raises:
        DataError: the list of names is missing or empty, or no class is known.
    """
    try:
        content = layout.names.read_bytes()
        lines = [line.strip() for line in content.decode("utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        there = sorted(path.stem for path in layout.names.parent.glob("*.txt") if "_" not in path.stem)
        raise DataError(f"{layout.names} cannot be read ({error}); lists that are there: {there}") from error
    if not lines:
        raise DataError(f"{layout.names} lists no picture")
    digest = hashlib.sha256(content)
    known = _class_names(layout)
    records: list[Record] = []
    objects: list[list[tuple[str, Object]]] = []
    seen: set[str] = set()
    for line in lines:
        name = _name(layout, line)
        if name in seen:
            problems.add("duplicate picture", layout.names, f"{name} is listed again")
            continue
        seen.add(name)
        parsed = _parse(layout.annotations / f"{name}.xml", digest, problems)
        if parsed is None:
            continue
        width, height, suffix, found = parsed
        path = _picture(layout.pictures / name, suffix)
        record = Record(path, len(records) + 1, str(path.relative_to(layout.pictures)), width, height)
        records.append(record)
        objects.append(found)
    used = {name for found in objects for name, _ in found}
    names = known or (CLASSES if used <= set(CLASSES) else sorted(used))
    number = {name: index for index, name in enumerate(names, start=1)}
    for record, found in zip(records, objects, strict=True):
        for name, item in found:
            if name in number:
                record.objects.append(item._replace(category=number[name]))
            else:
                problems.add("unknown class", record.path, f"class {name!r} is not in classes.txt")
    return Listing(layout.names, records, list(enumerate(names, start=1)), digest.hexdigest())


def _class_names(layout: Layout) -> list[str]:
    for path in layout.classes:
        if path.is_file():
            names = [line.strip() for line in path.read_text("utf-8", errors="replace").splitlines() if line.strip()]
            if not names or len(set(names)) < len(names):
                raise DataError(f"{path}: {len(names)} class names, {len(set(names))} different ones")
            return names
    return []


def _name(layout: Layout, line: str) -> str:
    """The name in a line of a list, without the number that may follow it (a class's -1, 0 or 1; ILSVRC's count)."""
    name, _, number = line.rpartition(" ")
    if name and number.lstrip("-").isdigit() and not (layout.annotations / f"{line}.xml").is_file():
        return name.strip()
    return line


def _picture(stem: Path, suffix: str) -> Path:
    candidates = [stem.with_name(stem.name + end) for end in (suffix, *SUFFIXES) if end]
    return next((path for path in candidates if path.is_file()), candidates[0])


def _parse(path: Path, digest: Any, problems: Problems) -> tuple | None:
    """Width, height, the picture's suffix and the objects by class name, or None and a problem."""
    try:
        content = path.read_bytes()
    except OSError as error:
        problems.add("missing annotation", path, error.strerror or str(error))
        return None
    digest.update(content)
    try:
        root = ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        problems.add("unreadable annotation", path, f"no XML: {error}" if content else "the file is empty")
        return None
    found = []
    for index, element in enumerate(root.findall("object")):
        where = f"{path}, object {index}"
        name, box = (element.findtext("name") or "").strip(), element.find("bndbox")
        if not name or box is None:
            problems.add("malformed entry", where, f"name {name!r}, {'no ' if box is None else ''}bndbox")
            continue
        values = finite_box([_number(box.findtext(key)) for key in ("xmin", "ymin", "xmax", "ymax")], where, problems)
        if values is None:
            continue
        # Some tools count from 0 all the same: what is below 1 stays as it is.
        x1, y1 = (value - 1 if value >= 1 else value for value in values[:2])
        x2, y2 = values[2:]
        if x2 <= x1 or y2 <= y1:
            problems.add("empty box", where, f"xmin {values[0]:g}, ymin {values[1]:g}, xmax {x2:g}, ymax {y2:g}")
            continue
        difficult = (element.findtext("difficult") or "0").strip() not in ("0", "")
        found.append((name, Object((x1, y1, x2, y2), 0, difficult=difficult)))
    width, height = (positive(_number(root.findtext(f"size/{key}"))) for key in ("width", "height"))
    return width, height, Path((root.findtext("filename") or "").strip()).suffix, found


def _number(text: str | None) -> Any:
    """The number that a text holds, or the text, which the checks then name."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return text


def write_voc_folder(root: str | Path, split: str, pictures: Any, suffix: str = ".jpg") -> None:
    """Write a split of scenes as a VOC folder: pictures (JPEG, or ``suffix`` ".png"), XML files, the list of names."""
    image, root = require("PIL.Image"), Path(root)
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    names = []
    for index in range(len(pictures)):
        picture, target = pictures[index]
        name = f"{split}_{target['image_id']:06d}"
        names.append(name)
        image.fromarray(picture.permute(1, 2, 0).numpy()).save(root / "JPEGImages" / f"{name}{suffix}")
        tree = ElementTree.Element("annotation")
        ElementTree.SubElement(tree, "filename").text = f"{name}{suffix}"
        size = ElementTree.SubElement(tree, "size")
        for key, value in zip(("depth", "height", "width"), picture.shape, strict=True):
            ElementTree.SubElement(size, key).text = str(value)
        for (x1, y1, x2, y2), label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            element = ElementTree.SubElement(tree, "object")
            ElementTree.SubElement(element, "name").text = pictures.category_names[label - 1]
            ElementTree.SubElement(element, "difficult").text = "0"
            box = ElementTree.SubElement(element, "bndbox")
            for key, value in zip(("xmin", "ymin", "xmax", "ymax"), (x1 + 1, y1 + 1, x2, y2), strict=True):
                ElementTree.SubElement(box, key).text = f"{value:g}"
        ElementTree.ElementTree(tree).write(root / "Annotations" / f"{name}.xml")
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
