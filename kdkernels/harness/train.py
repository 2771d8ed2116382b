"""``python -m kdkernels train``: from the command line to a run, and what its errors look like.

The main job is here: teacher, student alone, student distilled, and what came of it. The flags are
:mod:`kdkernels.harness.flags`, the trainings :mod:`kdkernels.harness.job`, comparisons of recipes
:mod:`kdkernels.harness.compare`.
"""

from __future__ import annotations

import sys
import time
import traceback
from dataclasses import asdict
from typing import Any

import torch

from . import flags, resume
from .extras import check


def main(argv: list[str]) -> int:
    """Run what the command line ``argv`` says; returns the exit code.

    0: done. 1: a package is missing, or training failed (the loss is not finite). 2: bad input; the message names the
    flag. 130, 143: interrupted, or stopped by SIGTERM, after a checkpoint of the step in progress. What a run has
    recorded stays in its folder whatever happens; no earlier run is overwritten.
    """
    parser = flags.parser()
    try:
        options = flags.parse(parser, argv)
    except SystemExit as stop:  # argparse exits by itself: 0 after --help, 2 after bad input
        return int(stop.code or 0)
    try:
        check(scenes=not options.data_path)
    except ImportError as error:
        print(f"kdkernels train: {error}", file=sys.stderr)
        return 1
    return _run(options)


def _run(options: flags.Options) -> int:
    from .interrupt import Interruption, Stopped
    from .processes import ALONE, join, leave

    processes = ALONE
    with Interruption() as interruption:
        try:
            processes = join(torch.device(options.device), options.dist_timeout)
            code = _work(options, interruption, processes)
            if not code:
                leave(processes)
            return code
        except Stopped:
            return _stopped(options)
        except KeyboardInterrupt:
            print(f"\nkdkernels train: interrupted; {_go_on(options)}", file=sys.stderr)
            return 130
        except RuntimeError as error:
            if processes.count == 1:
                raise
            if interruption.asked:  # and another one was faster
                return _stopped(options)
            traceback.print_exc()
            reason = str(error).splitlines()[0]
            print(
                f"kdkernels train: error: process {processes.rank} of {processes.count}: {reason}; where this is of a "
                f"connection or a timeout, another process has ended; {_go_on(options)}",
                file=sys.stderr,
            )
            return 1


def _stopped(options: flags.Options) -> int:
    print(f"\nkdkernels train: stopped by SIGTERM; {_go_on(options)}", file=sys.stderr)
    return 143


def _go_on(options: flags.Options) -> str:
    """How to go on with a run that was stopped."""
    if not (options.output_dir / resume.FOLDER / resume.FILE).exists():
        return "nothing was trained"
    return f"records so far: {options.output_dir}; go on with: python -m kdkernels train --resume {options.output_dir}"


def _work(options: flags.Options, interruption: Any, processes: Any) -> int:
    from .data import DataError
    from .job import Job, JobError
    from .update import TrainingError

    begin = time.perf_counter()
    try:
        train, val, identity = _pictures(options)
        unlabeled = _unlabeled(options)
        try:
            options = options.resolved(len(train), processes.count)
        except ValueError as error:
            raise JobError(str(error)) from None
        # Before there is a folder: what cannot be leaves none behind.
        checked = Job(options, train, val, identity, None, unlabeled)
        if options.test_only:
            return _test(checked)
        checked.check()
        try:
            folder, progress = _folder(options, identity, getattr(unlabeled, "digest", None), processes)
        except resume.ResumeError as error:
            return _refused(f"argument --resume: {error}")
        except OSError as error:
            return _refused(f"argument --output-dir: {error}")
        try:
            job = Job(
                options, train, val, identity, progress, unlabeled,
                folder=folder, interruption=interruption, processes=processes,
            )  # fmt: skip
            if options.compare:
                from .compare.run import run as compare

                compare(job, begin)
            else:
                run(job, begin)
            folder.finish()
        finally:
            progress.close()
            folder.close()
    except DataError as error:
        return _refused(f"argument --data-path: {error}")
    except JobError as error:
        return _refused(str(error))
    except TrainingError as error:
        print(f"kdkernels train: error: {error}; {_go_on(options)}", file=sys.stderr)
        return 1
    return 0


def _folder(options: flags.Options, identity: dict[str, Any], unlabeled: str | None, processes: Any) -> tuple[Any, Any]:
    """The run's folder, new or gone on with, and what records in it; the first process makes what the others find."""
    from .progress import Progress, Silent

    made_of = resume.made_of(options, data=identity, unlabeled=unlabeled, processes=processes.count)
    how = {"resume": options.resume, "first": processes.first}
    if not processes.first:
        processes.told(None)
        return resume.RunFolder(options.output_dir, made_of, options.argv, **how), Silent()
    try:
        options.output_dir.mkdir(parents=True, exist_ok=True)
        folder = resume.RunFolder(options.output_dir, made_of, options.argv, **how)
        metrics = options.output_dir / "metrics.jsonl"
        return folder, Progress(metrics, resume=options.resume, print_freq=options.upkeep.print_freq)
    finally:
        processes.told(None)


def _test(job: Any) -> int:
    """Score the student of ``--weights``."""
    score = job.evaluator(job.loaded(job.options.weights))
    for name, value in score._asdict().items():
        print(f"{name:<12}{value:9.4f}")
    print(f"\nScored on {len(job.val)} pictures: {job.options.weights}")
    return 0


def _refused(message: str) -> int:
    print(f"kdkernels train: error: {message}", file=sys.stderr)
    return 2


def _pictures(options: flags.Options) -> tuple[Any, Any, dict[str, Any]]:
    """Training and validation pictures, and what identifies them in the teacher's key."""
    from .data import ScenePictures, open_pictures

    if not options.data_path:
        print("composing the scenes", file=sys.stderr, flush=True)
        train, val = (ScenePictures(options.scenes, split) for split in ("train", "val"))
        return train, val, {"scenes": asdict(options.scenes), "digests": [train.digest, val.digest]}
    size = _size(options)
    train_split, val_split = options.splits
    train = open_pictures(options.data_path, train_split, size=size, on_bad=options.on_bad, hflip=options.hflip)
    val = open_pictures(
        options.data_path, val_split, size=size, on_bad=options.on_bad, classes=train.category_names, hflip=0.0
    )
    for split, pictures in ((train_split, train), (val_split, val)):
        if pictures.problems:
            print(f"{split}: {pictures.problems}", file=sys.stderr, flush=True)
    identity = {"digests": [train.digest, val.digest], "image_size": options.image_size, "hflip": train.hflip}
    if options.max_size is not None:
        identity["max_size"] = options.max_size
    return train, val, identity


def _size(options: flags.Options) -> Any:
    from .data import Size

    if options.max_size is None:
        return Size(square=options.image_size)
    return Size(shorter=options.image_size, longest=options.max_size)


def _unlabeled(options: flags.Options) -> Any:
    """The pictures without ground truth, or None."""
    from .data import UnlabeledPictures
    from .job import JobError

    if options.unlabeled_path is None:
        return None
    try:
        found = UnlabeledPictures(options.unlabeled_path, _size(options), on_bad=options.on_bad)
    except ValueError as error:
        raise JobError(f"argument --unlabeled-path: {error}") from None
    if found.problems:
        print(f"unlabeled: {found.problems}", file=sys.stderr, flush=True)
    return found


def run(job: Any, begin: float) -> None:
    """The main job: train everything and report."""
    from . import report

    options, steps = job.options, job.options.training.steps
    # Kernels that are not built yet are built now: half a minute that would else count as the student's first step.
    job.progress.record(kind="settings", **job.settings())
    teacher, teacher_run = job.teacher()
    students = {"distilled": job.student("distilled", steps, teacher, options.recipes)}
    control = {"inherit": (), "freeze": ()}
    students["alone"] = job.student("alone", steps, teacher, **control)
    if options.inherit or options.freeze:  # so that nobody takes for distillation what the copied weights alone give
        students["inherited"] = job.student("inherited", steps, teacher)
    first = students["distilled"]
    parts = job.decide("parts", lambda: job.split(first))
    # Fixed before that training begins: a number of steps like any other, not a race with the clock. The two kinds of
    # step were timed in turn: two runs, minutes apart, would compare what else the machine did.
    ratio = parts["distilled"] / parts["alone"]
    longer = max(steps, round(steps * ratio))
    job.progress.say(
        f"a distilled step takes {ratio:.2f} times one alone: at equal time the student alone gets {longer} steps"
    )
    students["alone, equal time"] = job.student("alone, equal time", longer, teacher, **control)
    if not job.processes.first:
        return
    report.write(
        options.output_dir,
        teacher=(teacher.detector, teacher_run),
        students=students,
        parts=parts,
        job=job,
        seconds=time.perf_counter() - begin,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
