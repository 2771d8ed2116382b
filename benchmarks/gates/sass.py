"""NVIDIA machine code: what cuobjdump says a kernel uses, and what nvdisasm says it does."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

from gates.flow import Code, Instruction, Kinds

_INSTRUCTION = re.compile(
    r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@(?P<predicate>!?U?P\w+)\s+)?(?P<opcode>[A-Z][\w.]*)(?P<rest>.*)"
)
_TARGET = re.compile(r"`\(([^()]+)\)")
_TABLE = re.compile(r'BRANCH_TARGETS ([^"]+)"')  # where an indirect jump may go
_LOAD = re.compile(r"LD(G|GSTS)?\.")
_STORE = re.compile(r"STG?\.")
_WIDE = re.compile(r"\.(128|256)\b")
_BULK_LOAD = re.compile(r"UBLKCP\b.*\.S\.G\b|UTMALDG")
_BULK_STORE = re.compile(r"UBLKCP\b.*\.G\.S\b|UTMASTG")
_FLOAT64 = re.compile(r"D(ADD|MUL|FMA|SETP|SET|MNMX|MMA)\b|MUFU\.R(CP|SQ)64H")
_CONVERSION = re.compile(r"(F2F|F2I|I2F|FRND)\..*\bF64\b")
_ATOMIC = re.compile(r"(ATOM|ATOMG|ATOMS|RED|REDG|REDS|UTMAREDG|UBLKRED)\b")
_LOCAL = re.compile(r"(LDL|STL)\b")
_BITS = re.compile(r"\.[US]?(8|16|32|64|128)\b")


def _local_bytes(opcode: str) -> int:
    if not _LOCAL.match(opcode):
        return 0
    bits = _BITS.search(opcode)
    return int(bits.group(1)) // 8 if bits else 4


KINDS = Kinds(
    wide_load=lambda x: bool((_LOAD.match(x) and _WIDE.search(x)) or _BULK_LOAD.match(x)),
    narrow_load=lambda x: bool(_LOAD.match(x) and not _WIDE.search(x)),
    wide_store=lambda x: bool((_STORE.match(x) and _WIDE.search(x)) or _BULK_STORE.match(x)),
    float64=lambda x: bool(_FLOAT64.match(x)),
    conversion=lambda x: bool(_CONVERSION.match(x)),
    atomic=lambda x: bool(_ATOMIC.match(x)),
    local_bytes=_local_bytes,
)


def _instruction(found: re.Match[str]) -> Instruction:
    opcode, rest = found["opcode"], found["rest"]
    name = opcode.split(".")[0]
    if name in ("EXIT", "RET", "KILL"):
        return Instruction(opcode, (), found["predicate"] is not None)
    if name not in ("BRA", "BRX", "JMP", "JMX"):
        return Instruction(opcode)  # a call comes back; BSSY and BSYNC name where threads meet, not where they go
    if table := _TABLE.search(rest):
        return Instruction(opcode, tuple(table.group(1).split(",")), found["predicate"] is not None)
    targets = tuple(_TARGET.findall(rest))
    operands = _TARGET.sub("", rest).strip(" ;,()")
    conditional = found["predicate"] is not None or bool(operands) or ".DIV" in opcode or ".CONV" in opcode
    return Instruction(opcode, targets, conditional)


def parse(text: str) -> dict[str, Code]:
    """The output of `nvdisasm -c` as one Code per kernel."""
    kernels: dict[str, Code] = {}
    code: Code | None = None
    for line in text.splitlines():
        if line.startswith(".text.") and line.endswith(":"):
            code = kernels.setdefault(line[len(".text.") : -1], Code())
            continue
        if line.lstrip().startswith(".section") and ".text." not in line:
            code = None
        if code is None:
            continue
        if line.endswith(":") and not line[0].isspace():
            code.labels[line[:-1]] = len(code.instructions)
        elif found := _INSTRUCTION.match(line):
            code.instructions.append(_instruction(found))
    return kernels


def parse_usage(text: str) -> dict[str, dict[str, int]]:
    """The output of `cuobjdump --dump-resource-usage`: {kernel: {"REG": 40, "STACK": 0, ...}}."""
    kernels: dict[str, dict[str, int]] = {}
    name = None
    for line in text.splitlines():
        if found := re.match(r"\s*Function (.+):$", line):
            name = found.group(1)
        elif name and "REG:" in line:
            kernels[name] = {key: int(value) for key, value in re.findall(r"(\w+)(?:\[\d+\])?:(\d+)", line)}
            name = None
    return kernels


@functools.cache
def tool(name: str) -> str | None:
    """nvdisasm, cuobjdump or a ptxas: triton's own, which reads every architecture, or else the one in PATH."""
    spec = importlib.util.find_spec("triton")
    for place in (spec and spec.submodule_search_locations) or ():
        path = Path(place) / "backends" / "nvidia" / "bin" / name
        if path.is_file():
            return str(path)
    return shutil.which(name)


def run(*command: str | Path) -> str:
    """A command's output; what it said is in the error where it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def version(name: str) -> str:
    """The version of one of the tools."""
    path = tool(name)
    found = re.search(r"V([\d.]+)", run(path, "--version")) if path else None
    return found.group(1) if found else "missing"


def read(cubin: Path) -> dict[str, tuple[Code, dict[str, int]]]:
    """Every kernel in a cubin: its code and what it uses."""
    codes = parse(run(tool("nvdisasm") or "nvdisasm", "-c", cubin))
    usage = parse_usage(run(tool("cuobjdump") or "cuobjdump", "--dump-resource-usage", cubin))
    return {name: (code, usage[name]) for name, code in codes.items() if name in usage}
