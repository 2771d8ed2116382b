"""What a run does, checked: the flags of ``python -m kdkernels train`` as the rest of the harness reads them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from .compare import Row
from .recipes import RecipeText
from .schedule import Length
from .settings import KdSettings, SceneSettings, TrainSettings, Upkeep


class Lengths(NamedTuple):
    """What may be given in epochs, as it was given."""

    epochs: int | None
    lr_steps: tuple[Length, ...]
    kd_start: Length
    kd_stop: Length | None
    kd_warmup: Length


@dataclass(frozen=True)
class Options:
    """What a run does, checked."""

    data_path: list[Path]
    splits: tuple[str, str]
    on_bad: str
    hflip: float
    unlabeled_path: Path | None
    output_dir: Path
    teacher_cache: Path
    image_size: int
    max_size: int | None
    scenes: SceneSettings
    model: str
    weights: Path | None
    teacher_model: str
    teachers: list[Path]
    teacher_dtype: str
    student_scale: float
    training: TrainSettings
    teacher_steps: int
    recipes: list[RecipeText]
    compare: list[Row]
    seeds: int
    equal_time: bool
    inherit: tuple[str, ...]
    freeze: tuple[str, ...]
    proposals: int
    base_size: float | None
    compile: bool
    grad_report_every: int | None
    eval_train: int
    voc_ap: bool
    device: str
    kd: KdSettings
    lengths: Lengths
    upkeep: Upkeep
    test_only: bool
    resume: bool
    dist_timeout: float
    argv: tuple[str, ...]

    @property
    def norms_every(self) -> int:
        """Every so many steps of distillation tell gradient norms; 0: none. Where nobody says: often enough for a
        curve; not in a comparison, whose rows nobody looks at one by one, nor compiled, as norms need a second graph.
        """
        if self.grad_report_every is not None:
            return self.grad_report_every
        return 0 if self.compare or self.compile else 10

    def resolved(self, pictures: int, count: int = 1) -> Options:
        """With lengths in steps, now that the number of pictures is known; ``count`` processes share them.

        Raises:
            ValueError: distillation would end before it begins; the message names the flag.
        """
        training, lengths = self.training, self.lengths
        epoch = math.ceil(pictures / (training.batch_size * training.accumulate * count))
        if lengths.epochs is not None:
            training = replace(training, steps=lengths.epochs * epoch)
        milestones = tuple(sorted(length.steps(epoch) for length in lengths.lr_steps))
        training = replace(training, lr_steps=milestones if training.scheduler == "multisteplr" else ())
        stop = None if lengths.kd_stop is None else lengths.kd_stop.steps(epoch)
        kd = KdSettings(lengths.kd_start.steps(epoch), stop, lengths.kd_warmup.steps(epoch))
        if kd.stop is not None and kd.stop <= kd.start:
            raise ValueError(f"argument --kd-stop: must be after --kd-start, step {kd.start}, got step {kd.stop}")
        if kd.start >= training.steps:
            raise ValueError(f"argument --kd-start: step {kd.start} of {training.steps}: nothing would be distilled")
        return replace(self, training=training, kd=kd)
