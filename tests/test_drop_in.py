"""docs/drop-in.md: each line of its tables gives what the named library's formula gives, and its code runs when pasted.

The lines are executed as they stand in the page. The bound in float32 is the house's (numerics.py): twice the error of
the library's formula in float32, plus 4 eps, both against that formula in float64.
"""

from __future__ import annotations

import ast
import copy
import functools
import re

import pytest
import torch
from drop_in import libraries
from drop_in.inputs import namespace
from drop_in.page import PAGE, render
from numerics import FLOAT64_BOUND

LIBRARIES = libraries()
ROWS = [
    pytest.param(library, row, id=f"{library.name}-{i}".replace(" ", "-"))
    for library in LIBRARIES.values()
    for i, row in enumerate(library.rows)
]
pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")  # what that row is about
every_row = pytest.mark.parametrize("library, row", ROWS)


def outcome(line, library, row, dtype, swapped=False):
    """Value and gradients of one line, as float64. One value per row gets unlike upstream gradients."""
    names, leaves = namespace(library, row, dtype, swapped)
    loss = eval(compile(line, "docs/drop-in.md", "eval") if isinstance(line, str) else line, names)
    grads = [None] * len(leaves)
    if loss.requires_grad:
        upstream = torch.linspace(0.7, 1.7, max(loss.numel(), 2), dtype=loss.dtype)[: loss.numel()].view(loss.shape)
        grads = torch.autograd.grad(loss, leaves, upstream)
    results = {"value": [loss.detach()], "gradient": grads}
    wanted = ("value", "gradient") if row.same == "both" else (row.same,)
    return [None if x is None else x.double() for name in wanted for x in results[name]]


def error(found, expected):
    """max|x - x64| / max|x64| of the worst part; infinite where shapes differ or something is missing."""
    worst = 0.0
    for x, x64 in zip(found, expected):
        if x is None or x.shape != x64.shape or not x.isfinite().all():
            return float("inf")
        worst = max(worst, float((x - x64).abs().max() / x64.abs().max()))
    return worst


@functools.cache
def expected(library_name, row):
    return outcome(row.runs or row.theirs, LIBRARIES[library_name], row, torch.float64)


def float64_error(line, library, row, swapped=False):
    return error(outcome(line, library, row, torch.float64, swapped), expected(library.name, row))


@every_row
def test_ours_is_theirs(library, row):
    exact = expected(library.name, row)
    assert all(x is not None and x.abs().max() > 0 for x in exact)
    assert float64_error(row.ours, library, row) <= FLOAT64_BOUND
    theirs = error(outcome(row.runs or row.theirs, library, row, torch.float32), exact)
    ours = error(outcome(row.ours, library, row, torch.float32), exact)
    assert ours <= 2 * theirs + 4 * torch.finfo(torch.float32).eps


def mutants(line):
    """The line with one thing less: a keyword of a call on kd, a factor or divisor; and the whole 5 % off."""
    tree = ast.parse(line, mode="eval")

    def uses_kd(node):
        return any(isinstance(x, ast.Name) and x.id == "kd" for x in ast.walk(node))

    def changed(change):
        new = copy.deepcopy(tree)
        change(new, list(ast.walk(new)))
        return compile(ast.fix_missing_locations(new), "mutant", "eval")

    yield "5 % off", compile(f"1.05 * ({line})", "mutant", "eval")
    for i, node in enumerate(ast.walk(tree)):
        if isinstance(node, ast.Call) and uses_kd(node.func):
            for k, keyword in enumerate(node.keywords):
                yield f"without {keyword.arg}", changed(lambda new, nodes, i=i, k=k: nodes[i].keywords.pop(k))
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mult, ast.Div)):
            one = "left" if isinstance(node.op, ast.Mult) and uses_kd(node.right) else "right"
            yield (
                f"without {ast.unparse(getattr(node, one))}",
                changed(lambda new, nodes, i=i, one=one: setattr(nodes[i], one, ast.Constant(1))),
            )


@every_row
def test_a_wrong_scale_is_noticed(library, row):
    """Each keyword and factor in a line is needed, and student and teacher cannot be exchanged."""

    def noticed(line, swapped=False):
        try:
            return float64_error(line, library, row, swapped) > 1e3 * FLOAT64_BOUND
        except (TypeError, ValueError, RuntimeError):
            return True

    unnoticed = [name for name, line in mutants(row.ours) if not noticed(line)]
    if not noticed(row.ours, swapped=True):
        unnoticed.append("student and teacher swapped")
    assert unnoticed == []


def test_the_page_has_these_tables():
    text = PAGE.read_text()
    assert text == render(text), "write it again: python tests/drop_in/page.py"
    for library in LIBRARIES.values():
        for row in library.rows:
            assert f"`{row.ours}`" in text


def blocks():
    return re.findall(r"<!-- runs: ([\w-]+) -->\n```python\n(.*?)```", PAGE.read_text(), re.S)


BLOCKS = dict(blocks())


def run(name):
    names = {}
    exec(compile(BLOCKS[name], f"docs/drop-in.md: {name}", "exec"), names)
    return names


def test_every_block_of_code_is_run_here():
    assert len(BLOCKS) == PAGE.read_text().count("```python")
    tests = {name.removeprefix("test_block_").replace("_", "-") for name in globals() if name.startswith("test_block_")}
    assert tests == set(BLOCKS)


def close(found, expected):
    torch.testing.assert_close(found.detach().double(), expected.detach().double(), rtol=1e-5, atol=0)


def kl(student, teacher, temperature):
    """T^2 KL of each row."""
    log_s, log_t = ((x.detach().double() / temperature).log_softmax(-1) for x in (student, teacher))
    return temperature**2 * (log_t.exp() * (log_t - log_s)).sum(-1)


def binary_kl(student, teacher, temperature):
    both = (torch.stack([torch.zeros_like(x), x], -1) for x in (student, teacher))
    return kl(*both, temperature).sum(-1)


def test_block_modelopt():
    names = run("modelopt")
    close(names["loss"], 0.5 * kl(names["student"], names["teacher"], 2).mean())
    assert names["student"].grad.abs().max() > 0 and names["teacher"].grad is None


def test_block_torchvision():
    pytest.importorskip("torchvision")
    names = run("torchvision")
    assert names["loss"].isfinite() and names["distilled"].total > 0
    assert names["distilled"].details["masked_mse/foreground"] > 0
    wide = names["student"].backbone(torch.zeros(1, 3, 96, 160))  # P6 is rounded up
    for stride, x in zip(names["strides"], wide.values(), strict=True):
        assert x.shape[-2:] == (-(-96 // stride), -(-160 // stride))
    assert names["student"].backbone.fpn.inner_blocks[0][0].weight.grad.abs().max() > 0


def test_block_mmdet_head():
    names = run("mmdet-head")
    by_level = [
        binary_kl(*(x.permute(0, 2, 3, 1).reshape(-1, 4) for x in pair), 2)
        for pair in zip(names["cls_scores"], names["teacher_scores"])
    ]
    close(names["losses"]["loss_kd"], 0.5 * (torch.cat(by_level) * names["label_weights"]).sum() / 37)
    assert all(x.grad.abs().max() > 0 for x in names["cls_scores"])


def test_block_yolo():
    names = run("yolo")
    features = 0.0
    for s, t, q in zip(names["adapted"], names["teacher_features"], names["scores"]):
        features = features + 6 * (q[:, None] * (s - t) ** 2).sum() / (t.shape[1] * q.sum() + 1e-9)
    close(names["feature_loss"], features)
    rows = binary_kl(names["student_logits"], names["teacher_logits"], 1)
    close(names["class_loss"], (rows * names["best"]).sum() / names["best"].sum())
    assert all(0 < mask.sum() < mask.numel() for mask in names["masks"])
    assert all(x.grad.abs().max() > 0 for x in [*names["student_features"], names["student_logits"]])


def test_block_padding():
    names = run("padding")
    kept = names["labels"][:, 1:] != -100
    s, t = names["student_logits"][:, :-1], names["teacher_logits"][:, :-1]
    rows = kl(s, t, 2)
    close(names["token_mean"], rows[kept].mean())
    close(names["accumulated"], rows[kept].sum() / 640)
    close(names["sequence_sum"], rows[kept].sum() / 3)
    close(names["sequence_mean"], torch.stack([row[k].mean() for row, k in zip(rows, kept)]).mean())
    soft = -(t.softmax(-1) * s.log_softmax(-1)).sum(-1)[kept].mean()
    hard = torch.nn.functional.cross_entropy(s[kept], names["labels"][:, 1:][kept])
    close(names["mixed"], 0.3 * hard + 0.7 * soft)
    grad = names["student_logits"].grad
    assert (grad[:, :-1][~kept] == 0).all() and (grad[:, :-1][kept].abs().amax(-1) > 0).all()
