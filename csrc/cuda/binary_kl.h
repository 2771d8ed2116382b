// The entry points of binary_kl.cu.
#pragma once

#include "../arguments.h"
#include "row_sums.h"

namespace kdkernels {
namespace cuda {

// Floats of workspace that a forward needs; one pass too, with its gradient in pair.grad.
int64_t binary_kl_workspace(const RowPair& pair);

// Each returns what went wrong, or null. coefficients: one number per row, for the backward.
const char* binary_kl_forward(const RowPair& pair, double temperature, const RowReduction& reduction, float* workspace,
                              float* loss, float* coefficients, void* stream);
const char* binary_kl_backward(const RowPair& pair, double temperature, const float* grad_loss, bool per_row,
                               const float* coefficients, void* stream);
// The gradient, which goes to pair.grad, and what adds up to the loss, both times the loss weight.
const char* binary_kl_sums(const RowPair& pair, double temperature, const RowReduction& reduction,
                           const DeviceScalar& loss_weight, float* workspace, RowSums* sums, void* stream);
// The same, and the sum.
const char* binary_kl_one_pass(const RowPair& pair, double temperature, const RowReduction& reduction,
                               const DeviceScalar& loss_weight, float* workspace, float* loss, void* stream);

}  // namespace cuda
}  // namespace kdkernels
