"""Whole runs of the harness at a tiny scale: detectors, recipes, folders, comparisons, a detector of one's own.

They only show that the parts meet; what each part computes is tested with the part. The longer ones are slow tests.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("sklearn")
pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")

from kdkernels.harness import data, train
from kdkernels.harness.compare import TABLES
from kdkernels.harness.detectors import load_model
from kdkernels.harness.settings import SceneSettings

SMALL = ["--quick", "--steps", "2", "--teacher-steps", "2", "-b", "2", "--image-size", "64", "--device", "cpu"]
MODELS = {
    kind: ["--model", f"{kind}:width=0.125{more}", "--teacher-model", f"{kind}:width=0.25{more}"]
    for kind, more in (
        ("faster_rcnn", ",channels=32"),
        ("retinanet", ",channels=32"),
        ("fcos", ",channels=64"),  # its GroupNorm wants more than one value of a 1 x 1 level
        ("ssdlite", ""),
    )
}
SCENES = SceneSettings(image_size=64, side=(16, 30), train=8, val=4)


def run(tmp_path, *argv):
    """Run with a folder and a teacher cache of its own; returns the folder."""
    out = tmp_path / "out"
    where = ["--output-dir", str(out), "--teacher-cache", str(tmp_path / "cache")]
    assert train.main([*SMALL, *map(str, argv), *where]) == 0
    return out


def records(folder, kind):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]


def terms(folder):
    """Names of the distilled student's terms."""
    first = next(step for step in records(folder, "step") if step["run"] == "distilled")
    return {name for name in first["losses"] if name.startswith("distill/")}


def folder_of(tmp_path, form):
    root = tmp_path / form
    write = data.write_coco_folder if form == "coco" else data.write_voc_folder
    for split in ("train", "val"):
        write(root, split, data.ScenePictures(SCENES, split))
    return root


def test_recipes_add_up_and_everything_is_recorded(tmp_path, capsys):
    out = run(
        tmp_path, *MODELS["faster_rcnn"], "--recipe", "defeat", "--recipe", "pkd:adapter=auto", "--recipe", "hinton",
        "--grad-report-every", "1", "--eval-train", "4", "--voc-ap", "--inherit", "rpn", "--freeze", "rpn",
    )  # fmt: skip
    assert terms(out) == {
        f"distill/{name}"
        for name in ("defeat/masked_mse", "defeat/decoupled_kl", "pkd/pearson", "hinton/temperature_kl")
    }
    step = records(out, "step")[-1]
    distilled = next(step for step in records(out, "step") if step["run"] == "distilled")
    assert "gradient norm at the features/pkd/pearson" in distilled["details"] and "details" not in step
    assert "defeat/masked_mse/foreground" in distilled["details"]
    runs = [entry["run"] for entry in records(out, "result")]
    assert runs == ["teacher", "alone", "alone, equal time", "inherited", "distilled"], (
        "what is inherited has its control"
    )
    scores = {(entry["what"], entry["run"]) for entry in records(out, "extra_score")}
    assert {("VOC mAP", "distilled"), ("mAP on 4 training pictures", "alone")} <= scores
    costs = {entry["detector"]: entry for entry in records(out, "cost")}
    assert costs["student"]["parameters"] < costs["teacher"]["parameters"] and costs["student"]["gflops"] > 0
    assert "GFLOPs" in capsys.readouterr().out
    taken = ["--weights", out / "students" / "distilled.safetensors", "--compare", "none"]
    again = run(tmp_path / "again", *MODELS["faster_rcnn"], *taken)
    assert len(records(again, "result")) == 1, "what a run leaves, the next one takes"


def test_frozen_parts_are_those_of_the_teacher_and_the_control_has_none(tmp_path):
    """The neck swap: what did not fit, and the student alone, learn."""
    argv = ["--recipe", "pkd", "--inherit", "fpn", "--freeze", "fpn"]
    out = run(tmp_path, *MODELS["faster_rcnn"], *argv)
    torch.manual_seed(0)
    start = load_model(MODELS["faster_rcnn"][1], classes=10, image_size=64).state_dict()
    alone, distilled = (load_file(out / "students" / f"{name}.safetensors") for name in ("alone", "distilled"))
    narrow, wide = "model.backbone.fpn.inner_blocks.0.0.weight", "model.backbone.fpn.layer_blocks.0.0.weight"
    assert not torch.equal(alone[narrow], start[narrow]) and not torch.equal(alone[wide], start[wide])
    assert not torch.equal(distilled[narrow], start[narrow]), "of another shape than the teacher's: it learns"
    teacher = torch.load(next((tmp_path / "cache").iterdir()), weights_only=True)["state"]
    assert torch.equal(distilled[wide], teacher[wide])


def test_pictures_without_labels_are_a_second_batch(tmp_path, capsys):
    good = next((folder_of(tmp_path, "coco") / "train2017").glob("*.png")).read_bytes()
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "good.png").write_bytes(good)
    (tmp_path / "more" / "broken.png").write_bytes(good[: len(good) // 2])
    argv = ["--recipe", "soft-labels", "--unlabeled-path", tmp_path / "more"]
    out = run(tmp_path, *MODELS["faster_rcnn"], *argv)
    assert "distill/soft-labels/rpn_classes" in terms(out)
    assert "broken.png" in capsys.readouterr().err


def test_hints_come_first_and_the_curve_is_the_detectors_own_loss(tmp_path):
    argv = ["--recipe", "fitnets:hint_steps=1", "--recipe", "hinton"]
    out = run(tmp_path, *MODELS["faster_rcnn"], *argv)
    hint, task = (step["losses"] for step in records(out, "step") if step["run"] == "distilled")
    assert set(hint) == {"distill/fitnets/masked_mse"}, "nothing else is trained, not even by a weight of 0"
    assert set(task) == {"distill/hinton/temperature_kl", *(name for name in task if name.startswith("task/"))}
    assert (out / "curves.png").exists()


def test_a_comparison_has_a_row_for_each_text(tmp_path, capsys):
    texts = ["none", "pkd", "mimic+hinton", "pkd+inherit=fpn+freeze=fpn"]
    out = run(tmp_path, *MODELS["faster_rcnn"], "--compare", *texts, "--no-equal-time")
    with (out / "compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["teacher", *texts, "inherit=fpn+freeze=fpn"]
    assert [row["row"] for row in rows[1:]] == [row["run"] for row in rows[1:]]
    printed = capsys.readouterr().out
    assert (out / "compare.md").read_text() in printed + "\n" and "| `pkd` | 1 |" in printed


@pytest.mark.parametrize("form", ["coco", "voc"])
def test_a_folder_is_trained_on(tmp_path, form):
    root = folder_of(tmp_path, form)
    (root / ("val2017" if form == "coco" else "JPEGImages")).joinpath("broken.jpg").write_bytes(b"not a picture")
    out = run(tmp_path, *MODELS["retinanet"], "--data-path", root, "--recipe", "pkd", "--recipe", "defeat")
    assert {entry["pictures"] for entry in records(out, "result")} == {4}
    assert terms(out) == {"distill/pkd/pearson", "distill/defeat/masked_mse"}
    assert records(out, "settings")[0]["recipes"][0]["options"]["weight"] is None, "published, with a folder"


def test_a_detector_of_ones_own_trains(tmp_path, monkeypatch):
    """As a user would: the template in a folder of theirs, its name on the command line."""
    template = Path(__file__).with_name("own_detector.py").read_text()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "detector_of_mine.py").write_text(template)
    monkeypatch.syspath_prepend(str(tmp_path / "mine"))
    own = "detector_of_mine:build"
    out = run(tmp_path, "--model", own, "--teacher-model", own, "--recipe", "pkd", "--recipe", "defeat")
    assert terms(out) == {"distill/pkd/pearson", "distill/defeat/masked_mse"}


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["--recipe", "objectness"], "argument --recipe: objectness: "),
        (["--recipe", "nothing"], "argument --recipe: no recipe"),
        (["--preset", "mine"], "argument --preset"),
        (["--recipe", "soft-labels"], "--unlabeled-path"),
        (["--unlabeled-path", "nowhere"], "argument --unlabeled-path: nowhere is not a folder"),
        (["--model", "yolo"], "argument --model: 'yolo': unknown kind"),
        (["--teacher-model", "faster_rcnn:depth=7"], "argument --teacher-model"),
        (["--teacher", "nowhere.pth"], "argument --teacher: nowhere.pth"),
        (["--weights", "nowhere.pth"], "argument --weights: nowhere.pth"),
        (["--inherit", "tail"], "argument --inherit: "),
        (["--freeze", "tail"], "argument --freeze: "),
        (["--student-scale", "0.5", "--image-size", "96"], "argument --student-scale"),
        (["--student-scale", "2"], "argument --student-scale"),
        (["--compare", "none", "objectness"], "argument --compare: 'objectness': objectness: "),
        (["--compare", "none", "pkd+inherit=tail"], "argument --compare: 'pkd+inherit=tail': argument --inherit"),
        (["--compare", "none", "--recipe", "pkd"], "argument --compare: does not go with --recipe"),
        (["--recipe", "hinton:temperature=0"], "temperature: expected a number above 0"),
        (["--recipe", "pkd:weight=-1"], "weight: expected a number of at least 0"),
        (["--recipe", "fgfi:threshold=7"], "argument --recipe: threshold"),
        (["--recipe", "fgfi:threshold=7", "--kd-start", "1"], "argument --recipe: threshold"),
        (["--recipe", "fgfi:threshold=7", "--recipe", "fitnets:hint_steps=1"], "argument --recipe: threshold"),
        (["--recipe", "fitnets:hint_steps=0"], "hint_steps: expected at least 1"),
        ([*MODELS["retinanet"][:2], *MODELS["fcos"][2:], "--recipe", "hinton"], "argument --recipe: dense predictions"),
        (["--model", "faster_rcnn:ratios=1", "--recipe", "chen2017"], "has the teacher's anchors"),
        (["--freeze", "backbone,fpn,rpn,roi_heads"], "argument --freeze: nothing is left"),
        ([*MODELS["ssdlite"], "-b", "1"], "argument --recipe: "),
        (["--unlabeled-path", "."], "argument --unlabeled-path: no recipe of this run"),
        (["--compare", "pkd", "pkd"], "argument --compare: 'pkd' is given twice"),
        (["--compare", "pkd+inherit="], "argument --compare"),
        (["--splits", "train"], "argument --splits"),
        (["--max-size", "32"], "argument --max-size"),
        (["--base-size", "-1"], "argument --base-size"),
        (["--hflip-prob", "2"], "argument --hflip-prob"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_trained(argv, why, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main([*SMALL, *argv]) == 2
    assert why in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir()), "nothing is written"


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_each_kind_of_detector_is_distilled(tmp_path, kind):
    recipes = ["defeat:adapter=true", "cwd", "hinton", "tadf:adapter=true"]
    out = run(tmp_path, *MODELS[kind], *(x for recipe in recipes for x in ("--recipe", recipe)))
    assert {name.split("/")[1] for name in terms(out)} == {"defeat", "cwd", "hinton", "tadf"}
    assert (out / "students" / "distilled.adapters.safetensors").exists()


@pytest.mark.slow
def test_teachers_of_another_kind_from_checkpoints_in_bfloat16(tmp_path):
    first = run(tmp_path / "first", *MODELS["retinanet"])
    weights = load_file(first / "students" / "alone.safetensors")
    paths = []
    for name in ("a", "b"):
        paths += ["--teacher", str(tmp_path / f"{name}.pth")]
        torch.save({"model": weights}, paths[-1])
    model = MODELS["faster_rcnn"][:2]
    how = ["--teacher-model", MODELS["retinanet"][1], "--teacher-dtype", "bfloat16"]
    out = run(tmp_path, *model, *how, *paths, "--recipe", "pkd")
    assert [entry["run"] for entry in records(out, "result")] == ["alone", "alone, equal time", "distilled"]


@pytest.mark.slow
def test_pictures_without_labels_and_a_student_of_half_size_pictures(tmp_path):
    root = folder_of(tmp_path, "coco")
    out = run(
        tmp_path, *MODELS["faster_rcnn"], "--recipe", "soft-labels", "--recipe", "combined", "--student-scale", "0.5",
        "--unlabeled-path", root / "train2017",
    )  # fmt: skip
    assert {"distill/soft-labels/rpn_classes", "distill/combined/pearson"} <= terms(out)


def test_what_is_compiled_is_one_graph_each(tmp_path, monkeypatch):
    """Backbone with pyramid, and each objective: traced whole, run by their own operations."""
    compiled = []

    def traced(what, *, fullgraph):
        assert fullgraph
        compiled.append(type(what).__name__)
        return compile_with(what, fullgraph=True, backend="eager")

    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", traced)
    out = run(tmp_path, *MODELS["retinanet"], "--recipe", "pkd", "--recipe", "defeat", "--recipe", "mimic", "--compile")
    assert compiled[:3] == ["method", "DetectionDistillationLoss", "DetectionDistillationLoss"], "two objectives"
    assert compiled.count("method") == 3, "of each student"
    assert terms(out) == {"distill/pkd/pearson", "distill/defeat/masked_mse", "distill/mimic/masked_mse"}


@pytest.mark.slow
def test_compiled_training(tmp_path):
    out = run(tmp_path, *MODELS["retinanet"], "--recipe", "pkd", "--recipe", "defeat", "--compile")
    assert terms(out) == {"distill/pkd/pearson", "distill/defeat/masked_mse"}


@pytest.mark.slow
@pytest.mark.parametrize("table", TABLES)
def test_every_table_of_the_papers_runs(tmp_path, table):
    out = run(tmp_path, *MODELS["faster_rcnn"], "--steps", "1", "--compare", table, "--no-equal-time")
    with (out / "compare.csv").open() as file:
        titles = [row["run"] for row in csv.DictReader(file)]
    assert titles[: 1 + len(TABLES[table])] == ["teacher", *(entry.partition("=")[0] for entry in TABLES[table])]
