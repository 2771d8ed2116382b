"""Every recipe on every detector that it applies to: its terms by the papers' formulas, and what it trains."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("torchvision")

from recipe_parts import APPLIES, CASES, TEXTS, distillation, expected, model, pairs, pictures, step_of, teachers  # noqa: F401

from kdkernels.harness.recipes import RECIPES


def test_every_recipe_is_here():
    assert set(APPLIES) == set(RECIPES)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_terms_are_the_papers_formulas(name, kind, teachers, pictures):
    student, teacher = model(kind).train(), teachers[kind]
    distil = distillation(name, student, teacher, steps=1000)
    with torch.no_grad():
        step = step_of(name, distil, student, pictures)
        found = distil(step)
        (recipe,) = distil.recipes
        wanted = expected(name, recipe, step)
        if name == "chen2017":
            levels, _ = pairs(step, recipe.pairs, recipe.hint_adapter)
            wanted = wanted + 0.5 * sum((s - t).square().mean() for s, t in levels) / len(levels)
    assert found.terms and math.isclose(float(found.total), float(wanted), rel_tol=2e-5), (found.total, wanted)
    assert math.isclose(sum(float(x) for x in found.terms.values()), float(found.total), rel_tol=1e-5)


@pytest.mark.parametrize("steps", [4, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_recipe_trains_the_student_and_its_adapters_and_nothing_else(name, kind, steps, teachers, pictures):
    """Without the detector's own losses: the terms fall, and every gradient is where it belongs."""
    student, teacher = model(kind).train(), teachers[kind]
    distil = distillation(TEXTS.get(name, name), student, teacher, preset="scenes", steps=1000)
    before = {key: value.clone() for key, value in teacher.detector.state_dict().items()}
    parameters = [*student.parameters(), *distil.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=3e-4)
    losses = []
    for index in range(steps):
        total = distil(step_of(name, distil, student, pictures, index)).total
        losses.append(float(total.detach()))
        optimizer.zero_grad()
        total.backward()
        if index == 0:
            reached = [p for p in student.parameters() if p.grad is not None and p.grad.abs().max() > 0]
            assert len(reached) > 10, "the student learns"
            for key, parameter in distil.named_parameters():
                assert parameter.grad is not None and parameter.grad.abs().max() > 0, key
        optimizer.step()
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0], losses
    assert all(p.grad is None and not p.requires_grad for p in teacher.detector.parameters())
    for key, value in teacher.detector.state_dict().items():
        assert torch.equal(value, before[key]), key
