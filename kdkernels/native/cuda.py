"""What there is of CUDA here: nvcc, the GPUs, which architectures to build for, and whether an object fits the GPUs.

Standard library only, like build.py: setup.py runs this without torch.
"""

from __future__ import annotations

import functools
import glob
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

# The kernels take tables of many kilobytes as arguments and use bfloat16: nothing older has been considered.
OLDEST_CAPABILITY = (8, 0)
OLDEST_NVCC = (12, 1)
# What "all" stands for, as far as an nvcc knows them; the newest also as PTX, for GPUs that are newer still.
ALL = ("80", "86", "89", "90", "100", "120")
_USUAL = "/usr/local/cuda/bin/nvcc"
_FAMILIES = {
    "ampere": "8.0;8.6+PTX",
    "ada": "8.9+PTX",
    "hopper": "9.0+PTX",
    "blackwell": "10.0;10.3;12.0;12.1+PTX",
}

Capability = tuple[int, int]


class ArchitectureError(ValueError):
    """A list of architectures that cannot be read, or that this nvcc does not know."""


@dataclass(frozen=True)
class Gpus:
    """The GPUs that a process sees, and the CUDA version that their driver runs (None: not known)."""

    capabilities: tuple[Capability, ...]
    names: tuple[str, ...] = ()
    driver: tuple[int, int] | None = None

    def name(self, index: int) -> str:
        """How a message calls one of them."""
        return f"GPU {index}" + (f" ({self.names[index]})" if self.names else "")


# nvcc.


def nvcc() -> list[str] | None:
    """nvcc as the words of a command: $NVCC ("ccache nvcc" included), $CUDA_HOME, PATH, the usual folder, or the wheel
    of NVIDIA's toolkit beside this package.
    """
    wanted = os.environ.get("NVCC", "").strip()
    if wanted:
        try:
            name, *arguments = shlex.split(wanted)
        except ValueError:  # a lone quote: a name that no file has
            name, arguments = wanted, []
        path = shutil.which(name)
        return [path, *arguments] if path else None
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [os.path.join(home, "bin", "nvcc") for home in homes] + ["nvcc", _USUAL]
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        candidates += sorted(glob.glob(os.path.join(folder, "cu*", "bin", "nvcc")), reverse=True)
    found = [[path] for path in map(shutil.which, candidates) if path]
    # A distribution's own may be years old: what is too old serves only for saying so.
    return next(
        (command for command in found if (release(command) or (0, 0)) >= OLDEST_NVCC), found[0] if found else None
    )


@functools.cache
def _said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def release(command: Sequence[str]) -> tuple[int, int] | None:
    """The version of an nvcc, or None if it does not run."""
    found = re.search(r"release (\d+)\.(\d+)", _said(*command, "--version"))
    return (int(found[1]), int(found[2])) if found else None


def version_line(command: Sequence[str]) -> str:
    """The line of `nvcc --version` that says most."""
    lines = [line for line in _said(*command, "--version").splitlines() if "release" in line]
    return lines[0].strip() if lines else command[0]


def known(command: Sequence[str]) -> frozenset[int]:
    """The architectures that an nvcc compiles for, as 10 * major + minor."""
    return frozenset(int(number) for number in re.findall(r"\bsm_(\d+)\b", _said(*command, "--list-gpu-code")))


def obstacle() -> str | None:
    """Why no CUDA code can be compiled here, or None."""
    command = nvcc()
    if command is None:
        wanted = os.environ.get("NVCC")
        return f"no nvcc ({wanted!r} of $NVCC is not there)" if wanted else "no nvcc ($NVCC, $CUDA_HOME or PATH)"
    version = release(command)
    if version is None:
        return f"{command[0]} --version does not answer"
    if version < OLDEST_NVCC:
        return f"nvcc {dotted(version)} is too old: {dotted(OLDEST_NVCC)} is the first that serves"
    return None


# Architectures: "sm_90" is machine code, "compute_120" is PTX, which a driver translates for newer GPUs.


def dotted(version: Sequence[int]) -> str:
    """13.0 for (13, 0)."""
    return ".".join(map(str, version))


def _parts(code: str) -> tuple[str, Capability, str]:
    kind, number, suffix = re.fullmatch(r"(sm|compute)_(\d+)([af]?)", code).groups()
    return kind, divmod(int(number), 10), suffix


def parse(text: str) -> list[str]:
    """ "80;9.0a;12.0+PTX;sm_90;compute_120" or "Hopper" as codes. Raises ArchitectureError."""
    codes: list[str] = []
    words = [w for word in re.split(r"[;,\s]+", text.strip()) for w in _FAMILIES.get(word.lower(), word).split(";")]
    for word in words:
        found = re.fullmatch(r"(sm_|compute_)?(\d+)\.?(\d)([af]?)(\+PTX)?", word, re.IGNORECASE)
        if not found:
            raise ArchitectureError(f'cannot read {word!r}; expected "80;90", "8.0 9.0+PTX", "all" or "native"')
        kind, major, minor, suffix, ptx = (part and part.lower() for part in found.groups())
        number = f"{major}{minor}{suffix}"
        codes += [f"sm_{number}"] * (kind != "compute_") + [f"compute_{number}"] * bool(kind == "compute_" or ptx)
    return list(dict.fromkeys(codes))


def valid(text: str) -> bool:
    """Whether $KDKERNELS_CUDA_ARCHS can be read."""
    try:
        return text.strip().lower() in ("all", "native") or bool(parse(text))
    except ArchitectureError:
        return False


def for_gpus(capabilities: Iterable[Capability], codes: frozenset[int]) -> list[str]:
    """What to build for these GPUs, among the architectures that an nvcc knows."""
    wanted = set()
    for major, minor in sorted(set(capabilities)):
        if (major, minor) < OLDEST_CAPABILITY:
            raise ArchitectureError(
                f"compute capability {major}.{minor}: the CUDA kernels need {dotted(OLDEST_CAPABILITY)} or later"
            )
        number = 10 * major + minor
        alike = [c for c in codes if c // 10 == major and c <= number]
        older = [c for c in codes if c <= number and c >= 80]
        if not older:
            raise ArchitectureError(f"this nvcc knows nothing that runs on compute capability {major}.{minor}")
        wanted.add(f"sm_{max(alike)}" if alike else f"compute_{max(older)}")
    return _sorted(wanted)


def _sorted(codes: Iterable[str]) -> list[str]:
    return sorted(set(codes), key=lambda code: (*_parts(code)[1:], _parts(code)[0] == "compute"))


def wanted(text: str, codes: frozenset[int], present: Sequence[Capability], *, drop: bool = False) -> list[str]:
    """The architectures that a user's list names. Raises ArchitectureError; with `drop`, leaves out what cannot be."""
    if text.strip().lower() == "native":
        if not present:
            raise ArchitectureError('"native", but there is no GPU here')
        return for_gpus(present, codes)
    if text.strip().lower() == "all":
        every = [int(number) for number in ALL if int(number) in codes]
        return [f"sm_{number}" for number in every] + [f"compute_{every[-1]}"] if every else []
    chosen = []
    for code in parse(text):
        _, capability, _ = _parts(code)
        good = capability >= OLDEST_CAPABILITY and 10 * capability[0] + capability[1] in codes
        if good:
            chosen.append(code)
        elif not drop:
            why = "this nvcc does not know it" if capability >= OLDEST_CAPABILITY else "8.0 is the first that serves"
            raise ArchitectureError(f"{code}: {why}")
    return _sorted(chosen)


def flags(codes: Iterable[str]) -> list[str]:
    """nvcc's arguments for these architectures."""
    return [f"-gencode=arch=compute_{code.split('_')[1]},code={code}" for code in codes]


# What fits.


def runs_on(code: str, capability: Capability) -> bool:
    """Whether code of this architecture runs on a GPU of this compute capability."""
    kind, made_for, suffix = _parts(code)
    if suffix == "a":
        return made_for == capability
    if kind == "sm" or suffix == "f":
        return made_for[0] == capability[0] and made_for[1] <= capability[1]
    return made_for <= capability


def misfit(codes: Sequence[str], toolkit: Capability, gpus: Gpus) -> str | None:
    """Why what is built for `codes` by the CUDA of version `toolkit` cannot serve these GPUs, or None. The words follow
    "built".

    A driver runs code of any toolkit of its own major version, but translates PTX of its own version or older only.
    """
    built = f"for {', '.join(codes) or 'nothing'} with CUDA {dotted(toolkit)}"
    if gpus.driver and gpus.driver[0] < toolkit[0]:
        return f"{built}, but the driver here runs CUDA {dotted(gpus.driver)} at most"
    for index, capability in enumerate(gpus.capabilities):
        fitting = [code for code in codes if runs_on(code, capability)]
        if not fitting:
            return f"{built}, but {gpus.name(index)} has compute capability {dotted(capability)}"
        if gpus.driver and gpus.driver < toolkit and all(code.startswith("compute") for code in fitting):
            return f"{built}, but the driver here translates PTX up to CUDA {dotted(gpus.driver)}"
    return None


# The GPUs, asked without torch: for an installation.


def capabilities_here() -> tuple[Capability, ...]:
    """The compute capabilities of the GPUs of this machine; empty without any. For use where torch is not imported."""
    smi = shutil.which("nvidia-smi")
    text = _said(smi, "--query-gpu=compute_cap", "--format=csv,noheader") if smi else ""
    if not text and glob.glob("/dev/nvidia[0-9]*") and importlib.util.find_spec("torch"):
        code = "import torch; n = torch.cuda.device_count()\n"
        code += "for i in range(n): print('%d.%d' % torch.cuda.get_device_capability(i))"
        text = _said(sys.executable, "-c", code)
    return tuple((int(a), int(b)) for a, b in re.findall(r"^(\d+)\.(\d+)\s*$", text, re.MULTILINE))


def runtime_folders(command: Sequence[str]) -> list[Path]:
    """Where libcudart_static.a may lie beside an nvcc that came in a wheel; nvcc itself knows the usual places."""
    home = Path(os.path.realpath(command[0])).parents[1]
    return [folder for folder in (home / "lib64", home / "lib") if (folder / "libcudart_static.a").exists()]
