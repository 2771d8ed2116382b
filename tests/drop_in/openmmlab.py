"""mmrazor, mmdetection and its descendants (LD, CrossKD): what their losses compute, and the rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import Library, Missing, Row


def kl(student, teacher, temperature, dim):
    """Elements of KL(teacher || student) of softened distributions."""
    log_t = F.log_softmax(teacher.detach() / temperature, dim)
    return log_t.exp() * (log_t - F.log_softmax(student / temperature, dim))


def KLDivergence(tau=1.0, reduction="batchmean", loss_weight=1.0):
    def forward(preds_S, preds_T):
        elements = kl(preds_S, preds_T, tau, 1)
        divisor = {"batchmean": elements.shape[0], "mean": elements.numel(), "sum": 1}[reduction]
        return loss_weight * tau**2 * elements.sum() / divisor

    return forward


def KDSoftCELoss(tau=1.0, reduction="mean", mult_tem_square=True, loss_weight=1.0):
    def forward(preds_S, preds_T, weight=None, avg_factor=None):
        # their student is detached; the tests ask this row for its value alone
        rows = -(F.softmax(preds_T / tau, -1) * F.log_softmax(preds_S.detach() / tau, -1)).sum(-1)
        scale = loss_weight * (tau**2 if mult_tem_square else 1)
        return scale * _mmcv(rows, weight, reduction, avg_factor)

    return forward


def _mmcv(rows, weight, reduction, avg_factor):
    """How mmcv's libraries reduce: weighted, then the mean over what is there or the sum over avg_factor."""
    rows = rows if weight is None else rows * weight
    if avg_factor is not None and reduction == "mean":
        return rows.sum() / (avg_factor + torch.finfo(torch.float32).eps)
    return {"none": lambda: rows, "mean": rows.mean, "sum": rows.sum}[reduction]()


def ChannelWiseDivergence(tau=1.0, loss_weight=1.0):
    def forward(preds_S, preds_T):
        n, c = preds_S.shape[:2]
        return loss_weight * tau**2 * kl(preds_S.flatten(2), preds_T.flatten(2), tau, 2).sum() / (n * c)

    return forward


def PKDLoss(loss_weight=1.0, resize_stu=True):
    def standardised(x):
        x = x.transpose(0, 1).flatten(1)
        return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-6)

    def forward(preds_S, preds_T):
        one = isinstance(preds_S, torch.Tensor)
        loss = 0.0
        for s, t in zip([preds_S] if one else preds_S, [preds_T] if one else preds_T):
            if s.shape[2] != t.shape[2]:  # the height alone is looked at
                s, t = (
                    (F.interpolate(s, t.shape[2:], mode="bilinear"), t)
                    if resize_stu
                    else (s, F.interpolate(t, s.shape[2:], mode="bilinear"))
                )
            assert s.shape == t.shape
            loss = loss + F.mse_loss(standardised(s), standardised(t)) / 2
        return loss_weight * loss

    return forward


def L2Loss(loss_weight=1.0, normalize=True, mult=1.0, div_element=False, dist=False):
    assert not normalize and not dist, "these have no row"

    def forward(s_feature, t_feature):
        divisor = s_feature.numel() if div_element else s_feature.shape[0]
        return loss_weight * (s_feature - t_feature).square().sum() / divisor

    return forward


def MGDLoss(alpha_mgd=2e-5):
    return lambda preds_S, preds_T: alpha_mgd * (preds_S - preds_T).square().sum() / preds_T.shape[0]


def KnowledgeDistillationKLDivLoss(reduction="mean", loss_weight=1.0, T=10, class_reduction="mean"):
    def forward(pred, soft_label, weight=None, avg_factor=None):
        elements = T**2 * kl(pred, soft_label, T, 1)
        rows = elements.mean(1) if class_reduction == "mean" else elements.sum(1)
        return loss_weight * _mmcv(rows, weight, reduction, avg_factor)

    return forward


MMRAZOR = Library(
    name="mmrazor",
    student="preds_S",
    teacher="preds_T",
    names={f.__name__: f for f in (KLDivergence, KDSoftCELoss, ChannelWiseDivergence, PKDLoss, L2Loss, MGDLoss)},
    rows=[
        Row(
            "KLDivergence(tau=tau, loss_weight=w)(preds_S, preds_T)",
            "kd.TemperatureKLLoss(temperature=tau, loss_weight=w)(preds_S, preds_T)",
            "rows",
            "the same: T², divided by the rows",
            "mmrazor 0.x had the cross-entropy there: larger by the teacher's entropy, the same gradient",
        ),
        Row(
            "KLDivergence(tau=tau, reduction='mean', loss_weight=w)(preds_S, preds_T)",
            'kd.TemperatureKLLoss(temperature=tau, reduction="mean", loss_weight=w)(preds_S, preds_T)',
            "rows",
            "rows x classes",
        ),
        Row(
            "KLDivergence(tau=tau, loss_weight=w)(preds_S, preds_T)",
            "kd.TemperatureKLLoss(temperature=tau, loss_weight=w)"
            "(preds_S.movedim(1, -1), preds_T.movedim(1, -1), avg_factor=len(preds_S))",
            "maps",
            "logits (N, C, H, W): theirs divides by N alone, H x W times a mean over positions; without `avg_factor` "
            "ours is that mean",
        ),
        Row(
            "KDSoftCELoss(tau=tau, loss_weight=w)(preds_S, preds_T)",
            "kd.SoftCrossEntropyLoss(temperature=tau, loss_weight=w * tau**2)(preds_S, preds_T)",
            "rows",
            "`tau**2` goes into the weight; with `mult_tem_square=False` leave it out",
            "theirs (1.0) detaches the student: the value is the same, but it trains nothing; ours has the gradient",
            same="value",
        ),
        Row(
            "KDSoftCELoss(tau=tau, loss_weight=w)(preds_S, preds_T, weight=weight, avg_factor=avg_factor)",
            "kd.SoftCrossEntropyLoss(temperature=tau, loss_weight=w * tau**2)"
            "(preds_S, preds_T, weight=weight, avg_factor=avg_factor)",
            "rows",
            "the same: one weight per row",
            "as above; theirs adds 1.2e-7 to `avg_factor`",
            same="value",
        ),
        Row(
            "ChannelWiseDivergence(tau=tau, loss_weight=w)(preds_S, preds_T)",
            "kd.TemperatureKLLoss(temperature=tau, loss_weight=w)(preds_S.flatten(2), preds_T.flatten(2))",
            "maps",
            "the same: N x C",
        ),
        Row(
            "PKDLoss(loss_weight=w)(preds_S, preds_T)",
            "kd.PearsonLoss(loss_weight=w)(preds_S, preds_T)",
            "levels",
            "the same: half the mean, summed over levels",
            "gradient of a constant student channel 0 instead of about a million times the usual "
            '(`on_constant="reference"`'
            " has theirs); one sample per channel 0 instead of NaN",
        ),
        Row(
            "PKDLoss(loss_weight=w, resize_stu=True)(preds_S, preds_T)",
            "kd.PearsonLoss(loss_weight=w)(preds_S, preds_T)",
            "unequal",
            "the same",
            "theirs looks at the height alone, and fails where only widths differ",
        ),
        Row(
            "PKDLoss(loss_weight=w, resize_stu=False)(preds_S, preds_T)",
            'kd.PearsonLoss(resize="teacher", loss_weight=w)(preds_S, preds_T)',
            "unequal",
            "the same",
            "as above",
        ),
        Row(
            "L2Loss(normalize=False, loss_weight=w)(s_feature, t_feature)",
            'kd.MaskedMSELoss(normalizer="batch", loss_weight=2 * w)'
            "(s_feature, t_feature, kd.masks.all_ones(s_feature))",
            "maps",
            "2: ours has the papers' half",
            "ours takes (N, C, H, W) only",
            student="s_feature",
            teacher="t_feature",
        ),
        Row(
            "L2Loss(normalize=False, div_element=True, loss_weight=w)(s_feature, t_feature)",
            "kd.MaskedMSELoss(loss_weight=2 * w)(s_feature, t_feature, kd.masks.all_ones(s_feature))",
            "maps",
            "2",
            student="s_feature",
            teacher="t_feature",
        ),
        Row(
            "MGDLoss(alpha_mgd=alpha)(preds_S, preds_T)",
            'kd.MaskedMSELoss(normalizer="batch", loss_weight=2 * alpha)(preds_S, preds_T, kd.masks.all_ones(preds_S))',
            "maps",
            "2; sum over N, so weights are as small as the published 2e-5",
            "the generation block (`MGDConnector`) stays yours, in front of the student",
        ),
    ],
    missing=[
        Missing("`L2Loss()` as it comes (`normalize=True`)", "normalise both sides per picture, then the row above"),
        Missing(
            "`DKDLoss`",
            "keep theirs, with `reduction='batchmean'`: 'mean' and 'none' give the sum there, and the target "
            "term is inf "
            "where a float32 student is sure of another class",
        ),
        Missing(
            "`DISTLoss`, `ATLoss`, `DistanceWiseRKD`, `AngleWiseRKD`, `FBKDLoss`, `WSLD`, `CRDLoss`, `FTLoss`, "
            "`OFDLoss`, "
            "`ABLoss`, `L1Loss`",
            "other losses",
        ),
    ],
)

MMDET = Library(
    name="mmdet",
    student="pred",
    teacher="soft_label",
    names={"KnowledgeDistillationKLDivLoss": KnowledgeDistillationKLDivLoss, "PKDLoss": PKDLoss},
    rows=[
        Row(
            "KnowledgeDistillationKLDivLoss(T=T, loss_weight=w)(pred, soft_label)",
            'kd.TemperatureKLLoss(temperature=T, reduction="mean", loss_weight=w)(pred, soft_label)',
            "rows",
            "theirs is the mean over classes too: 1 / C of the KL",
            "their T is 10 unless given, and at least 1",
        ),
        Row(
            "KnowledgeDistillationKLDivLoss(T=T, loss_weight=w)(pred, soft_label, weight=weight, "
            "avg_factor=avg_factor)",
            'kd.TemperatureKLLoss(temperature=T, reduction="mean", loss_weight=w)'
            "(pred, soft_label, weight=weight, avg_factor=avg_factor)",
            "rows",
            "the same: `avg_factor` replaces the rows, and the classes still divide (LD's call is this one, with "
            "17 bins)",
            "theirs adds 1.2e-7 to `avg_factor`; an `avg_factor` of 0 gives 0",
        ),
        Row(
            "KnowledgeDistillationKLDivLoss(T=T, loss_weight=w, reduction='sum')(pred, soft_label)",
            'kd.TemperatureKLLoss(temperature=T, reduction="sum", loss_weight=w)(pred, soft_label) / pred.shape[-1]',
            "rows",
            "1 / C",
        ),
        Row(
            "KnowledgeDistillationKLDivLoss(T=T, loss_weight=w, reduction='none')(pred, soft_label)",
            'kd.TemperatureKLLoss(temperature=T, reduction="none", loss_weight=w)(pred, soft_label) / pred.shape[-1]',
            "rows",
            "1 / C",
        ),
        Row(
            "KnowledgeDistillationKLDivLoss(T=T, loss_weight=w, class_reduction='sum')"
            "(pred, soft_label, weight=weight, avg_factor=avg_factor)",
            "kd.TemperatureKLLoss(temperature=T, loss_weight=w)(pred, soft_label, weight=weight, "
            "avg_factor=avg_factor)",
            "rows",
            "CrossKD's: the sum over classes",
            "theirs adds 1.2e-7 to `avg_factor`",
        ),
        Row(
            "PKDLoss(loss_weight=w)(pred, soft_label)",
            "kd.PearsonLoss(loss_weight=w)(pred, soft_label)",
            "maps",
            "CrossKD's: the same as mmrazor's",
            "as mmrazor's",
        ),
    ],
    missing=[
        Missing("CrossKD's `KDQualityFocalLoss`, FGD's `FeatureLoss`", "other losses"),
        Missing(
            "`LDHead(imitation_method='decouple')`",
            "indexes the student by negatives and the teacher by positives: nothing should reproduce it",
        ),
    ],
)

LIBRARIES = [MMRAZOR, MMDET]
