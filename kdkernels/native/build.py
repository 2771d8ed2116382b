"""Builds the native parts from csrc/ with ninja. Standard library only: setup.py runs this file without torch.

What is built and with which flags is decided here and nowhere else. `setup.py` builds into the wheel; `cache.py` builds
into the user's cache on first execution. cuda.py knows nvcc and architectures.
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
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import cuda

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
# Exact too: nvcc's defaults, without --use_fast_math.
CUDA_FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra", "-DKD_CAPABILITY=cuda"]
CPU_OBJECT, CUDA_OBJECT = "kdkernels_cpu.so", "kdkernels_cuda.so"
OBJECTS = {"cpu": CPU_OBJECT, "cuda": CUDA_OBJECT}
# The sources of each object, in csrc/. Headers of math/, torch/ and csrc/ itself are shared, but for the one named.
_SOURCES = {
    "cpu": ("*.h", "math/*.h", "torch/*.h", "cpu/*.h", "cpu/*.cpp", "torch/*_cpu.cpp"),
    "cuda": ("*.h", "math/*.h", "torch/*.h", "cuda/*.h", "cuda/*.cuh", "cuda/*.cu", "torch/*_cuda.cpp"),
}
_NOT_SOURCES = {"cpu": ("torch/cuda.h",), "cuda": ()}


class BuildError(RuntimeError):
    """Why a native part could not be built, in one line; `log` holds the compiler's own words."""

    def __init__(self, message: str, log: str = ""):
        super().__init__(message)
        self.log = log


class SourcesChanged(BuildError):
    """Somebody edited csrc/ during the build, so the object belongs to no one state of it."""


@dataclass(frozen=True)
class Library:
    """One shared object: its file name, and (source, flags) for each object in it. nvcc compiles what ends in .cu."""

    name: str
    objects: list[tuple[Path, list[str]]]
    link_flags: list[str] = field(default_factory=list)
    linker: str = "cxx"  # or "nvcc"


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
    """Why `name` ("cpu", "cuda" or "python") cannot be built here, or None. Cheap."""
    if not sys.platform.startswith("linux"):
        return f"compiled kernels are built on Linux only, this is {sys.platform}"
    if compiler() is None:
        wanted = os.environ.get("CXX")
        return f"no C++ compiler ({wanted!r} of $CXX is not there)" if wanted else "no C++ compiler (g++ or clang++)"
    if ninja() is None:
        return "no ninja (pip install ninja)"
    if name in OBJECTS and torch_directory() is None:
        return "torch is not importable here"
    if name == "cuda":
        return cuda.obstacle()
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
    objects += [(source, _stable_abi(torch)) for source in sorted((csrc / "torch").glob("*_cpu.cpp"))]
    link = [f"-L{torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    return Library(CPU_OBJECT, objects, link)


def _stable_abi(torch: Path) -> list[str]:
    return ["-isystem", str(torch / "include"), f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]


def cuda_library(csrc: Path, torch: Path, architectures: Sequence[str], nvcc: Sequence[str] = ("nvcc",)) -> Library:
    """The CUDA kernels: every cuda/*.cu by nvcc, and their registration with torch by the C++ compiler.

    The CUDA runtime is linked statically, so that the object needs a driver but no particular CUDA of torch's, and
    loads where there is neither.
    """
    version = cuda.release(nvcc) or (0, 0)
    kernels = [*CUDA_FLAGS, *cuda.flags(architectures)]
    if version >= (13, 0):  # drivers of CUDA 12 before 12.4 cannot read it
        kernels.append("--compress-mode=size")
    objects = [(source, kernels) for source in sorted((csrc / "cuda").glob("*.cu"))]
    objects += [(source, _stable_abi(torch)) for source in sorted((csrc / "torch").glob("*_cuda.cpp"))]
    link = [*cuda.flags(architectures), "-cudart", "static", "-Xlinker", "--exclude-libs=ALL"]
    link += [f"-L{folder}" for folder in cuda.runtime_folders(nvcc)]
    link += [f"-L{torch / 'lib'}", "-Xlinker", "--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    return Library(CUDA_OBJECT, objects, link, linker="nvcc")


def cuda_architectures(present: Sequence[cuda.Capability], *, installing: bool = False) -> tuple[list[str], str]:
    """What to build the CUDA kernels for, and why: $KDKERNELS_CUDA_ARCHS, else the GPUs that are there.

    At install $TORCH_CUDA_ARCH_LIST comes between the two. Raises BuildError where that leaves nothing; nvcc is there.
    """
    codes = cuda.known(cuda.nvcc() or ["nvcc"])
    try:
        if text := os.environ.get("KDKERNELS_CUDA_ARCHS", "").strip():
            return cuda.wanted(text, codes, present), "KDKERNELS_CUDA_ARCHS"
        text = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() if installing else ""
        if text and (chosen := cuda.wanted(text, codes, present, drop=True)):
            return chosen, "TORCH_CUDA_ARCH_LIST"
        if present:
            return cuda.for_gpus(present, codes), "the GPUs here"
    except cuda.ArchitectureError as error:
        raise BuildError(str(error)) from None
    raise BuildError("no GPU here, and KDKERNELS_CUDA_ARCHS is not set")


def python_library(csrc: Path) -> Library:
    """The pybind11 module: what a test or a person can ask of the build without torch."""
    import pybind11

    include = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"]]
    sources = [(csrc / "python.cpp", include), (csrc / "cpu" / "capability.cpp", [])]
    return Library(f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", sources)


def _identity(command: Sequence[str] | None) -> list[object]:
    if not command:
        return []
    status = os.stat(command[0])
    return [os.path.realpath(command[0]), list(command[1:]), status.st_size, status.st_mtime_ns]


def cache_key(csrc: Path, name: str = "cpu", architectures: Sequence[str] = ()) -> str:
    """What "cpu" or "cuda" depends on, as a hash: sources, flags, compilers, architectures, ABI target; not torch's
    version.
    """
    digest = hashlib.sha256()
    paths = {path for pattern in _SOURCES[name] for path in csrc.glob(pattern)}
    for path in sorted(paths):
        inside = path.relative_to(csrc).as_posix()
        if inside not in _NOT_SOURCES[name]:
            digest.update(inside.encode() + b"\0" + path.read_bytes())
    recipe = [COMMON_FLAGS, TORCH_TARGET, platform.machine(), *_identity(compiler())]
    if name == "cpu":
        library = cpu_library(Path("csrc"), Path("torch"))
        recipe += [KERNEL_FLAGS, CAPABILITY_FLAGS]
    else:
        nvcc = cuda.nvcc() or ["nvcc"]
        library = cuda_library(Path("csrc"), Path("torch"), architectures, nvcc)
        # nvcc may be a script that calls another: what it says of itself counts too.
        recipe += [CUDA_FLAGS, list(architectures), *_identity(cuda.nvcc()), cuda.version_line(nvcc), _host_compiler()]
    recipe.append(library.link_flags)
    digest.update(repr(recipe).encode())
    return digest.hexdigest()[:16]


def _host_compiler() -> list[str]:
    """nvcc's arguments that name the compiler of the host's half: $CXX without the likes of ccache, unless
    $NVCC_CCBIN, which nvcc reads, names another.
    """
    command = [word for word in compiler() or [] if os.path.basename(word) not in ("ccache", "sccache", "distcc")]
    if os.environ.get("NVCC_CCBIN") or not os.environ.get("CXX") or not command:
        return []
    return ["-ccbin", command[0]]


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


def _ninja_file(library: Library, work: Path, output: Path, cxx: list[str], nvcc: list[str]) -> str:
    lines = [
        f"cxx = {_command(cxx)}",
        f"nvcc = {_command([*nvcc, *_host_compiler()])}",
        "rule compile",
        "  command = $cxx $flags -c $in -o $out",
        "  description = compile $in",
        "rule compile_cuda",
        "  command = $nvcc $flags -c $in -o $out",
        "  description = compile $in",
        "rule link",
        f"  command = ${library.linker} -shared $in -o $out $flags",
        "  description = link $out",
    ]
    objects = []
    for index, (source, flags) in enumerate(library.objects):
        objects.append(_escape(str(work / f"{index:02d}_{source.stem}.o")))
        kernels = source.suffix == ".cu"
        lines.append(f"build {objects[-1]}: {'compile_cuda' if kernels else 'compile'} {_escape(str(source))}")
        lines.append(f"  flags = {_command(flags if kernels else [*COMMON_FLAGS, *flags])}")
    lines.append(f"build {_escape(str(output))}: link {' '.join(objects)}")
    lines.append(f"  flags = {_command(library.link_flags)}")
    return "\n".join(lines) + "\n"


def _first_error(log: str) -> str:
    """The line of ninja's output that says most: the linker's or a compiler's error, else how a command ended."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for pattern in (
        r".*(?:undefined reference|: cannot find ).*",
        r".*\berror: .*",
        r"ptxas .*, line \d+; .*",
        r"(?:nvcc|ptxas|nvlink) (?:error|fatal) .*",
        r"ninja: fatal.*",
        r"FAILED: (\S+)",
    ):
        for line in lines:
            if found := re.match(pattern, line):
                return found[found.lastindex or 0]
    return lines[-1] if lines else "no message"


def build(name: str, destination: Path, architectures: Sequence[str] = ()) -> Path:
    """Builds "cpu", "cuda" (for `architectures`) or "python" into `destination` and returns the shared object. Raises
    BuildError.

    The object appears under its name complete or not at all: it is linked in a temporary folder beside it and renamed.
    A JSON file beside it says what it was built with, and its checksum.
    """
    reason = obstacle(name)
    if reason:
        raise BuildError(reason)
    csrc, cxx, nvcc = source_directory(), compiler(), cuda.nvcc() if name == "cuda" else []
    keyed = (csrc, name if name in OBJECTS else "cpu", architectures)
    key = cache_key(*keyed)
    if name == "cuda":
        library = cuda_library(csrc, torch_directory(), architectures, nvcc)
    else:
        library = cpu_library(csrc, torch_directory()) if name == "cpu" else python_library(csrc)
    destination = destination.resolve()  # ninja runs elsewhere
    destination.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=".build-", dir=destination) as folder:
        work = Path(folder)
        output = work / library.name
        (work / "build.ninja").write_text(_ninja_file(library, work, output, cxx, nvcc), encoding="utf-8")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []

        def run(*command: str) -> subprocess.CompletedProcess:
            # English, so that "error:" is found; whatever bytes a compiler prints must not become another error.
            environment = {**os.environ, "LC_ALL": "C"}
            return subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)

        result = run(ninja(), "-C", str(work), *jobs)
        if result.returncode != 0:
            log = result.stdout + result.stderr
            raise BuildError(f"{os.path.basename((nvcc or cxx)[0])} failed: {_first_error(log)}", log)
        if cache_key(*keyed) != key:
            raise SourcesChanged("the sources were edited during the build")
        record = {
            "compiler": (run(*cxx, "--version").stdout.splitlines() or cxx)[0],
            "seconds": round(time.monotonic() - started, 1),
            "torch_target": TORCH_TARGET,
            "sources_and_flags": key,
            "sha256": _checksum(output),
        }
        if name == "cuda":
            record |= {"architectures": list(architectures), "cuda": cuda.dotted(cuda.release(nvcc))}
            record["nvcc"] = cuda.version_line(nvcc)
        record_of(output).write_text(json.dumps(record, indent=1))
        target = destination / library.name
        os.replace(record_of(output), record_of(target))
        os.replace(output, target)
    return target
