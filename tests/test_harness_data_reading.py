"""Pictures that break while they are read, and pictures that are unusual but legal."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")
np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")

from harness_folders import SIZE, change, coco_folder, opened, picture  # noqa: E402

from kdkernels.harness import data  # noqa: E402
from kdkernels.harness.data.problems import NAMED  # noqa: E402
from kdkernels.harness.evaluate import Evaluator  # noqa: E402


@pytest.fixture
def sound(tmp_path):
    return coco_folder(tmp_path)


def cut(root, *numbers):
    for number in numbers:
        content = picture(root, number).read_bytes()
        picture(root, number).write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_undecodable_picture_is_replaced_counted_and_named_once(sound, workers, capsys):
    cut(sound, 2)
    pictures = opened(sound, hflip=0.0)
    assert not pictures.problems, "its header is sound"
    batches = list(data.training_batches(pictures, 4, 3, seed=0, workers=workers))
    assert sorted(t["image_id"] for _, targets in batches for t in targets) == [1] * 4 + [3] * 8
    assert pictures.problems.counts == {"undecodable picture": 1}
    error = capsys.readouterr().err
    assert error.count("2.jpg") == 1 and "another one in its place" in error and "truncated" in error
    assert not any("findings" in target for _, targets in batches for target in targets)


def test_a_cut_picture_is_refused_before_anything_is_trained(sound):
    pictures = opened(sound, on_bad="refuse")
    cut(sound, 3)
    with pytest.raises(data.DataError, match=r"undecodable picture: 1 .*3\.jpg"):
        opened(sound, on_bad="refuse")
    with pytest.raises(data.DataError, match=r"3\.jpg"):
        pictures[2]
    with pytest.raises(data.DataError, match=r"3\.jpg"):
        list(data.evaluation_batches(pictures, 3))


def test_no_decodable_picture_at_all_is_refused(sound):
    pictures = opened(sound)
    cut(sound, 1, 2, 3)
    with pytest.raises(data.DataError, match=r"none of 3 pictures can be decoded.*1\.jpg"):
        pictures[0]


class Found(nn.Module):
    """Finds the object that every sound picture has."""

    def detect(self, images):
        box = torch.tensor([[8.0, 8, 48, 48]]) * 64 / 96
        return [{"boxes": box, "labels": torch.ones(1, dtype=torch.int64), "scores": torch.ones(1)} for _ in images]


def test_an_undecodable_picture_is_not_scored(sound, capsys):
    cut(sound, 2)
    pictures = opened(sound)
    evaluator = Evaluator(pictures, 2, torch.device("cpu"))
    results = evaluator.detect(Found())
    assert sorted(result["image_id"] for result in results) == [1, 3]
    assert evaluator.score(results).mean_ap == pytest.approx(1)
    assert pictures.problems.counts == {"undecodable picture": 1} and "2.jpg" in capsys.readouterr().err


def test_a_flood_of_problems_is_counted_and_a_few_are_named(capsys):
    problems = data.Problems()
    for turn in range(2):
        for number in range(20):
            problems.meet(data.problems.Finding("undecodable picture", f"{number}.jpg", f"cut, turn {turn}"))
    assert problems.counts == {"undecodable picture": 20}
    assert len(capsys.readouterr().err.splitlines()) == NAMED == len(problems.examples["undecodable picture"])
    said = []
    data.Problems(say=said.append).meet(data.problems.Finding("undecodable picture", "a.jpg", "cut"))
    assert said == ["warning: a.jpg: cut; another one in its place in training, not scored in evaluation"]


def test_a_picture_that_has_changed_since_is_not_used(sound):
    pictures = opened(sound)
    Image.new("RGB", (64, 96)).save(picture(sound))
    _, target = pictures[1]
    assert target["image_id"] == 3 and "96 x 64 when the set was opened" in target["findings"][0].what


def test_a_pickled_set_reads_the_same(sound):
    pictures = opened(sound)
    pictures.problems.say = lambda text: None  # no pickle of this
    again = pickle.loads(pickle.dumps(pictures))
    assert torch.equal(again[1][0], pictures[1][0]) and torch.equal(again[1][1]["boxes"], pictures[1][1]["boxes"])


# --- unusual pictures


def test_digest_follows_annotations_and_what_is_left_out(sound):
    digests = {opened(sound).digest, opened(sound).digest}
    assert len(digests) == 1
    for number in (2, 3):
        kept = picture(sound, number).read_bytes()
        picture(sound, number).unlink()
        digests.add(opened(sound).digest)
        picture(sound, number).write_bytes(kept)
    assert len(digests) == 3, "which one is left out counts"
    change(sound, lambda document: document["annotations"].pop())
    assert opened(sound).digest not in digests


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "RGBA", "CMYK", "I;16"])
def test_every_kind_of_pixels_becomes_rgb(sound, mode):
    grey = np.tile(np.linspace(0, 255, 96).astype(np.uint8), (64, 1))
    if mode == "I;16":
        unusual = Image.fromarray(grey.astype(np.uint16) * 256)
    else:
        unusual = Image.fromarray(np.stack([grey] * 3, axis=2)).convert(mode)
    if mode == "P":
        unusual.info["transparency"] = bytes(range(256))
    unusual.save(picture(sound), format="JPEG" if mode == "CMYK" else "PNG")
    pictures = data.open_pictures(sound, "train", size=data.Size(square=96), on_bad="refuse")
    pixels = pictures[1][0][:, :64].numpy().astype(int)
    assert pixels.shape == (3, 64, 96)
    tolerance = {"1": 255, "P": 60, "CMYK": 12}.get(mode, 0)
    assert abs(pixels - grey.astype(int)).max() <= tolerance
    assert pixels[:, :, 90].mean() > 180 > 80 > pixels[:, :, 5].mean()


def test_an_exif_orientation_is_not_applied(sound):
    pixels = Image.open(picture(sound)).convert("RGB")
    pixels.save(picture(sound))
    before = data.open_pictures(sound, "train", size=SIZE)[1][0]
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels.save(picture(sound), exif=exif)
    assert Image.open(picture(sound)).getexif()[0x0112] == 6
    assert torch.equal(opened(sound, on_bad="refuse")[1][0], before)
