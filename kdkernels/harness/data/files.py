"""Picture files: their size from the header, their pixels as a tensor, and what a list says against what is there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..extras import require
from .listing import Object, Record
from .problems import Finding, Problems

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
#: Pixels that a box may be beyond the picture's border without a word: roundings, and counting from 0 or 1.
TOLERANCE = 1.0
#: Least width and height of a box: float32 must still hold it after scaling, or a logarithm of 0 ends the training.
LEAST = 0.01


class Undecodable(Exception):
    """A picture file whose pixels cannot be had; holds the finding."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(f"{finding.where}: {finding.what}")
        self.finding = finding


def decode(path: Path) -> Tensor:
    """The pixels as stored, uint8 ``(3, H, W)``.

    Grey, palette and CMYK pictures become RGB, 16 bits become 8 (the upper ones), transparency is dropped, the first
    frame is taken. An EXIF orientation is not applied: boxes are in stored pixels.

    Raises:
        Undecodable: whatever goes wrong.
    """
    image = require("PIL.Image")
    try:
        with image.open(path) as opened:
            if opened.mode.startswith("I"):  # 16 bits of grey; convert() would cut them off at 255
                grey = np.asarray(opened).astype(np.int64).clip(0, 65535) >> 8
                pixels = np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
            else:
                pixels = np.array(opened.convert("RGBA" if opened.mode == "P" else "RGB"))[..., :3]
        return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
    except Exception as error:  # PIL's readers raise whatever a damaged file makes them raise
        raise Undecodable(Finding("undecodable picture", str(path), f"{type(error).__name__}: {error}")) from error


def header(path: Path) -> tuple[int, int] | Finding:
    """Height and width as the file's header says, without decoding; or what is wrong."""
    try:
        with require("PIL.Image").open(path) as opened:
            return opened.height, opened.width
    except FileNotFoundError:
        return Finding("missing picture", str(path), "no such file")
    except Exception as error:
        what = "the file is empty" if _is_empty(path) else f"{type(error).__name__}: {error}"
        return Finding("unreadable picture", str(path), what)


def checked(records: list[Record], problems: Problems, pixels: bool = False) -> list[Record]:
    """The records whose file is there with a readable header of the annotated size, with the boxes that are in it.

    Their width and height are the file's. ``pixels`` decodes every file as well.
    """
    kept = []
    for record, found in zip(records, _headers([record.path for record in records], pixels), strict=True):
        if isinstance(found, Finding):
            problems.add(*found)
            continue
        height, width = found
        said = record.width or width, record.height or height
        if said != (width, height):
            what = f"{width} x {height}, but annotated as {said[0]} x {said[1]}"
            what += " (turned by its EXIF orientation?)" if said == (height, width) else ""
            problems.add("wrong size", record.path, what)
            continue
        record.height, record.width = height, width
        record.objects = list(_inside(record, problems))
        kept.append(record)
    return kept


def _inside(record: Record, problems: Problems) -> Iterator[Object]:
    width, height = record.width, record.height
    for index, item in enumerate(record.objects):
        x1, y1, x2, y2 = item.box
        box = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
        where = f"{record.path}, object {index}"
        told = f"box {x1:g}, {y1:g}, {x2:g}, {y2:g} in a picture of {width} x {height}"
        if min(x2 - x1, y2 - y1) < LEAST:
            problems.add("empty box", where, told)
            continue
        if min(box[2] - box[0], box[3] - box[1]) < LEAST:
            problems.add("box outside", where, told)
            continue
        if max(abs(a - b) for a, b in zip(box, item.box, strict=True)) <= TOLERANCE:
            yield item  # as it is: the scores are then those of the annotation file; training clips it
            continue
        problems.add("box partly outside", where, told)
        area = (box[2] - box[0]) * (box[3] - box[1])
        yield item._replace(box=box, area=None if item.area is None else min(item.area, area))


def _headers(paths: list[Path], pixels: bool) -> Iterable[tuple[int, int] | Finding]:
    # Threads: most of the time goes to waiting for the disk, and decoding releases the interpreter.
    with ThreadPoolExecutor(8) as pool:
        yield from pool.map(_decoded if pixels else header, paths, chunksize=1)


def _decoded(path: Path) -> tuple[int, int] | Finding:
    found = header(path)
    if isinstance(found, Finding):
        return found
    try:
        return tuple(decode(path).shape[-2:])
    except Undecodable as error:
        return error.finding


def _is_empty(path: Path) -> bool:
    try:
        return path.stat().st_size == 0
    except OSError:
        return False
