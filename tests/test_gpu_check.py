"""benchmarks/gpu_check.sh without a GPU: its stages and marks, with a stub for Python."""

from __future__ import annotations

import os
import subprocess

import pytest
from benchmark_rows import FOLDER

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="benchmarks/ is not beside these tests")


def test_gpu_check_resumes(tmp_path):
    """A stage that passed is marked and not run again; one that failed is run again, and the status says so."""

    def check(python: str, *stages: str) -> subprocess.CompletedProcess:
        command = ["bash", str(FOLDER / "gpu_check.sh"), str(tmp_path / "results"), *stages]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHON": python})

    assert check("true", "gpu").returncode == 0
    failed = check("false", "gpu", "bench")
    assert failed.returncode == 1 and "gpu: passed before" in failed.stdout and "bench: FAILED" in failed.stdout
    assert check("true", "gpu", "bench").returncode == 0


def test_gpu_check_measures_each_loss_once(tmp_path):
    """What failed, or found no time, is left for the next call; what passed is not measured again."""
    python, log, status = tmp_path / "python", tmp_path / "log", tmp_path / "status"
    python.write_text(
        "#!/bin/sh\n"
        "if [ $1 = -c ]; then printf 'pearson float32\\nmasks float32\\n'; exit; fi\n"
        f"echo $2 >> {log}\n"
        f"[ $2 = pearson ] || exit $(cat {status})\n"
    )
    python.chmod(0o755)

    def check(masks: int, seconds: int) -> tuple[int, list[str]]:
        log.write_text("")
        status.write_text(str(masks))
        environment = {**os.environ, "PYTHON": str(python), "KDKERNELS_GPU_CHECK_SECONDS": str(seconds)}
        command = ["bash", str(FOLDER / "gpu_check.sh"), str(tmp_path / "results"), "bench"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        return done.returncode, log.read_text().split()

    assert check(0, seconds=60) == (1, [])
    assert check(1, seconds=500) == (1, ["pearson", "masks"])
    assert check(0, seconds=500) == (0, ["masks"])
    assert check(0, seconds=500) == (0, [])
