"""The flags of ``python -m kdkernels train``, their checks, and what they are turned into.

Names are those of torchvision's references/detection where it has them. Every refusal goes through ``parser.error``: a
message that names the flag, and exit code 2.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .cache import default_folder
from .settings import DetectorSettings, RecipeSettings, SceneSettings, TrainSettings

EPILOG = """\
With no argument: composes 1,500 small scenes from the digits and photographs of scikit-learn, trains a teacher and
three students (distilled, alone at equal steps, alone at equal time), and takes about four minutes on two idle cores,
or three when the teacher is kept from before. Writes metrics.jsonl, curves.png, detections.png and the students'
weights to the output folder, and prints the table.

Everything is seeded; other seeds need another --seed, and one seed says little.
"""


@dataclass(frozen=True)
class Options:
    """What a run does, checked."""

    data_path: Path | None
    output_dir: Path
    teacher_cache: Path
    image_size: int
    scenes: SceneSettings
    teacher: DetectorSettings
    student: DetectorSettings
    training: TrainSettings
    teacher_steps: int
    recipe: RecipeSettings
    device: str


def parser() -> argparse.ArgumentParser:
    """The command line."""
    line = argparse.ArgumentParser(
        prog="kdkernels train",
        description="Distil a small Faster R-CNN from a larger one, and compare it with the same student alone.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = line.add_argument
    add("--data-path", metavar="DIR", help="COCO-format folder (train2017/, val2017/, annotations/instances_*.json)")
    add("--output-dir", metavar="DIR", help="results, a new or empty folder (default: a new one in kdkernels-runs)")
    add("--steps", type=int, default=250, help="steps of the student, alone and distilled (default: %(default)s)")
    add("--teacher-steps", type=int, default=400, help="steps of the teacher (default: %(default)s)")
    add("-b", "--batch-size", type=int, default=8, help="pictures of a step (default: %(default)s)")
    add("--lr", type=float, default=2e-3, help="highest learning rate of AdamW (default: %(default)s)")
    add("--wd", "--weight-decay", type=float, default=1e-4, help="weight decay (default: %(default)s)")
    size = "side of the pictures, a multiple of 32 pixels; anchors and mask levels scale with it (default: %(default)s)"
    add("--image-size", type=int, default=160, help=size)
    add("--seed", type=int, default=0, help="seeds scenes, weights and order (default: %(default)s)")
    add("-j", "--workers", type=int, default=0, help="processes that read pictures (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda where there is one, else cpu)")
    folder = str(default_folder())
    add("--teacher-cache", metavar="DIR", default=folder, help="folder of trained teachers (default: %(default)s)")
    add("--quick", action="store_true", help="a few steps on a few scenes, to see that everything works")
    return line


def parse(line: argparse.ArgumentParser, argv: list[str]) -> Options:
    """Parse and check ``argv``; SystemExit with code 2 and a message that names the flag where it is bad."""
    args = line.parse_args(argv)
    for flag, value, least in (
        ("--steps", args.steps, 1),
        ("--teacher-steps", args.teacher_steps, 1),
        ("-b/--batch-size", args.batch_size, 1),
        ("--seed", args.seed, 0),
        ("-j/--workers", args.workers, 0),
    ):
        if value < least:
            line.error(f"argument {flag}: must be at least {least}, got {value}")
    if args.seed >= 2**63:
        line.error(f"argument --seed: must be below 2^63, got {args.seed}")
    if not 0 < args.lr < float("inf"):
        line.error(f"argument --lr: must be a positive number, got {args.lr}")
    if not 0 <= args.wd < float("inf"):
        line.error(f"argument --wd: must be a number of at least 0, got {args.wd}")
    if not 64 <= args.image_size <= 4096 or args.image_size % 32:
        line.error(f"argument --image-size: must be a multiple of 32 from 64 to 4096, got {args.image_size}")
    data_path = Path(args.data_path) if args.data_path is not None else None
    if data_path is not None and not data_path.is_dir():
        line.error(f"argument --data-path: {data_path} is not a folder")
    scale = args.image_size / 160
    scenes = SceneSettings(image_size=args.image_size, side=(round(24 * scale), round(64 * scale)), seed=args.seed)
    training = TrainSettings(
        steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        weight_decay=args.wd,
        seed=args.seed,
        workers=args.workers,
    )
    teacher_steps = args.teacher_steps
    if args.quick:
        scenes = replace(scenes, train=24, val=8)
        training = replace(training, steps=min(args.steps, 4), batch_size=min(args.batch_size, 4), evaluations=2)
        teacher_steps = min(teacher_steps, 6)
    return Options(
        data_path=data_path,
        output_dir=_output_dir(line, args, data_path),
        teacher_cache=Path(args.teacher_cache),
        image_size=args.image_size,
        scenes=scenes,
        teacher=DetectorSettings(width=0.5, image_size=args.image_size),
        student=DetectorSettings(width=0.25, image_size=args.image_size),
        training=training,
        teacher_steps=teacher_steps,
        recipe=RecipeSettings(),
        device=_device(line, args.device),
    )


def _output_dir(line: argparse.ArgumentParser, args: argparse.Namespace, data_path: Path | None) -> Path:
    """A folder that holds nothing yet: no run ever overwrites another."""
    if args.output_dir is not None:
        folder = Path(args.output_dir)
        if folder.exists() and not folder.is_dir():
            line.error(f"argument --output-dir: {folder} is not a folder")
        if folder.is_dir() and any(folder.iterdir()):
            line.error(f"argument --output-dir: {folder} is not empty, and nothing is overwritten; name another")
        return folder
    source = "scenes" if data_path is None else data_path.resolve().name
    base = Path("kdkernels-runs") / f"{source}-seed{args.seed}{'-quick' if args.quick else ''}"
    folder, number = base, 1
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder


def _device(line: argparse.ArgumentParser, name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no values")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # by device and build: AssertionError is torch without CUDA
        line.error(f"argument --device: {name} cannot be used: {str(error).splitlines()[0]}")
    return name
