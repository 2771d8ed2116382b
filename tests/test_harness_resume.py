"""Runs that were stopped or killed go on, and end in the same bits as if they had not been."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")

from runs_parts import COMPARE, ROWS, TINY, child, leader, moments, processes_context, steps, weights

from kdkernels.harness import checkpoint, data, evaluate, loop, progress, train, update
from kdkernels.harness.checkpoint import Checkpoints
from kdkernels.harness.settings import SceneSettings
from kdkernels.harness.state import random_state, set_random_state


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A comparison that nothing disturbs: its folder, and its teachers."""
    folder = tmp_path_factory.mktemp("whole")
    argv = [*COMPARE, "--output-dir", str(folder / "out"), "--teacher-cache", str(folder / "cache")]
    assert train.main(argv) == 0
    return folder


def same(out, whole):
    wanted, found = weights(whole / "out"), weights(out)
    assert found.keys() == wanted.keys() and len(found) > 50
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert steps(out) == steps(whole / "out"), "every step once, in order, with the same losses"
    assert {path.name for path in out.iterdir()} == {path.name for path in (whole / "out").iterdir()}


# --- a whole run


def stop_after(monkeypatch, places):
    """SIGTERM after the steps (run, step) of ``places``, once in an evaluation if ("evaluation", 0) is among them, and
    while the pictures of a training's step are read if ("reading", step) is.
    """
    left, record = list(places), progress.Progress.record

    def recorded(self, **entry):
        record(self, **entry)
        if entry["kind"] == "step" and (entry["run"], entry["step"]) in left:
            left.remove((entry["run"], entry["step"]))
            os.kill(os.getpid(), signal.SIGTERM)

    score = evaluate.Evaluator.__call__

    def scored(self, detector):
        if ("evaluation", 0) in left:
            left.remove(("evaluation", 0))
            os.kill(os.getpid(), signal.SIGTERM)
        return score(self, detector)

    batches = loop._steps

    def read(*args):
        for number, found in enumerate(batches(*args)):
            if ("reading", number) in left:
                left.remove(("reading", number))
                os.kill(os.getpid(), signal.SIGTERM)
            yield found

    monkeypatch.setattr(loop, "_steps", read)
    monkeypatch.setattr(progress.Progress, "record", recorded)
    monkeypatch.setattr(evaluate.Evaluator, "__call__", scored)
    return left


def test_a_run_stopped_by_sigterm_says_how_to_go_on_and_ends_in_the_same_bits(whole, tmp_path, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    left = stop_after(monkeypatch, [("evaluation", 0), ("teacher", 1), ("none", 4), (ROWS[1], 1), (ROWS[2], 3)])
    left.append(("reading", 2))  # the third step of "none": done, and then the run is stopped
    out = tmp_path / "out"
    argv = [*COMPARE, "--output-dir", str(out), "--teacher-cache", str(tmp_path / "cache")]
    # Without checkpoints in between: each stop writes its own.
    argv[argv.index("--checkpoint-every") + 1] = "0"
    codes = [train.main(argv)]
    said = capsys.readouterr().err.splitlines()[-1]
    assert "stopped by SIGTERM" in said and said.endswith(f"python -m kdkernels train --resume {out}")
    while codes[-1] == 143 and len(codes) < 9:
        codes.append(train.main(["--resume", str(out)]))
    assert codes == [143] * 6 + [0] and not left
    assert signal.getsignal(signal.SIGTERM) is before
    assert "going on after step 1/2" in capsys.readouterr().err
    same(out, whole)
    assert train.main(["--resume", str(out)]) == 2
    assert "its run is finished" in capsys.readouterr().err


def test_schedules_scaler_and_unlabelled_pictures_go_on_as_well(tmp_path, monkeypatch):
    scenes = data.ScenePictures(SceneSettings(image_size=64, side=(16, 30), train=5, val=1), "train")
    data.write_coco_folder(tmp_path / "more", "train", scenes)
    recipe = "soft-labels"
    how = ["--steps", "4", "--opt", "sgd", "--accum-steps", "2", "--lr-scheduler", "multisteplr", "--lr-steps", "3s"]
    how += ["--amp", "bfloat16", "--kd-start", "1", "--kd-warmup", "3", "--compare", recipe, "--lr", "0.01"]
    how += ["--unlabeled-path", str(tmp_path / "more" / "train2017"), "--teacher-cache"]
    assert train.main([*TINY, *how, str(tmp_path / "cache"), "--output-dir", str(tmp_path / "out")]) == 0
    stop_after(monkeypatch, [(recipe, 2), (recipe, 3)])
    assert train.main([*TINY, *how, str(tmp_path / "c2"), "--output-dir", str(tmp_path / "again")]) == 143
    assert [train.main(["--resume", str(tmp_path / "again")]) for _ in range(2)] == [143, 0]
    same(tmp_path / "again", tmp_path)
    assert [told["distill/soft-labels/rpn_boxes"] > 0 for *_, told in steps(tmp_path / "out")[3:]] == [True] * 3


def killed(tmp_path, ways):
    """Run the comparison until it is through, killed on the way; returns how often it was."""
    context = processes_context()
    out = tmp_path / "out"
    argv = [*COMPARE, "--output-dir", str(out), "--teacher-cache", str(tmp_path / "cache")]
    deaths = 0
    for how, after in [*ways, ("never", 0)]:
        resumable = (out / "checkpoints" / "job.json").exists()
        if not resumable and out.exists():
            assert not list(out.glob("checkpoints/*/*")), "nothing was lost"
            shutil.rmtree(out)
        process = context.Process(target=child, args=(["--resume", str(out)] if resumable else argv, how, after))
        process.start()
        process.join(120)
        assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
        if process.exitcode == 0:
            break
        deaths += 1
    assert process.exitcode == 0
    return deaths


def test_a_killed_run_ends_in_the_same_bits(whole, tmp_path):
    """In the middle of a checkpoint's content, before it has its name, after a step."""
    assert killed(tmp_path, [("write", 3), ("rename", 9), ("record", 4)]) == 3
    same(tmp_path / "out", whole)
    assert not list((tmp_path / "out").rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_kills_at_random_moments_change_nothing(whole, tmp_path, seed):
    begin = time.monotonic()
    assert killed(tmp_path / "first", []) == 0
    longest = time.monotonic() - begin
    deaths = killed(tmp_path, moments(9, longest, seed))
    assert deaths >= 5, "or too little was tried"
    same(tmp_path / "out", whole)


@pytest.mark.slow
def test_the_main_job_keeps_to_what_it_decided(tmp_path, monkeypatch):
    """The steps at equal time follow from measured seconds, which are others the next time."""
    argv = [*TINY, "--steps", "2", "--output-dir", str(tmp_path / "out"), "--teacher-cache", str(tmp_path / "cache")]
    stop_after(monkeypatch, [("alone, equal time", 1)])
    assert train.main(argv) == 143
    decided = json.loads((tmp_path / "out" / "checkpoints" / "job.json").read_text())["decided"]["parts"]
    monkeypatch.setattr("kdkernels.harness.split.measure", lambda *a, **k: pytest.fail("measured again"))
    assert train.main(["--resume", str(tmp_path / "out")]) == 0
    ratio = decided["distilled"] / decided["alone"]
    longest = [step for run, step, *_ in steps(tmp_path / "out") if run == "alone, equal time"]
    assert longest == list(range(1, max(2, round(2 * ratio)) + 1))
    again = ["--weights", str(tmp_path / "out" / "students" / "distilled.safetensors"), "--test-only"]
    assert train.main([*TINY, *again]) == 0, "what was exported is loaded"


# --- what is refused


def stopped(tmp_path, monkeypatch):
    out = tmp_path / "out"
    argv = [*TINY, "--steps", "2", "--compare", "none", "--output-dir", str(out), "--teacher-cache", str(tmp_path)]
    stop_after(monkeypatch, [("none", 1)])
    assert train.main(argv) == 143
    return out


def test_another_runs_settings_are_refused_and_named(tmp_path, monkeypatch, capsys):
    out = stopped(tmp_path, monkeypatch)
    assert train.main(["--resume", str(out), "--lr", "0.5", "--seed", "3"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert str(out) in said and "training.lr was 0.002 and is 0.5" in said and "training.seed was 0 and is 3" in said
    assert train.main(["--resume", str(out), "--output-dir", str(tmp_path / "other")]) == 2
    assert "--output-dir" in capsys.readouterr().err.splitlines()[-1]
    assert train.main([*TINY, "--output-dir", str(out)]) == 2
    assert "--resume" in capsys.readouterr().err.splitlines()[-1]
    for folder in (out, out / "checkpoints", next((out / "checkpoints").glob("none-*"))):
        (folder / ".what-a-kill-leaves.tmp").write_bytes(b"half")
    job = out / "checkpoints" / "job.json"
    text = job.read_text()
    for broken in ("", text[: len(text) // 2], "{}", "[]"):
        job.write_text(broken)
        assert train.main(["--resume", str(out)]) == 2
        assert f"argument --resume: {job} cannot be read" in capsys.readouterr().err.splitlines()[-1]
    job.write_text(text)
    assert train.main(["--resume", str(out), "--print-freq", "1", "--checkpoint-every", "7"]) == 0
    assert not list(out.rglob(".*"))
    assert train.main(["--resume", str(tmp_path / "nowhere")]) == 2


@pytest.mark.parametrize("how", ["empty", "truncated", "changed", "foreign", "no checkpoint", "code"])
def test_a_bad_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, how):
    said = []
    kept = Checkpoints(tmp_path, "mine", said.append)
    for step in (1, 2, 3):
        kept.save(step, {"x": torch.full((1000,), float(step)), "list": [1, None, 0.5]})
    newest, before = kept.files()
    assert kept.newest().step == 3 and not said, "the last two are kept"
    content = newest.read_bytes()
    if how == "empty":
        newest.write_bytes(b"")
    elif how == "truncated":
        newest.write_bytes(content[: len(content) // 2])
    elif how == "changed":
        newest.write_bytes(content[:1500] + bytes([content[1500] ^ 1]) + content[1501:])
    elif how == "foreign":
        newest.unlink()
        newest = Checkpoints(tmp_path, "another's", said.append, keep=9).save(3, {"x": torch.zeros(1)})
    else:
        other = torch.tensor(1) if how == "no checkpoint" else {"x": os.system}
        torch.save(other, newest)
        newest = newest.rename(newest.with_name(f"step-000000003-{checkpoint._hash(newest)}.pt"))
    again = Checkpoints(tmp_path, "mine", said.append)
    found = again.newest()
    assert (found.path, found.step) == (before, 2) and torch.equal(found.state["x"], torch.full((1000,), 2.0))
    (line,) = said
    assert str(newest) in line and line.endswith("taking the one before")
    again.save(3, {"x": torch.zeros(1)})
    assert again.files()[-1] == before or before in again.files(), "what was refused is none of the two that are kept"


def test_random_states_come_back_from_a_file(tmp_path):
    random.gauss(0, 1)  # leaves one in store
    torch.save(random_state(), tmp_path / "state.pt")
    first = (torch.rand(3), np.random.rand(3), random.random(), random.gauss(0, 1))
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    again = (torch.rand(3), np.random.rand(3), random.random(), random.gauss(0, 1))
    assert torch.equal(first[0], again[0]) and (first[1] == again[1]).all() and first[2:] == again[2:]


def test_a_folder_in_use_is_refused(tmp_path, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")
    out = stopped(tmp_path, monkeypatch)
    with (out / "checkpoints" / "lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert train.main(["--resume", str(out)]) == 2
        assert "is being written by another process" in capsys.readouterr().err.splitlines()[-1]
    assert train.main(["--resume", str(out)]) == 0


def test_a_full_disk_costs_checkpoints_and_not_the_training(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpoints, "save", full)
    argv = [*TINY, "--steps", "2", "--compare", "none", "--teacher-cache", str(tmp_path)]
    assert train.main([*argv, "--output-dir", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert "warning: none: no checkpoint of step 2 could be written: [Errno 28]" in said


@pytest.mark.slow
def test_a_signal_to_all_processes_of_a_job_leaves_the_readers_alive(tmp_path):
    """As batch systems send it; workers that died of it would end the run without a checkpoint."""
    out = tmp_path / "out"
    argv = [*TINY, "--steps", "4", "--compare", "none", "--workers", "2", "--accum-steps", "4"]
    argv += ["--teacher-cache", str(tmp_path / "cache"), "--output-dir", str(out)]
    process = processes_context().Process(target=leader, args=(argv,))
    process.start()
    end = time.monotonic() + 100
    metrics = out / "metrics.jsonl"
    while time.monotonic() < end and not (metrics.exists() and '"run": "none"' in metrics.read_text()):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    process.join(100)
    assert process.exitcode == 143
    assert list(out.glob("checkpoints/none-*/step-*")), "of the step in progress"
    assert train.main(["--resume", str(out)]) == 0


# --- losses that are not finite


def poisoned(monkeypatch, at, value=math.nan):
    """Of the student "distilled", losses of the steps ``at`` are ``value``."""
    from kdkernels.harness import job

    make = job.distilled

    def distilled(*args, **keywords):
        objective = make(*args, **keywords)

        def spoiled(images, targets, index):
            losses = objective(images, targets, index)
            if index + 1 in at:
                losses.summed["task/loss_classifier"] = losses.summed["task/loss_classifier"] * value
            return losses

        return spoiled

    monkeypatch.setattr(job, "distilled", distilled)


def test_a_loss_that_is_not_finite_is_blamed_on_its_term_and_pictures(tmp_path, monkeypatch, capsys):
    poisoned(monkeypatch, {2})
    argv = [*TINY, "--steps", "3", "--compare", "pkd", "--teacher-cache", str(tmp_path), "--output-dir"]
    assert train.main([*argv, str(tmp_path / "stop")]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "pkd: the loss is nan at step 2: task/loss_classifier is nan; image ids " in said
    assert f"--resume {tmp_path / 'stop'}" in said

    assert train.main([*argv, str(tmp_path / "skip"), "--on-nan", "skip"]) == 0
    assert "pkd: 1 of 3 steps were skipped" in capsys.readouterr().err
    assert all(bool(torch.isfinite(x).all()) for x in weights(tmp_path / "skip").values())
    lines = map(json.loads, (tmp_path / "skip" / "metrics.jsonl").read_text().splitlines())
    assert [e.get("skipped", False) for e in lines if e.get("run") == "pkd" and e["kind"] == "step"] == [
        False, True, False
    ]  # fmt: skip


def test_steps_that_all_fail_end_the_run_even_when_they_may_be_skipped(tmp_path, monkeypatch, capsys):
    poisoned(monkeypatch, set(range(1, 9)), math.inf)
    monkeypatch.setattr(update, "MOST_SKIPPED", 2)
    argv = [*TINY, "--steps", "4", "--compare", "pkd", "--teacher-cache", str(tmp_path), "--on-nan", "skip"]
    assert train.main([*argv, "--output-dir", str(tmp_path / "out")]) == 1
    assert "at step 3" in capsys.readouterr().err.splitlines()[-1]
