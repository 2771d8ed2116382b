"""Training in several processes: what they compute together is what one would with the joined batch."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")
if not torch.distributed.is_available():
    pytest.skip("torch is built without distributed", allow_module_level=True)

from harness_parts import batch, detector
from runs_parts import ROWS, TINY, steps, together, weights

from kdkernels.harness import FrozenTeacher, data, train
from kdkernels.harness.distill import Distillation
from kdkernels.harness.processes import Shared, join
from kdkernels.harness.recipes import Setup, parse
from kdkernels.harness.update import Losses

#: With adapters, statistics, divisors by mask and by row: the objective's, global; and those that are each rank's own.
GLOBAL = ("pkd:adapter=true", "defeat:adapter=true", "tadf:adapter=true", "combined")
OWN = ("hinton", "cwd:adapter=true")


def objective_of(texts, group=None):
    """A student, and an objective that is its distillation alone, with BatchNorm's statistics fixed."""
    student, teacher = detector(seed=1).eval(), detector(seed=2)
    recipes = [parse(text).build(Setup(student, teacher)) for text in texts]
    torch.manual_seed(3)
    for recipe in recipes:
        for parameter in recipe.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    distillation = Distillation(recipes, FrozenTeacher(teacher), base_size=16.0, limit=16, process_group=group)

    def objective(images, targets, index):
        found = distillation(distillation.step(student, images, targets, index))
        return Losses({"distill": found.total}, found.terms)

    return student, distillation, objective


def measured(student, distillation, objective, images, targets):
    losses = objective(images, targets, 0)
    losses.summed["distill"].backward()
    gradients = {
        f"{owner}.{name}": parameter.grad
        for owner, module in (("student", student), ("distillation", distillation))
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    return {name: x.detach() for name, x in losses.told.items()}, gradients


def share(rank, folder):
    """One of two processes; half of the batch."""
    processes = join(torch.device("cpu"), 60)
    images, targets = batch(4)
    found = {}
    for kind, texts in (("global", GLOBAL), ("own", OWN)):
        student, distillation, objective = objective_of(texts, torch.distributed.group.WORLD)
        shared = Shared(objective, student, distillation, torch.device("cpu"))
        mine = slice(2 * rank, 2 * rank + 2)
        found[kind] = measured(student, distillation, shared, images[mine], targets[mine])
    torch.save(found, folder / f"{processes.rank}.pt")
    os._exit(0)


def close(found, wanted):
    assert found.keys() == wanted.keys() and wanted
    largest = max(float(x.abs().max()) for x in wanted.values())
    for name, x in wanted.items():
        # Pearson's loss does not see its adapter's bias: that gradient is rounding alone.
        atol = max(1e-4 * float(x.abs().max()), 1e-6 * largest)
        assert torch.allclose(found[name], x, rtol=1e-3, atol=atol), name


def test_terms_and_gradients_are_those_of_the_joined_batch(tmp_path):
    assert together(share, 2, tmp_path) == [0, 0]
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    images, targets = batch(4)
    wanted = measured(*objective_of(GLOBAL), images, targets)
    for rank in ranks:
        for found, one in zip(rank["global"], wanted, strict=True):
            close(found, one)
    halves = [measured(*objective_of(OWN), images[i : i + 2], targets[i : i + 2]) for i in (0, 2)]
    mean = {name: (halves[0][1][name] + halves[1][1][name]) / 2 for name in halves[0][1]}
    for rank, half in zip(ranks, halves, strict=True):
        close(rank["own"][1], mean)
        name = next(name for name in half[0] if name.startswith("cwd"))
        close({name: rank["own"][0][name]}, {name: half[0][name]})


def test_each_process_takes_its_share_of_the_same_order():
    pictures = data.ScenePictures(data.scenes.SceneSettings(train=10, val=1), "train")

    def ids(*args, **how):
        return [[t["image_id"] for t in targets] for _, targets in data.training_batches(pictures, *args, **how)]

    whole = ids(5, 4, 0)
    shares = [ids(5, 2, 0, share=(rank, 2)) for rank in range(2)]
    assert [a + b for a, b in zip(*shares, strict=True)] == whole
    assert [ids(5, 2, 0, first=3, share=(rank, 2)) for rank in range(2)] == [x[3:] for x in shares]


# --- whole runs


ARGV = [*TINY, "--no-equal-time", "--compare", "none", ROWS[1], "pkd:adapter=true+fitnets:hint_steps=1"]


def whole_run(rank, argv, folder, plan):
    """A run; ``plan`` says which signal this rank sends itself after which step."""
    from kdkernels.harness import loop, update

    fit, step = loop.fit, update.Updates.step

    def stepped(self, batches, number):
        told = step(self, batches, number)
        for who, at, name, what in plan:
            if (who, at, name) == (rank, number, self.name):
                os.kill(os.getpid(), what)
        return told

    def fitted(name, detector, *args, **keywords):
        run = fit(name, detector, *args, **keywords)
        torch.save(detector.state_dict(), folder / f"{name[:4]}-{rank}.pt")
        return run

    update.Updates.step = stepped
    from kdkernels.harness import job

    job.fit = fitted
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os._exit(train.main(argv))


@pytest.mark.slow
def test_a_run_in_two_processes_has_one_student_and_one_record_and_goes_on(tmp_path):
    where = ["--output-dir", str(tmp_path / "out"), "--teacher-cache", str(tmp_path / "cache"), "--steps", "3"]
    plan = [(1, 2, ROWS[1], signal.SIGTERM)]  # one of them is asked, and all stop
    assert together(whole_run, 2, [*ARGV, *where], tmp_path, plan) == [143, 143]
    assert together(whole_run, 2, ["--resume", str(tmp_path / "out")], tmp_path, []) == [0, 0]
    for name in ("none", "defe", "pkd:"):
        mine, other = (torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(2))
        assert len(mine) > 50 and all(torch.equal(mine[key], other[key]) for key in mine)
    told = steps(tmp_path / "out")
    names = ["teacher"] * 2 + [name for name in ("none", *ARGV[-2:]) for _ in range(3)]
    assert [run for run, *_ in told] == names and all(loss == loss and loss < 1e4 for _, _, loss, _ in told)
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"compare.csv", "students", "metrics.jsonl"}


@pytest.mark.slow
def test_a_run_in_two_processes_goes_on_to_the_same_bits(tmp_path):
    found = []
    for name, plan in (("stopped", [(0, 1, ROWS[1], signal.SIGTERM), (1, 2, "none", signal.SIGTERM)]), ("whole", [])):
        out = tmp_path / name
        argv = [*ARGV, "--steps", "3", "--output-dir", str(out), "--teacher-cache", str(tmp_path / f"cache-{name}")]
        codes = together(whole_run, 2, argv, tmp_path, plan)
        while codes == [143, 143]:
            codes = together(whole_run, 2, ["--resume", str(out)], tmp_path, plan[:1])
            plan = []
        assert codes == [0, 0]
        found.append((weights(out), steps(out)))
    (first, told), (again, wanted) = found
    assert told == wanted and first.keys() == again.keys() and len(again) > 100
    assert all(torch.equal(first[key], again[key]) for key in again)


@pytest.mark.slow
def test_a_killed_process_ends_the_run_with_a_message(tmp_path):
    where = ["--output-dir", str(tmp_path / "out"), "--teacher-cache", str(tmp_path / "cache"), "--steps", "3"]
    plan = [(1, 2, "none", signal.SIGKILL)]
    argv = [*ARGV[:-2], *where, "--dist-timeout", "20"]
    assert together(whole_run, 2, argv, tmp_path, plan) == [1, -signal.SIGKILL]
    said = (tmp_path / "err-0.txt").read_text().strip().splitlines()[-1]
    assert "process 0 of 2" in said and f"--resume {tmp_path / 'out'}" in said


def test_a_number_of_processes_belongs_to_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.chdir(tmp_path)
    assert train.main(TINY) == 2
    assert "argument --output-dir" in capsys.readouterr().err
    assert train.main([*TINY, "--grad-report-every", "1"]) == 2
    assert "argument --grad-report-every" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    job = tmp_path / "out" / "checkpoints" / "job.json"
    job.parent.mkdir(parents=True)
    monkeypatch.setenv("WORLD_SIZE", "1")
    content = {"format": 1, "argv": TINY, "made_of": {"processes": 2}, "decided": {}}
    job.write_text(json.dumps(content))
    assert train.main(["--resume", str(tmp_path / "out")]) == 2
    assert "processes was 2 and is 1" in capsys.readouterr().err.splitlines()[-1]
