"""The flags of ``python -m kdkernels train``, their checks, and what they are turned into.

Names are those of torchvision's references/detection where it has them. Every refusal goes through ``parser.error``: a
message that names the flag, and exit code 2.
"""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .cache import default_folder
from .compare import COMPARE, Row, rows
from .recipes import PRESETS, RECIPES, RecipeText, described
from .recipes import parse as parse_recipe
from .settings import SceneSettings, TrainSettings

EPILOG = """\
With no argument: composes 1,500 small scenes from the digits and photographs of scikit-learn, trains a teacher and
three students (distilled, alone at equal steps, alone at equal time), and takes about four minutes on two idle cores,
or three when the teacher is kept from before. Writes metrics.jsonl, curves.png, detections.png and the students'
weights to the output folder, and prints the table.

Everything is seeded; other seeds need another --seed, and one seed says little.

recipes and their keys:
{recipes}
"""


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
    inherit: tuple[str, ...]
    freeze: tuple[str, ...]
    proposals: int
    base_size: float | None
    compile: bool
    grad_report_every: int
    eval_train: int
    voc_ap: bool
    device: str


def parser() -> argparse.ArgumentParser:
    """The command line."""
    listed = "\n".join(
        textwrap.fill(f"{name}: {described(kind)}", 118, initial_indent="  ", subsequent_indent="    ")
        for name, kind in RECIPES.items()
    )
    line = argparse.ArgumentParser(
        prog="kdkernels train",
        description="Distil a detector from a larger one, and compare it with the same student alone.",
        epilog=EPILOG.format(recipes=listed),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = line.add_argument_group("data").add_argument
    add(
        "--data-path",
        metavar="DIR",
        action="append",
        default=[],
        help="folder in COCO's form, VOC's or ILSVRC's; repeatable: the folders are joined (default: scenes)",
    )
    add("--splits", metavar="TRAIN,VAL", default="train,val", help="as the folders name them (default: %(default)s)")
    add(
        "--on-bad",
        choices=("skip", "refuse"),
        default="skip",
        help="what becomes of broken files and boxes: left out and counted, or the end (default: %(default)s)",
    )
    add("--hflip-prob", type=float, default=0.5, help="how often training mirrors a picture (default: %(default)s)")
    add("--unlabeled-path", metavar="DIR", help="pictures without ground truth, for recipes that take them")
    size = "side of the pictures, a multiple of 32 pixels; anchors and mask levels scale with it (default: %(default)s)"
    add("--image-size", type=int, default=160, help=size)
    add(
        "--max-size",
        type=int,
        metavar="PIXELS",
        help="scale the shorter side to --image-size and the longer one to this at most, and pad (default: squares)",
    )
    add = line.add_argument_group("detectors").add_argument
    kinds = "KIND[:key=value,...] (faster_rcnn, retinanet, fcos, ssdlite), or package.module:function for your own"
    add("--model", default="faster_rcnn:width=0.25", help=f"the student: {kinds} (default: %(default)s)")
    add("--weights", metavar="FILE", help="a checkpoint that students start from")
    add("--teacher-model", default="faster_rcnn:width=0.5", help="the teacher, likewise (default: %(default)s)")
    add(
        "--teacher",
        metavar="FILE",
        action="append",
        default=[],
        help="a trained teacher's checkpoint; repeatable: the mean of them teaches (default: one is trained)",
    )
    add(
        "--teacher-dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="what the teacher computes in (default: %(default)s)",
    )
    add("--teacher-steps", type=int, default=400, help="steps of the teacher (default: %(default)s)")
    folder = str(default_folder())
    add("--teacher-cache", metavar="DIR", default=folder, help="folder of trained teachers (default: %(default)s)")
    add(
        "--student-scale",
        type=float,
        default=1.0,
        help="size of the student's pictures, in whose pixels its anchors are (default: 1)",
    )
    add("--inherit", metavar="PARTS", default="", help="parts that begin as the teacher's: fpn,rpn,roi_heads")
    add("--freeze", metavar="PARTS", default="", help="parts that are not trained")
    add = line.add_argument_group("distillation").add_argument
    add(
        "--recipe",
        metavar="NAME[:key=value,...]",
        action="append",
        default=[],
        help="repeatable, and added up; see below (default: combined)",
    )
    add(
        "--preset",
        choices=PRESETS,
        help="the weights that keys change: the papers', or those for small scenes (default: scenes if no --data-path)",
    )
    add("--compare", metavar="RECIPE", nargs="+", default=[], help=COMPARE)
    add(
        "--proposals",
        type=int,
        default=64,
        help="of a picture in the heads' terms, at most (default: %(default)s)",
    )
    add(
        "--base-size",
        type=float,
        help="boxes below twice this many pixels mark the finest level (default: by size)",
    )
    add(
        "--grad-report-every",
        type=int,
        default=0,
        metavar="STEPS",
        help="record the gradient norm of each term at the features every so many steps (default: never)",
    )
    add = line.add_argument_group("training").add_argument
    add("--steps", type=int, default=250, help="steps of a student (default: %(default)s)")
    add("-b", "--batch-size", type=int, default=8, help="pictures of a step (default: %(default)s)")
    add("--lr", type=float, default=2e-3, help="highest learning rate of AdamW (default: %(default)s)")
    add("--wd", "--weight-decay", type=float, default=1e-4, help="weight decay (default: %(default)s)")
    add("--seed", type=int, default=0, help="seeds scenes, weights and order (default: %(default)s)")
    add("--compile", action="store_true", help="compile backbone and pyramid, and the distillation losses")
    add("-j", "--workers", type=int, default=0, help="processes that read pictures (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda where there is one, else cpu)")
    add = line.add_argument_group("what comes out").add_argument
    add("--output-dir", metavar="DIR", help="results, a new or empty folder (default: a new one in kdkernels-runs)")
    add(
        "--eval-train",
        type=int,
        default=0,
        metavar="PICTURES",
        help="score on so many training pictures too",
    )
    add("--voc-ap", action="store_true", help="score by VOC's own average precision too")
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
        ("--proposals", args.proposals, 1),
        ("--grad-report-every", args.grad_report_every, 0),
        ("--eval-train", args.eval_train, 0),
    ):
        if value < least:
            line.error(f"argument {flag}: must be at least {least}, got {value}")
    if args.seed >= 2**63:
        line.error(f"argument --seed: must be below 2^63, got {args.seed}")
    if not 0 < args.lr < float("inf"):
        line.error(f"argument --lr: must be a positive number, got {args.lr}")
    if not 0 <= args.wd < float("inf"):
        line.error(f"argument --wd: must be a number of at least 0, got {args.wd}")
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
    )
    teacher_steps = args.teacher_steps
    if args.quick:
        scenes = replace(scenes, train=24, val=8)
        training = replace(training, steps=min(args.steps, 4), batch_size=min(args.batch_size, 4), evaluations=2)
        teacher_steps = min(teacher_steps, 6)
    if args.compare and (args.recipe or args.inherit or args.freeze):
        line.error("argument --compare: does not go with --recipe, --inherit and --freeze; write them into the rows")
    preset = args.preset or ("published" if data_path else "scenes")
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
        inherit=_parts(args.inherit),
        freeze=_parts(args.freeze),
        proposals=args.proposals,
        # A quarter of the side of the boxes that RoIAlign reads from the third level (DetectorSettings).
        base_size=args.base_size or 16 * scale,
        compile=args.compile,
        grad_report_every=args.grad_report_every,
        eval_train=args.eval_train,
        voc_ap=args.voc_ap,
        device=_device(line, args.device),
    )


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
    if args.output_dir is not None:
        folder = Path(args.output_dir)
        if folder.exists() and not folder.is_dir():
            line.error(f"argument --output-dir: {folder} is not a folder")
        if folder.is_dir() and any(folder.iterdir()):
            line.error(f"argument --output-dir: {folder} is not empty, and nothing is overwritten; name another")
        return folder
    source = data_path[0].resolve().name if data_path else "scenes"
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
