"""Scaling, padding, mirroring, and batches of pictures that differ in size; pictures without annotations."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("torchvision")
np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")

from harness_folders import change, coco_folder, opened  # noqa: E402
from torchvision.models.detection.transform import GeneralizedRCNNTransform  # noqa: E402

from kdkernels.harness import data  # noqa: E402
from kdkernels.harness.data import geometry  # noqa: E402
from kdkernels.harness.evaluate import coco_results  # noqa: E402

SHORTER = data.Size(shorter=96, longest=150)


@pytest.fixture
def folder(tmp_path):
    """Three pictures: 96 x 64, a wide one and a tall one."""
    coco_folder(tmp_path)
    for number, size in ((2, (200, 80)), (3, (50, 71))):
        pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "train2017" / f"{number}.jpg")
    change(tmp_path, lambda document: [(i.pop("width"), i.pop("height")) for i in document["images"]])
    return tmp_path


def blob(index, shape=(64, 96)):
    """A black picture with a white block, and the block's box."""
    picture = torch.zeros(3, *shape, dtype=torch.uint8)
    picture[:, 10:30, 12 + index : 50] = 255
    return picture, torch.tensor([[12.0 + index, 10, 50, 30]])


def test_sizes_are_those_of_torchvisions_detectors(folder):
    pictures = data.open_pictures(folder, "train", size=SHORTER)
    plain = GeneralizedRCNNTransform(96, 150, [0.0] * 3, [1.0] * 3)
    for index in range(3):
        picture, target = pictures[index]
        raw = torch.from_numpy(np.array(Image.open(pictures.paths[index]))).permute(2, 0, 1) / 255
        boxes = torch.tensor([[8.0, 8, 48, 48]])
        wanted, there = plain([raw], [{"boxes": boxes, "labels": torch.ones(1, dtype=torch.int64)}])
        assert picture.shape[1:] == target["size"] and target["size"] == wanted.image_sizes[0]
        torch.testing.assert_close(target["boxes"], there[0]["boxes"])


def test_a_batch_is_padded_to_its_largest_and_a_multiple_of_32(folder):
    pictures = data.open_pictures(folder, "train", size=SHORTER)
    samples = [pictures[index] for index in range(3)]
    batch, targets = data.collate(samples)
    assert batch.shape == (3, 3, 160, 160) and [t["size"] for t in targets] == [(96, 144), (60, 150), (136, 96)]
    for image, (picture, target) in zip(batch, samples, strict=True):
        height, width = target["size"]
        assert torch.equal(image[:, :height, :width], picture)
        assert (image[:, height:] == 114).all() and (image[:, :, width:] == 114).all()
    assert data.collate(samples[1:2])[0].shape == (1, 3, 64, 160)


@pytest.mark.parametrize("size", [SHORTER, data.Size(square=64)])
@pytest.mark.parametrize("shape", [(1, 3000), (3000, 1), (1, 1)])
def test_a_line_stays_a_line(size, shape):
    boxes = torch.tensor([[0.0, 0, shape[1], shape[0]]])
    picture, boxes, (height, width) = geometry.placed(torch.zeros(3, *shape, dtype=torch.uint8), boxes, size)
    assert min(height, width) >= 1 and picture.numel() and boxes[0].tolist() == [0, 0, width, height]


@pytest.mark.parametrize("size", [SHORTER, data.Size(square=64)])
def test_detections_go_back_to_the_files_own_pixels(folder, size):
    pictures = data.open_pictures(folder, "train", size=size)
    for index in range(3):
        _, target = pictures[index]
        found = {"boxes": target["boxes"], "labels": target["labels"], "scores": torch.ones(1)}
        (result,) = coco_results(target, found, pictures.category_ids)
        assert result["bbox"] == pytest.approx([8, 8, 40, 40], abs=1e-4) and result["category_id"] == 5


@pytest.mark.parametrize("size", [SHORTER, data.Size(square=64), data.Size(square=200)])
def test_boxes_stay_on_what_they_enclose(size):
    for mirror in (False, True):
        picture, boxes = blob(0)
        picture, boxes, (height, width) = geometry.placed(picture, boxes, size)
        target = {"boxes": boxes, "size": (height, width)}
        if mirror:
            picture, target = geometry.mirrored(picture, target)
        white = (picture[0, :height, :width] > 127).nonzero()
        (top, left), (bottom, right) = white.amin(0).tolist(), (white.amax(0) + 1).tolist()
        assert target["boxes"][0].tolist() == pytest.approx([left, top, right, bottom], abs=0.75)
        assert (picture[:, height:] == 114).all() and (picture[:, :, width:] == 114).all(), "padding stays where it is"


def test_mirroring_twice_is_nothing_and_leaves_its_input_alone():
    picture, boxes = blob(3)
    before = picture.clone(), boxes.clone()
    target = {"boxes": boxes, "size": (64, 90)}
    once = geometry.mirrored(picture, target)
    assert torch.equal(picture, before[0]) and torch.equal(boxes, before[1]) and once[1]["mirrored"]
    assert once[1]["boxes"].tolist() == [[40, 10, 75, 30]] and "mirrored" not in target
    twice = geometry.mirrored(*once)
    assert torch.equal(twice[0], picture) and torch.equal(twice[1]["boxes"], boxes)


def read(pictures, seed, **keywords):
    batches = data.training_batches(pictures, 6, 2, seed, **keywords)
    return [(image, target) for images, targets in batches for image, target in zip(images, targets, strict=True)]


def test_training_mirrors_half_the_same_at_any_number_of_workers(folder):
    pictures = opened(folder)
    alone, helped = read(pictures, 1), read(pictures, 1, workers=2)
    for (image, target), (other, same) in zip(alone, helped, strict=True):
        assert torch.equal(image, other) and torch.equal(target["boxes"], same["boxes"])
        assert type(target["boxes"]) is torch.Tensor
    flags = [target.get("mirrored", False) for _, target in alone]
    seen = {(target["image_id"], target.get("mirrored", False)) for _, target in alone}
    assert 2 <= sum(flags) <= 10 and len(seen) > 3, "some picture comes both ways: it is decided anew at every draw"
    assert flags != [target.get("mirrored", False) for _, target in read(pictures, 2)]
    pictures.hflip = 0.0
    assert not any("mirrored" in target for _, target in read(pictures, 1))
    pictures.hflip = 1.0
    assert all(target["mirrored"] for _, target in read(pictures, 1))
    assert not any("mirrored" in t for _, targets in data.evaluation_batches(pictures, 2) for t in targets)


def test_a_run_that_goes_on_gets_the_batches_that_it_would_have_got(folder):
    pictures = opened(folder)
    whole, rest = read(pictures, 5), read(pictures, 5, first=4)
    assert len(whole) == 12 and len(rest) == 4
    for (image, target), (other, same) in zip(whole[8:], rest, strict=True):
        assert torch.equal(image, other) and target["image_id"] == same["image_id"]
    assert not read(pictures, 5, first=6)


def test_evaluation_sees_every_picture_once_or_the_first(folder):
    pictures = opened(folder)
    for limit, wanted in ((None, [1, 2, 3]), (2, [1, 2]), (9, [1, 2, 3])):
        batches = data.evaluation_batches(pictures, 2, limit=limit)
        assert [target["image_id"] for _, targets in batches for target in targets] == wanted


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({}, "square or shorter"),
        ({"square": 32, "shorter": 32}, "square or shorter"),
        ({"square": 0}, "square must be"),
        ({"shorter": -5}, "shorter must be"),
        ({"shorter": 800, "longest": 800}, "longest must be larger"),
    ],
)
def test_bad_sizes_are_named(keywords, message):
    with pytest.raises(ValueError, match=message):
        data.Size(**keywords)


def test_pictures_without_annotations(folder):
    (folder / "train2017" / "notes.txt").write_text("not a picture")
    (folder / "train2017" / ".hidden.jpg").write_text("not shown")
    (folder / "deep" / "er").mkdir(parents=True)
    Image.new("L", (30, 60)).save(folder / "deep" / "er" / "a.PNG")
    (folder / "deep" / "broken.png").write_bytes(b"")
    pictures = data.UnlabeledPictures(folder, data.Size(square=64))
    assert [path.rpartition("/")[2] for path in pictures.paths] == ["a.PNG", "1.jpg", "2.jpg", "3.jpg"]
    assert pictures.problems.counts == {"unreadable picture": 1} and "broken.png" in str(pictures.problems)
    picture, target = pictures[0]
    assert picture.shape == (3, 64, 64) and target["size"] == (64, 32) and target["unlabeled"] is True
    assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,) and target["labels"].dtype == torch.int64
    images, targets = next(iter(data.training_batches(pictures, 1, 4, 0)))
    assert images.shape == (4, 3, 64, 64) and all(target["unlabeled"] for target in targets)
    with pytest.raises(data.DataError, match=r"broken\.png"):
        data.UnlabeledPictures(folder, data.Size(square=64), on_bad="refuse")
    (folder / "none").mkdir()
    for place, message in (("none", "has no picture"), ("nowhere", "is not a folder")):
        with pytest.raises(data.DataError, match=message):
            data.UnlabeledPictures(folder / place, data.Size(square=64))
