"""What docs/drop-in.md says still differs from the other libraries: empty regions, infinities, constant channels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from drop_in import libraries
from drop_in.inputs import namespace

import kdkernels as kd

LIBRARIES = libraries()
ROWWISE = [
    pytest.param(library, row, id=f"{library.name}-{i}".replace(" ", "-"))
    for library in LIBRARIES.values()
    for i, row in enumerate(library.rows)
    # PyTorch's own cross-entropy in a line is NaN without rows
    if row.kind in ("rows", "tokens", "boxes") and "F.cross_entropy" not in row.ours
]


@pytest.mark.parametrize("library, row", ROWWISE)
def test_without_rows_ours_is_zero_with_a_graph(library, row):
    names, leaves = namespace(library, row, torch.float64)
    count = leaves[0].shape[0]
    for name, x in names.items():
        if isinstance(x, torch.Tensor) and x.shape[:1] == (count,):
            names[name] = x[:0]
    loss = eval(row.ours, names)
    assert loss.requires_grad and loss.sum() == 0


def lines(library, starts, **given):
    """Values of theirs and ours, and our gradient, for the row that starts so, some of its inputs replaced."""
    library = LIBRARIES[library]
    row = next(row for row in library.rows if (row.runs or row.theirs).startswith(starts))
    names, leaves = namespace(library, row, torch.float64)
    names.update(given)
    theirs, ours = eval(row.runs or row.theirs, names), eval(row.ours, names)
    return theirs, ours, torch.autograd.grad(ours, leaves)[0]


# What the library's own code gives: NaN, or 0 that cannot be differentiated.
EMPTY = {
    "FGFI": ("papers", "ilw", {"mask": torch.zeros(3, 6, 7)}, float("nan")),
    "DeFeat": ("papers", "KLDivergenceLoss", {"pos": torch.zeros(24, dtype=torch.bool)}, 0.0),
    "TRL": ("language models", "GKDTrainer", {"labels": torch.full((3, 8), -100)}, float("nan")),
    "torchtune": ("language models", "ForwardKLLoss", {"labels": torch.full((3, 8), -100)}, 0.0),
}


@pytest.mark.parametrize("case", EMPTY)
def test_nothing_to_average_is_zero_with_a_graph(case):
    library, starts, given, said = EMPTY[case]
    theirs, ours, grad = lines(library, starts, **given)
    assert theirs.isnan() if said != said else theirs == said and not theirs.requires_grad
    assert ours == 0 and (grad == 0).all()


def test_defeats_regions_may_be_empty():
    for region in (torch.zeros, torch.ones):
        masks = [region(3, 8, 9), region(3, 4, 7)]
        theirs, ours, _ = lines("papers", "neck_loss", masks=masks)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)


def test_an_avg_factor_of_zero():
    theirs, ours, grad = lines(
        "mmdet", "KnowledgeDistillationKLDivLoss(T=T, loss_weight=w)(pred, soft_label, w", avg_factor=0.0
    )
    assert theirs > 1e5 and ours == 0 and (grad == 0).all()


def test_a_class_that_both_rule_out():
    student, teacher = torch.randn(2, 5, 11).double()
    student[:, 4] = teacher[:, 4] = float("-inf")
    names = {"F": F, "kd": kd, "s": student, "t": teacher, "T": 2.0}
    row = LIBRARIES["by hand"].rows[0]
    kept = [x[:, [i for i in range(11) if i != 4]] for x in (student, teacher)]
    assert eval(row.theirs, names).isnan()
    torch.testing.assert_close(eval(row.ours, names), kd.temperature_kl_loss(*kept, temperature=2.0))


def test_the_tutorials_form_is_nan_where_the_teacher_underflows():
    student, teacher = torch.zeros(1, 3), torch.tensor([[300.0, 0.0, 0.0]])
    row = next(row for row in LIBRARIES["by hand"].rows if "torch.sum" in row.theirs)
    names = {"F": F, "torch": torch, "kd": kd, "s": student, "t": teacher, "T": 1.0}
    assert eval(row.theirs, names).isnan()
    torch.testing.assert_close(eval(row.ours, names), torch.tensor(3.0).log())


def test_the_value_of_bce_is_larger_by_the_teachers_entropy():
    library = LIBRARIES["by hand"]
    row = next(row for row in library.rows if "binary_cross_entropy" in row.theirs)
    names, _ = namespace(library, row, torch.float64)
    entropy = F.binary_cross_entropy_with_logits(names["t"], names["t"].sigmoid())
    torch.testing.assert_close(eval(row.theirs, names), eval(row.ours, names) + entropy, rtol=1e-12, atol=0)


def test_pkds_constant_channel_and_width():
    library = LIBRARIES["mmrazor"]
    PKDLoss = library.names["PKDLoss"]
    student, teacher = torch.randn(2, 2, 3, 4, 5).double()
    student[:, 1] = 0.25
    student.requires_grad_()
    (published,) = torch.autograd.grad(PKDLoss()(student, teacher), student)
    (mended,) = torch.autograd.grad(kd.pearson_loss(student, teacher), student)
    (asked,) = torch.autograd.grad(kd.pearson_loss(student, teacher, on_constant="reference"), student)
    assert (mended[:, 1] == 0).all() and published[:, 1].abs().max() > 1e4 * published[:, 0].abs().max()
    torch.testing.assert_close(asked, published, rtol=1e-9, atol=1e-9)
    wider = torch.randn(2, 3, 4, 7).double()
    with pytest.raises(AssertionError):
        PKDLoss()(student, wider)
    assert kd.PearsonLoss()(student, wider).isfinite()


def test_what_holds_of_all_rows():
    student, teacher = torch.randn(4, 6), torch.randn(4, 6)
    with pytest.raises(TypeError):
        kd.temperature_kl_loss(student, teacher, 4.0)
    with pytest.raises(ValueError, match="detach"):
        kd.temperature_kl_loss(teacher, student.clone().requires_grad_())
    # by name, as a configuration gives them
    by_name = kd.TemperatureKLLoss(temperature=2)(student=student, teacher=teacher, avg_factor=3)
    assert by_name == kd.temperature_kl_loss(student, teacher, temperature=2, avg_factor=3)
    half = kd.temperature_kl_loss(student.bfloat16(), teacher.bfloat16())
    assert half.dtype == torch.float32 and half.dim() == 0
