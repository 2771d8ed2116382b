"""The compile gates: what they read in machine code, what they let pass, and the kernels on one architecture.

The gates on every architecture are slow: `python benchmarks/compile_gates.py`, or here `-m slow`.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("benchmarks/ is not beside these tests", allow_module_level=True)
sys.path.append(str(BENCHMARKS))

from gates import amdgcn, cuda, flow, rules, sass, triton_kernels  # noqa: E402

RECORDED = BENCHMARKS / "results" / "compile_gates.csv"


def listing(*lines: str, name: str = "kernel") -> str:
    """Lines of code as nvdisasm prints them; a line that ends with a colon is a label."""
    body, address = [], 0
    for line in lines:
        if line.endswith(":"):
            body.append(line)
            continue
        body.append(f"        /*{address:04x}*/              {line} ;")
        address += 16
    start = [
        f'\t.section\t.text.{name},"ax",@progbits',
        f".text.{name}:",
        f"        .type {name},@function",
        f"{name}:",
    ]
    return "\n".join([*start, *body, ""])


def counts(*lines: str) -> flow.Counts:
    return flow.count(sass.parse(listing(*lines))["kernel"], sass.KINDS)


def loop_sizes(*lines: str) -> list[int]:
    return sorted(len(body) for body in flow.loops_of(sass.parse(listing(*lines))["kernel"]))


MAIN = (
    ".L_x_0:",
    "LDG.E.EF.128 R4, desc[UR4][R2.64]",
    "LDG.E.128.CONSTANT R8, desc[UR4][R12.64]",
    "STG.E.EF.128 desc[UR6][R2.64], R4",
    "@!P0 BRA `(.L_x_0)",
)
TAIL = (".L_x_1:", "LDG.E.U16 R4, desc[UR4][R2.64]", "LDG.E R5, desc[UR4][R2.64]", "@P1 BRA `(.L_x_1)")


def test_loads_are_those_of_the_main_loop():
    got = counts("S2R R0, SR_TID.X", *MAIN, *TAIL, "EXIT")
    assert got == flow.Counts(
        wide_loads=2, narrow_loads=0, wide_stores=1, float64=0, conversions=0, atomics=0, local_bytes=0
    )


def test_narrow_loads_beside_wide_ones_are_seen():
    got = counts(*MAIN[:2], "@P2 LDG.E.64 R6, desc[UR4][R2.64]", *MAIN[2:], "EXIT")
    assert (got.wide_loads, got.narrow_loads) == (2, 1)


def test_without_a_loop_all_loads_count():
    got = counts("LDG.E.128 R4, desc[UR4][R2.64]", "LDG.E.U8 R3, desc[UR4][R2.64]", "EXIT")
    assert (got.wide_loads, got.narrow_loads) == (1, 1)


def test_the_inner_loop_is_the_main_one():
    outer = (".L_x_9:", "LDG.E R1, desc[UR4][R2.64]", *MAIN, "LDG.E R1, desc[UR4][R2.64]", "@P3 BRA `(.L_x_9)", "EXIT")
    assert loop_sizes(*outer) == [4, 7]
    assert counts(*outer).narrow_loads == 0


def test_a_rare_path_behind_the_end_is_no_loop():
    """It jumps back to a place that it does not dominate."""
    lines = ("@P0 BRA `(.L_x_5)", ".L_x_4:", "LDG.E.128 R4, desc[UR4][R2.64]", "EXIT", ".L_x_5:", "MOV R1, R2")
    assert loop_sizes(*lines, "BRA `(.L_x_4)") == []


def test_a_rare_path_of_a_loop_belongs_to_it():
    lines = (".L_x_0:", "@P1 BRA `(.L_x_5)", ".L_x_4:", *MAIN[1:4], "@!P0 BRA `(.L_x_0)", "EXIT")
    assert loop_sizes(*lines, ".L_x_5:", "F2F.F32.F64 R1, R2", "BRA `(.L_x_4)") == [7]
    assert counts(*lines, ".L_x_5:", "F2F.F32.F64 R1, R2", "BRA `(.L_x_4)").conversions == 1


@pytest.mark.parametrize(
    ("branch", "size"),
    [
        ("@P0 BRA P1, `(.L_x_0)", 2),
        ("BRA.U UP0, `(.L_x_0)", 2),
        ("BRA `(.L_x_0)", 2),
        ('BRX R24 -0x7710   (*"BRANCH_TARGETS .L_x_7,.L_x_0"*)', 2),
    ],
)
def test_every_kind_of_jump_back_makes_a_loop(branch, size):
    assert loop_sizes(".L_x_0:", "IADD3 R1, R1, 1, RZ", branch, ".L_x_7:", "EXIT") == [size]


def test_padding_and_subroutines_are_read_past():
    lines = (
        *MAIN,
        "EXIT",
        ".L_x_8:",
        "BRA `(.L_x_8)",
        "$__internal_0:",
        "DADD R2, R2, R4",
        "RET.REL.NODEC R2 `(kernel)",
    )
    got = counts(*lines)
    assert got.wide_loads == 2 and got.float64 == 1
    assert loop_sizes(*lines) == [4]


@pytest.mark.parametrize("opcode", ["DADD", "DMUL.RP", "DFMA", "DSETP.GEU.AND", "MUFU.RCP64H", "DMNMX"])
def test_float64_arithmetic(opcode):
    assert counts(f"@P0 {opcode} R2, R4, R6", "EXIT").float64 == 1


@pytest.mark.parametrize("opcode", ["DEPBAR.LE", "FADD", "I2F.U64.RP", "HADD2.F32", "F2F.BF16.F32", "MUFU.RCP"])
def test_what_is_not_float64(opcode):
    got = counts(".L_x_0:", f"{opcode} R2, R4", "@P0 BRA `(.L_x_0)", "EXIT")
    assert got.float64 == got.conversions == 0


@pytest.mark.parametrize("opcode", ["F2F.F64.F32", "F2F.F32.F64", "I2F.F64.S64", "F2I.F64.TRUNC"])
def test_conversions_count_in_loops_alone(opcode):
    assert counts(f"{opcode} R2, R4", "EXIT").conversions == 0
    assert counts(".L_x_0:", f"{opcode} R2, R4", "@P0 BRA `(.L_x_0)", "EXIT").conversions == 1


@pytest.mark.parametrize("opcode", ["RED.E.ADD.F32.FTZ.RN.STRONG.GPU", "ATOMG.E.ADD", "ATOMS.CAST.SPIN", "REDG.E.ADD"])
def test_atomics(opcode):
    assert counts(f"{opcode} desc[UR4][R2.64], R5", "EXIT").atomics == 1


def test_a_warp_reduction_is_no_atomic():
    assert counts("REDUX.SUM UR4, R2", "CREDUX.MIN UR4, R2", "EXIT").atomics == 0


@pytest.mark.parametrize(("opcode", "size"), [("STL", 4), ("LDL.LU", 4), ("STL.64", 8), ("LDL.128", 16), ("STL.U8", 1)])
def test_local_memory(opcode, size):
    assert counts(f"{opcode} [R1+0x8], R5", "EXIT").local_bytes == size


@pytest.mark.parametrize(
    ("opcode", "wide"),
    [
        ("LDG.E.ENL2.256", True),
        ("LDGSTS.E.BYPASS.128", True),
        ("LD.E.128", True),
        ("UBLKCP.S.G", True),
        ("LDG.E.64", False),
        ("LDS.128", False),
        ("LDC.128", False),
        ("LDSM.16.M88.4", False),
    ],
)
def test_what_is_a_wide_load(opcode, wide):
    assert bool(counts(f"{opcode} R4, [R2]", "EXIT").wide_loads) == wide


def test_kernels_of_one_listing_are_apart():
    text = listing("EXIT", name="first") + listing(*MAIN, "EXIT", name="second")
    codes = sass.parse(text + "\t.section\t.nv.info\n        /*0000*/  LDG.E.128 R0, [R2] ;\n")
    assert {name: len(code.instructions) for name, code in codes.items()} == {"first": 1, "second": 5}


def test_resource_usage():
    text = """
Resource usage:
 Common:
  GLOBAL:0
 Function _Z6kernelv:
  REG:112 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:3248 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    usage = sass.parse_usage(text)["_Z6kernelv"]
    assert (usage["REG"], usage["STACK"], usage["SHARED"], usage["LOCAL"]) == (112, 8, 1024, 0)


def test_spills_from_the_assembler():
    text = """ptxas info    : Function properties for _Z6kernelv
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 255 registers
"""
    assert cuda.spills(text) == {"_Z6kernelv": 32}


@pytest.mark.parametrize(
    ("demangled", "expected"),
    [
        (
            "void kdkernels::cuda::(anonymous namespace)::sums<kdkernels::cuda::Half, float>(kdkernels::Table, float*)",
            ("sums", "f16/f32"),
        ),
        ("kdkernels::cuda::(anonymous namespace)::finish(Table, float const*)", ("finish", "-")),
        ("void kd::rows<float, (int)4, (kd::Kind)1, V<float> >(float const*)", ("rows<4, (Kind)1, V<float>>", "f32")),
    ],
)  # fmt: skip
def test_names(demangled, expected):
    assert cuda.split_name(demangled) == expected


AMD = """
	.text
kernel:                                 ; @kernel
	s_load_dwordx8 s[4:11], s[0:1], 0x8
	global_load_ushort v5, v[2:3], off
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
	buffer_load_dwordx4 v[4:7], v1, s[8:11], 0 offen
	global_load_dword v9, v[2:3], off
	buffer_store_dwordx4 v[4:7], v1, s[12:15], 0 offen
	s_cbranch_scc1 .LBB0_2
; %bb.3:
	v_add_f64 v[0:1], v[0:1], v[2:3]
	scratch_store_dwordx2 off, v[0:1], s32
	s_endpgm
.Lfunc_end0:
	.section	.AMDGPU.csdata
	global_load_dwordx4 v[0:3], v[4:5], off
    .group_segment_fixed_size: 16
    .private_segment_fixed_size: 8
    .sgpr_count:     24
    .vgpr_count:     20
    .vgpr_spill_count: 2
"""


def test_amd_code():
    got = flow.count(amdgcn.parse(AMD), amdgcn.KINDS)
    assert got == flow.Counts(
        wide_loads=1, narrow_loads=1, wide_stores=1, float64=1, conversions=0, atomics=0, local_bytes=8
    )
    usage = amdgcn.parse_usage(AMD)
    assert (usage["vgpr_count"], usage["sgpr_count"], usage["vgpr_spill_count"]) == (20, 24, 2)
    assert usage["private_segment_fixed_size"] == 8


@pytest.mark.parametrize(
    "opcode", ["global_atomic_add_f32", "ds_add_f32", "buffer_atomic_pk_add_bf16", "flat_atomic_add"]
)
def test_amd_atomics(opcode):
    assert flow.count(amdgcn.parse(f"\t{opcode} v0, v1\n\ts_endpgm\n"), amdgcn.KINDS).atomics == 1


# What passes.

SOUND = flow.Counts(wide_loads=4, narrow_loads=0, wide_stores=2, float64=0, conversions=0, atomics=0, local_bytes=0)
KERNEL = rules.Kernel("x", "x_gradient", "cuda", "sm_90", "f32/f32", "any", "13.0", 64, 0, 0, 0, 0, SOUND)
NVCC = frozenset(["13.0"])
RANGES = {KERNEL.key: rules.Range(60, 66, 0, NVCC)}


def test_a_sound_kernel_passes():
    assert rules.failures(KERNEL, RANGES) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"spill_bytes": 8}, "8 bytes of spills"),
        ({"local_bytes": 16}, "local memory (16 bytes"),
        ({"registers": 66 + rules.SLACK + 1}, "recorded 60-66"),
        ({"registers": 60 - rules.SLACK - 1}, "recorded 60-66"),
        ({"arch": "sm_80"}, "no recorded range"),
        ({"counts": replace(SOUND, float64=1)}, "1 float64 instructions"),
        ({"counts": replace(SOUND, conversions=2)}, "2 conversions"),
        ({"counts": replace(SOUND, atomics=1)}, "1 atomics"),
        ({"counts": replace(SOUND, local_bytes=4)}, "local memory"),
        ({"counts": replace(SOUND, wide_loads=0)}, "no 16-byte loads"),
        ({"counts": replace(SOUND, wide_stores=0)}, "no 16-byte stores"),
        ({"counts": replace(SOUND, narrow_loads=3)}, "3 narrow loads"),
    ],
)
def test_every_gate_can_fail(change, said):
    (failure,) = rules.failures(replace(KERNEL, **change), RANGES)
    assert said in failure


def test_ranges_hold_for_the_compilers_that_they_were_recorded_with():
    other = replace(KERNEL, compiler="13.1", registers=100)
    assert rules.failures(other, RANGES) == []
    assert rules.failures(replace(other, name="new"), RANGES) == []
    assert rules.failures(replace(other, local_bytes=8), RANGES)


def test_finishing_kernels_may_use_float64_but_not_local_memory():
    counts = replace(SOUND, wide_loads=0, wide_stores=0, float64=40, conversions=9)
    kernel = replace(KERNEL, name="x_finish", counts=counts)
    ranges = {kernel.key: rules.Range(64, 64, 0, NVCC)}
    assert rules.failures(kernel, ranges) == []
    assert rules.failures(replace(kernel, local_bytes=8), ranges)


def test_recording_replaces_what_was_compiled_and_nothing_else(tmp_path):
    other, gone = replace(KERNEL, op="y"), replace(KERNEL, name="gone")
    before = rules.record({}, [KERNEL, other, gone], widen=False)
    after = rules.record(before, [replace(KERNEL, registers=80)], widen=False)
    assert after == {KERNEL.key: rules.Range(80, 80, 0, NVCC), other.key: rules.Range(64, 64, 0, NVCC)}
    shared = replace(KERNEL, name="shared_gradient", shared=True)
    kept = rules.record(before, [shared], widen=False)
    assert kept == {**before, shared.key: rules.range_of(shared)}
    widened = rules.record(before, [replace(KERNEL, registers=80, compiler="12.9")], widen=True)
    assert widened[KERNEL.key] == rules.Range(64, 80, 0, NVCC | {"12.9"}) and gone.key in widened
    rules.write_ranges(tmp_path / "ranges.csv", widened)
    assert rules.read_ranges(tmp_path / "ranges.csv") == widened


def test_recorded_ranges_name_kernels_that_exist():
    sources = {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    modules = {path.stem for path in (ROOT / "kdkernels" / "triton").glob("*.py")}
    for op, _, backend, *_ in rules.read_ranges(RECORDED):
        assert op in (sources if backend == "cuda" else modules), f"{op}: run compile_gates.py --record"


# The kernels.


def judge(op: str, arch: str) -> list[rules.Kernel]:
    """A file's kernels, every one of which passes."""
    why = cuda.obstacle()
    if why:
        pytest.skip(why)
    ranges = rules.read_ranges(RECORDED)
    kernels = list(cuda.kernels(op, arch, print))
    failed = {" ".join(kernel.key): found for kernel in kernels if (found := rules.failures(kernel, ranges))}
    assert not failed
    return kernels


@pytest.mark.parametrize("op", ["masked_mse", "kl_rows"])
def test_cuda_kernels(op):
    assert judge(op, "90")


@pytest.mark.slow
@pytest.mark.parametrize("arch", cuda.ARCHITECTURES)
@pytest.mark.parametrize("op", cuda.ops())
def test_cuda_kernels_everywhere(op, arch):
    judge(op, arch)


def judge_triton(*arguments: str) -> None:
    """In a process of its own, as this one may have imported Triton with its interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    command = [sys.executable, str(BENCHMARKS / "compile_gates.py"), "--backend", "triton", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def test_triton_kernels():
    judge_triton("--arch", "90", "--pairs", "bf16/bf16", "--only", "masked_mse")


@pytest.mark.slow
@pytest.mark.parametrize("arch", triton_kernels.ARCHITECTURES)
def test_triton_kernels_everywhere(arch):
    judge_triton("--arch", arch)
