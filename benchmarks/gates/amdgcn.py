"""AMD machine code, from the assembly text that Triton keeps: what a kernel uses and what it does."""

from __future__ import annotations

import re

from gates.flow import Code, Instruction, Kinds

_LABEL = re.compile(r"([.\w$]+):")
_LOAD = re.compile(r"(global|buffer|flat)_load_")
_STORE = re.compile(r"(global|buffer|flat)_store_")


def _bytes(opcode: str) -> int:
    """What a memory instruction moves per lane."""
    found = re.search(r"_dwordx(\d)|_dword\b|_b(\d+)", opcode)
    if not found:
        return 2 if "short" in opcode else 1
    if found.group(2):
        return int(found.group(2)) // 8
    return 4 * int(found.group(1) or 1)


KINDS = Kinds(
    wide_load=lambda x: bool(_LOAD.match(x)) and _bytes(x) >= 16,
    narrow_load=lambda x: bool(_LOAD.match(x)) and _bytes(x) < 16,
    wide_store=lambda x: bool(_STORE.match(x)) and _bytes(x) >= 16,
    float64=lambda x: x.startswith("v_") and "f64" in x and not x.startswith("v_cvt_"),
    conversion=lambda x: x.startswith("v_cvt_") and "f64" in x,
    atomic=lambda x: "_atomic" in x or bool(re.match(r"ds_(add|min|max|cmpst|wrxchg)_", x)),
    local_bytes=lambda x: _bytes(x) if x.startswith("scratch_") else 0,
)


def parse(text: str) -> Code:
    """The assembly of one kernel."""
    code = Code()
    for line in text.splitlines():
        line = line.split(";")[0].strip()
        if found := _LABEL.fullmatch(line):
            code.labels[found.group(1)] = len(code.instructions)
            continue
        if not line or line.startswith("."):
            if line.startswith(".section") and code.instructions:
                break
            continue
        opcode, _, operands = line.partition(" ")
        operands = operands.strip()
        if opcode.startswith("s_cbranch"):
            code.instructions.append(Instruction(opcode, (operands,)))
        elif opcode == "s_branch":
            code.instructions.append(Instruction(opcode, (operands,), False))
        else:
            code.instructions.append(Instruction(opcode, (), opcode not in ("s_endpgm", "s_setpc_b64")))
    return code


def parse_usage(text: str) -> dict[str, int]:
    """What the metadata at the end says: {"vgpr_count": 20, "private_segment_fixed_size": 0, ...}."""
    return {key: int(value) for key, value in re.findall(r"^\s*\.(\w+):\s*(\d+)\s*$", text, re.MULTILINE)}
