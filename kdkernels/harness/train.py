"""The main job, ``python -m kdkernels train``: teacher, student alone, student distilled, and what came of it.

Only the order of things lives here; the flags are :mod:`kdkernels.harness.flags`, the parts are the other files.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

import kdkernels as kd

from . import flags
from .extras import check


def main(argv: list[str]) -> int:
    """Run the main job with the command line ``argv``; returns the exit code.

    0: done. 1: a package is missing, or training failed (the loss is not finite). 2: bad input; the message names the
    flag. What a run has recorded stays in its folder whatever happens; no earlier run is overwritten.
    """
    parser = flags.parser()
    try:
        options = flags.parse(parser, argv)
    except SystemExit as stop:  # argparse exits by itself: 0 after --help, 2 after bad input
        return int(stop.code or 0)
    try:
        check(scenes=options.data_path is None)
    except ImportError as error:
        print(f"kdkernels train: {error}", file=sys.stderr)
        return 1
    return _run(options)


def _run(options: flags.Options) -> int:
    from .data import DataError
    from .loop import TrainingError
    from .progress import Progress

    begin = time.perf_counter()
    try:
        train, val, identity = _pictures(options)
        try:
            options.output_dir.mkdir(parents=True, exist_ok=True)
            progress = Progress(options.output_dir / "metrics.jsonl")
        except OSError as error:
            print(f"kdkernels train: error: argument --output-dir: {error}", file=sys.stderr)
            return 2
        try:
            Job(options, train, val, identity, progress, begin).run()
        finally:
            progress.close()
    except DataError as error:
        print(f"kdkernels train: error: argument --data-path: {error}", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"kdkernels train: error: {error}; records so far: {options.output_dir}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nkdkernels train: interrupted; records so far: {options.output_dir}", file=sys.stderr)
        return 130
    return 0


def _pictures(options: flags.Options) -> tuple[Any, Any, dict[str, Any]]:
    """Training and validation pictures, and what identifies them in the teacher's key."""
    from .data import ScenePictures, Size, open_pictures

    if options.data_path is None:
        print("composing the scenes", file=sys.stderr, flush=True)
        train, val = (ScenePictures(options.scenes, split) for split in ("train", "val"))
        return train, val, {"scenes": asdict(options.scenes), "digests": [train.digest, val.digest]}
    size = Size(square=options.image_size)
    train = open_pictures(options.data_path, "train", size=size)
    val = open_pictures(options.data_path, "val", size=size, classes=train.category_names)
    for split, pictures in (("train", train), ("val", val)):
        if pictures.problems:
            print(f"{split}: {pictures.problems}", file=sys.stderr, flush=True)
    return train, val, {"digests": [train.digest, val.digest], "image_size": options.image_size, "hflip": train.hflip}


class Job:
    """One run of the main job; the attributes are what the report shows."""

    def __init__(
        self, options: flags.Options, train: Any, val: Any, identity: dict, progress: Any, begin: float
    ) -> None:
        from .evaluate import Evaluator

        self.options, self.train, self.val, self.identity, self.progress = options, train, val, identity, progress
        self.begin = begin
        self.device = torch.device(options.device)
        classes = len(train.category_ids)
        self.teacher_settings = replace(options.teacher, classes=classes)
        self.student_settings = replace(options.student, classes=classes)
        self.evaluator = Evaluator(val, options.training.batch_size * 2, self.device, options.training.workers)

    def run(self) -> None:
        """Train everything and report."""
        from . import report, split
        from .distill import Adapter, Recipe
        from .teacher import FrozenTeacher

        options, steps = self.options, self.options.training.steps
        # Kernels that are not built yet are built now: half a minute that would else count as the student's first step.
        served = kd.backend_info(build=True)
        kernels = {loss: backends.get(self.device.type, ("reference",))[0] for loss, backends in served.items()}
        self.progress.record(kind="settings", kernels=kernels, **self._settings())
        teacher, teacher_run = self._teacher()
        frozen = FrozenTeacher(teacher)
        students: dict[str, nn.Module] = {}
        runs = {}

        channels = self.student_settings.channels, self.teacher_settings.channels
        recipe = Recipe(
            frozen, Adapter(*channels, levels=5), options.recipe, base_size=self.teacher_settings.canonical_scale / 4
        ).to(self.device)
        students["distilled"], runs["distilled"] = self._student("distilled", steps, recipe)
        students["alone"], runs["alone"] = self._student("alone", steps)
        parts = split.measure(
            students["distilled"], recipe, self.train, options.training, self.device, steps=min(12, steps)
        )
        # Fixed before that training begins: a number of steps like any other, not a race with the clock. The two kinds
        # of step were timed in turn: two runs, minutes apart, would compare what else the machine did.
        ratio = sum(parts[part] for part in split.PARTS) / parts["alone"]
        longer = max(steps, round(steps * ratio))
        self.progress.say(
            f"a distilled step takes {ratio:.2f} times one alone: at equal time the student alone gets {longer} steps"
        )
        students["alone, equal time"], runs["alone, equal time"] = self._student("alone, equal time", longer)
        report.write(
            options.output_dir,
            teacher=(teacher, teacher_run),
            students=students,
            runs=runs,
            parts=parts,
            val=self.val,
            device=self.device,
            progress=self.progress,
            seconds=time.perf_counter() - self.begin,
        )

    def _teacher(self) -> tuple[nn.Module, Any]:
        from .cache import TeacherCache, key_of
        from .detectors import build
        from .loop import Run, fit

        settings = replace(self.options.training, steps=self.options.teacher_steps)
        made_of = {
            "data": self.identity,
            "detector": asdict(self.teacher_settings),
            "training": {key: value for key, value in asdict(settings).items() if key != "workers"},
        }
        cache, key = TeacherCache(self.options.teacher_cache), key_of(made_of)
        torch.manual_seed(settings.seed)
        teacher = build(self.teacher_settings)
        try:
            record = cache.load(key, teacher)
        except ValueError as error:
            self.progress.say(f"warning: {error}; training it anew")
            record = None
        teacher.to(self.device)
        if record is not None:
            run = Run(**record)
            run.scores = [tuple(score) for score in run.scores]
            self.progress.say(f"teacher: {cache.path(key)}, trained before in {run.seconds:.0f} s")
            return teacher, run
        run = fit(
            "teacher", teacher, _alone(teacher), self.train, settings, parameters=teacher.parameters(), **self._where()
        )
        try:
            self.progress.say(f"teacher: kept in {cache.save(key, teacher, asdict(run))}")
        except OSError as error:
            self.progress.say(f"warning: the teacher cannot be kept: {error}")
        return teacher, run

    def _student(self, name: str, steps: int, recipe: Any = None) -> tuple[nn.Module, Any]:
        from .detectors import build
        from .loop import fit

        settings = replace(self.options.training, steps=steps)
        torch.manual_seed(settings.seed)  # every student starts from the same weights
        student = build(self.student_settings).to(self.device)
        objective, parameters = _alone(student), list(student.parameters())
        if recipe is not None:
            objective, parameters = _distilled(student, recipe), [*parameters, *recipe.parameters()]
        run = fit(name, student, objective, self.train, settings, parameters=parameters, **self._where())
        return student, run

    def _where(self) -> dict[str, Any]:
        return {"device": self.device, "evaluator": self.evaluator, "progress": self.progress}

    def _settings(self) -> dict[str, Any]:
        options = self.options
        return {
            "data": self.identity,
            "teacher": asdict(self.teacher_settings),
            "student": asdict(self.student_settings),
            "training": asdict(options.training),
            "teacher_steps": options.teacher_steps,
            "recipe": asdict(options.recipe),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }


def _alone(detector: Any) -> Any:
    """The objective of a detector alone: its own losses."""
    from .loop import Losses

    def objective(images: Tensor, targets: list[dict]) -> Losses:
        losses = detector.losses(detector.features(images), targets)
        return Losses({f"task/{name}": value for name, value in losses.items()})

    return objective


def _distilled(student: Any, recipe: Any) -> Any:
    """The objective of a distilled student: its own losses and the recipe's, from features computed once."""
    from .loop import Losses

    def objective(images: Tensor, targets: list[dict]) -> Losses:
        features = student.features(images)
        losses = {f"task/{name}": value for name, value in student.losses(features, targets).items()}
        extra = recipe(student, features, images, targets)
        return Losses(
            {**losses, "distill": extra.total}, {f"distill/{name}": value for name, value in extra.terms.items()}
        )

    return objective


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
