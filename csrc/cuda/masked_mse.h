// The entry points of masked_mse.cu.
#pragma once

#include <stdint.h>

#include "../arguments.h"

namespace kdkernels {
namespace cuda {

// Floats of workspace that a forward over these levels needs.
int64_t masked_mse_workspace(const FeatureLevel* levels, int count);

// Each returns what went wrong, or null. scales: (levels, 2), the backward's factors of the two regions.
const char* masked_mse_forward(const FeatureLevel* levels, int count, const MaskedMseOptions& options, float* workspace,
                               float* loss, float* scales, void* stream);

// levels[i].grad is written, from row level_of[i] of scales.
const char* masked_mse_backward(const FeatureLevel* levels, int count, const float* grad_loss, const float* scales,
                                const int64_t* level_of, void* stream);

}  // namespace cuda
}  // namespace kdkernels
