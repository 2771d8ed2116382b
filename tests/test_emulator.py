"""The emulator itself: it finds what it promises to find. Then the kernels in it: no result depends on the order in
which threads run, nor on the architecture, and the sanitizers find nothing."""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys
from pathlib import Path

import emulator_library
import pytest
import torch
from losses import LOSSES, SIZES, loss_and_gradients
from numerics import check

import kdkernels as kd
from kdkernels.native import build as builder

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU here, not in the emulator")
EMULATED = pytest.mark.parametrize("backend", ["cuda"], indirect=True)


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    """Runs one kernel of emulator/probe.cu: (what the launch said, its output)."""
    target = tmp_path_factory.mktemp("probe") / "probe.so"
    sources = [emulator_library.FOLDER / "probe.cu", emulator_library.FOLDER / "emulator.cpp"]
    words = [
        *builder.compiler(),
        *emulator_library.FLAGS,
        "-shared",
        "-x",
        "c++",
        *map(str, sources),
        "-o",
        str(target),
    ]
    subprocess.run(words, check=True)
    library = ctypes.CDLL(str(target))
    library.probe.restype = ctypes.c_char_p
    library.probe.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    library.half_as_float.restype, library.half_as_float.argtypes = ctypes.c_float, [ctypes.c_uint16]
    for name in ("float_as_half", "float_as_bfloat16"):
        getattr(library, name).restype, getattr(library, name).argtypes = ctypes.c_uint16, [ctypes.c_float]

    def run(name: str, blocks: int = 1, cluster: int = 1, seed: int = 0):
        library.kdkernels_emulator_seed(ctypes.c_uint64(seed))
        out = torch.zeros(1024)
        said = library.probe(name.encode(), out.data_ptr(), blocks, cluster)
        return said.decode() if said else None, out

    run.library = library
    return run


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing_barrier", "barrier divergence"),
        ("barrier_and_shuffle", "barrier divergence"),  # the first warp ends while the second waits for all
        ("half_a_warp_shuffles", "barrier divergence"),
        ("lanes_shuffle_differently", "shuffle differently"),
        ("misaligned_load", "16-byte load"),
        ("misaligned_store", "16-byte store"),
        ("peer_outside", "outside shared memory"),
        ("no_such_peer", "no block of rank 7"),
    ],
)
def test_misbehaviour_is_reported(name, said, seed, probe):
    got, _ = probe(name, seed=seed)
    assert got is not None and said in got


def test_a_launch_after_an_error_is_sound(probe):
    assert probe("missing_barrier")[0]
    said, out = probe("block_total")
    assert said is None and out[0] == 63 * 32 and out[1] == 64


def test_shared_memory_is_poisoned(probe):
    said, out = probe("unwritten_shared_memory")
    assert said is None and out[:64].isnan().all()


def test_the_seed_permutes_threads(probe):
    orders = [tuple(probe("race", seed=seed)[1][1:65].tolist()) for seed in range(3)]
    assert orders[0] == tuple(range(64)) and len(set(orders)) == 3
    assert all(sorted(order) == list(range(64)) for order in orders)


def test_clusters_see_each_other(probe):
    said, out = probe("cluster_ring", blocks=8, cluster=4)
    assert said is None
    expected = [100 * ((rank + 1) % 4) + thread for _ in range(2) for rank in range(4) for thread in range(64)]
    assert out[:512].tolist() == expected


def test_launches_that_a_gpu_refuses(probe):
    assert "cluster" in probe("cluster_ring", blocks=6, cluster=4)[0]
    probe.library.kdkernels_emulator_capability(80)
    try:
        assert "9.0" in probe("cluster_ring", blocks=4, cluster=4)[0]
    finally:
        probe.library.kdkernels_emulator_capability(90)


def test_16_bit_conversions(probe):
    """Every half is itself, and floats on and beside each rounding boundary go where PyTorch puts them."""
    halves = torch.arange(65536).to(torch.uint16).view(torch.float16)
    values = halves.float()
    for bits in range(0, 65536, 7):
        got = probe.library.half_as_float(bits)
        assert got == values[bits] or (math.isnan(got) and values[bits].isnan())
    middles = torch.cat([(values[:-1] + values[1:]) / 2, torch.randn(2000) * 1e-5, torch.randn(2000) * 1e38])
    middles = middles[~middles.isnan()]
    sample = torch.cat(
        [middles[::31], middles[::37].nextafter(torch.tensor(math.inf)), torch.tensor([65519.0, 65520.0])]
    )
    for name, dtype in (("float_as_half", torch.float16), ("float_as_bfloat16", torch.bfloat16)):
        expected = sample.to(dtype).view(torch.int16).tolist()
        for x, bits in zip(sample.tolist(), expected):
            assert getattr(probe.library, name)(x) == bits & 0xFFFF, x


@pytest.fixture
def seeded():
    """Sets the seed of the order of threads; restored afterwards."""
    library = emulator_library.load()
    yield library.kdkernels_emulator_seed
    library.kdkernels_emulator_seed(0)


@NO_GPU
@EMULATED
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_threads_changes_nothing(name, size, backend, seeded):
    """A race would change bits."""
    inputs = LOSSES[name].inputs(size)
    loss, grads = loss_and_gradients(inputs)
    for seed in (1, 2, 3):
        seeded(seed)
        again, grads_again = loss_and_gradients(inputs)
        assert torch.equal(loss, again)
        assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))


WIDE = {
    "temperature_kl": lambda s, t, **k: kd.temperature_kl_loss(s, t, temperature=2.0, **k),
    "decoupled_kl": lambda s, t, **k: kd.decoupled_kl_loss(s, t, torch.arange(len(s)) % 2 == 0, **k),
    "soft_cross_entropy": lambda s, t, **k: kd.soft_cross_entropy_loss(s, t, temperature=2.0, **k),
    "binary_kl": lambda s, t, **k: kd.binary_kl_loss(s, t, **k),
}


@NO_GPU
@EMULATED
@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_rows_with_and_without_clusters(name, capability, dtype, backend):
    library = emulator_library.load()
    library.kdkernels_emulator_capability(capability)
    try:
        for rows, columns in ((2, 40001), (1, 131072)):
            s, t = torch.randn(rows, columns).mul(3).to(dtype), torch.randn(rows, columns).mul(3).to(dtype)
            check(WIDE[name], s, t, length=rows * columns)
            near = (t.float() * (1 + 0.01 * torch.randn(rows, columns))).to(dtype)
            check(WIDE[name], near, t, length=rows * columns)
    finally:
        library.kdkernels_emulator_capability(90)


@NO_GPU
@EMULATED
@pytest.mark.parametrize("name", [*WIDE, "pearson"])
def test_code_without_clusters_on_a_gpu_that_has_them(name, backend):
    """A driver may translate the PTX of an older architecture: no kernel may then count on clusters."""
    library = emulator_library.load()
    library.kdkernels_emulator_code(80)
    try:
        if name == "pearson":
            check(kd.pearson_loss, torch.randn(2, 70, 9, 15), torch.randn(2, 70, 9, 15), length=18900)
        else:
            check(WIDE[name], torch.randn(2, 40001).mul(3), torch.randn(2, 40001).mul(3), length=80002)
    finally:
        library.kdkernels_emulator_code(0)


@NO_GPU
@EMULATED
@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("shape", [(3, 3001), (2, 20011)])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_thread_order_of_rows_that_are_read_twice(name, shape, reduction, backend, seeded):
    """Rows of a block, and of a cluster, whose sides are close: two exchanges follow each other. Without a reduction
    nothing but the last barrier keeps a block of a cluster from ending while others read what it has.
    """
    teacher = torch.randn(shape)
    student = (teacher * (1 + 0.01 * torch.randn(shape))).requires_grad_()
    found = []
    for seed in range(5):
        seeded(seed)
        loss = WIDE[name](student, teacher, reduction=reduction)
        found.append((loss.detach(), *torch.autograd.grad(loss.sum(), student)))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


def _sanitized(*arguments: str) -> subprocess.CompletedProcess:
    cxx = builder.compiler()
    runtimes = []
    for name in ("libasan.so", "libubsan.so"):
        found = subprocess.run([*cxx, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        if not Path(found).is_absolute():
            pytest.skip(f"no {name}")
        runtimes.append(found)
    emulator_library.build(sanitize=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "KDKERNELS_EMULATOR_SANITIZE": "1",
    }
    tests = Path(__file__).resolve().parent
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=tests.parent, env=environment, capture_output=True, text=True)


FILES = [*(f"tests/test_{name}.py" for name in LOSSES), "tests/test_joint_pass.py", "tests/test_joint_boxes.py"]


@NO_GPU
def test_the_sanitizers_find_nothing_in_a_short_list():
    """Odd alignments and shapes of each loss, and of all together, in a process with the sanitizers' runtime."""
    names = "misaligned or 3x17 or 77x81 or pyramid or 3x7x5x11 or 13x17 or every or golden"
    together = "test_rows_that_do_not_follow_each_other or test_empty_heads or test_equals_masks or several_tiles"
    run = _sanitized(*FILES, "-k", f"cuda and (test_error_bound and ({names}) or {together})")
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-6000:]


@pytest.mark.slow
@NO_GPU
def test_the_sanitizers_find_nothing_in_the_grid():
    run = _sanitized(*FILES, "-k", "cuda")
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-6000:]
