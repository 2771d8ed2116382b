"""Broken data is counted and named when the set is opened, and left out or refused; what is legal is no problem."""

from __future__ import annotations

import struct
import zlib

import pytest
import torch

pytest.importorskip("torchvision")
np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")

from harness_folders import XML, change, coco_folder, opened, picture, voc_folder  # noqa: E402

from kdkernels.harness import data  # noqa: E402
from kdkernels.harness.data.problems import KINDS  # noqa: E402
from kdkernels.harness.evaluate import Evaluator  # noqa: E402


@pytest.fixture
def sound(tmp_path):
    return coco_folder(tmp_path)


def huge_png():
    """A header that promises 60,000 x 60,000 pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + b"\0\0\0\1IDAT"


FILES = {
    "empty": (lambda path: path.write_bytes(b""), "unreadable picture", "the file is empty"),
    "text": (lambda path: path.write_text("404 not found"), "unreadable picture", "cannot identify"),
    "cut in its header": (lambda path: path.write_bytes(path.read_bytes()[:30]), "unreadable picture", "Error"),
    "huge": (lambda path: path.write_bytes(huge_png()), "unreadable picture", "DecompressionBomb"),
    "gone": (lambda path: path.unlink(), "missing picture", "no such file"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "unreadable picture", "Error"),
    "dangling link": (lambda path: (path.unlink(), path.symlink_to("nowhere")), "missing picture", "no such file"),
    "other size": (lambda path: Image.new("RGB", (48, 32)).save(path), "wrong size", "48 x 32, but annotated as 96"),
    "turned": (lambda path: Image.new("RGB", (64, 96)).save(path), "wrong size", "EXIF orientation?"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_is_found_when_the_set_is_opened(sound, name):
    damage, kind, what = FILES[name]
    damage(picture(sound))
    pictures = opened(sound)
    assert pictures.problems.counts == {kind: 1} and pictures.ids == [1, 3]
    (example,) = pictures.problems.examples[kind]
    assert str(picture(sound)) in example and what in example
    assert str(picture(sound)) in str(pictures.problems) and KINDS[kind] in str(pictures.problems)
    assert [image["id"] for image in pictures.coco["images"]] == [1, 3]
    assert [entry["image_id"] for entry in pictures.coco["annotations"]] == [1, 3]
    with pytest.raises(data.DataError, match=rf"{kind}: 1 .*2\.jpg"):
        opened(sound, on_bad="refuse")


def entry(**changed):
    return lambda document: document["annotations"].append({**document["annotations"][0], "id": 9, **changed})


ENTRIES = {
    "outside": (entry(bbox=[200, 8, 10, 10]), "box outside", 3),
    "left of it": (entry(bbox=[-50, 8, 20, 10]), "box outside", 3),
    "partly outside": (entry(bbox=[80, 8, 40, 10]), "box partly outside", 4),
    "no width": (entry(bbox=[8, 8, 0, 10]), "empty box", 3),
    "hardly any width": (entry(bbox=[8, 8, 0.001, 10]), "empty box", 3),
    "negative height": (entry(bbox=[8, 8, 10, -4]), "empty box", 3),
    "NaN": (entry(bbox=[8, float("nan"), 10, 10]), "box not finite", 3),
    "infinite": (entry(bbox=[8, 8, float("inf"), 10]), "box not finite", 3),
    "three numbers": (entry(bbox=[8, 8, 10]), "malformed box", 3),
    "null": (entry(bbox=None), "malformed box", 3),
    "text": (entry(bbox=["8", "8", "10", "10"]), "malformed box", 3),
    "no such class": (entry(category_id=6), "unknown class", 3),
    "class null": (entry(category_id=None), "unknown class", 3),
    "no such picture": (entry(image_id=77), "unknown picture", 3),
    "no picture": (entry(image_id=None), "malformed entry", 3),
    "no object": (lambda document: document["annotations"].append("nothing"), "malformed entry", 3),
    "same again": (entry(id=1), "duplicate object", 3),
    "same id": (entry(id=1, bbox=[1, 1, 10, 10]), "duplicate object id", 4),
    "same picture": (lambda d: d["images"].append({**d["images"][0], "file_name": "2.jpg"}), "duplicate picture", 3),
    "no file name": (lambda d: d["images"].append({"id": 4}), "malformed entry", 3),
    "image null": (lambda d: d["images"].append(None), "malformed entry", 3),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_a_broken_entry_is_left_out_alone(sound, name):
    edit, kind, objects = ENTRIES[name]
    change(sound, edit)
    pictures = opened(sound)
    assert pictures.problems.counts == {kind: 1} and len(pictures) == 3
    assert len(pictures.coco["annotations"]) == objects == sum(len(pictures[i][1]["labels"]) for i in range(3))
    assert len({entry["id"] for entry in pictures.coco["annotations"]}) == objects
    for _, target in (pictures[i] for i in range(3)):
        boxes = target["boxes"]
        assert torch.isfinite(boxes).all() and (boxes[:, 2:] > boxes[:, :2]).all()
        assert boxes.min() >= 0 and boxes[:, 2].max() <= 64 and boxes[:, 3].max() <= target["size"][0]
    with pytest.raises(data.DataError, match=kind):
        opened(sound, on_bad="refuse")


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d["images"].append({"id": 4, "file_name": "1.jpg", "width": 96, "height": 64}),  # without objects
        lambda d: [image.pop("width") for image in d["images"]],
        lambda d: [image.update(width=0, height=None) for image in d["images"]],
        lambda d: [a.pop(key) for a in d["annotations"] for key in ("id", "area", "iscrowd")],
        entry(bbox=[-0.4, -1, 96.8, 65.5]),  # a rounding beyond the border
        lambda d: d["annotations"].clear(),
        lambda d: (d["images"][0].update(id=2**70), d["annotations"][0].update(image_id=2**70)),
        lambda d: (
            [e.update(id=f"name {e['id']}") for e in d["images"]]
            + [a.update(image_id=f"name {a['image_id']}") for a in d["annotations"]]
        ),
    ],
)
def test_what_is_legal_is_no_problem(sound, edit):
    change(sound, edit)
    pictures = opened(sound, on_bad="refuse")
    assert not pictures.problems and str(pictures.problems) == "no problems in the data"
    for index in range(len(pictures)):
        assert pictures[index][1]["boxes"].shape[1] == 4
    assert all(isinstance(number, int) for number in pictures.ids)
    assert Evaluator(pictures, 2, torch.device("cpu")).score([]).mean_ap == 0


def test_a_rounding_beyond_the_border_is_clipped_for_training_alone(sound):
    change(sound, entry(bbox=[-0.5, 8, 97, 57]))
    pictures = opened(sound, on_bad="refuse")
    assert pictures.coco["annotations"][1]["bbox"] == [-0.5, 8, 97, 57]
    height, width = pictures[0][1]["size"]
    assert pictures[0][1]["boxes"][1].tolist() == pytest.approx([0, 8 * height / 64, width, height])


def test_an_annotation_file_that_is_cut_is_refused(sound):
    path = sound / "annotations" / "instances_train2017.json"
    for content in (b"", path.read_bytes()[:100], b"\xff\xfe\x00", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(data.DataError, match=r"2017\.json is not a COCO instances file"):
            opened(sound)


def test_nothing_left_is_refused_with_the_reasons(sound):
    for number in (1, 2, 3):
        picture(sound, number).write_bytes(b"")
    with pytest.raises(data.DataError, match=r"no picture can be used; 3 problems.*\n  unreadable picture: 3"):
        opened(sound)


# --- VOC

BOX = "<bndbox><xmin>{}</xmin><ymin>9</ymin><xmax>48</xmax><ymax>48</ymax></bndbox>"


@pytest.mark.parametrize(
    ("content", "kind", "left"),
    [
        (None, "missing annotation", 1),
        ("", "unreadable annotation", 1),
        ("<annotation><size>", "unreadable annotation", 1),
        ("picture,0,0,1,1", "unreadable annotation", 1),
        (XML.format("<object><name>dog</name></object>"), "malformed entry", 2),
        (XML.format(f"<object>{BOX.format(9)}</object>"), "malformed entry", 2),
        (XML.format(f"<object><name>dog</name>{BOX.format('x')}</object>"), "malformed box", 2),
        (XML.format("<object><name>dog</name><bndbox><xmin>1</xmin></bndbox></object>"), "malformed box", 2),
        (XML.format(f"<object><name>dog</name>{BOX.format('nan')}</object>"), "box not finite", 2),
        (XML.format(f"<object><name>dog</name>{BOX.format(50)}</object>"), "empty box", 2),
        (XML.format(f"<object><name>dog</name>{BOX.format(-20)}</object>"), "box partly outside", 2),
        (XML.replace("96", "97").format(""), "wrong size", 1),
        (XML.format(""), None, 2),
        ("<annotation/>", None, 2),
    ],
)
def test_broken_annotations_of_voc(tmp_path, content, kind, left):
    voc_folder(tmp_path)
    if content is None:
        (tmp_path / "Annotations" / "a.xml").unlink()
    else:
        (tmp_path / "Annotations" / "a.xml").write_text(content)
    pictures = opened(tmp_path)
    assert len(pictures) == left and pictures.problems.counts == ({kind: 1} if kind else {})
    if kind:
        assert "/a." in pictures.problems.examples[kind][0]
        with pytest.raises(data.DataError, match=kind):
            opened(tmp_path, on_bad="refuse")


def test_a_list_that_names_pictures_twice_or_in_vain(tmp_path):
    names = voc_folder(tmp_path) / "ImageSets" / "Main" / "train.txt"
    (tmp_path / "JPEGImages" / "b.png").unlink()
    names.write_text("a\nb\na\n")
    pictures = opened(tmp_path)
    assert pictures.problems.counts == {"duplicate picture": 1, "missing picture": 1} and len(pictures) == 1
    names.write_text("\n")
    with pytest.raises(data.DataError, match=r"train\.txt lists no picture"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("keywords", "name"),
    [({"on_bad": "ignore"}, "on_bad"), ({"hflip": 2}, "hflip"), ({"hflip": float("nan")}, "hflip")],
)
def test_bad_options_are_named(sound, keywords, name):
    with pytest.raises(ValueError, match=name):
        opened(sound, **keywords)
