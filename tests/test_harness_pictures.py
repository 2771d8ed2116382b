"""The pictures of a run: that each is drawn, of any detector and any number of runs, and what its numbers mean."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")

from own_detector import build as own_detector

from kdkernels.harness import report
from kdkernels.harness.data import ScenePictures
from kdkernels.harness.detectors import load_model
from kdkernels.harness.detectors.rescaled import Rescaled
from kdkernels.harness.distill import GRADIENT_NORM
from kdkernels.harness.ensemble import TeacherEnsemble
from kdkernels.harness.loop import Run
from kdkernels.harness.options import Options
from kdkernels.harness.report import drawing, found_boxes, heat_maps, learning_curves
from kdkernels.harness.settings import SceneSettings

CPU = torch.device("cpu")
VAL = ScenePictures(SceneSettings(image_size=64, side=(12, 28), train=1, val=4), "val")


def model(text, seed=0):
    torch.manual_seed(seed)
    return own_detector(classes=10, image_size=64) if text == "own" else load_model(text, classes=10, image_size=64)


def drawn(path):
    """The pixels of a picture that is not blank."""
    from matplotlib.pyplot import imread

    pixels = torch.from_numpy(imread(path))[..., :3]
    assert pixels.std() > 0.05 and len(pixels[..., 0].unique()) > 20, "blank"
    return pixels


def run(name="alone", seed=0, best=0.4, steps=40):
    scores = [(k * steps // 4, 2.0 * k, best * k / 8, best * k / 4) for k in range(1, 5)]
    return Run(name, seed, steps, 8.0, [0.2] * steps, [3.0 - 0.05 * k for k in range(steps)], scores)


class Finds(torch.nn.Module):
    """A detector that finds what it is told to."""

    def __init__(self, boxes, scores, labels):
        super().__init__()
        self.found = {"boxes": torch.tensor(boxes), "scores": torch.tensor(scores), "labels": torch.tensor(labels)}

    def detect(self, images):
        return [self.found] * len(images)


# --- heat maps


def test_a_heat_map_is_the_largest_channel_from_0_to_255():
    level = torch.tensor([[[1.0, -2.0], [0.0, 5.0]], [[3.0, -4.0], [-1.0, 2.0]]])
    expected = torch.tensor([[5.0, 0.0], [2.0, 7.0]]) * 255 / 7  # of 3, -2, 0 and 5
    torch.testing.assert_close(report.heat_map(level), expected)
    torch.testing.assert_close(report.heat_map(level.bfloat16() * 8), expected)
    assert report.heat_map(torch.full((3, 2, 2), 4.0)).eq(0).all(), "constant"


def test_cells_that_are_not_finite_leave_the_others_their_scale():
    found = report.heat_map(torch.tensor([[[1.0, float("nan")], [3.0, float("inf")]]]))
    assert found[:, 0].tolist() == [0, 255] and not found[:, 1].isfinite().any()
    assert report.heat_map(torch.full((2, 1, 1), float("nan"))).isnan().all()


@pytest.mark.parametrize("shape", [(2, 3), (1, 2, 3, 4), (0, 2, 2), (3, 0, 2)])
def test_what_is_no_level_is_refused(shape):
    with pytest.raises(ValueError, match=r"level: expected a shape \(C, H, W\)"):
        report.heat_map(torch.zeros(shape))


@pytest.mark.parametrize(
    ("teacher", "student", "shared"),
    [
        ("faster_rcnn:width=0.125,channels=32", "fcos:width=0.125,channels=64", ["P3", "P4", "P5", "P6"]),
        ("retinanet:width=0.125,channels=32", "own", ["P3", "P4", "P5"]),
        ("ssdlite:width=0.25", "ssdlite:width=0.125", ["P4", "P5", "P6", "P7"]),
    ],
)
def test_features_of_every_kind_of_detector(teacher, student, shared, tmp_path):
    teacher, student = model(teacher), model(student, seed=1)
    pairs = heat_maps._pairs(teacher, {"student": student})["student"]
    assert [pair.name for pair in pairs][: len(shared)] == shared
    report.features(tmp_path / "a.png", teacher, {"student": student}, VAL, CPU, base_size=8, count=1)
    drawn(tmp_path / "a.png")
    assert not student.training, "as in an evaluation"


def test_features_of_several_teachers_and_of_a_student_of_half_size_pictures(tmp_path):
    members = [model("faster_rcnn:width=0.125,channels=32", seed) for seed in range(2)]
    students = {name: Rescaled(model("faster_rcnn:width=0.125,channels=16", 2), 0.5) for name in ("a", "b")}
    report.features(tmp_path / "a.png", TeacherEnsemble(members), students, VAL, CPU, base_size=8, count=1)
    drawn(tmp_path / "a.png")


def test_the_outline_is_what_the_mask_marks(tmp_path, monkeypatch):
    """The cells inside the outline, by counting borders, are those of the mask that training draws."""
    seen = []
    monkeypatch.setattr(heat_maps, "_outline", lambda axes, mask, stride: seen.append((mask, stride)))
    student = model("own")
    report.features(tmp_path / "a.png", model("own", 1), {"student": student}, VAL, CPU, base_size=8, count=1)
    index = drawing.most_objects(VAL, 1)[0]
    from kdkernels.masks import ground_truth_masks

    wanted = ground_truth_masks([VAL[index][1]["boxes"]], [(8, 8), (4, 4), (2, 2)], [8, 16, 32], base_size=8)
    assert len(seen) == 6 and [stride for _, stride in seen[:3]] == [8, 16, 32]
    for k, (mask, _) in enumerate(seen):
        assert torch.equal(mask, wanted[k % 3][0])
    assert sum(mask.sum() for mask in wanted) > 0


def test_an_outline_goes_around_the_cells():
    lines = []

    class Axes:
        def vlines(self, x, low, high, **how):
            lines.extend(("v", *map(float, one)) for one in zip(x, low, high, strict=True))

        def hlines(self, y, low, high, **how):
            lines.extend(("h", *map(float, one)) for one in zip(y, low, high, strict=True))

    mask = torch.zeros(2, 3)
    heat_maps._outline(Axes(), mask, 8)
    assert not lines
    mask[1, 1:] = 1
    heat_maps._outline(Axes(), mask, 8)
    assert set(lines) == {("v", 8, 8, 16), ("v", 24, 8, 16), *(("h", y, x, x + 8) for y in (8, 16) for x in (8, 16))}


def test_students_that_cannot_be_shown_are_named(tmp_path):
    own, other = model("own"), model("ssdlite:width=0.125")
    with pytest.raises(ValueError, match="students: expected at least one"):
        report.features(tmp_path / "a.png", own, {}, VAL, CPU)
    with pytest.raises(ValueError, match="students: 'b' shares levels of strides"):
        report.features(tmp_path / "a.png", own, {"a": own, "b": other}, VAL, CPU)
    with pytest.raises(ValueError, match="count: expected at least 1"):
        report.features(tmp_path / "a.png", own, {"a": own}, VAL, CPU, count=0)
    own.strides = {"fine": 3, "middle": 5, "coarse": 7}
    with pytest.raises(ValueError, match="no level of the student has the stride"):
        report.features(tmp_path / "a.png", own, {"a": other}, VAL, CPU)
    assert not list(tmp_path.iterdir())


# --- gradients


def test_gradients_are_read_by_term_and_level_and_drawn(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    with metrics.open("w") as file:
        for name, step, factor in (("distilled", 1, 1.0), ("distilled", 11, 0.5), ("other", 1, 9.0)):
            details = {"pkd/pearson/P3": 7.0}
            for term in ("pkd/pearson", "defeat/masked_mse"):
                for level, value in (("", 5.0), ("/P3", 3.0), ("/P10", 4.0)):
                    details[f"{GRADIENT_NORM}/{term}{level}"] = factor * value
            file.write(json.dumps({"kind": "step", "run": name, "step": step, "details": details}) + "\n")
        file.write(json.dumps({"kind": "step", "run": "distilled", "step": 12, "details": {"pkd/pearson": 1.0}}) + "\n")
    norms = report.norms_of(metrics)
    assert list(norms) == ["pkd/pearson", "defeat/masked_mse"]
    assert norms["pkd/pearson"] == {
        "all levels": ([1, 11], [5.0, 2.5]), "P3": ([1, 11], [3.0, 1.5]), "P10": ([1, 11], [4.0, 2.0])
    }  # fmt: skip
    assert report.norms_of(metrics, "other")["pkd/pearson"]["P3"] == ([1], [9.0 * 3])
    report.gradients(tmp_path / "a.png", norms)
    drawn(tmp_path / "a.png")
    nothing = {"pkd/pearson": {"P3": ([1, 2], [0.0, 0.0]), "all levels": ([1, 2], [0.0, 0.0])}}
    report.gradients(tmp_path / "b.png", nothing)  # of a frozen pyramid, or a weight of 0
    assert report.norms_of(metrics, "alone") == {}
    with pytest.raises(ValueError, match="--grad-report-every"):
        report.gradients(tmp_path / "c.png", {})


@pytest.mark.parametrize(
    ("given", "more", "expected"),
    [(None, {}, 10), (None, {"compile": True}, 0), (None, {"compare": [1]}, 0), (0, {}, 0), (3, {"compare": [1]}, 3)],
)
def test_norms_are_recorded_where_they_cost_nothing(given, more, expected):
    options = Options(**{**dict.fromkeys(Options.__dataclass_fields__), "grad_report_every": given, **more})
    assert options.norms_every == expected


# --- detections


def test_a_detection_is_right_once_for_each_object():
    truth = {"boxes": torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40]]), "labels": torch.tensor([1, 2])}
    boxes = [[0, 0, 10, 9], [0, 0, 10, 10], [20, 20, 40, 40], [20, 20, 40, 29], [0, 0, 9, 9]]
    found = {"boxes": torch.tensor(boxes).float(), "labels": torch.tensor([1, 1, 1, 2, 3])}
    right, missed = found_boxes.judged(found, truth)
    assert right.tolist() == [True, False, False, False, False], "taken, taken, other class, too small, other class"
    assert missed.tolist() == [False, True]
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    assert [x.tolist() for x in found_boxes.judged(nothing, truth)] == [[], [True, True]]
    assert [x.tolist() for x in found_boxes.judged(found, nothing)] == [[False] * 5, []]


@pytest.mark.parametrize("count", [1, 6])
def test_detections_of_any_number_of_detectors(count, tmp_path):
    names = [f"row {k} of a comparison with a long name" for k in range(count)]
    detectors = {name: Finds([[4.0, 1.0, 30.0, 30.0]], [0.9], [3]) for name in names}
    report.detections(tmp_path / "a.png", detectors, VAL, CPU, count=1)
    height, width = drawn(tmp_path / "a.png").shape[:2]
    assert width / height < 3, "in several lines where there are many"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"score": 1.5}, "score: expected a number in"),
        ({"count": 0}, "count: expected at least 1, got 0"),
        ({"detectors": {}}, "detectors: expected at least one"),
        ({"val": []}, "val: expected at least one picture"),
    ],
)
def test_bad_input_of_detections_is_named(how, message, tmp_path):
    given = {"detectors": {"a": Finds([[0.0, 0, 1, 1]], [1.0], [1])}, "val": VAL, "device": CPU, **how}
    with pytest.raises(ValueError, match=message):
        report.detections(tmp_path / "a.png", **given)


# --- curves


def test_curves_of_the_main_job_and_of_many_rows_with_seeds(tmp_path):
    runs = {name: run(name) for name in ("teacher", "alone", "alone, equal time", "distilled")}
    report.curves(tmp_path / "a.png", runs)
    drawn(tmp_path / "a.png")
    rows = {f"row {k}": [run(f"row {k}", seed, 0.4 + 0.02 * k + 0.01 * seed) for seed in range(2)] for k in range(5)}
    report.curves(tmp_path / "b.png", {"teacher": runs["teacher"], **rows}, baseline="row 4")
    drawn(tmp_path / "b.png")


def test_seeds_are_a_mean_and_a_band():
    class Axes:
        def plot(self, x, y, **how):
            self.line = (x, y)

        def fill_between(self, x, low, high, **how):
            self.band = (low, high)

    axes = Axes()
    learning_curves._line(axes, [([0, 2, 9], [1.0, 2.0, 3.0]), ([0, 4], [3.0, 6.0])], "black", "")
    assert axes.line == ([0, 3], [2.0, 4.0]) and axes.band == ([1.0, 2.0], [3.0, 6.0]), "as far as both go"
    assert "seeds 0, 1" in learning_curves._seeds({"a": [run(seed=0), run(seed=1)]})
    assert "one seed says little" in learning_curves._seeds({"a": [run()], "b": [run()]})


@pytest.mark.parametrize(
    ("runs", "how", "message"),
    [
        ({}, {}, "runs: expected at least one"),
        ({"a": []}, {}, "runs: 'a' has no run"),
        ({"a": Run("a", 0, 4)}, {}, "runs: 'a' has a run without steps or evaluations"),
        ({"a": run()}, {"baseline": "b"}, "baseline: 'b' is no student among the runs: a"),
        ({"teacher": run(), "a": run()}, {"baseline": "teacher"}, "baseline: 'teacher' is no student"),
    ],
)
def test_bad_input_of_curves_is_named(runs, how, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        report.curves(tmp_path / "a.png", runs, **how)
