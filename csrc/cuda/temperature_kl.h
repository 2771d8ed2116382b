// The entry points of temperature_kl.cu.
#pragma once

#include "../arguments.h"

namespace kdkernels {
namespace cuda {

// Floats of workspace that a forward needs.
int64_t temperature_kl_workspace(const RowPair& pair);

// Each returns what went wrong, or null. statistics: six numbers per row, for the backward.
const char* temperature_kl_forward(const RowPair& pair, double temperature, const RowReduction& reduction,
                                   float* workspace, float* loss, float* statistics, void* stream);
const char* temperature_kl_backward(const RowPair& pair, const float* grad_loss, bool per_row, const float* statistics,
                                    void* stream);

}  // namespace cuda
}  // namespace kdkernels
