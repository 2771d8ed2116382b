"""The CUDA kernels: each csrc/cuda/*.cu as a cubin, every template instance in it read and named."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from gates import sass
from gates.flow import count
from gates.rules import Kernel
from kdkernels.native import build
from kdkernels.native import cuda as toolkit

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
ARCHITECTURES = ("80", "90", "100", "120")
_DTYPES = {"float": "f32", "BFloat16": "bf16", "Half": "f16"}


def obstacle() -> str | None:
    """Why the kernels cannot be compiled and read here, or None."""
    if why := toolkit.obstacle():
        return why
    missing = [name for name in ("nvdisasm", "cuobjdump") if not sass.tool(name)]
    return f"no {' or '.join(missing)}: triton has them, and the CUDA toolkit" if missing else None


def ops() -> list[str]:
    return sorted(path.stem for path in SOURCES.glob("*.cu"))


def version() -> str:
    return toolkit.version_line(toolkit.nvcc() or ["nvcc"])


def split_name(demangled: str) -> tuple[str, str]:
    """(kernel with the template arguments that are not dtypes, dtypes) of a demangled name."""
    name = demangled.replace("(anonymous namespace)::", "").removeprefix("void ")
    depth, first, commas, end = 0, None, [], len(name)
    for i, character in enumerate(name):
        if character == "<":
            depth += 1
            first = i if first is None else first
        elif character == ">":
            depth -= 1
        elif character == "," and depth == 1:
            commas.append(i)
        elif character == "(" and depth == 0:
            end = i
            break
    if first is None:
        return name[:end].split("::")[-1], "-"
    edges = [first, *commas, end - 1]
    arguments = [re.sub(r"\b\w+::", "", name[a + 1 : b]).strip() for a, b in itertools.pairwise(edges)]
    dtypes = [_DTYPES[x] for x in arguments if x in _DTYPES]
    others = [re.sub(r"^\((unsigned )?(int|bool|long)\)", "", x) for x in arguments if x not in _DTYPES]
    kernel = name[:first].split("::")[-1] + (f"<{', '.join(others)}>" if others else "")
    return kernel, "/".join(dtypes) or "-"


def demangle(names: list[str]) -> list[str]:
    if not shutil.which("c++filt"):
        return names
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def spills(log: str) -> dict[str, int]:
    """Bytes of spill stores and loads per kernel, from what `ptxas -v` says."""
    pattern = r"Function properties for (\S+)\n.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    return {name: int(stores) + int(loads) for name, stores, loads in re.findall(pattern, log)}


def kernels(op: str, arch: str, say: Callable[[str], None]) -> Iterator[Kernel]:
    """Compiles csrc/cuda/<op>.cu for one architecture."""
    say(f"cuda {op} sm_{arch}")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / f"{op}.cubin"
        command = [*(toolkit.nvcc() or ["nvcc"]), *build.CUDA_FLAGS, "-cubin", f"-arch=sm_{arch}", "-Xptxas=-v"]
        done = subprocess.run([*command, str(SOURCES / f"{op}.cu"), "-o", str(cubin)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{op}.cu does not compile for sm_{arch}:\n{done.stderr[-3000:]}")
        spilled = spills(done.stderr + done.stdout)
        found = sass.read(cubin)
    for mangled, demangled in zip(found, demangle(list(found))):
        code, usage = found[mangled]
        name, dtypes = split_name(demangled)
        yield Kernel(
            op=op,
            name=name,
            backend="cuda",
            arch=f"sm_{arch}",
            dtypes=dtypes,
            case="any",
            compiler=toolkit.dotted(toolkit.release(toolkit.nvcc() or ["nvcc"]) or (0, 0)),
            registers=usage["REG"],
            scalar_registers=0,
            spill_bytes=spilled.get(mangled, 0),
            local_bytes=usage["STACK"] + usage["LOCAL"],
            shared_bytes=usage["SHARED"],
            counts=count(code, sass.KINDS),
        )
