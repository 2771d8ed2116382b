// The objective's heads before its features: one launch for all, which draws the masks from boxes, or counts them, as
// well.
#pragma once

#include "detection_distillation.h"

#include "mask_counts.cuh"
#include "row_sums.h"

KD_NAMESPACE_BEGIN

// Host: floats of workspace that these heads need.
int64_t heads_workspace(const Head* heads, int count);

// Host: writes each head's gradient and leaves what adds up to its loss at sums[i]. `counted`: whether the launch that
// the heads share was there and took `masks`, whose counts go to `counts`. Returns what went wrong, or null.
const char* launch_heads(const Head* heads, int count, const MaskTable& masks, float* counts, float* workspace,
                         RowSums* sums, bool* counted, void* stream);

KD_NAMESPACE_END
