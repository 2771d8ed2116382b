"""The papers' repositories (DeFeat, FGFI, ports of Chen et al.) and YOLO trainers: what they compute, and the rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import Library, Missing, Row
from .openmmlab import kl


def neck_loss(students, teachers, masks, fg_w, bg_w):
    """DeFeat's losskd_neck + losskd_neck_back; fg_w and bg_w are its hint_neck_w and hint_neck_back_w."""
    total = 0.0
    for s, t, m in zip(students, teachers, masks):
        square = (s - t) ** 2
        for weight, region in ((fg_w, m), (bg_w, 1 - m)):
            region = region[:, None].expand_as(square)
            total = total + weight * (square * region).sum() / max(1.0, 2 * float(region.sum()))
    return total / len(students)


def KLDivergenceLoss(y, teacher, mask=None, T=1):
    if mask is None:
        return T**2 * kl(y, teacher, T, 1).sum() / len(y)
    if not mask.any():
        return torch.zeros(1)
    return T**2 * kl(y[mask], teacher[mask], T, 1).sum() / mask.sum()


def bounded_regression_loss(Rs, Rt, gt, m, v=0.5):
    """The SSD port's: one gate for the whole batch. It is a branch in Python there."""
    error = F.mse_loss(Rs, gt)
    return v * error if error + m > F.mse_loss(Rt, gt) else 0.0 * error


def loss_sl2(students, teachers, scores):
    """Ultralytics' feature loss; scores are the teacher's largest class probability of each cell."""
    total = 0.0
    for s, t, q in zip(students, teachers, scores):
        total = total + (q[:, None] * (s - t) ** 2).sum() / (s.shape[1] * q.sum() + 1e-9)
    return total


def distill_loss_cls(logits_student, logits_teacher, num_classes, temperature=20):
    s, t = logits_student.view(-1, num_classes), logits_teacher.view(-1, num_classes)
    return temperature**2 * kl(s, t, temperature, 1).sum()


def distill_loss_cw(s_feats, t_feats, temperature=1):
    return sum(
        temperature**2 * kl(s.flatten(2), t.flatten(2), temperature, 2).sum() / (s.shape[0] * s.shape[1])
        for s, t in zip(s_feats, t_feats)
    )


_SQUARES = "((s - gt) ** 2).sum(1)"

PAPERS = Library(
    name="papers",
    student="s",
    teacher="t",
    names={f.__name__: f for f in (neck_loss, KLDivergenceLoss, bounded_regression_loss)},
    rows=[
        Row(
            "DeFeat, `losskd_neck + losskd_neck_back` (fg_w, bg_w: its `hint_neck_w`, `hint_neck_back_w`)",
            "kd.masked_mse_loss(s, t, masks, foreground_weight=fg_w, background_weight=bg_w)",
            "levels",
            "the same: twice pixels x channels per region, mean over levels (also United-Perception's port)",
            "theirs has shape (1,) and a float64 accumulator; some of its masks differ from `kd.masks`, whose "
            "docstrings "
            "say where",
            runs="neck_loss(s, t, masks, fg_w, bg_w)",
        ),
        Row(
            "DeFeat with `mask-neck-roi` (its FGFI), Gaussian masks or masks of ones: `losskd_neck` alone",
            "kd.masked_mse_loss(s, t, masks, foreground_weight=fg_w, background_weight=0)",
            "levels",
            "the same",
            runs="neck_loss(s, t, masks, fg_w, 0)",
        ),
        Row(
            "KLDivergenceLoss(y, teacher, pos, T)",
            "kd.temperature_kl_loss(y, teacher, temperature=T, weight=pos.float(), avg_factor=pos.sum().float())",
            "rows",
            "the same: the selected rows",
            "no indexing, so no host sync; none selected: 0 with a graph (theirs has none)",
            student="y",
            teacher="teacher",
        ),
        Row(
            "fg_w * KLDivergenceLoss(y, teacher, pos, T) + bg_w * KLDivergenceLoss(y, teacher, ~pos, T)",
            "kd.decoupled_kl_loss(y, teacher, pos, foreground_weight=fg_w, background_weight=bg_w, "
            "foreground_temperature=T, background_temperature=T)",
            "rows",
            "the same",
            "theirs reads `head_cls_T` for both regions, takes the largest label present for the background, and "
            "labels "
            "of other rows than the logits: pass `pos` of the very proposals that the logits are of",
            student="y",
            teacher="teacher",
        ),
        Row(
            "ilw * (mask[:, None] * (t - s) ** 2).sum() / (2 * mask.sum())",
            'kd.masked_mse_loss(s, t, mask, foreground_weight=ilw, background_weight=0, normalizer="pixels")',
            "maps",
            "FGFI's own repository: pixels, not pixels x channels: its weight means C times as much",
            "an empty mask gives 0, not NaN",
        ),
        Row(
            "-(class_weight * F.softmax(t, 1) * F.log_softmax(s, 1)).sum(1).mean()",
            "kd.soft_cross_entropy_loss(s, t, class_weight=class_weight)",
            "rows",
            "Chen et al., eq. 3: the same. `compute_loss_classification` of a Faster R-CNN port takes `Z_t` "
            "BEFORE `Z_s`",
        ),
        Row(
            "-(class_weight * F.softmax(t, 1) * F.log_softmax(s, 1)).sum() / num_pos",
            "kd.soft_cross_entropy_loss(s, t, class_weight=class_weight, avg_factor=num_pos)",
            "rows",
            "the SSD port's `weighted_KL_div`: positives divide",
            "theirs adds 1e-10 to both probabilities, and divides by 0 without positives",
        ),
        Row(
            f"torch.where({_SQUARES} + margin <= ((t - gt) ** 2).sum(1), 0, {_SQUARES}).mean()",
            "kd.bounded_regression_loss(s, t, gt, margin=margin, bound_weight=1, smooth_l1_weight=0)",
            "boxes",
            "the Faster R-CNN port's bound (its nu, annealed, in front; it has 0.01 for the margin)",
            "theirs compares each side with a target of its own, which ours cannot: run both heads on the same "
            "proposals",
        ),
        Row(
            "F.smooth_l1_loss(s, gt, reduction='none').sum(1).mean() + nu * "
            f"torch.where({_SQUARES} + margin > ((t - gt) ** 2).sum(1), {_SQUARES}, 0).mean()",
            "kd.bounded_regression_loss(s, t, gt, margin=margin, bound_weight=nu)",
            "boxes",
            "Chen et al., eq. 4-5: the same",
        ),
        Row(
            "bounded_regression_loss(Rs, Rt, gt, margin, v=nu)",
            "kd.bounded_regression_loss(Rs, Rt, gt, margin=margin, bound_weight=nu, smooth_l1_weight=0, "
            'gate="batch", '
            "avg_factor=Rs.numel())",
            "boxes",
            "the SSD port's: the mean over 4 K coordinates, one gate for the batch (not the paper's)",
            "no branch in Python, so no host sync; no positives: 0, not NaN",
            student="Rs",
            teacher="Rt",
        ),
    ],
    missing=[
        Missing(
            "DeFeat's `l1loss` (boxes)",
            "the smaller of abs(s - t) and abs(s - gt): another loss than the paper's bound",
        ),
        Missing(
            "DeFeat's `pixel-wise` with `L1` or `Div`, `BCE-fore`, `BCE-correct`",
            "an inverted smooth L1, a ratio, BCE on softmax outputs: not reproduced",
        ),
    ],
)

YOLO = Library(
    name="YOLO",
    student="s",
    teacher="t",
    names={f.__name__: f for f in (loss_sl2, distill_loss_cls, distill_loss_cw)},
    rows=[
        Row(
            "Ultralytics with `distill_model=`, `dis=` (before the trainer multiplies by the batch size)",
            'kd.masked_mse_loss(s, t, scores, foreground_weight=2 * dis, background_weight=0, level_reduction="sum")',
            "levels",
            "2, and the sum over levels; `scores` (N, H, W): the teacher's largest class probability per cell",
            "theirs adds 1e-9 to C x sum(scores), ours holds twice that at 1 or more",
            runs="dis * loss_sl2(s, t, scores)",
        ),
        Row(
            "distill_loss_cls(s, t, num_classes, temperature=temperature)",
            "kd.temperature_kl_loss(s.view(-1, num_classes), t.view(-1, num_classes), temperature=temperature, "
            'reduction="sum")',
            "tokens",
            "YOLOv6: no divisor at all, so it grows with the picture; its inputs are sigmoid's outputs, not logits",
            "theirs can come out negative in 16 bits; from logits `kd.binary_kl_loss` is the KL of a sigmoid head",
        ),
        Row(
            "distill_loss_cw(s, t, temperature=temperature)",
            "sum(kd.temperature_kl_loss(a.flatten(2), b.flatten(2), temperature=temperature) for a, b in zip(s, t))",
            "levels",
            "YOLOv6, and `CWDLoss` of DAMO-YOLO and LibreYOLO: N x C per level, summed",
        ),
        Row(
            '1e-4 * T**2 * nn.KLDivLoss(reduction="sum")(F.log_softmax(s / T, -1), F.softmax(t / T, -1)) / batch_size',
            "1e-4 * kd.temperature_kl_loss(s, t, temperature=T, avg_factor=batch_size)",
            "rows",
            "YOLOv3 forks, strategy 2: pictures divide, not rows",
            "theirs mixes objectness and classes in one softmax",
        ),
        Row(
            f"1e-3 * torch.where({_SQUARES} > ((t - gt) ** 2).sum(1), {_SQUARES}, 0).sum()",
            '1e-3 * kd.bounded_regression_loss(s, t, gt, bound_weight=1, smooth_l1_weight=0, reduction="sum")',
            "boxes",
            "the same forks' boxes, on decoded boxes",
        ),
    ],
    missing=[
        Missing(
            "`MGDLoss` of LibreYOLO",
            "a mean MSE with the weight 2e-5 that is meant for a sum: C x H x W too small in the version read",
        ),
        Missing(
            "`compute_distillation_output_loss` of yolov5 forks, PaddleDetection's `DistillYOLOv3Loss`",
            "MSE or BCE of every output, scaled by objectness: `F.mse_loss`; the recipe `objectness` of the "
            "harness has "
            "the paper's",
        ),
        Missing("YOLOv6's `distill_loss_dfl`, D-FINE's DDF", "KL over bins with weights of their own"),
    ],
)

LIBRARIES = [PAPERS, YOLO]
