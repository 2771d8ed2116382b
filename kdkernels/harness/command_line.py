"""The command line of ``python -m kdkernels train``: its flags and what they say of themselves. ``flags.py`` checks.

Names are those of torchvision's references/detection where it has them.
"""

from __future__ import annotations

import argparse
import textwrap

from .cache import default_folder
from .compare import COMPARE
from .published import SCHEDULES
from .recipes import PRESETS, RECIPES, described
from .schedule import Length

EPILOG = """\
With no argument: composes 1,500 small scenes from the digits and photographs of scikit-learn, trains a teacher and
three students (distilled, alone at equal steps, alone at equal time), which takes some minutes on two idle cores; a
teacher that was trained before is kept. Writes metrics.jsonl, pictures (curves, detections, features, gradients) and
the students' weights to the output folder, and prints the table.

Everything is seeded; other seeds need another --seed, and one seed says little. A run that was stopped or killed goes
on with --resume and its folder, and ends as if it had not been.

LENGTH is steps (500, 500s) or epochs, rounds through the pictures (2e). Under torchrun each process trains on its share
of a step's pictures: --batch-size is of each.

presets that are a whole training (mmdetection's schedules, untested here at that scale; flags that are given win):
{schedules}

recipes and their keys:
{recipes}
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    listed = "\n".join(
        textwrap.fill(f"{name}: {described(kind)}", 118, initial_indent="  ", subsequent_indent="    ")
        for name, kind in RECIPES.items()
    )
    scheduled = "\n".join(
        textwrap.fill(
            f"{name}: {', '.join(f'{key}={_shown(value)}' for key, value in values.items())}",
            118,
            initial_indent="  ",
            subsequent_indent="    ",
        )
        for name, values in SCHEDULES.items()
    )
    line = argparse.ArgumentParser(
        prog="kdkernels train",
        description="Distil a detector from a larger one, and compare it with the same student alone.",
        epilog=EPILOG.format(recipes=listed, schedules=scheduled),
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
        help="size of the student's pictures, in whose pixels its anchors are",
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
        choices=(*PRESETS, *SCHEDULES),
        help="the weights that keys change: the papers', or those for small scenes (default: scenes if no --data-path)"
        "; or a paper's whole training, see below",
    )
    add("--compare", metavar="RECIPE", nargs="+", default=[], help=COMPARE)
    add("--seeds", type=int, default=1, help="of each row of --compare, from --seed on (default: %(default)s)")
    longer = "train the baseline of --compare as long as each of its rows takes, as well (default: yes)"
    add("--equal-time", action=argparse.BooleanOptionalAction, default=True, help=longer)
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
        metavar="STEPS",
        help="record the gradient norm of each term at the features every so many steps; 0: never (default: 10 in one "
        "process, without --compare and --compile)",
    )
    begin = "when distillation begins, ends, and how long its weight rises (default: always, at once)"
    add("--kd-start", type=Length.parse, default=Length(0, False), metavar="LENGTH", help=begin)
    add("--kd-stop", type=Length.parse, metavar="LENGTH", help="see --kd-start")
    add("--kd-warmup", type=Length.parse, default=Length(0, False), metavar="LENGTH", help="see --kd-start")
    _training(line)
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
    add(
        "--test-only",
        action="store_true",
        help="score the student that --weights names, and train nothing",
    )
    add("--quick", action="store_true", help="a few steps on a few scenes, to see that everything works")
    return line


def _training(line: argparse.ArgumentParser) -> None:
    add = line.add_argument_group("training").add_argument
    add("--steps", type=int, default=250, help="steps of a student (default: %(default)s)")
    add("--epochs", type=int, help="rounds through the pictures, instead of --steps")
    add("-b", "--batch-size", type=int, default=8, help="pictures of a forward (default: %(default)s)")
    add("--accum-steps", type=int, default=1, help="batches whose gradients make a step (default: %(default)s)")
    add("--opt", choices=("adamw", "sgd"), default="adamw", help="(default: %(default)s)")
    add("--lr", type=float, default=2e-3, help="highest learning rate (default: %(default)s)")
    add("--momentum", type=float, default=0.9, help="of sgd (default: %(default)s)")
    add("--wd", "--weight-decay", type=float, default=1e-4, help="weight decay (default: %(default)s)")
    add("--norm-weight-decay", type=float, help="weight decay of normalisation layers (default: --weight-decay)")
    kinds = ("cosineannealinglr", "multisteplr")
    add("--lr-scheduler", choices=kinds, default=kinds[0], help="(default: %(default)s)")
    steps = "epochs, or steps as in 500s, after which multisteplr multiplies the rate with --lr-gamma"
    add("--lr-steps", nargs="+", metavar="EPOCH", default=["16", "22"], help=f"{steps} (default: %(default)s)")
    add("--lr-gamma", type=float, default=0.1, help="(default: %(default)s)")
    warmup = "steps of linear warm-up, at most a fifth of all (default: %(default)s)"
    add("--lr-warmup-steps", type=int, default=30, help=warmup)
    add("--lr-warmup-decay", type=float, default=0.0, help="share of --lr that it begins at (default: %(default)s)")
    add("--clip-grad-norm", type=float, default=10.0, help="largest norm; 0: any (default: %(default)s)")
    types = ("bfloat16", "float16")
    add("--amp", choices=types, nargs="?", const=types[0], help="autocast of student, losses and teacher")
    add("--seed", type=int, default=0, help="seeds scenes, weights and order (default: %(default)s)")
    add("--compile", action="store_true", help="compile backbone and pyramid, and the distillation losses")
    add("-j", "--workers", type=int, default=0, help="processes that read pictures (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda where there is one, else cpu)")
    add = line.add_argument_group("long runs").add_argument
    add("--resume", metavar="DIR", help="go on with the run of this output folder; its own flags hold")
    every = "write a checkpoint every so many steps, beside those before evaluations; 0: none (default: %(default)s)"
    add("--checkpoint-every", type=int, default=500, metavar="STEPS", help=every)
    bad = "what becomes of a step whose loss or gradient is not finite (default: %(default)s)"
    add("--on-nan", choices=("stop", "skip"), default="stop", help=bad)
    add("--print-freq", type=int, metavar="STEPS", help="a line in the log every so many steps (default: by time)")
    add("--dist-timeout", type=float, default=1800.0, metavar="SECONDS", help="of waiting for another process")


def _shown(value: object) -> str:
    return " ".join(value) if isinstance(value, list) else f"{value:.4g}" if isinstance(value, float) else str(value)
