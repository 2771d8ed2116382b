"""PyTorch by hand, RepDistiller, mdistiller, torchdistill, ModelOpt: what their losses compute, and the rows."""

from __future__ import annotations

import torch.nn.functional as F

from . import Library, Missing, Row
from .openmmlab import kl


def DistillKL(T):
    return lambda y_s, y_t: T**2 * kl(y_s, y_t, T, 1).sum() / y_s.shape[0]


def HintLoss():
    return lambda f_s, f_t: (f_s - f_t).square().mean()


def kd_loss(logits_student, logits_teacher, temperature):
    return temperature**2 * kl(logits_student, logits_teacher, temperature, 1).sum(1).mean()


def KDLoss(path_s, io_s, path_t, io_t, temperature, alpha=None, beta=None, reduction="batchmean"):
    assert reduction == "batchmean"
    beta = 1 - alpha if beta is None else beta  # theirs too raises where both are None

    def forward(student_io_dict, teacher_io_dict, targets=None):
        student, teacher = student_io_dict[path_s][io_s], teacher_io_dict[path_t][io_t]
        soft = kl(student, teacher, temperature, 1).sum() / student.shape[0]
        if not alpha or targets is None:
            return soft
        return alpha * F.cross_entropy(student, targets) + beta * temperature**2 * soft

    return forward


def LogitsDistillationLoss(temperature=1.0, reduction="batchmean"):
    def forward(logits_s, logits_t):
        elements = kl(logits_s, logits_t, temperature, -1)
        classes = logits_s.shape[-1]
        divisor = {"batchmean": elements.numel() / classes, "mean": elements.numel(), "sum": 1}[reduction]
        return temperature**2 * elements.sum() / divisor

    return forward


BY_HAND = Library(
    name="by hand",
    student="s",
    teacher="t",
    rows=[
        Row(
            'T**2 * F.kl_div(F.log_softmax(s / T, -1), F.softmax(t / T, -1), reduction="batchmean")',
            "kd.temperature_kl_loss(s, t, temperature=T)",
            "rows",
        ),
        Row(
            'F.kl_div(F.log_softmax(s / T, -1), F.softmax(t / T, -1), reduction="batchmean")',
            "kd.temperature_kl_loss(s, t, temperature=T) / T**2",
            "rows",
            "T² forgotten: 1 / T²",
        ),
        Row(
            "T**2 * nn.KLDivLoss()(F.log_softmax(s / T, -1), F.softmax(t / T, -1))",
            'kd.temperature_kl_loss(s, t, temperature=T, reduction="mean")',
            "rows",
            "the default of `nn.KLDivLoss` divides by the classes too (KD-Lib and many copies)",
        ),
        Row(
            'T**2 * F.kl_div(F.log_softmax(s / T, -1), F.log_softmax(t / T, -1), reduction="sum", log_target=True)',
            'kd.temperature_kl_loss(s, t, temperature=T, reduction="sum")',
            "rows",
        ),
        Row(
            'T**2 * F.kl_div(F.log_softmax(s / T, -1), F.softmax(t / T, -1), reduction="batchmean")',
            "kd.temperature_kl_loss(s, t, temperature=T, avg_factor=len(s))",
            "tokens",
            "(B, L, C): batchmean divides by B alone; without `avg_factor` ours divides by B x L",
        ),
        Row(
            "T**2 * torch.sum(F.softmax(t / T, -1) * (F.softmax(t / T, -1).log() - F.log_softmax(s / T, -1))) / "
            "s.size(0)",
            "kd.temperature_kl_loss(s, t, temperature=T)",
            "rows",
            "the same (PyTorch's tutorial)",
            "theirs is NaN where a teacher's probability underflows to 0",
        ),
        Row(
            "alpha * F.cross_entropy(s, targets) + (1 - alpha) * T**2 * F.kl_div(F.log_softmax(s / T, -1), "
            'F.softmax(t / T, -1), reduction="batchmean")',
            "alpha * F.cross_entropy(s, targets) + (1 - alpha) * kd.temperature_kl_loss(s, t, temperature=T)",
            "rows",
            "the same (Hinton; transformers' guide with `lambda_param` for 1 - alpha)",
        ),
        Row(
            "-(F.softmax(t, -1) * F.log_softmax(s, -1)).sum(-1).mean()",
            "kd.soft_cross_entropy_loss(s, t)",
            "rows",
        ),
        Row(
            "F.binary_cross_entropy_with_logits(s, t.sigmoid())",
            'kd.binary_kl_loss(s, t, reduction="mean")',
            "rows",
            "rows x classes",
            "value less the teacher's entropy (0 where both agree); the gradient is the same",
            same="gradient",
        ),
        Row(
            "F.mse_loss(s, t)",
            "2 * kd.masked_mse_loss(s, t, kd.masks.all_ones(s))",
            "maps",
            "2: ours has the papers' half",
            "the same numbers, no new benefit: it pays together with masks, levels or other losses",
        ),
    ],
    missing=[
        Missing("`F.mse_loss`, `F.l1_loss`, `F.smooth_l1_loss` of logits or boxes", "PyTorch has them: keep them"),
        Missing(
            "KD-Lib's default, `nn.MSELoss` or `nn.KLDivLoss` on probabilities",
            "not a KL; the row for `nn.KLDivLoss` has what was meant (its trainers take the teacher FIRST)",
        ),
    ],
)

REPDISTILLER = Library(
    name="RepDistiller",
    student="y_s",
    teacher="y_t",
    names={"DistillKL": DistillKL, "HintLoss": HintLoss},
    rows=[
        Row(
            "DistillKL(T)(y_s, y_t)",
            "kd.TemperatureKLLoss(temperature=T)(y_s, y_t)",
            "rows",
        ),
        Row(
            "HintLoss()(f_s, f_t)",
            "kd.MaskedMSELoss(loss_weight=2)(f_s, f_t, kd.masks.all_ones(f_s))",
            "maps",
            "2",
            student="f_s",
            teacher="f_t",
        ),
    ],
    missing=[
        Missing(
            "`Attention` (a list, one loss per level), `Similarity`, `RKDLoss`, `PKT`, `VIDLoss`, `NSTLoss`, "
            "`Correlation`, "
            "`ABLoss`, `FactorTransfer`, `FSP`, `CRDLoss`",
            "other losses",
        )
    ],
)

MDISTILLER = Library(
    name="mdistiller",
    student="logits_student",
    teacher="logits_teacher",
    names={"kd_loss": kd_loss},
    rows=[
        Row(
            "kd_loss(logits_student, logits_teacher, temperature)",
            "kd.temperature_kl_loss(logits_student, logits_teacher, temperature=temperature)",
            "rows",
            "the same; the temperature is a keyword here",
        ),
        Row(
            "F.mse_loss(f_s, f_t)",
            "2 * kd.masked_mse_loss(f_s, f_t, kd.masks.all_ones(f_s))",
            "maps",
            "FitNet's: 2",
            student="f_s",
            teacher="f_t",
        ),
    ],
    missing=[
        Missing(
            "`dkd_loss` (also in the detectors), `hcl_loss` (ReviewKD), `at_loss`, `rkd_loss`, OFD, SP, NST, "
            "PKT, VID, CRD",
            "other losses",
        )
    ],
)

_THEIRS = 'KDLoss("fc", "output", "fc", "output", temperature=temperature'
_CAUGHT = '({"fc": {"output": logits_s}}, {"fc": {"output": logits_t}}, targets)'

TORCHDISTILL = Library(
    name="torchdistill",
    student="logits_s",
    teacher="logits_t",
    names={"KDLoss": KDLoss},
    rows=[
        Row(
            "KDLoss(..., temperature=temperature, alpha=alpha)(student_io_dict, teacher_io_dict, targets)",
            "alpha * F.cross_entropy(logits_s, targets) "
            "+ (1 - alpha) * kd.temperature_kl_loss(logits_s, logits_t, temperature=temperature)",
            "rows",
            'the same; `logits_s` is `student_io_dict[path]["output"]`, `logits_t` the teacher\'s',
            runs=f"{_THEIRS}, alpha=alpha){_CAUGHT}",
        ),
        Row(
            "KDLoss(..., temperature=temperature, alpha=alpha, beta=beta)(student_io_dict, teacher_io_dict, targets)",
            "alpha * F.cross_entropy(logits_s, targets) "
            "+ beta * kd.temperature_kl_loss(logits_s, logits_t, temperature=temperature)",
            "rows",
            "the same",
            runs=f"{_THEIRS}, alpha=alpha, beta=beta){_CAUGHT}",
        ),
        Row(
            "KDLoss(..., temperature=temperature, beta=beta)(student_io_dict, teacher_io_dict, targets)",
            "kd.temperature_kl_loss(logits_s, logits_t, temperature=temperature) / temperature**2",
            "rows",
            "without alpha (or with 0, or without targets) theirs drops beta and T²",
            "theirs does not detach the teacher, and raises where alpha and beta are both None",
            runs=f"{_THEIRS}, beta=beta){_CAUGHT}",
        ),
        Row(
            'nn.MSELoss(reduction="sum")(z_s, z_t)',
            '2 * len(z_s) * kd.masked_mse_loss(z_s, z_t, kd.masks.all_ones(z_s), normalizer="batch")',
            "maps",
            "through `SimpleLossWrapper` (GHND): 2 N",
            student="z_s",
            teacher="z_t",
        ),
    ],
    missing=[
        Missing(
            "`LogitStdKDLoss`",
            "standardise each row yourself, `(z - mean) / (1e-7 + std)`, then the rows of `KDLoss`",
        ),
        Missing(
            "`DISTLoss`, `DISTPlusLoss`, `ATLoss`, `RKDLoss`, `SPKDLoss`, `CRDLoss`, `FSPLoss`, `PKTLoss`, "
            "`FTLoss`, `VIDLoss`, "
            "`CCKDLoss`, `SSKDLoss`, `PADL2Loss`, `KTALoss`, `SRDLoss` and others",
            "other losses",
        ),
    ],
)

MODELOPT = Library(
    name="ModelOpt",
    student="logits_s",
    teacher="logits_t",
    names={"LogitsDistillationLoss": LogitsDistillationLoss},
    rows=[
        Row(
            "LogitsDistillationLoss(temperature=temperature)(logits_s, logits_t)",
            "kd.TemperatureKLLoss(temperature=temperature)(logits_s, logits_t)",
            "tokens",
            "the same: rows are all leading dimensions",
            "padded tokens count in both: see the language model below",
        ),
        Row(
            'LogitsDistillationLoss(temperature=temperature, reduction="mean")(logits_s, logits_t)',
            'kd.TemperatureKLLoss(temperature=temperature, reduction="mean")(logits_s, logits_t)',
            "tokens",
        ),
        Row(
            'LogitsDistillationLoss(temperature=temperature, reduction="sum")(logits_s, logits_t)',
            'kd.TemperatureKLLoss(temperature=temperature, reduction="sum")(logits_s, logits_t)',
            "tokens",
        ),
    ],
    missing=[
        Missing(
            '`LogitsDistillationLoss(reduction="none")`',
            "one value per element there, (rows, C), to be masked by you; here one per row, shaped like the "
            "rows, which is "
            "what a mask of tokens needs",
        ),
        Missing("`MGDLoss` (mean MSE, alpha 1: not mmrazor's scale), `MFTLoss`", "other losses"),
    ],
)

LIBRARIES = [BY_HAND, REPDISTILLER, MDISTILLER, TORCHDISTILL, MODELOPT]
