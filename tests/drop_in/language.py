"""TRL, torchtune, Liger: what their losses of language models compute, and the rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import Library, Missing, Row
from .openmmlab import kl


class GKDTrainer:
    @staticmethod
    def generalized_jsd_loss(
        student_logits, teacher_logits, labels=None, beta=0.5, temperature=1.0, num_items_in_batch=None
    ):
        assert beta == 0, "the others have no row"
        tokens = kl(student_logits, teacher_logits, temperature, -1).sum(-1)
        if labels is None:
            return tokens.sum() / tokens.shape[0]
        kept = labels != -100
        return tokens[kept].sum() / (kept.sum() if num_items_in_batch is None else num_items_in_batch)


def ForwardKLLoss(ignore_index=-100):
    def forward(student_logits, teacher_logits, labels, normalize=True):
        tokens = -(F.softmax(teacher_logits, -1) * F.log_softmax(student_logits, -1)).sum(-1)
        kept = labels != ignore_index
        if not kept.any():
            return torch.zeros(())
        return (tokens * kept).sum() / (kept.sum() if normalize else 1)

    return forward


def LigerKLDIVLoss(reduction):
    return torch.nn.KLDivLoss(reduction=reduction)  # up to an eps of 1e-10 under the logarithm


_GKD = "GKDTrainer.generalized_jsd_loss(student_logits, teacher_logits"
_KEPT = "weight=(labels != -100).float()"

LANGUAGE = Library(
    name="language models",
    student="student_logits",
    teacher="teacher_logits",
    names={"GKDTrainer": GKDTrainer, "ForwardKLLoss": ForwardKLLoss, "LigerKLDIVLoss": LigerKLDIVLoss},
    rows=[
        Row(
            f"{_GKD}, labels=labels, beta=0, temperature=temperature)",
            f"kd.temperature_kl_loss(student_logits, teacher_logits, temperature=temperature, {_KEPT}, "
            "avg_factor=(labels != -100).sum().float()) / temperature**2",
            "tokens",
            "tokens that are not ignored; TRL has no T²",
            "all ignored: 0, not NaN; no indexing, so no host sync and no copy of the kept logits",
        ),
        Row(
            f"{_GKD}, labels=labels, beta=0, num_items_in_batch=num_items_in_batch)",
            f"kd.temperature_kl_loss(student_logits, teacher_logits, {_KEPT}, avg_factor=num_items_in_batch)",
            "tokens",
            "the tokens of all accumulated batches: a number, or a 0-d float tensor that stays on the device",
            "its trainer passes no temperature: T is 1",
        ),
        Row(
            f"{_GKD}, beta=0, temperature=temperature)",
            "kd.temperature_kl_loss(student_logits, teacher_logits, temperature=temperature, "
            "avg_factor=len(student_logits)) / temperature**2",
            "tokens",
            "without labels sequences divide, not tokens",
            "some versions divide by tokens there: then leave `avg_factor` out",
        ),
        Row(
            "ForwardKLLoss()(student_logits, teacher_logits, labels)",
            "kd.soft_cross_entropy_loss(student_logits, teacher_logits, target=labels)",
            "tokens",
            "torchtune: the same (in name a KL, in value a cross-entropy)",
            "all ignored: theirs is 0 without a graph, after a host sync; it drops a class whose student logit is "
            "infinite, ours gives inf where the teacher has it",
        ),
        Row(
            "ForwardKLLoss()(student_logits, teacher_logits, labels, normalize=False)",
            'kd.soft_cross_entropy_loss(student_logits, teacher_logits, target=labels, reduction="sum")',
            "tokens",
            "the same; `ForwardKLWithChunkedOutputLoss` is the row above on the joined chunks",
        ),
        Row(
            'LigerKLDIVLoss(reduction="batchmean")(F.log_softmax(student_logits, -1), F.softmax(teacher_logits, -1))',
            "kd.temperature_kl_loss(student_logits, teacher_logits, avg_factor=len(student_logits))",
            "tokens",
            "raw logits go in; batchmean divides by the first dimension (Liger wants (tokens, C): then leave "
            "`avg_factor` out)",
        ),
    ],
    missing=[
        Missing(
            "`generalized_jsd_loss` with beta above 0, `LigerJSD`, `LigerTVDLoss`",
            "reverse KL, Jensen-Shannon, total variation: other losses",
        ),
        Missing(
            "`LigerFusedLinearJSDLoss`, `FusedKLDivLoss` (fla)",
            "fused with the output layer, so that logits are never stored; here logits are an input",
        ),
    ],
)

LIBRARIES = [LANGUAGE]
