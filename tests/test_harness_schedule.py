"""Learning rate, optimiser, weight of the distillation, precision and batches of a step: what flags make of a run."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("torchvision")

from harness_parts import batch, detector
from runs_parts import TINY, weights

from kdkernels.harness import FrozenTeacher, flags, loop, train, update
from kdkernels.harness.distill import Distillation, distilled
from kdkernels.harness.evaluate import Score
from kdkernels.harness.progress import Progress
from kdkernels.harness.published import SCHEDULES
from kdkernels.harness.recipes import Setup, parse
from kdkernels.harness.schedule import Length, kd_weight, learning_rate, optimizer_of
from kdkernels.harness.settings import KdSettings, TrainSettings, Upkeep


def options(*argv):
    return flags.parse(flags.parser(), list(argv))


# --- functions of the step


def test_lengths_are_steps_or_epochs():
    assert [Length.parse(text).steps(10) for text in ("7", "7s", "2e", "1.5e", "0")] == [7, 7, 20, 15, 0]
    assert Length.parse("16", epochs=True).steps(10) == 160 and Length.parse("16s", epochs=True).steps(10) == 16
    for text in ("", "e", "x", "-1", "1.5", "nan", "nane", "infe", "1ee"):
        with pytest.raises(ValueError):
            Length.parse(text)


def test_steps_down_after_a_warm_up_from_a_third():
    settings = TrainSettings(
        steps=100, warmup=10, warmup_factor=1 / 3, scheduler="multisteplr", lr_steps=(60, 80), lr_gamma=0.1
    )
    factors = [learning_rate(step, settings) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 3 + 2 / 3 / 10) and factors[9:60] == [pytest.approx(1)] * 51
    assert factors[60:80] == [pytest.approx(0.1)] * 20 and factors[80:] == [pytest.approx(0.01)] * 20
    assert settings.lasting(50).lr_steps == (30, 40), "in proportion"


def test_the_weight_of_distillation():
    settings = KdSettings(start=3, stop=8, warmup=4)
    assert [kd_weight(step, settings) for step in range(10)] == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 0, 0]
    assert {kd_weight(step, KdSettings()) for step in range(10)} == {1.0}


def test_normalisations_may_have_their_own_weight_decay():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1, bias=False), nn.GroupNorm(1, 2))
    outside = nn.Parameter(torch.zeros(1))
    settings = TrainSettings(optimizer="sgd", momentum=0.5, norm_weight_decay=0.0, weight_decay=0.3)
    optimizer = optimizer_of([*net.parameters(), outside], net, settings)
    assert isinstance(optimizer, torch.optim.SGD)
    assert [(len(g["params"]), g["weight_decay"], g["momentum"]) for g in optimizer.param_groups] == [
        (4, 0.3, 0.5), (4, 0.0, 0.5)
    ]  # fmt: skip
    (group,) = optimizer_of(net.parameters(), net, TrainSettings()).param_groups
    assert group["weight_decay"] == 1e-4


# --- the flags


def test_epochs_become_steps_once_the_pictures_are_counted():
    given = options("--epochs", "3", "-b", "4", "--accum-steps", "2", "--kd-start", "1e", "--kd-stop", "2e",
                    "--kd-warmup", "5", "--lr-scheduler", "multisteplr", "--lr-steps", "2", "17s")  # fmt: skip
    found = given.resolved(81)
    assert found.training.steps == 33 and found.training.lr_steps == (17, 22)
    assert found.kd == KdSettings(11, 22, 5)
    assert given.resolved(81, 2).training.steps == 18, "two processes share the pictures"
    with pytest.raises(ValueError, match="--kd-stop"):
        options("--kd-start", "20", "--kd-stop", "20").resolved(81)
    with pytest.raises(ValueError, match="--kd-start"):
        options("--kd-start", "250").resolved(81)


def test_the_default_trains_as_before():
    found = options().resolved(1500)
    assert found.training == TrainSettings() and found.kd == KdSettings()


@pytest.mark.parametrize("name", SCHEDULES)
def test_published_schedules_set_flags_and_flags_that_are_given_win(name):
    found = options("--preset", name).resolved(118_000)
    training = found.training
    assert (training.optimizer, training.momentum, training.weight_decay) == ("sgd", 0.9, 1e-4)
    rounds = 24 if "pkd" in name else 12
    assert training.batch_size == 16 and training.steps == rounds * 7375
    factors = [learning_rate(step, training) for step in (0, 499, training.steps // 2, training.steps - 1)]
    voc = name == "defeat-voc"
    assert factors == pytest.approx([1 / 3 + 2 / 3 / 500, 1, 1, 0.1 if voc else 0.01])
    assert training.lr == (0.01 if voc or "retina" in name else 0.02) and training.clip == (35 if voc else 0)
    assert (found.image_size, found.max_size) == ((608, 1000) if voc else (800, 1333))
    (recipe,) = found.recipes
    weights = {"defeat": (4, 16), "voc": (3, 12)}["voc" if voc else "defeat"]
    assert "pkd" in name or (recipe.options.foreground, recipe.options.background) == weights
    compared = options("--preset", name, "--compare", "none", "pkd")
    assert compared.training.lr == found.training.lr and [row.title for row in compared.compare] == ["none", "pkd"]
    mine = options("--preset", name, "--lr", "0.1", "--steps", "7", "--recipe", "cwd", "--max-size", "900")
    assert mine.training.lr == 0.1 and mine.resolved(118_000).training.steps == 7
    assert mine.recipes[0].text == "cwd" and mine.max_size == 900 and mine.training.batch_size == 16


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        (["--epochs", "0"], "--epochs"),
        (["--epochs", "2", "--steps", "9"], "--epochs"),
        (["--opt", "lion"], "--opt"),
        (["--momentum", "1"], "--momentum"),
        (["--lr-scheduler", "exponentiallr"], "--lr-scheduler"),
        (["--lr-steps", "soon"], "--lr-steps"),
        (["--lr-gamma", "nan"], "--lr-gamma"),
        (["--lr-warmup-steps", "-1"], "--lr-warmup-steps"),
        (["--lr-warmup-decay", "1"], "--lr-warmup-decay"),
        (["--clip-grad-norm", "-1"], "--clip-grad-norm"),
        (["--norm-weight-decay", "-1"], "--norm-weight-decay"),
        (["--accum-steps", "0"], "--accum-steps"),
        (["--kd-start", "late"], "--kd-start"),
        (["--kd-warmup", "-3"], "--kd-warmup"),
        (["--amp", "int8"], "--amp"),
        (["--preset", "mine"], "--preset"),
        (["--on-nan", "hope"], "--on-nan"),
        (["--checkpoint-every", "-1"], "--checkpoint-every"),
        (["--print-freq", "0"], "--print-freq"),
        (["--test-only"], "--test-only"),
        (["--resume", "nowhere"], "--resume"),
    ],
)
def test_bad_input_names_the_flag(argv, flag, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert train.main(argv) == 2
    assert f"argument {flag}" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_a_stop_before_the_start_is_refused_before_anything_is_trained(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main([*TINY, "--kd-start", "2", "--kd-stop", "1"]) == 2
    assert "argument --kd-stop" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


# --- training


class Line(nn.Module):
    """A detector of one weight, as far as the loop asks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Linear(3, 1)

    def objective(self, images, targets, index):
        return update.Losses({"task/mean": (self.line(images.mean((2, 3))) - 1).square().mean()})


class Grey(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.full((3, 32, 32), 20 * index, dtype=torch.uint8), {
            "boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "image_id": index
        }  # fmt: skip


def fitted(tmp_path, name="line", upkeep=None, **settings):
    net = Line()
    progress = Progress(tmp_path / f"{name}.jsonl")
    run = loop.fit(
        name, net, net.objective, Grey(), TrainSettings(steps=6, evaluations=1, **settings),
        parameters=net.parameters(), device=torch.device("cpu"), evaluator=lambda _: Score(0.0, 0.0),
        progress=progress, upkeep=upkeep or Upkeep(),
    )  # fmt: skip
    progress.close()
    return net, run


def test_batches_add_up_to_a_step(tmp_path):
    """The pictures come in the same order, so that 2 x 2 are 4."""
    whole, first = fitted(tmp_path, "whole", batch_size=4)
    parts, second = fitted(tmp_path, "parts", batch_size=2, accumulate=2)
    once, _ = fitted(tmp_path, "once", batch_size=2)
    assert torch.allclose(whole.line.weight, parts.line.weight, rtol=1e-5)
    assert not torch.allclose(whole.line.weight, once.line.weight, rtol=1e-5)
    assert second.task_loss == pytest.approx(first.task_loss, rel=1e-5)


@pytest.mark.parametrize("settings", [{"optimizer": "sgd"}, {"clip": 0.0}, {"amp": "bfloat16"}])
def test_each_setting_changes_the_training(tmp_path, settings):
    usual, _ = fitted(tmp_path, "usual", lr=0.5, clip=1e-4)
    again, _ = fitted(tmp_path, "again", lr=0.5, clip=1e-4)
    changed, run = fitted(tmp_path, "changed", **{"lr": 0.5, "clip": 1e-4, **settings})
    assert torch.equal(usual.line.weight, again.line.weight)
    assert not torch.equal(usual.line.weight, changed.line.weight)
    assert all(map(math.isfinite, run.task_loss))


def test_print_freq_counts_steps(tmp_path, capsys):
    progress = Progress(tmp_path / "m.jsonl", print_freq=3)
    with progress.task("line", 9) as task:
        for step in range(1, 10):
            task.advance(step, "")
    progress.close()
    told = [line.split()[2] for line in capsys.readouterr().err.splitlines()]
    assert told == ["1/9", "3/9", "6/9", "9/9"]


def test_a_run_repeats_to_the_bit_and_another_seed_does_not(tmp_path):
    found = []
    for number, seed in enumerate((1, 1, 2)):
        out, cache = tmp_path / str(number), tmp_path / f"cache{number}"
        argv = ["--steps", "2", "--compare", "defeat:masks=random", "--seed", str(seed), "--kd-warmup", "2"]
        assert train.main([*TINY, *argv, "--output-dir", str(out), "--teacher-cache", str(cache)]) == 0
        found.append(weights(out))
    first, again, other = found
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_mixed_precision_trains_or_is_refused_with_a_sentence(tmp_path, capsys, kind):
    argv = [*TINY, "--steps", "2", "--compare", "combined", "--amp", kind, "--teacher-cache", str(tmp_path)]
    code = train.main([*argv, "--output-dir", str(tmp_path / "out")])
    if code == 2:
        assert f"argument --amp: {kind} cannot be used on cpu" in capsys.readouterr().err
        return
    assert code == 0 and all(bool(torch.isfinite(x).all()) for x in weights(tmp_path / "out").values())


# --- distillation that comes and goes


def between(schedule, compile=False, *texts):
    student, teacher = detector(seed=1), detector(width=0.25, seed=2)
    setup = Setup(student, teacher)
    recipes = [parse(text).build(setup) for text in texts or ("pkd", "defeat:adapter=auto")]
    how = {"base_size": 16.0, "limit": 16, "schedule": schedule, "compile": compile}
    return student, Distillation(recipes, FrozenTeacher(teacher), **how)


def test_the_weight_of_distillation_scales_every_term_and_none_before_it_begins():
    images, targets = batch(2)
    texts = ("pkd", "cwd", "defeat:adapter=auto")
    student, distillation = between(KdSettings(start=2, stop=9, warmup=4), False, *texts)
    objective = distilled(student, distillation)
    reference = distilled(student, between(KdSettings(), False, *texts)[1])(images, targets, 0).told
    assert {name.split("/")[1] for name in reference} == {"pkd", "cwd", "defeat"}
    for index, weight in ((0, 0), (1, 0), (2, 0.25), (4, 0.75), (7, 1), (9, 0)):
        found = objective(images, targets, index)
        wanted = {name: weight * float(x) for name, x in reference.items()} if weight else {}
        assert {name: float(x) for name, x in found.told.items()} == pytest.approx(wanted, rel=1e-5)
        assert float(found.summed["distill"].detach()) == pytest.approx(sum(wanted.values()), rel=1e-4)


def test_a_weight_that_changes_keeps_one_graph(monkeypatch):
    from torch._dynamo.testing import CompileCounter

    counter, compiled = CompileCounter(), torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda x, **how: compiled(x, **{**how, "backend": counter}))
    images, targets = batch(1)
    student, distillation = between(KdSettings(start=1, warmup=20), True, "pkd")
    student.eval()
    values = set()
    for index in range(24):
        with torch.no_grad():
            found = distillation(distillation.step(student, images, targets, index))
        values.add(round(float(found.total), 6))
    assert len(values) == 21, "0, twenty that rise, and then the whole"
    assert counter.frame_count == 1
