// The entry points of soft_cross_entropy.cu.
#pragma once

#include "../arguments.h"
#include "row_sums.h"

namespace kdkernels {
namespace cuda {

// Floats of workspace that a forward needs; one pass too, with its gradient in pair.grad.
int64_t soft_cross_entropy_workspace(const RowPair& pair, const SoftCrossEntropyOptions& options);

// Each returns what went wrong, or null. statistics: eight numbers per row, for the backward.
const char* soft_cross_entropy_forward(const RowPair& pair, const SoftCrossEntropyOptions& options, float* workspace,
                                       float* loss, float* statistics, void* stream);
const char* soft_cross_entropy_backward(const RowPair& pair, double temperature, const float* class_weight,
                                        const int64_t* target, const float* grad_loss, bool per_row,
                                        const float* statistics, void* stream);
// The gradient, which goes to pair.grad, and what adds up to the loss, both times the loss weight.
const char* soft_cross_entropy_sums(const RowPair& pair, const SoftCrossEntropyOptions& options,
                                    const DeviceScalar& loss_weight, float* workspace, RowSums* sums, void* stream);
// The same, and the sum.
const char* soft_cross_entropy_one_pass(const RowPair& pair, const SoftCrossEntropyOptions& options,
                                        const DeviceScalar& loss_weight, float* workspace, float* loss, void* stream);

}  // namespace cuda
}  // namespace kdkernels
