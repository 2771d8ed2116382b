"""The main job end to end on a tiny scale, and how it treats bad input."""

from __future__ import annotations

import json
import math
import sys

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")

from harness_parts import SMALL

from kdkernels.harness import data, flags, loop, schedule, train
from kdkernels.harness.settings import TrainSettings

PICTURES = ("curves.png", "detections.png", "features.png", "gradients.png")
FILES = {"metrics.jsonl", "students", *PICTURES}
TINY = ["--image-size", "64", "--model", "faster_rcnn:width=0.125,channels=32"]
TINY += ["--teacher-model", "faster_rcnn:width=0.25,channels=32", "--device", "cpu", "--quick"]
ROWS = ["teacher", "alone", "alone, equal time", "distilled"]


def records(folder, kind):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One quick run with an empty teacher cache; the tests below look at what it left."""
    folder = tmp_path_factory.mktemp("quick")
    out, cache = folder / "out", folder / "cache"
    assert train.main([*TINY, "--output-dir", str(out), "--teacher-cache", str(cache)]) == 0
    return out, cache


def test_a_run_writes_every_file(quick):
    out, cache = quick
    assert {path.name for path in out.iterdir()} == FILES
    for name in PICTURES:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert len(list(cache.iterdir())) == 1


def test_metrics_hold_every_row_and_step(quick):
    out, _ = quick
    results = records(out, "result")
    assert [entry["run"] for entry in results] == ROWS
    for entry in results:
        assert entry["seed"] == 0 and entry["pictures"] == 8 and entry["seconds"] > 0
        assert 0 <= entry["mean_ap"] <= 1 and 0 <= entry["ap50"] <= 1
        steps = [step["step"] for step in records(out, "step") if step["run"] == entry["run"]]
        assert steps == list(range(1, entry["steps"] + 1)), "fixed steps, every one recorded"
        evaluated = [e["step"] for e in records(out, "evaluation") if e["run"] == entry["run"]]
        assert evaluated[-1] == entry["steps"]
    by_name = {entry["run"]: entry for entry in results}
    assert by_name["alone"]["steps"] == by_name["distilled"]["steps"] == 4
    assert by_name["alone, equal time"]["steps"] >= 4
    (settings,) = records(out, "settings")
    assert {"pearson", "masked_mse", "decoupled_kl", "bounded_regression"} <= set(settings["kernels"])
    (split,) = records(out, "step_split")
    split_parts = ("teacher", "student", "losses", "separate", "distilled", "alone")
    assert set(split) == {"kind", *split_parts, "memory", "memory_alone"}
    ratio = split["distilled"] / split["alone"]
    assert by_name["alone, equal time"]["steps"] == max(4, round(4 * ratio)), "computed from what was measured"
    first = next(step for step in records(out, "step") if step["run"] == "distilled")
    assert {"task/loss_classifier", "distill/combined/pearson", "distill/combined/masked_mse"} <= set(first["losses"])
    assert math.isclose(sum(first["losses"].values()), first["loss"], rel_tol=1e-4)


def test_students_start_alike_and_see_the_same_pictures(quick):
    """Alone and alone at equal time differ in the schedule only; before the first update they are the same run."""
    out, _ = quick
    first = {step["run"]: step for step in reversed(records(out, "step"))}
    assert first["alone"]["losses"] == first["alone, equal time"]["losses"]
    task = {key: value for key, value in first["distilled"]["losses"].items() if key.startswith("task/")}
    assert task == pytest.approx(first["alone"]["losses"], rel=1e-4)


def test_teacher_is_reused_and_a_corrupt_one_is_retrained(quick, tmp_path, capsys):
    out, cache = quick
    argv = [*TINY, "--steps", "1", "--teacher-cache", str(cache), "--output-dir"]
    assert train.main([*argv, str(tmp_path / "again")]) == 0
    (kept,) = cache.iterdir()
    assert f"teacher: {kept}" in capsys.readouterr().err
    assert not [step for step in records(tmp_path / "again", "step") if step["run"] == "teacher"]
    scores = [
        next(e for e in records(folder, "result") if e["run"] == "teacher") for folder in (out, tmp_path / "again")
    ]
    assert scores[0] == scores[1]

    kept.write_bytes(b"damaged")
    assert train.main([*argv, str(tmp_path / "corrupt")]) == 0
    assert f"warning: {kept} is not a usable teacher" in capsys.readouterr().err
    assert [step for step in records(tmp_path / "corrupt", "step") if step["run"] == "teacher"]
    assert kept.stat().st_size > 1000, "trained anew and kept"


def test_a_coco_folder_takes_the_place_of_the_scenes(tmp_path, monkeypatch):
    root = tmp_path / "coco"
    for split in ("train", "val"):
        data.write_coco_folder(root, split, data.ScenePictures(SMALL, split))
    monkeypatch.setattr(train, "check", lambda scenes: None if not scenes else pytest.fail("scenes are not needed"))
    monkeypatch.chdir(tmp_path)
    argv = [*TINY, "--steps", "1", "--teacher-steps", "1", "--data-path", str(root), "--teacher-cache", "cache"]
    assert train.main(argv) == 0
    out = tmp_path / "kdkernels-runs" / "coco-seed0-quick"
    assert {path.name for path in out.iterdir()} == FILES
    assert {entry["pictures"] for entry in records(out, "result")} == {6}
    assert records(out, "settings")[0]["data"]["digests"]


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        (["--steps", "0"], "--steps"),
        (["--steps", "many"], "--steps"),
        (["--teacher-steps", "-1"], "--teacher-steps"),
        (["-b", "0"], "--batch-size"),
        (["--lr", "nan"], "--lr"),
        (["--lr", "-1"], "--lr"),
        (["--wd", "-1"], "--wd"),
        (["--seed", "-1"], "--seed"),
        (["--workers", "-1"], "--workers"),
        (["--image-size", "100"], "--image-size"),
        (["--device", "toaster"], "--device"),
        (["--data-path", "does/not/exist"], "--data-path"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_bad_input_names_the_flag(argv, flag, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert train.main(argv) == 2
    assert flag in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_an_earlier_run_is_never_overwritten(tmp_path, capsys, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text("kept\n")
    assert train.main(["--quick", "--output-dir", str(tmp_path)]) == 2
    assert "--output-dir" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_text() == "kept\n"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kdkernels-runs" / "scenes-seed0").mkdir(parents=True)
    assert flags.parse(flags.parser(), []).output_dir.name == "scenes-seed0-2"


def test_a_bad_folder_ends_with_its_flag_and_code_2(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert train.main(["--data-path", "empty"]) == 2
    assert "--data-path: " in capsys.readouterr().err
    assert not (tmp_path / "kdkernels-runs").exists()


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert train.main(["--quick", "--output-dir", str(tmp_path / "file" / "below")]) == 2
    assert "--output-dir" in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert train.main(["--quick"]) == 1
    assert 'pip install "kdkernels[train]"' in capsys.readouterr().err


def test_training_that_diverges_stops_and_keeps_its_records(tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["--quick", "--lr", "1e30", "--output-dir", str(out), "--teacher-cache", str(tmp_path / "cache")]
    assert train.main([*argv, "--device", "cpu"]) == 1
    message = capsys.readouterr().err
    assert "teacher: the loss is" in message and str(out) in message
    assert records(out, "step") and not (tmp_path / "cache").exists()


def test_help_names_every_flag(capsys):
    assert train.main(["--help"]) == 0
    text = capsys.readouterr().out
    for flag in ("--data-path", "--output-dir", "--batch-size", "--lr", "--wd", "--seed", "--device", "--quick"):
        assert flag in text


def test_steps_that_become_much_slower_are_noticed():
    usual = [0.1] * 40
    assert loop.slowed(usual + [0.7] * 5) == pytest.approx(7)
    assert loop.slowed([*usual, 0.7, 0.7, 0.1, 0.7, 0.7]) is None, "a hiccup is not"
    assert loop.slowed([0.1] * 10 + [0.7] * 5) is None, "too early to tell"


def test_learning_rate_warms_up_and_ends_low():
    settings = TrainSettings(steps=250)
    factors = [schedule.learning_rate(step, settings) for step in range(250)]
    assert factors[0] == pytest.approx(1 / 30) and factors[29] == factors[30] == pytest.approx(1)
    assert factors[-1] == pytest.approx(0.02, abs=1e-3) and factors[30:] == sorted(factors[30:], reverse=True)
