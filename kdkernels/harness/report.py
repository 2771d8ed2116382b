"""What a run leaves behind: the printed table, the learning curves, pictures with boxes, and the students' weights."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .data import collate, to_device
from .detectors import Cost, cost
from .evaluate import Evaluator, voc_ap
from .export import FOLDER
from .extras import require
from .loop import Run
from .split import PARTS

#: One colour per run, the same in both pictures; told apart by the colour-blind too (Okabe and Ito).
COLOURS = {
    "teacher": "#000000",
    "alone": "#0072B2",
    "alone, equal time": "#56B4E9",
    "inherited": "#009E73",
    "distilled": "#D55E00",
}
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
    curves(folder / "curves.png", everything)
    shown = {"teacher": teacher[0], "student alone": detectors["alone"], "student distilled": detectors["distilled"]}
    detections(folder / "detections.png", shown, job.val, job.device)
    progress.record(kind="end", seconds=seconds)
    print(table(everything, parts, len(job.val), costs))
    for entry in extra:
        print(f"{entry['what']}, {entry['run']}: {entry['score']:.3f}")
    weights = sorted(f"{FOLDER}/{path.name}" for path in (folder / FOLDER).iterdir())
    names = ", ".join(["metrics.jsonl", "curves.png", "detections.png", *weights])
    print(f"\n{seconds:.0f} s in all. In {folder}: {names}")


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


def curves(path: Path, runs: dict[str, Run]) -> None:
    """Draw the detectors' own loss over the steps, and the validation AP50 over the seconds of training."""
    require("matplotlib").use("Agg")
    plt = require("matplotlib.pyplot")
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    for name, run in runs.items():
        steps = range(1, len(run.task_loss) + 1)
        title = name if name == "teacher" else f"student {name}"
        left.plot(steps, _smooth(run.task_loss), color=COLOURS[name], label=title, linewidth=1.6)
        seconds = [0.0, *(entry[1] for entry in run.scores)]
        ap50 = [0.0, *(entry[3] for entry in run.scores)]
        label = f"{title}: {ap50[-1]:.2f}"
        right.plot(seconds, ap50, color=COLOURS[name], label=label, marker="o", markersize=4, linewidth=1.6)
    seeds = ", ".join(str(seed) for seed in sorted({run.seed for run in runs.values()}))
    figure.suptitle(f"Teacher and students, seed {seeds}: one seed says little", fontsize=11)
    left.set(title="Detection loss on the training pictures", xlabel="step", ylabel="loss (running mean)")
    left.set_ylim(bottom=0)
    right.set(title="Average precision on the validation pictures", xlabel="training time (s)", ylabel="AP at IoU .5")
    right.set_ylim(0, 1)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def detections(
    path: Path, detectors: dict[str, nn.Module], val: Any, device: torch.device, *, count: int = 4, score: float = 0.3
) -> None:
    """Draw validation pictures, one per row, with the boxes that each detector finds with at least ``score``."""
    require("matplotlib").use("Agg")
    plt = require("matplotlib.pyplot")
    rectangle = require("matplotlib.patches").Rectangle
    chosen = _most_objects(val, count)
    pictures, targets = collate([val[index] for index in chosen])
    columns: list[tuple[str, list[dict]]] = [("ground truth", [{**t, "scores": None} for t in targets])]
    images, _ = to_device(pictures, targets, device)
    for name, detector in detectors.items():
        detector.eval()
        columns.append((name, [_best_at_each_place(found, score) for found in detector.detect(images)]))
    figure, grid = plt.subplots(
        len(chosen), len(columns), figsize=(3.4 * len(columns), 3.4 * len(chosen)), layout="constrained", squeeze=False
    )
    height, width = pictures.shape[-2:]
    for column, (title, found) in enumerate(columns):
        for line, boxes in enumerate(found):
            axes = grid[line][column]
            axes.imshow(pictures[line].permute(1, 2, 0).numpy())
            axes.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
            scores = boxes["scores"]
            for index, (x1, y1, x2, y2) in enumerate(boxes["boxes"].tolist()):
                colour = "#3cd070" if scores is None else "#ffe119"
                axes.add_patch(rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.8))
                text = val.category_names[int(boxes["labels"][index]) - 1]
                text += "" if scores is None else f"  {float(scores[index]):.2f}"
                # Above the box, or inside it where there is no room above.
                below = y1 < 0.08 * height
                axes.text(
                    x1, y1, text, fontsize=9, color="black", va="top" if below else "bottom", clip_on=True,
                    bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.0},
                )  # fmt: skip
        grid[0][column].set_title(title if column == 0 else f"{title} (score ≥ {score:g})", fontsize=12)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _best_at_each_place(found: dict[str, torch.Tensor], score: float) -> dict[str, torch.Tensor]:
    """Detections of at least ``score``, one label for each place: two labels on one box cannot be read."""
    keep = require("torchvision.ops").nms(found["boxes"], found["scores"], 0.5)
    keep = keep[found["scores"][keep] >= score]
    return {name: value[keep] for name, value in found.items()}


def _most_objects(val: Any, count: int) -> list[int]:
    """The pictures to show: by number of objects among the first 50, the most first; the same whatever was trained."""
    first = range(min(50, len(val)))
    return sorted(first, key=lambda index: (-len(val[index][1]["labels"]), index))[:count]


def _smooth(values: list[float]) -> list[float]:
    """Running mean over a twentieth of the run."""
    window = max(1, len(values) // 20)
    sums = list(itertools.accumulate(values, initial=0.0))
    return [(sums[i] - sums[max(0, i - window)]) / min(window, i) for i in range(1, len(sums))]
