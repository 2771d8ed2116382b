"""Pictures from scenes and from COCO-format folders, and the order in which training sees them."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("torchvision")
Image = pytest.importorskip("PIL.Image")

from harness_parts import SMALL  # noqa: E402

from kdkernels.harness import data  # noqa: E402

SQUARE = data.Size(square=160)


@pytest.fixture(scope="module")
def scenes():
    return data.ScenePictures(SMALL, "train")


def folder_of(tmp_path, document, pictures, split="train"):
    (tmp_path / f"{split}2017").mkdir(parents=True, exist_ok=True)
    (tmp_path / "annotations").mkdir(exist_ok=True)
    for name, picture in pictures.items():
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / f"{split}2017" / name)
    path = tmp_path / "annotations" / f"instances_{split}2017.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return tmp_path


def test_scenes_written_as_a_folder_come_back_the_same(scenes, tmp_path):
    data.write_coco_folder(tmp_path, "train", scenes)
    read = data.open_pictures(tmp_path, "train", size=data.Size(square=SMALL.image_size))
    assert len(read) == len(scenes) == 12 and read.category_ids == list(range(10))
    for (picture, target), (mine, wanted) in zip(
        (read[i] for i in range(12)), (scenes[i] for i in range(12)), strict=True
    ):
        assert torch.equal(picture, mine)
        assert torch.equal(target["labels"], wanted["labels"])
        torch.testing.assert_close(target["boxes"], wanted["boxes"])


def test_folder_scales_pads_and_maps_categories(tmp_path):
    document = {
        "images": [{"id": 7, "file_name": "wide.png", "width": 320, "height": 128}],
        "categories": [{"id": 90, "name": "b"}, {"id": 3, "name": "a"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 90, "bbox": [20, 40, 100, 60], "area": 6000, "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 3, "bbox": [0, 0, 50, 0], "area": 0, "iscrowd": 0},
            {"id": 3, "image_id": 7, "category_id": 3, "bbox": [0, 0, 50, 50], "area": 2500, "iscrowd": 1},
        ],
    }
    folder_of(tmp_path, document, {"wide.png": torch.full((3, 128, 320), 200, dtype=torch.uint8)})
    pictures = data.open_pictures(tmp_path, "train", size=SQUARE)
    picture, target = pictures[0]
    assert picture.shape == (3, 160, 160) and target["image_id"] == 7
    assert target["scale"] == (0.5, 0.5) and target["size"] == (64, 160)
    assert (picture[:, :64] == 200).all() and (picture[:, 64:] == 114).all()
    assert target["boxes"].tolist() == [[10, 20, 60, 50]] and target["labels"].tolist() == [2]
    assert pictures.category_names == ["a", "b"]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("not json", "not a COCO instances file"),
        ({"images": [], "annotations": []}, "categories"),
        ({"images": [], "annotations": [], "categories": [{"id": 1}]}, "lists 0 images"),
        ({"images": [{"id": 1, "file_name": "none.png"}], "annotations": [], "categories": [{"id": 1}]}, "none.png"),
        ({"images": [{"id": 1}], "annotations": [], "categories": [{"id": 1}, {"id": 1}]}, "the same id"),
        ({"images": [{"id": 1}], "annotations": [], "categories": [{"id": "x"}]}, "not a COCO instances file"),
        ({"images": [{"id": 1}], "annotations": [], "categories": [{"id": 2**70}]}, "beyond 64 bits"),
        ([], "not a COCO instances file"),
    ],
)
def test_bad_folder_is_named(tmp_path, document, message):
    folder_of(tmp_path, document, {})
    with pytest.raises(data.DataError, match=message):
        data.open_pictures(tmp_path, "train", size=SQUARE)


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(data.DataError, match="no folder of COCO's form"):
        data.open_pictures(tmp_path, "train", size=SQUARE)
    (tmp_path / "annotations").mkdir()
    with pytest.raises(data.DataError, match="train2017 does not exist"):
        data.open_pictures(tmp_path, "train", size=SQUARE)
    with pytest.raises(data.DataError, match="nowhere is not a folder"):
        data.open_pictures([tmp_path / "nowhere"], "train", size=SQUARE)


def test_training_batches_are_counted_and_seeded(scenes):
    def order(seed, steps):
        return [[t["image_id"] for t in targets] for _, targets in data.training_batches(scenes, steps, 5, seed)]

    state = torch.get_rng_state()
    first = order(3, 7)
    assert torch.equal(torch.get_rng_state(), state), "the order of the pictures must not move the global generator"
    assert [len(ids) for ids in first] == [5] * 7
    assert first == order(3, 7) and first != order(4, 7)
    seen = [index for ids in first for index in ids]
    assert sorted(seen[:12]) == sorted(seen[12:24]) == list(range(12)), "one permutation after the other"


def test_to_device_makes_floats_and_leaves_the_dataset_alone(scenes):
    images, targets = data.collate([scenes[0], scenes[1]])
    floats, moved = data.to_device(images, targets, torch.device("cpu"))
    assert floats.dtype == torch.float32 and floats.max() <= 1
    moved[0]["boxes"] = None
    assert scenes[0][1]["boxes"] is not None
