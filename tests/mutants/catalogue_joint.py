"""Mutants of the launches that the objective's losses share."""

from mutant import Mutant

JOINT = [
    Mutant(
        "joint: the second KL has the first one's rows",
        "cuda/detection_distillation_heads.cu",
        "detection_distillation",
        "return block_of_rows<S, T>(block, table.kl[second]);",
        "return block_of_rows<S, T>(block, table.kl[0]);",
        unit="detection_distillation_heads",
    ),
    Mutant(
        "joint: masks counted from the boxes' blocks on",
        "cuda/detection_distillation_heads.cu",
        "detection_distillation",
        "block_of_counts(block - table.boxes.in.blocks,",
        "block_of_counts(block,",
        unit="detection_distillation_heads",
    ),
    Mutant(
        "joint: heads of any dtype share the launch",
        "cuda/detection_distillation_heads.cu",
        "detection_distillation",
        "if (heads_ && (pair.student.dtype != student_ || pair.teacher.dtype != teacher_)) return false;",
        "",
        unit="detection_distillation_heads",
    ),
    Mutant(
        "joint: rows of a cluster share the launch",
        "cuda/detection_distillation_heads.cu",
        "detection_distillation",
        "if (plan.cluster > 1 || plan.parts > 1) return false;",
        "",
        unit="detection_distillation_heads",
    ),
    Mutant(
        "joint: the last warp of a block that counts for itself is left out",
        "cuda/row_counts.cuh",
        "detection_distillation",
        "found = sum_of_lanes(lane < warps ? scratch[lane] : 0.0f);",
        "found = sum_of_lanes(lane + 1 < warps ? scratch[lane] : 0.0f);",
        unit="detection_distillation_heads",
    ),
    Mutant(
        "joint: no barrier behind a block's own count",
        "cuda/row_counts.cuh",
        "detection_distillation",
        "  block_sync();\n  return found;",
        "  return found;",
        unit="detection_distillation_heads",
    ),
    Mutant(
        "joint: parts of a head one beside the other",
        "cuda/pass_sums.cuh",
        "detection_distillation",
        "head.values[b * head.parts + k]",
        "head.values[b * most_row_parts + k]",
        unit="detection_distillation",
    ),
    Mutant(
        "joint: heads added up again with further levels",
        "cuda/detection_distillation.cu",
        "detection_distillation",
        "heads_.count = 0;  // they are told",
        "",
        unit="detection_distillation",
    ),
    Mutant(
        "joint: masks counted twice",
        "cuda/detection_distillation.cu",
        "detection_distillation",
        "if (!counted) {",
        "if (true) {",
        unit="detection_distillation",
    ),
]
