"""Breaks the CUDA kernels in many small ways, and counts how many the tests notice in the emulator.

    python tests/mutants/run.py [--only pearson] [--results tests/mutants/results.csv]

Each mutant of catalogue.py is one edit of one file of csrc/. The changed kernels are compiled for the emulator and the
loss's own tests run against them. A mutant that no test notices must be explained in the catalogue as equivalent; any
other survivor, or an explained one that is killed after all, makes this script fail. Its last results are committed
beside it.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(HERE)]

import emulator_library  # noqa: E402
from catalogue import MUTANTS  # noqa: E402
from mutant import Mutant  # noqa: E402

from kdkernels.native import build as builder  # noqa: E402

FLAGS = [flag for flag in emulator_library.FLAGS if not flag.startswith("-W")]  # an unused variable is no discovery
JOINT = tuple(f"tests/test_joint_{x}.py" for x in ("pass", "launches", "boxes"))  # of the launches that losses share
COLUMNS = ("name", "file", "loss", "result", "noticed_by", "note")


def _compile(source: Path, target: Path) -> None:
    torch_folder = builder.torch_directory()
    words = [*builder.compiler(), *FLAGS, "-isystem", str(torch_folder / "include")]
    subprocess.run(
        [*words, "-x", "c++", "-c", str(source), "-o", str(target)], check=True, capture_output=True, text=True
    )


def sound_objects(work: Path) -> dict[str, Path]:
    """Every object of the emulator's library, unbroken: stem of the source -> object."""
    found = {}
    for source in emulator_library.sources():
        target = work / f"{source.stem}.o"
        _compile(source, target)
        found[source.stem] = target
    return found


def occurrences(mutant: Mutant, csrc: Path) -> int:
    """How often the text that a mutant replaces occurs in its file."""
    return (csrc / mutant.file).read_text().count(mutant.before)


def library_of(mutant: Mutant, objects: dict[str, Path], work: Path) -> Path | None:
    """The library with one loss's kernels broken; None if they do not compile (which counts as noticed)."""
    csrc = work / "csrc"
    shutil.rmtree(csrc, ignore_errors=True)
    shutil.copytree(builder.source_directory(), csrc)
    path = csrc / mutant.file
    text = path.read_text()
    path.write_text(text.replace(mutant.before, mutant.after))
    broken, unit = work / "broken.o", mutant.unit or mutant.loss
    try:
        _compile(csrc / "cuda" / f"{unit}.cu", broken)
    except subprocess.CalledProcessError:
        return None
    target = work / "broken.so"
    linked = [str(path) for stem, path in objects.items() if stem != unit] + [str(broken)]
    torch_folder = builder.torch_directory()
    link = ["-shared", "-o", str(target), *linked, f"-L{torch_folder / 'lib'}", "-Wl,--no-as-needed"]
    subprocess.run([*builder.compiler(), *link, "-ltorch", "-ltorch_cpu", "-lc10"], check=True)
    return target


def first_failure(mutant: Mutant, library: Path) -> str | None:
    """The first test that notices, or None."""
    files = [
        f"tests/test_{mutant.loss}.py",
        "tests/test_golden.py",
        "tests/test_hard_inputs.py",
        "tests/test_emulator.py",
        "tests/test_one_pass_rows.py",
        *(JOINT if mutant.loss == "detection_distillation" else []),
    ]
    chosen = f"cuda and not sanitizers and ({mutant.loss} or not (test_emulator or test_one_pass_rows))"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no", *files, "-k", chosen]
    environment = {**os.environ, "KDKERNELS_EMULATOR_LIBRARY": str(library), "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return "time limit"
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"signal {-done.returncode}"
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split(" ")[1].split(" - ")[0] if failed else f"exit status {done.returncode}"


def main() -> int:
    """Runs the chosen mutants; 1 if a survivor is not explained or an explanation is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", help="only mutants whose name, file or loss contains one of these")
    parser.add_argument("--results", type=Path, help="write the list there")
    options = parser.parse_args()
    wanted = options.only or [""]
    chosen = [m for m in MUTANTS if any(word in f"{m.name} {m.file} {m.loss}" for word in wanted)]
    if missing := [m.name for m in MUTANTS if occurrences(m, builder.source_directory()) != 1]:
        parser.error(f"these mutants' texts do not occur exactly once in their files: {missing}")
    rows, wrong, began = [], 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kdkernels-mutants-") as folder:
        work = Path(folder)
        objects = sound_objects(work)
        for number, mutant in enumerate(chosen, 1):
            library = library_of(mutant, objects, work)
            noticed = "the compiler" if library is None else first_failure(mutant, library)
            result = "survived" if noticed is None else "killed"
            good = (noticed is None) == bool(mutant.equivalent)
            wrong += not good
            mark = "" if good else "   <-- " + ("explained, but killed" if noticed else "NOT NOTICED")
            clock = f"{number:3}/{len(chosen)} {time.monotonic() - began:5.0f} s"
            print(f"{clock}  {mutant.name}: {result} {noticed or ''}{mark}", flush=True)
            rows.append((mutant.name, mutant.file, mutant.loss, result, noticed or "", mutant.equivalent))
    killed = sum(row[3] == "killed" for row in rows)
    print(f"{len(rows)} mutants: {killed} killed, {len(rows) - killed} survived, {wrong} not as the catalogue says")
    if options.results:
        with options.results.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(rows)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
