"""The end of the main job: the printed table, the records of the results, and which pictures are drawn. How they are
drawn is in the files beside this one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..detectors import Cost, cost
from ..evaluate import Evaluator, voc_ap
from ..export import FOLDER
from ..loop import Run
from ..split import PARTS
from .found_boxes import detections
from .gradient_norms import gradients, norms_of
from .heat_maps import features
from .learning_curves import curves

ORDER = ("alone", "alone, equal time", "inherited", "distilled")


def write(
    folder: Path,
    *,
    teacher: tuple[nn.Module, Run | None],
    students: dict[str, Any],
    parts: dict[str, float],
    job: Any,
    seconds: float,
) -> None:
    """Write everything to ``folder`` and print the table.

    ``students`` are by name what :meth:`kdkernels.harness.job.Job.student` returned; ``job`` has the pictures.
    """
    progress, options = job.progress, job.options
    runs = {name: students[name].run for name in ORDER if name in students}
    everything = {**({"teacher": teacher[1]} if teacher[1] is not None else {}), **runs}
    for name, run in everything.items():
        progress.record(kind="result", **row(name, run), pictures=len(job.val))
    progress.record(kind="step_split", **parts)
    detectors = {name: student.detector for name, student in students.items()}
    for detector in detectors.values():
        detector.__dict__.pop("features", None)  # a compiled one, in the place of its own: operations are counted in it
    members = getattr(teacher[0], "members", [teacher[0]])
    title = "teacher" if len(members) == 1 else f"each of {len(members)} teachers"
    measured = {title: members[0], "student": detectors["alone"]}
    costs = {name: cost(detector, options.image_size) for name, detector in measured.items()}
    for name, found in costs.items():
        progress.record(kind="cost", detector=name, **found._asdict())
    extra = _extra_scores(job, detectors)
    for entry in extra:
        progress.record(kind="extra_score", **entry)
    shown = {"teacher": teacher[0], "student alone": detectors["alone"], "student distilled": detectors["distilled"]}
    curves(folder / "curves.png", everything)
    pictures = ["curves.png", *seen(folder, shown, job, "distilled")]
    progress.record(kind="end", seconds=seconds)
    print(table(everything, parts, len(job.val), costs))
    for entry in extra:
        print(f"{entry['what']}, {entry['run']}: {entry['score']:.3f}")
    weights = sorted(f"{FOLDER}/{path.name}" for path in (folder / FOLDER).iterdir())
    names = ", ".join(["metrics.jsonl", *pictures, *weights])
    print(f"\n{seconds:.0f} s in all. In {folder}: {names}")


def seen(folder: Path, detectors: dict[str, nn.Module], job: Any, distilled: str) -> list[str]:
    """Draw what detectors, the teacher first, find and see in validation pictures, and the gradients of the run
    ``distilled``, as far as there are levels to compare and norms that were recorded; returns the files' names.
    """
    detections(folder / "detections.png", detectors, job.val, job.device)
    drawn = ["detections.png"]
    (_, teacher), *students = detectors.items()
    try:
        how = {"base_size": job.options.base_size}
        features(folder / "features.png", teacher, dict(students), job.val, job.device, **how)
        drawn.append("features.png")
    except ValueError as error:  # recipes of logits alone do without a common level
        job.progress.say(f"no features.png: {error}")
    norms = norms_of(folder / "metrics.jsonl", distilled)
    if norms:
        gradients(folder / "gradients.png", norms)
        drawn.append("gradients.png")
    return drawn


def _extra_scores(job: Any, detectors: dict[str, nn.Module]) -> list[dict[str, Any]]:
    """Scores that flags ask for: on training pictures, and by VOC's rules."""
    options, found = job.options, []
    for name, detector in detectors.items():
        if options.voc_ap:
            score = voc_ap(job.evaluator.detect(detector), job.val.coco)
            found.append({"what": "VOC mAP", "run": name, "score": score.mean_ap})
        if options.eval_train:
            size = options.training.batch_size * 2
            seen = Evaluator(job.train, size, job.device, options.training.workers, limit=options.eval_train)
            score = seen(detector).mean_ap
            found.append({"what": f"mAP on {len(seen)} training pictures", "run": name, "score": score})
    return found


def row(name: str, run: Run) -> dict[str, Any]:
    """The numbers of one row of the table."""
    return {
        "run": name,
        "seed": run.seed,
        "steps": run.steps,
        "seconds": run.seconds,
        **run.score._asdict(),
    }


def table(runs: dict[str, Run], parts: dict[str, float], pictures: int, costs: dict[str, Cost]) -> str:
    """The text that a run ends with: every row, the split of a distilled step, and what the numbers are worth."""
    lines = [f"{'':<28}{'seed':>6}{'steps':>8}{'seconds':>10}{'mAP':>9}{'AP50':>9}"]
    for name, run in runs.items():
        title = {"alone": "student alone, equal steps", "alone, equal time": "student alone, equal time"}.get(
            name, "teacher" if name == "teacher" else f"student {name}"
        )
        score = run.score
        lines.append(
            f"{title:<28}{run.seed:>6}{run.steps:>8}{run.seconds:>10.1f}{score.mean_ap:>9.3f}{score.ap50:>9.3f}"
        )
    whole = sum(parts[part] for part in PARTS)
    split = ", ".join(f"{part} {1000 * parts[part]:.0f} ms ({parts[part] / whole:.0%})" for part in PARTS)
    sizes = [
        f"{name}: {x.parameters / 1e6:.2f} million parameters, {x.gflops:.2f} GFLOPs, {x.milliseconds:.1f} ms a picture"
        for name, x in costs.items()
    ]
    return "\n".join(
        [
            *lines,
            "",
            *sizes,
            f"A distillation step: {1000 * parts['distilled']:.0f} ms; a step alone: {1000 * parts['alone']:.0f} ms.",
            f"In parts: {split}.",
            f"The losses by one call each instead of the objective: {1000 * parts['separate']:.0f} ms, "
            f"{parts['separate'] / parts['losses']:.2f} times as long.",
            "These are of forward and backward, without the optimiser, the kinds of step timed in turn.",
            "Seconds are of training, without evaluations. Equal time: its steps were computed from these times before",
            "it began, and then fixed.",
            f"Scored on {pictures} validation pictures, with one seed. One seed says little: repeat with other --seed",
            "values before you believe a difference.",
        ]
    )
