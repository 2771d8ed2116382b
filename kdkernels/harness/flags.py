"""What the flags of ``python -m kdkernels train`` are turned into, and their checks.

Every refusal goes through ``parser.error``: a message that names the flag, and exit code 2.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import processes, resume
from .command_line import parser
from .compare import Row, rows
from .options import Lengths, Options
from .published import SCHEDULES
from .recipes import RECIPES, RecipeText
from .recipes import parse as parse_recipe
from .schedule import Length
from .settings import KdSettings, SceneSettings, TrainSettings, Upkeep

__all__ = ["Options", "parse", "parser"]


def parse(line: argparse.ArgumentParser, argv: list[str]) -> Options:
    """Parse and check ``argv``; SystemExit with code 2 and a message that names the flag where it is bad."""
    args = line.parse_args(argv)
    stored: list[str] = []
    if args.resume is not None:
        try:
            stored = resume.read(Path(args.resume))["argv"]
        except ValueError as error:
            line.error(f"argument --resume: {error}")
        args = _joined(line, stored, argv)
        args.output_dir = args.resume
    given = {**_explicit(stored), **_explicit(argv)}
    schedule = SCHEDULES.get(args.preset, {})
    for name, value in schedule.items():
        # Steps that are given are instead of its epochs, as a whole recipe, or the rows of a comparison, of its own.
        instead = {"epochs": "steps", "recipe": "compare"}.get(name)
        if name not in given and instead not in given:
            setattr(args, name, value)
    if "steps" in given and "epochs" in given:
        line.error("argument --epochs: --steps says the same thing; give one of them")
    for flag, value, least in (
        ("--steps", args.steps, 1),
        ("--teacher-steps", args.teacher_steps, 1),
        ("-b/--batch-size", args.batch_size, 1),
        ("--seed", args.seed, 0),
        ("--seeds", args.seeds, 1),
        ("-j/--workers", args.workers, 0),
        ("--proposals", args.proposals, 1),
        ("--grad-report-every", args.grad_report_every, 0),
        ("--eval-train", args.eval_train, 0),
        ("--epochs", args.epochs, 1),
        ("--accum-steps", args.accum_steps, 1),
        ("--lr-warmup-steps", args.lr_warmup_steps, 0),
        ("--checkpoint-every", args.checkpoint_every, 0),
        ("--print-freq", args.print_freq, 1),
    ):
        if value is not None and value < least:
            line.error(f"argument {flag}: must be at least {least}, got {value}")
    if args.seed + args.seeds > 2**63:
        line.error(f"argument --seed: must be below 2^63, got {args.seed} and {args.seeds} seeds")
    if args.seeds > 1 and not args.compare:
        line.error("argument --seeds: is of --compare, which is not given")
    if "equal_time" in given and not args.compare:
        line.error("argument --equal-time: is of --compare, which is not given")
    if not 0 < args.lr < float("inf"):
        line.error(f"argument --lr: must be a positive number, got {args.lr}")
    for flag, value, most in (
        ("--wd", args.wd, math.inf),
        ("--norm-weight-decay", args.norm_weight_decay, math.inf),
        ("--clip-grad-norm", args.clip_grad_norm, math.inf),
        ("--momentum", args.momentum, 1),
        ("--lr-gamma", args.lr_gamma, math.inf),
        ("--lr-warmup-decay", args.lr_warmup_decay, 1),
        ("--dist-timeout", args.dist_timeout, math.inf),
    ):
        if value is not None and not 0 <= value < most:
            line.error(f"argument {flag}: must be a number of at least 0{_below(most)}, got {value}")
    if args.test_only and args.weights is None:
        line.error("argument --test-only: needs --weights, the student that is scored")
    if processes.asked_for()[1] > 1 and args.grad_report_every:
        line.error("argument --grad-report-every: is of one process")
    if not 0 <= args.hflip_prob <= 1:
        line.error(f"argument --hflip-prob: must be in [0, 1], got {args.hflip_prob}")
    if not 64 <= args.image_size <= 4096 or args.image_size % 32:
        line.error(f"argument --image-size: must be a multiple of 32 from 64 to 4096, got {args.image_size}")
    if args.max_size is not None and args.max_size < args.image_size:
        line.error(f"argument --max-size: must be at least --image-size, {args.image_size}, got {args.max_size}")
    if args.base_size is not None and not 0 < args.base_size < float("inf"):
        line.error(f"argument --base-size: must be a positive number, got {args.base_size}")
    data_path = [Path(path) for path in args.data_path]
    for path in data_path:
        if not path.is_dir():
            line.error(f"argument --data-path: {path} is not a folder")
    splits = tuple(args.splits.split(","))
    if len(splits) != 2 or not all(splits):
        line.error(f"argument --splits: expected two names, as in train,val, got {args.splits!r}")
    _check_scale(line, args)
    if args.unlabeled_path is not None and not Path(args.unlabeled_path).is_dir():
        line.error(f"argument --unlabeled-path: {args.unlabeled_path} is not a folder")
    scale = args.image_size / 160
    scenes = SceneSettings(image_size=args.image_size, side=(round(24 * scale), round(64 * scale)), seed=args.seed)
    training = TrainSettings(
        steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        weight_decay=args.wd,
        seed=args.seed,
        workers=args.workers,
        optimizer=args.opt,
        momentum=args.momentum,
        norm_weight_decay=args.norm_weight_decay,
        warmup=args.lr_warmup_steps,
        warmup_factor=args.lr_warmup_decay,
        scheduler=args.lr_scheduler,
        lr_gamma=args.lr_gamma,
        clip=args.clip_grad_norm,
        amp=args.amp,
        accumulate=args.accum_steps,
    )
    try:
        lr_steps = tuple(Length.parse(text, epochs=True) for text in args.lr_steps)
    except ValueError as error:
        line.error(f"argument --lr-steps: {error}")
    lengths = Lengths(args.epochs, lr_steps, args.kd_start, args.kd_stop, args.kd_warmup)
    teacher_steps = args.teacher_steps
    if args.quick:
        scenes = replace(scenes, train=24, val=8)
        training = replace(training, steps=min(args.steps, 4), batch_size=min(args.batch_size, 4), evaluations=2)
        teacher_steps = min(teacher_steps, 6)
        lengths = lengths._replace(epochs=None)
    device = _device(line, args.device)
    _check_amp(line, args.amp, device)
    if args.compare and (args.recipe or args.inherit or args.freeze):
        line.error("argument --compare: does not go with --recipe, --inherit and --freeze; write them into the rows")
    preset = "published" if schedule else args.preset or ("published" if data_path else "scenes")
    recipes = _recipes(line, "--recipe", args.recipe or ["combined"], preset)
    compared = _compared(line, args.compare, preset)
    used = [recipe for row in compared for recipe in row.recipes] if compared else recipes
    if args.unlabeled_path is not None and not any(recipe.kind.needs_unlabeled for recipe in used):
        takers = ", ".join(name for name, kind in RECIPES.items() if kind.needs_unlabeled)
        line.error(f"argument --unlabeled-path: no recipe of this run takes such pictures; {takers} does")
    return Options(
        data_path=data_path,
        splits=splits,
        on_bad=args.on_bad,
        hflip=args.hflip_prob,
        unlabeled_path=Path(args.unlabeled_path) if args.unlabeled_path is not None else None,
        output_dir=_output_dir(line, args, data_path),
        teacher_cache=Path(args.teacher_cache),
        image_size=args.image_size,
        max_size=args.max_size,
        scenes=scenes,
        model=args.model,
        weights=Path(args.weights) if args.weights is not None else None,
        teacher_model=args.teacher_model,
        teachers=[Path(path) for path in args.teacher],
        teacher_dtype=args.teacher_dtype,
        student_scale=args.student_scale,
        training=training,
        teacher_steps=teacher_steps,
        recipes=recipes,
        compare=compared,
        seeds=args.seeds,
        equal_time=args.equal_time,
        inherit=_parts(args.inherit),
        freeze=_parts(args.freeze),
        proposals=args.proposals,
        # A quarter of the side of the boxes that RoIAlign reads from the third level (DetectorSettings).
        base_size=args.base_size or 16 * scale,
        compile=args.compile,
        grad_report_every=args.grad_report_every,
        eval_train=args.eval_train,
        voc_ap=args.voc_ap,
        device=device,
        kd=KdSettings(),
        lengths=lengths,
        upkeep=Upkeep(args.checkpoint_every, args.on_nan, args.print_freq),
        test_only=args.test_only,
        resume=args.resume is not None,
        dist_timeout=args.dist_timeout,
        argv=tuple(stored if args.resume is not None else argv),
    )


def _explicit(argv: list[str]) -> dict[str, Any]:
    """The flags that a command line gives."""
    line = parser()
    for action in line._actions:
        action.default = argparse.SUPPRESS
    return vars(line.parse_args(argv))


def _joined(line: argparse.ArgumentParser, stored: list[str], argv: list[str]) -> argparse.Namespace:
    """The flags that a run began with, and over them those that it goes on with."""
    args = line.parse_args(stored)
    for name, value in _explicit(argv).items():
        if name == "output_dir" and Path(value).resolve() != Path(_explicit(argv)["resume"]).resolve():
            line.error(f"argument --output-dir: a run goes on where it is, in --resume; got {value}")
        setattr(args, name, value)
    return args


def _below(most: float) -> str:
    return "" if most == math.inf else f" and below {most:g}"


def _check_scale(line: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    scale = args.student_scale
    if not 0 < scale <= 1:
        line.error(f"argument --student-scale: must be above 0 and at most 1, got {scale}")
    if scale != 1 and (args.max_size is not None or args.image_size * scale % 32):
        line.error(
            f"argument --student-scale: needs square pictures whose scaled side is a multiple of 32, and {scale} of "
            f"--image-size {args.image_size} is {args.image_size * scale:g}"
            + ("" if args.max_size is None else "; --max-size makes pictures of any shape")
        )


def _recipes(line: argparse.ArgumentParser, flag: str, texts: list[str], preset: str) -> list[RecipeText]:
    try:
        return [parse_recipe(text, preset) for text in texts]
    except ValueError as error:
        line.error(f"argument {flag}: {error}")


def _compared(line: argparse.ArgumentParser, texts: list[str], preset: str) -> list[Row]:
    try:
        return rows(texts, preset)
    except ValueError as error:
        line.error(f"argument --compare: {error}")


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _output_dir(line: argparse.ArgumentParser, args: argparse.Namespace, data_path: list[Path]) -> Path:
    """A folder that holds nothing yet: no run ever overwrites another."""
    if args.resume is not None:
        return Path(args.resume)
    rank, count, _ = processes.asked_for()
    if count > 1 and args.output_dir is None:
        line.error("argument --output-dir: several processes need one that is named, or --resume")
    if args.output_dir is not None:
        folder = Path(args.output_dir)
        if folder.exists() and not folder.is_dir():
            line.error(f"argument --output-dir: {folder} is not a folder")
        if rank == 0 and folder.is_dir() and any(folder.iterdir()):
            line.error(
                f"argument --output-dir: {folder} is not empty, and nothing is overwritten; name another, or go on "
                "with its run by --resume"
            )
        return folder
    source = data_path[0].resolve().name if data_path else "scenes"
    base = Path("kdkernels-runs") / f"{source}-seed{args.seed}{'-quick' if args.quick else ''}"
    folder, number = base, 1
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder


def _check_amp(line: argparse.ArgumentParser, amp: str | None, device: str) -> None:
    """Refuse a type that the device cannot train in, by trying a convolution and its backward."""
    if amp is None:
        return
    try:
        x, kind = torch.ones(1, 1, 4, 4, device=device), torch.device(device).type
        weight = torch.ones(1, 1, 3, 3, device=device, requires_grad=True)
        with torch.autocast(kind, getattr(torch, amp)):
            found = torch.nn.functional.conv2d(x, weight)
        scaler = torch.amp.GradScaler(kind, enabled=amp == "float16")
        scaler.scale(found.float().sum()).backward()
        if found.dtype != getattr(torch, amp):
            raise RuntimeError(f"autocast computes in {found.dtype}")
    except (RuntimeError, ValueError) as error:
        line.error(f"argument --amp: {amp} cannot be used on {device} here: {str(error).splitlines()[0]}")


def _device(line: argparse.ArgumentParser, name: str) -> str:
    _, count, local = processes.asked_for()
    if name == "auto":
        if not torch.cuda.is_available():
            return "cpu"
        return f"cuda:{local}" if count > 1 else "cuda"
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no values")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # by device and build: AssertionError is torch without CUDA
        line.error(f"argument --device: {name} cannot be used: {str(error).splitlines()[0]}")
    return name
