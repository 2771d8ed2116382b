"""Statistics over data-parallel ranks: two gloo processes against one process with the joined batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdkernels as kd
from kdkernels.losses import sharded

HERE = Path(__file__).resolve().parent

# What each rank runs: every case, on its share of the pictures and rows.
RANK = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch, torch.distributed as dist
import kdkernels as kd
from test_sharded import CASES, case, part, run
dist.init_process_group("gloo")
rank, ranks, found = dist.get_rank(), dist.get_world_size(), {}
for name in CASES:
    terms, given, cuts = case(name)
    objective = kd.DetectionDistillationLoss(**terms, process_group=dist.group.WORLD)
    told, grads = run(objective, part(given, cuts, rank))
    every = [None] * ranks
    # What DistributedDataParallel's mean keeps of a rank's own inputs, which other ranks do not have.
    dist.all_gather_object(every, (told, [None if g is None else g / ranks for g in grads]))
    found[name] = every
if rank == 0:
    torch.save(found, sys.argv[2])
dist.barrier()
os._exit(0)  # gloo's threads may end a process that waits for them with an abort
"""

_ALL = {
    "masked_mse": {"foreground_weight": 3.0, "loss_weight": 2.0},
    "pearson": {"loss_weight": torch.tensor(5.0)},
    "decoupled_kl": {"foreground_temperature": 2.0, "loss_weight": 0.5},
    "temperature_kl": {"temperature": 3.0},
    "soft_cross_entropy": {"hard_weight": 0.4},
    "binary_kl": {"temperature": 2.0, "reduction": "mean"},
    "bounded_regression": {"bound_weight": 0.8},
}
_LEVELS = {
    "masked_mse": {"normalizer": "pixels", "level_reduction": "sum"},
    "pearson": {"level_reduction": "mean", "levels": [1], "on_constant": "reference"},
}
_SUMS = {
    "temperature_kl": {"reduction": "sum"},
    "binary_kl": {"avg_factor": 11.0},
    "decoupled_kl": {"reduction": "sum"},
}
# Name -> (terms, pictures of rank 0, rows of rank 0, dtype).
CASES = {
    "all": (_ALL, 2, 15, torch.float32),
    "unequal shares": (_ALL, 1, 7, torch.float32),
    "a rank without anything": (_ALL, 0, 0, torch.float32),
    "bfloat16": (_ALL, 3, 20, torch.bfloat16),
    "float64": (_ALL, 3, 20, torch.float64),
    "pixels, mean of levels": (_LEVELS, 1, 7, torch.float32),
    "pictures": ({"masked_mse": {"normalizer": "batch", "background_weight": 0.0}}, 1, 7, torch.float32),
    "sums and averages": (_SUMS, 1, 7, torch.float32),
}
_PICTURES, _ROWS = 4, 30
STUDENTS = ("student_features", "student_logits", "student_deltas")


def case(name):
    """The terms, the joined batch, and where it is cut."""
    terms, pictures, rows, dtype = CASES[name]
    generator = torch.Generator().manual_seed(7)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    shapes = [(_PICTURES, 5, 9, 11), (_PICTURES, 5, 4, 6)]
    target = torch.randint(0, 9, (_ROWS,), generator=generator)
    target[::4] = -100
    given = {
        "student_features": [normal(*s) + 1 for s in shapes],
        "teacher_features": [2 * normal(*s) - 3 for s in shapes],
        "masks": [(torch.rand(s[0], *s[2:], generator=generator) < 0.3).float() for s in shapes],
        "student_logits": normal(_ROWS, 9),
        "teacher_logits": normal(_ROWS, 9),
        "foreground": torch.rand(_ROWS, generator=generator) < 0.3,
        "target": target,
        "row_weight": torch.rand(_ROWS, generator=generator) + 0.5,
        "student_deltas": normal(_ROWS, 4),
        "teacher_deltas": normal(_ROWS, 4),
        "target_deltas": normal(_ROWS, 4),
    }
    given["student_features"][1][:, 0] = 0.25  # a channel without variation
    return terms, given, (pictures, rows)


def part(given, cuts, rank):
    """A rank's pictures and rows."""

    def cut(x, at):
        return x[:at] if rank == 0 else x[at:]

    return {k: [cut(v, cuts[0]) for v in x] if isinstance(x, list) else cut(x, cuts[1]) for k, x in given.items()}


def run(objective, given):
    """All that the result tells, as numbers, and the student's gradients."""
    given, leaves = dict(given), []
    for name in STUDENTS:
        fresh = [v.clone().requires_grad_() for v in (given[name] if isinstance(given[name], list) else [given[name]])]
        leaves += fresh
        given[name] = fresh if isinstance(given[name], list) else fresh[0]
    result = objective(**given)
    told = {"total": result.total, **result.terms, **result.details}
    return {k: v.item() for k, v in told.items()}, torch.autograd.grad(result.total, leaves, allow_unused=True)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes found in every case."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    target = tmp_path_factory.mktemp("ranks") / "found.pt"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(HERE), str(target)],
            env={**environment, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [p.communicate(timeout=240)[1] for p in processes]
    assert all(p.returncode == 0 for p in processes), "\n".join(errors)
    return torch.load(target)


@pytest.mark.parametrize("name", CASES)
def test_ranks_equal_the_joined_batch(ranks, name):
    terms, given, _ = case(name)
    told, grads = run(kd.DetectionDistillationLoss(**terms), given)
    (first, own_0), (second, own_1) = ranks[name]
    assert first == second  # the same bits on every rank
    assert set(first) == set(told)
    # Weights and divisors are float32 scalars whatever the inputs are.
    single = torch.finfo(torch.float32).eps
    for key, number in told.items():
        assert first[key] == pytest.approx(number, rel=16 * single, abs=1e-12), key
    limit = 8 * max(torch.finfo(CASES[name][3]).eps, single)
    for whole, a, b in zip(grads, own_0, own_1, strict=True):
        if whole is None:
            assert a is None and b is None
            continue
        found = torch.cat([a, b])
        assert found.shape == whole.shape
        assert (found.double() - whole.double()).abs().max() <= limit * whole.double().abs().max()
    assert any(g is not None and g.any() for g in grads)


def test_a_batch_gate_is_refused():
    """Its means would be of one rank's rows."""
    _, given, _ = case("all")
    given = {**dict.fromkeys(("delta_weight", "boxes", "strides")), **given}
    with pytest.raises(ValueError, match="gate='batch'"):
        sharded.parts({"bounded_regression": {"gate": "batch", "loss_weight": 1.0}}, given, None)
