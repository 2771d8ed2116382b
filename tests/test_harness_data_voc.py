"""Folders of Pascal VOC's form, alone and joined, and ILSVRC's detection set."""

from __future__ import annotations

import shutil

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("torchvision")
Image = pytest.importorskip("PIL.Image")

from harness_parts import SMALL  # noqa: E402

from kdkernels.harness import data  # noqa: E402

SQUARE = data.Size(square=160)
OBJECT = "<object><name>{name}</name>{more}<bndbox>{box}</bndbox></object>"


def an_object(name, x1, y1, x2, y2, more=""):
    box = f"<xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
    return OBJECT.format(name=name, box=box, more=more)


def voc_folder(root, split, entries, size=(200, 100)):
    """``entries``: name of a picture to the text of its objects."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, objects in entries.items():
        Image.new("RGB", size, (200, 200, 200)).save(root / "JPEGImages" / f"{name}.jpg")
        head = f"<filename>{name}.jpg</filename><size><width>{size[0]}</width><height>{size[1]}</height></size>"
        (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{head}{objects}</annotation>")
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in entries))
    return root


def test_scenes_written_as_a_voc_folder_come_back(tmp_path):
    scenes = data.ScenePictures(SMALL, "val")
    data.write_voc_folder(tmp_path, "val", scenes, suffix=".png")
    read = data.open_pictures(tmp_path, "val", size=SQUARE)
    assert len(read) == len(scenes) == 6 and not read.problems
    assert read.category_names == sorted(read.category_names)
    for (picture, target), (mine, wanted) in zip([read[i] for i in range(6)], [scenes[i] for i in range(6)]):
        assert torch.equal(picture, mine) and torch.equal(target["boxes"], wanted["boxes"])
        assert [read.category_names[i - 1] for i in target["labels"]] == [str(i - 1) for i in wanted["labels"].tolist()]


def test_jpeg_pictures_come_back_nearly(tmp_path):
    scenes = data.ScenePictures(SMALL, "val")
    data.write_voc_folder(tmp_path / "voc", "val", scenes)
    data.write_coco_folder(tmp_path / "coco", "val", scenes, suffix=".jpg")
    for folder in ("voc", "coco"):
        picture, _ = data.open_pictures(tmp_path / folder, "val", size=SQUARE)[0]
        assert 0 < (picture.float() - scenes[0][0].float()).abs().mean() < 6


def test_boxes_count_from_one_and_difficult_objects_are_ignored(tmp_path):
    objects = an_object("dog", 1, 1, 200, 100) + an_object("cat", 11, 21, 30, 60, "<difficult>1</difficult>")
    pictures = data.open_pictures(voc_folder(tmp_path, "train", {"a": objects}), "train", size=SQUARE)
    _, target = pictures[0]
    assert target["boxes"].tolist() == [[0, 0, 160, 80]], "the whole picture"
    assert target["labels"].tolist() == [12] and pictures.category_names[11] == "dog", "VOC's own 20 classes"
    dog, cat = pictures.coco["annotations"]
    assert dog["bbox"] == [0, 0, 200, 100] and dog["area"] == 20000 and not dog["iscrowd"] and "difficult" not in dog
    assert cat["bbox"] == [10, 20, 20, 40] and cat["iscrowd"] == cat["difficult"] == 1


def test_years_of_a_devkit_are_joined_where_they_have_the_split(tmp_path):
    for year in ("VOC2007", "VOC2012"):
        voc_folder(tmp_path / "VOCdevkit" / year, "trainval", {f"{year}_1": an_object("dog", 5, 5, 50, 50), "both": ""})
    voc_folder(tmp_path / "VOCdevkit" / "VOC2007", "test", {"t": an_object("cat", 5, 5, 50, 50)})
    train = data.open_pictures(tmp_path, "trainval", size=SQUARE)
    test = data.open_pictures([tmp_path], "test", size=SQUARE, classes=train.category_names)
    assert len(train) == 4 and len(test) == 1 and len(set(train.ids)) == 4
    assert train.category_names == test.category_names and len(train.category_names) == 20
    again = data.open_pictures(
        [tmp_path / "VOCdevkit" / "VOC2007", tmp_path / "VOCdevkit" / "VOC2012"], "trainval", size=SQUARE
    )
    assert again.digest == train.digest and again.coco == train.coco
    assert [len(train[i][1]["labels"]) for i in range(4)] == [1, 0, 1, 0], "a picture without objects is one"
    with pytest.raises(data.DataError, match=r"val\.txt cannot be read.*'trainval'"):
        data.open_pictures(tmp_path, "val", size=SQUARE)


def test_sets_of_different_classes_are_joined_by_name(tmp_path):
    one = voc_folder(tmp_path / "one", "train", {"a": an_object("owl", 1, 1, 50, 50) + an_object("emu", 1, 1, 40, 40)})
    two = voc_folder(tmp_path / "two", "train", {"b": an_object("owl", 1, 1, 50, 50) + an_object("yak", 1, 1, 40, 40)})
    both = data.open_pictures([one, two], "train", size=SQUARE)
    assert both.category_names == ["emu", "owl", "yak"] and both.category_ids == [1, 2, 3]
    assert [both[i][1]["labels"].tolist() for i in (0, 1)] == [[2, 1], [2, 3]] and both.ids == [1, 2]
    other = data.open_pictures(two, "train", size=SQUARE, classes=["owl", "emu"])
    assert other[0][1]["labels"].tolist() == [1] and other.problems.counts == {"unknown class": 1}
    assert "yak" in str(other.problems)
    with pytest.raises(data.DataError, match="none of its classes"):
        data.open_pictures(two, "train", size=SQUARE, classes=["emu"])


def test_classes_of_the_same_name_cannot_be_joined(tmp_path):
    root = voc_folder(tmp_path, "train", {"a": an_object("dog", 1, 1, 50, 50)})
    with pytest.raises(data.DataError, match="two have the same: dog, dog"):
        data.open_pictures(root, "train", size=SQUARE, classes=["dog", "dog"])
    with pytest.raises(data.DataError, match="no folder is given"):
        data.open_pictures([], "train", size=SQUARE)


def test_coco_and_voc_are_joined_and_ids_stay_unique(tmp_path):
    scenes = data.ScenePictures(SMALL, "val")
    data.write_coco_folder(tmp_path / "coco", "val", scenes)
    data.write_voc_folder(tmp_path / "voc", "val", scenes)
    both = data.open_pictures([tmp_path / "coco", tmp_path / "voc"], "val", size=SQUARE)
    assert len(both) == 12 and both.ids[:6] == list(range(6)) and len(set(both.ids)) == 12
    assert both.category_names == [str(i) for i in range(10)] and both.category_ids == list(range(1, 11))
    for index in range(6):
        assert torch.equal(both[index][1]["labels"], both[index + 6][1]["labels"])


def test_classes_file_names_the_labels(tmp_path):
    root = voc_folder(tmp_path, "train", {"a": an_object("dog", 1, 1, 50, 50) + an_object("gnu", 1, 1, 40, 40)})
    (root / "classes.txt").write_text("zebra\ndog\n\n")
    pictures = data.open_pictures(root, "train", size=SQUARE)
    assert pictures.category_names == ["zebra", "dog"] and pictures[0][1]["labels"].tolist() == [2]
    assert pictures.problems.counts == {"unknown class": 1} and "'gnu'" in str(pictures.problems)
    (root / "classes.txt").write_text("dog\ndog\n")
    with pytest.raises(data.DataError, match=r"classes\.txt: 2 class names, 1 different"):
        data.open_pictures(root, "train", size=SQUARE)


def test_ilsvrc_detection_set(tmp_path):
    flat = voc_folder(tmp_path / "flat", "train", {"x": an_object("n02084071", 0, 0, 49, 49), "y": ""})
    for kind, source, end in (("Data", "JPEGImages", ".JPEG"), ("Annotations", "Annotations", ".xml")):
        for name, folder in (("x", "train_0001/n01"), ("y", "extra")):
            place = tmp_path / "ILSVRC" / kind / "DET" / "train" / folder
            place.mkdir(parents=True)
            (source_file,) = (flat / source).glob(f"{name}.*")
            shutil.copy(source_file, place / f"{name}{end}")
    (tmp_path / "ILSVRC" / "ImageSets" / "DET").mkdir(parents=True)
    (tmp_path / "ILSVRC" / "ImageSets" / "DET" / "train.txt").write_text("train_0001/n01/x 1\nextra/y 2\n")
    for root in (tmp_path, tmp_path / "ILSVRC"):
        pictures = data.open_pictures(root, "train", size=SQUARE)
        assert len(pictures) == 2 and not pictures.problems and pictures.category_names == ["n02084071"]
        assert pictures.coco["images"][0]["file_name"] == "train_0001/n01/x.JPEG"
        assert pictures.coco["annotations"][0]["bbox"] == [0, 0, 49, 49]


def test_lists_may_have_a_class_column_and_names_with_spaces(tmp_path):
    root = voc_folder(tmp_path, "dog_train", {"a": an_object("dog", 1, 1, 9, 9), "b 1": "", "c": ""})
    (root / "ImageSets" / "Main" / "dog_train.txt").write_text("a  1\nb 1\nc -1\n")
    pictures = data.open_pictures(root, "dog_train", size=SQUARE)
    assert [image["file_name"] for image in pictures.coco["images"]] == ["a.jpg", "b 1.jpg", "c.jpg"]
