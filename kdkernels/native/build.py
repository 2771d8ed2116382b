"""Builds the native parts from csrc/ with ninja. Standard library only: setup.py runs this file without torch.

What is built and with which flags is decided here and nowhere else. `setup.py` builds into the wheel; `cache.py` builds
into the user's cache on first execution.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
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
CPU_OBJECT = "kdkernels_cpu.so"


class BuildError(RuntimeError):
    """Why a native part could not be built, in one line; `log` holds the compiler's own words."""

    def __init__(self, message: str, log: str = ""):
        super().__init__(message)
        self.log = log


class SourcesChanged(BuildError):
    """Somebody edited csrc/ during the build, so the object belongs to no one state of it."""


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


def compiler() -> list[str] | None:
    """The C++ compiler as the words of a command: $CXX ("ccache g++" included), else g++, clang++ or c++ from PATH."""
    wanted = os.environ.get("CXX", "").strip()
    try:
        candidates = [shlex.split(wanted)] if wanted else [["g++"], ["clang++"], ["c++"]]
    except ValueError:  # a lone quote: a name that no file has
        candidates = [[wanted]]
    for name, *arguments in candidates:
        path = shutil.which(name)
        if path:
            return [path, *arguments]
    return None


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
        return f"no C++ compiler ({wanted!r} of $CXX is not there)" if wanted else "no C++ compiler (g++ or clang++)"
    if ninja() is None:
        return "no ninja (pip install ninja)"
    if name == "cpu" and torch_directory() is None:
        return "torch is not importable here"
    if name == "python" and importlib.util.find_spec("pybind11") is None:
        return "no pybind11 (pip install pybind11)"
    return None


def cpu_library(csrc: Path, torch: Path) -> Library:
    """The CPU kernels: every cpu/*.cpp once per instruction set, and their registration with torch."""
    capabilities = list(CAPABILITY_FLAGS) if platform.machine() in ("x86_64", "AMD64") else ["base"]
    objects: list[tuple[Path, list[str]]] = []
    for source in sorted((csrc / "cpu").glob("*.cpp")):
        if source.name == "capability.cpp":
            objects.append((source, []))
            continue
        for name in capabilities:
            objects.append((source, [*KERNEL_FLAGS, *CAPABILITY_FLAGS[name], f"-DKD_CAPABILITY={name}"]))
    include = ["-isystem", str(torch / "include"), f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    objects += [(source, include) for source in sorted((csrc / "torch").glob("*_cpu.cpp"))]
    link = [f"-L{torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    return Library(CPU_OBJECT, objects, link)


def python_library(csrc: Path) -> Library:
    """The pybind11 module: what a test or a person can ask of the build without torch."""
    import pybind11

    include = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"]]
    sources = [(csrc / "python.cpp", include), (csrc / "cpu" / "capability.cpp", [])]
    return Library(f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", sources)


def cache_key(csrc: Path) -> str:
    """What the CPU object depends on, as a hash: sources, flags, compiler, ABI target; not the version of torch."""
    digest = hashlib.sha256()
    for path in sorted(csrc.glob("*/*")):  # python.cpp, beside them, is no part of it
        if path.suffix in (".h", ".cpp"):
            digest.update(path.relative_to(csrc).as_posix().encode() + b"\0" + path.read_bytes())
    library = cpu_library(Path("csrc"), Path("torch"))
    recipe = [COMMON_FLAGS, KERNEL_FLAGS, CAPABILITY_FLAGS, TORCH_TARGET, library.link_flags, platform.machine()]
    command = compiler()
    if command:
        status = os.stat(command[0])
        recipe += [os.path.realpath(command[0]), command[1:], status.st_size, status.st_mtime_ns]
    digest.update(repr(recipe).encode())
    return digest.hexdigest()[:16]


def record_of(shared_object: Path) -> Path:
    """The JSON file beside a shared object that says what it was built with."""
    return shared_object.with_name(shared_object.name.split(".")[0] + ".json")


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def intact(shared_object: Path) -> bool:
    """Whether a shared object is, byte for byte, what its build wrote: loading a truncated one can end the process."""
    try:
        return json.loads(record_of(shared_object).read_text())["sha256"] == _checksum(shared_object)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _escape(text: str) -> str:
    return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _command(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _ninja_file(library: Library, work: Path, output: Path, cxx: list[str]) -> str:
    lines = [
        f"cxx = {_command(cxx)}",
        "rule compile",
        "  command = $cxx $flags -c $in -o $out",
        "  description = compile $in",
        "rule link",
        "  command = $cxx -shared $in -o $out $flags",
        "  description = link $out",
    ]
    objects = []
    for index, (source, flags) in enumerate(library.objects):
        objects.append(_escape(str(work / f"{index:02d}_{source.stem}.o")))
        lines.append(f"build {objects[-1]}: compile {_escape(str(source))}")
        lines.append(f"  flags = {_command([*COMMON_FLAGS, *flags])}")
    lines.append(f"build {_escape(str(output))}: link {' '.join(objects)}")
    lines.append(f"  flags = {_command(library.link_flags)}")
    return "\n".join(lines) + "\n"


def _first_error(log: str) -> str:
    """The line of ninja's output that says most: the linker's or a compiler's error, else how a command ended."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for pattern in (
        r".*(?:undefined reference|: cannot find ).*",
        r".*\berror: .*",
        r"ninja: fatal.*",
        r"FAILED: (\S+)",
    ):
        for line in lines:
            if found := re.match(pattern, line):
                return found[found.lastindex or 0]
    return lines[-1] if lines else "no message"


def build(name: str, destination: Path) -> Path:
    """Builds "cpu" or "python" into `destination` and returns the shared object. Raises BuildError.

    The object appears under its name complete or not at all: it is linked in a temporary folder beside it and renamed.
    A JSON file beside it says what it was built with, and its checksum.
    """
    reason = obstacle(name)
    if reason:
        raise BuildError(reason)
    csrc, cxx = source_directory(), compiler()
    key = cache_key(csrc)
    library = cpu_library(csrc, torch_directory()) if name == "cpu" else python_library(csrc)
    destination = destination.resolve()  # ninja runs elsewhere
    destination.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=".build-", dir=destination) as folder:
        work = Path(folder)
        output = work / library.name
        (work / "build.ninja").write_text(_ninja_file(library, work, output, cxx), encoding="utf-8")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []

        def run(*command: str) -> subprocess.CompletedProcess:
            # English, so that "error:" is found; whatever bytes a compiler prints must not become another error.
            environment = {**os.environ, "LC_ALL": "C"}
            return subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)

        result = run(ninja(), "-C", str(work), *jobs)
        if result.returncode != 0:
            log = result.stdout + result.stderr
            raise BuildError(f"{os.path.basename(cxx[0])} failed: {_first_error(log)}", log)
        if cache_key(csrc) != key:
            raise SourcesChanged("the sources were edited during the build")
        record = {
            "compiler": (run(*cxx, "--version").stdout.splitlines() or cxx)[0],
            "seconds": round(time.monotonic() - started, 1),
            "torch_target": TORCH_TARGET,
            "sources_and_flags": key,
            "sha256": _checksum(output),
        }
        record_of(output).write_text(json.dumps(record, indent=1))
        target = destination / library.name
        os.replace(record_of(output), record_of(target))
        os.replace(output, target)
    return target
