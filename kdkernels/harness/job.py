"""The trainings of one run, on one set of pictures: the teacher's, from disk or trained here, and any student's.

What is trained in which order, and what is shown of it, is the business of ``train.py`` and ``compare/``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

import kdkernels as kd

from . import detectors, split
from .cache import TeacherCache, key_of
from .data import DataError, collate, to_device, training_batches
from .detectors.rescaled import Rescaled
from .distill import Distillation, alone, distilled
from .ensemble import TeacherEnsemble
from .evaluate import Evaluator
from .export import export
from .flags import Options
from .interrupt import Interruption
from .loop import Run, fit
from .processes import ALONE, Processes, Shared
from .progress import Progress
from .recipes import RecipeText, Setup
from .resume import RunFolder
from .settings import TrainSettings
from .teacher import FrozenTeacher
from .update import Objective


class JobError(ValueError):
    """What was asked for makes no sense with these detectors; the message names the flag."""


@dataclass
class Student:
    """A trained student."""

    detector: nn.Module
    run: Run
    distillation: Distillation | None = None
    inherited: list[str] = field(default_factory=list)  #: names of tensors that it began with from the teacher
    frozen: list[nn.Parameter] = field(default_factory=list)  #: what --freeze took out of its training


class Job:
    """Teacher and students of one run.

    Args:
        options: what the flags say.
        train, val: pictures.
        identity: what identifies the pictures, for the teacher's key.
        unlabeled: pictures without ground truth, or None.
        folder: where the trainings' checkpoints go; None: nowhere.
        interruption: what a step is held whole against.
        processes: this one among those of the run.
    """

    def __init__(
        self,
        options: Options,
        train: Any,
        val: Any,
        identity: dict,
        progress: Progress,
        unlabeled: Any = None,
        *,
        folder: RunFolder | None = None,
        interruption: Interruption | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.folder, self.interruption, self.processes = folder, interruption, processes
        self.options, self.train, self.val, self.identity, self.progress = options, train, val, identity, progress
        self.unlabeled = unlabeled
        self.device = torch.device(options.device)
        self.classes = len(train.category_ids)
        self.evaluator = Evaluator(val, options.training.batch_size * 2, self.device, options.training.workers)

    def check(self) -> None:
        """Build everything once, untrained, and take a step with a batch, so that what cannot be is refused before
        anything is trained.

        Raises:
            JobError: a recipe that makes no sense between these detectors, a part that cannot be inherited or frozen, a
                checkpoint that does not fit.
        """
        options = self.options
        rows: list[tuple[str, Sequence[RecipeText], dict[str, Any]]] = [("argument --recipe: ", options.recipes, {})]
        if options.compare:
            rows = [
                (f"argument --compare: {row.title!r}: ", row.recipes, {"inherit": row.inherit, "freeze": row.freeze})
                for row in options.compare
            ]
        with torch.random.fork_rng():
            teacher = self._untrained_teacher()
            for prefix, recipes, changes in rows:
                try:
                    how = {"steps": options.training.steps, "compile": False, **changes}
                    student, distillation, *_ = self._started(teacher, recipes, **how)
                    self._dry_steps(student, distillation)
                except JobError as error:
                    raise JobError(f"{prefix}{error}" if options.compare else str(error)) from None
                except ValueError as error:
                    raise JobError(f"{prefix}{error}") from None

    @torch.no_grad()
    def _dry_steps(self, student: nn.Module, distillation: Distillation | None) -> None:
        """The first and the last distilled step and a detection of an untrained student, which raise what those of the
        training would: recipes may take turns in its course.
        """
        training, when = self.options.training, self.options.kd
        count = min(training.batch_size, 2)
        images, targets = to_device(*collate([self.train[i % len(self.train)] for i in range(count)]), self.device)
        objective = alone(student)
        if distillation is not None:
            unlabeled = self.unlabeled_batches() if distillation.needs_unlabeled else None
            objective = distilled(student, distillation, unlabeled=unlabeled)
        end = training.steps if when.stop is None else min(when.stop, training.steps)
        for index in {when.start, end - 1}:  # the flags see to it that the start comes first
            objective(images, targets, index)
        student.eval()
        student.detect(images[:1])

    def teacher(self) -> tuple[FrozenTeacher, Run | None]:
        """The teacher, and its training, None where it came from checkpoints."""
        dtype = getattr(torch, self.options.teacher_dtype) if self.options.teacher_dtype != "float32" else None
        if self.options.teachers:
            return FrozenTeacher(self._untrained_teacher().to(self.device), dtype), None
        teacher, run = self._trained_teacher()
        return FrozenTeacher(teacher, dtype), run

    def student(
        self,
        name: str,
        steps: int,
        teacher: FrozenTeacher,
        recipes: Sequence[RecipeText] = (),
        *,
        seed: int | None = None,
        **changes: Any,
    ) -> Student:
        """Train a student.

        Args:
            name: what progress and records call it.
            recipes: none: alone, by the detector's own losses.
            seed: of the weights, the order of the pictures and what the recipes draw; None: the run's.
            changes: of the options, for this student: ``inherit``, ``freeze``.
        """
        settings = self.options.training.lasting(steps)
        if seed is not None:
            settings = replace(settings, seed=seed)
        torch.manual_seed(settings.seed)  # every student of a seed starts from the same weights
        how = {"training": settings, **changes}
        student, distillation, inherited, frozen = self._started(teacher.detector, recipes, teacher, steps, **how)
        parts = changes.get("inherit", self.options.inherit)
        if parts:
            count = sum(len(part.state_dict()) for part in (detectors.part_of(student, name) for name in parts))
            self.progress.say(f"{name}: begins with {len(inherited)} of the {count} tensors of {', '.join(parts)}")
        objective, parameters = alone(student), list(student.parameters())
        if distillation is not None:
            unlabeled = self.unlabeled_batches(settings) if distillation.needs_unlabeled else None
            every = self.options.norms_every if self.processes.count == 1 else 0
            objective = distilled(student, distillation, norms_every=every, unlabeled=unlabeled)
            parameters += list(distillation.parameters())
        run = self._fit(name, student, objective, settings, parameters, distillation)
        trained = Student(student, run, distillation, inherited, frozen)
        if self.processes.first:
            export(self.options.output_dir, name, trained)  # now: whatever fails later, it is not lost
        return trained

    def decide(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make`` gives, in JSON's types; a run that goes on keeps to what it was, and so do all processes."""
        if self.folder is None:
            return self.processes.told(make())
        if not self.processes.told(self.folder.decided(name)):
            value = make()  # all of them: it may need them all
            self.folder.decide(name, value)
        return self.processes.told(self.folder.content["decided"].get(name))

    def _fit(
        self,
        name: str,
        detector: nn.Module,
        objective: Objective,
        settings: TrainSettings,
        parameters: list[nn.Parameter],
        distillation: Distillation | None = None,
    ) -> Run:
        checkpoints = None
        if self.folder is not None:
            checkpoints = self.folder.checkpoints(name, settings.steps, self.progress.say)
        if self.processes.count > 1:
            objective = Shared(objective, detector, distillation, self.device)
        return fit(
            name,
            detector,
            objective,
            self.train,
            settings,
            parameters=parameters,
            device=self.device,
            evaluator=self.evaluator,
            progress=self.progress,
            upkeep=self.options.upkeep,
            checkpoints=checkpoints,
            distillation=distillation,
            interruption=self.interruption,
            processes=self.processes,
        )

    def _started(
        self,
        teacher_detector: nn.Module | None,
        recipes: Sequence[RecipeText],
        teacher: FrozenTeacher | None = None,
        steps: int = 1,
        **changes: Any,
    ) -> tuple[nn.Module, Distillation | None, list[str], list[nn.Parameter]]:
        """A student before its training, its distillation, the names of what it inherited, and what is frozen. Without
        a teacher's detector nothing can be inherited, nor distilled.
        """
        options = replace(self.options, **changes)
        student = self._model("--model", options.model).to(self.device)
        if options.weights is not None:
            self._load(student, options.weights, "--weights")
        inherited: list[str] = []
        try:
            if options.inherit:
                inherited = detectors.inherit(student, teacher_detector, list(options.inherit))
        except ValueError as error:
            raise JobError(f"argument --inherit: {error}") from None
        frozen: list[nn.Parameter] = []
        try:
            if options.freeze:
                frozen = [student.get_parameter(x) for x in detectors.freeze(student, list(options.freeze), inherited)]
        except ValueError as error:
            raise JobError(f"argument --freeze: {error}") from None
        if not any(parameter.requires_grad for parameter in student.parameters()):
            raise JobError("argument --freeze: nothing is left to train")
        if options.student_scale != 1:
            student = Rescaled(student, options.student_scale)
        if options.compile:
            student.features = torch.compile(student.features, fullgraph=True)
        if not recipes:
            return student, None, inherited, frozen
        training = options.training
        # Each process draws for its own pictures.
        seed = training.seed + self.processes.rank
        setup = Setup(student, teacher_detector, seed, options.image_size, self.unlabeled is not None)
        built = [recipe.build(setup) for recipe in recipes]
        distillation = Distillation(
            built,
            teacher if teacher is not None else FrozenTeacher(teacher_detector),
            base_size=options.base_size,
            limit=options.proposals,
            steps=steps,
            epoch_steps=math.ceil(len(self.train) / (training.batch_size * training.accumulate * self.processes.count)),
            compile=options.compile,
            schedule=options.kd,
            process_group=torch.distributed.group.WORLD if self.processes.count > 1 else None,
        ).to(self.device)
        return student, distillation, inherited, frozen

    def _model(self, flag: str, text: str) -> nn.Module:
        try:
            return detectors.load_model(text, classes=self.classes, image_size=self.options.image_size)
        except ValueError as error:
            raise JobError(f"argument {flag}: {error}") from None

    def _load(self, detector: nn.Module, path: Any, flag: str) -> None:
        try:
            detectors.load_weights(detector, path)
        except ValueError as error:
            raise JobError(f"argument {flag}: {error}") from None

    def _untrained_teacher(self) -> nn.Module:
        """The teacher's architecture; with the weights of ``--teacher``, where that is given."""
        members = []
        for path in self.options.teachers or [None]:
            member = self._model("--teacher-model", self.options.teacher_model)
            if path is not None:
                self._load(member, path, "--teacher")
            members.append(member)
        return (members[0] if len(members) == 1 else TeacherEnsemble(members)).to(self.device)

    def _trained_teacher(self) -> tuple[nn.Module, Run]:
        settings = self.options.training.lasting(self.options.teacher_steps)
        known = detectors.settings_of(
            self.options.teacher_model, classes=self.classes, image_size=self.options.image_size
        )
        made_of = {
            "data": self.identity,
            "detector": asdict(known) if known is not None else self.options.teacher_model,
            "training": {key: value for key, value in asdict(settings).items() if key != "workers"},
            "processes": self.processes.count,
        }
        cache, key = TeacherCache(self.options.teacher_cache), key_of(made_of)
        torch.manual_seed(settings.seed)
        teacher = self._model("--teacher-model", self.options.teacher_model)
        try:
            # A detector of one's own may change without its name.
            record = cache.load(key, teacher) if known is not None else None
        except ValueError as error:
            self.progress.say(f"warning: {error}; training it anew")
            record = None
        teacher.to(self.device)
        if record is not None:
            run = Run.of(record)
            self.progress.say(f"teacher: {cache.path(key)}, trained before in {run.seconds:.0f} s")
            return teacher, run
        run = self._fit("teacher", teacher, alone(teacher), settings, list(teacher.parameters()))
        if known is not None and self.processes.first:
            try:
                self.progress.say(f"teacher: kept in {cache.save(key, teacher, asdict(run))}")
            except OSError as error:
                self.progress.say(f"warning: the teacher cannot be kept: {error}")
        return teacher, run

    def unlabeled_batches(self, settings: TrainSettings | None = None) -> UnlabeledBatches:
        """Batch after batch of the pictures without ground truth; by the run's settings, or those of a student."""
        return UnlabeledBatches(self.unlabeled, settings or self.options.training, self.processes, self.device)

    def loaded(self, path: Any) -> nn.Module:
        """The student whose weights a file holds, as :func:`~kdkernels.harness.export.export` wrote it."""
        student, *_ = self._started(None, [], weights=path, inherit=(), freeze=(), compile=False)
        return student

    def split(self, student: Student, steps: int = 12) -> dict[str, float]:
        """Where the time and the memory of a distillation step go: :func:`kdkernels.harness.split.measure`."""
        unlabeled = self.unlabeled_batches() if student.distillation.needs_unlabeled else None
        steps = min(steps, self.options.training.steps)
        how = {"steps": steps, "unlabeled": unlabeled, "frozen": student.frozen}
        training = self.options.training
        return split.measure(student.detector, student.distillation, self.train, training, self.device, **how)

    def settings(self) -> dict[str, Any]:
        """What makes the run, for its records."""
        options = self.options
        served = kd.backend_info(build=True)
        return {
            "data": self.identity,
            "teacher": options.teacher_model,
            "teachers": [str(path) for path in options.teachers],
            "student": options.model,
            "training": asdict(options.training),
            "kd": asdict(options.kd),
            "processes": self.processes.count,
            "teacher_steps": options.teacher_steps,
            "recipes": [] if options.compare else [_written(recipe) for recipe in options.recipes],
            "compare": [{**row._asdict(), "recipes": [_written(x) for x in row.recipes]} for row in options.compare],
            "seeds": options.seeds,
            "inherit": list(options.inherit),
            "freeze": list(options.freeze),
            "student_scale": options.student_scale,
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "kernels": {loss: backends.get(self.device.type, ("reference",))[0] for loss, backends in served.items()},
        }


def _written(recipe: RecipeText) -> dict[str, Any]:
    return {"text": recipe.text, "options": asdict(recipe.options)}


class UnlabeledBatches:
    """Gives the batch of pictures without ground truth that belongs to a step, by the step's number, from 0."""

    def __init__(self, pictures: Any, settings: TrainSettings, processes: Processes, device: torch.device) -> None:
        self.pictures, self.settings, self.device = pictures, settings, device
        self.share = (processes.rank, processes.count)
        self.next = -1

    def __call__(self, index: int) -> Tensor:
        settings = self.settings
        try:
            if index != self.next:  # the first one; or steps were left out, in which no recipe asked for one
                many = index + settings.steps
                how = (many, settings.batch_size, settings.seed + 1, settings.workers)
                self.batches = training_batches(self.pictures, *how, first=index, share=self.share)
            self.next = index + 1
            return to_device(*next(self.batches), self.device)[0]
        except DataError as error:
            raise JobError(f"argument --unlabeled-path: {error}") from None
