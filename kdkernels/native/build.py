"""Builds the native parts from csrc/ with ninja. Standard library only: setup.py runs this file without torch.

What is built, with which flags, and where results go is decided here and nowhere else. `setup.py` builds into the wheel;
`kdkernels.native` builds into the user's cache on first execution.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

# The oldest PyTorch whose stable ABI the objects need; they load in every later one.
TORCH_TARGET = "0x020a000000000000"

COMMON_FLAGS = ["-O3", "-fPIC", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wextra"]
# Exact about infinities and NaN, unlike -ffast-math; only errno and traps, which nobody reads, are given up.
KERNEL_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
CAPABILITY_FLAGS = {
    "base": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ],
}


class BuildError(RuntimeError):
    """Why a native part could not be built, in one line; `log` holds the compiler's own words."""

    def __init__(self, message: str, log: str = ""):
        super().__init__(message)
        self.log = log


@dataclass(frozen=True)
class Library:
    """One shared object: its file name, and (source, flags) for each object in it."""

    name: str
    objects: list[tuple[Path, list[str]]]
    link_flags: list[str] = field(default_factory=list)


def source_directory() -> Path:
    """csrc/ of the checkout, or the copy that travels in the wheel."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "_csrc", package.parent / "csrc"):
        if candidate.is_dir():
            return candidate
    raise BuildError("the sources (csrc/) are not part of this installation")


def torch_directory() -> Path | None:
    """Where torch is installed, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])


def compiler() -> str | None:
    """The C++ compiler: $CXX, else g++, clang++ or c++ from PATH."""
    wanted = os.environ.get("CXX")
    names = [shlex.split(wanted)[-1]] if wanted else ["g++", "clang++", "c++"]
    return next((path for path in map(shutil.which, names) if path), None)


def ninja() -> str | None:
    """The ninja executable: the one of the ninja package, else from PATH."""
    if importlib.util.find_spec("ninja") is not None:
        import ninja as package

        candidate = Path(package.BIN_DIR) / "ninja"
        if candidate.exists():
            return str(candidate)
    return shutil.which("ninja")


def obstacle(name: str) -> str | None:
    """Why `name` ("cpu" or "python") cannot be built here, or None. Cheap: nothing is run."""
    if not sys.platform.startswith("linux"):
        return f"compiled kernels are built on Linux only, this is {sys.platform}"
    if compiler() is None:
        wanted = os.environ.get("CXX")
        return f"no C++ compiler ({wanted} of $CXX is not there)" if wanted else "no C++ compiler (g++ or clang++)"
    if ninja() is None:
        return "no ninja (pip install ninja)"
    if name == "cpu" and torch_directory() is None:
        return "torch is not importable here"
    if name == "python" and importlib.util.find_spec("pybind11") is None:
        return "no pybind11 (pip install pybind11)"
    return None


def cpu_library(csrc: Path) -> Library:
    """The CPU kernels: every cpu/*.cpp once per instruction set, and their registration with torch."""
    capabilities = ["base", "avx2", "avx512"] if platform.machine() in ("x86_64", "AMD64") else ["base"]
    objects: list[tuple[Path, list[str]]] = []
    for source in sorted((csrc / "cpu").glob("*.cpp")):
        if source.name == "capability.cpp":
            objects.append((source, []))
            continue
        for name in capabilities:
            objects.append((source, [*KERNEL_FLAGS, *CAPABILITY_FLAGS[name], f"-DKD_CAPABILITY={name}"]))
    torch = torch_directory()
    include = ["-isystem", str(torch / "include"), f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    objects += [(source, include) for source in sorted((csrc / "torch").glob("*_cpu.cpp"))]
    link = [f"-L{torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    return Library("kdkernels_cpu.so", objects, link)


def python_library(csrc: Path) -> Library:
    """The pybind11 module: what a test or a person can ask of the build without torch."""
    import pybind11

    include = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"]]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    sources = [(csrc / "python.cpp", include), (csrc / "cpu" / "capability.cpp", [])]
    return Library(f"_C{suffix}", sources)


LIBRARIES = {"cpu": cpu_library, "python": python_library}


def cache_key(csrc: Path) -> str:
    """A hash of everything that the CPU object depends on: sources, flags, compiler, ABI target; not torch's version."""
    digest = hashlib.sha256()
    for path in sorted(csrc.rglob("*")):
        if path.suffix in (".h", ".cpp"):
            digest.update(path.relative_to(csrc).as_posix().encode() + b"\0" + path.read_bytes())
    cxx = compiler()
    if cxx:
        status = os.stat(cxx)
        digest.update(f"{os.path.realpath(cxx)} {status.st_size} {status.st_mtime_ns}".encode())
    digest.update(repr((COMMON_FLAGS, KERNEL_FLAGS, CAPABILITY_FLAGS, TORCH_TARGET, platform.machine())).encode())
    return digest.hexdigest()[:16]


def _escape(text: str) -> str:
    return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _ninja_file(library: Library, work: Path, output: Path, cxx: str) -> str:
    lines = [
        f"cxx = {_escape(cxx)}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $in",
        "rule link",
        "  command = $cxx -shared $in -o $out $flags",
        "  description = link $out",
    ]
    objects = []
    for index, (source, flags) in enumerate(library.objects):
        target = work / f"{index:02d}_{source.stem}.o"
        objects.append(_escape(str(target)))
        lines.append(f"build {objects[-1]}: compile {_escape(str(source))}")
        lines.append(f"  flags = {shlex.join([*COMMON_FLAGS, *flags]).replace('$', '$$')}")
    lines.append(f"build {_escape(str(output))}: link {' '.join(objects)}")
    lines.append(f"  flags = {shlex.join(library.link_flags).replace('$', '$$')}")
    lines.append(f"default {_escape(str(output))}")
    return "\n".join(lines) + "\n"


def build(name: str, destination: Path) -> Path:
    """Builds "cpu" or "python" into `destination` and returns the shared object. Raises BuildError.

    The object appears under its name complete or not at all: it is linked in a temporary folder beside it and renamed.
    A JSON file of the same stem says what it was built with.
    """
    reason = obstacle(name)
    if reason:
        raise BuildError(reason)
    library = LIBRARIES[name](source_directory())
    cxx = compiler()
    destination.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=".build-", dir=destination) as folder:
        work = Path(folder)
        output = work / library.name
        (work / "build.ninja").write_text(_ninja_file(library, work, output, cxx))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        command = [ninja(), "-C", str(work), *jobs]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode != 0:
            lines = [line for line in run.stdout.splitlines() if "error" in line] or run.stdout.splitlines()
            first = (lines or [run.stderr.strip() or "ninja failed"])[0]
            raise BuildError(f"{os.path.basename(cxx)} failed: {first.strip()}", run.stdout + run.stderr)
        version = subprocess.run([cxx, "--version"], capture_output=True, text=True).stdout
        record = {
            "compiler": (version.splitlines() or [cxx])[0],
            "seconds": round(time.monotonic() - started, 1),
            "torch_target": TORCH_TARGET,
            "key": cache_key(source_directory()),
        }
        stem = library.name.split(".")[0]
        (work / f"{stem}.json").write_text(json.dumps(record, indent=1))
        os.replace(work / f"{stem}.json", destination / f"{stem}.json")
        os.replace(output, destination / library.name)
    return destination / library.name
