// The entry points of bounded_regression.cu.
#pragma once

#include <stdint.h>

#include "../arguments.h"
#include "row_sums.h"

namespace kdkernels {
namespace cuda {

// Floats of workspace that a forward over this many rows needs.
int64_t bounded_regression_workspace(int64_t rows);

// pair: student and teacher, four columns; target likewise, of any dtype. derivative: (rows, 4), d loss / d student but
// for the upstream gradient. Each returns what went wrong, or null.
const char* bounded_regression_forward(const RowPair& pair, const RowView& target,
                                       const BoundedRegressionOptions& options, float* workspace, float* loss,
                                       float* derivative, void* stream);

// The gradient, which goes to pair.grad, and what adds up to the loss, both times the loss weight; and with the sum.
const char* bounded_regression_sums(const RowPair& pair, const RowView& target, const BoundedRegressionOptions& options,
                                    const DeviceScalar& loss_weight, float* workspace, RowSums* sums, void* stream);
const char* bounded_regression_one_pass(const RowPair& pair, const RowView& target,
                                        const BoundedRegressionOptions& options, const DeviceScalar& loss_weight,
                                        float* workspace, float* loss, void* stream);

// pair.grad is written.
const char* bounded_regression_backward(const RowPair& pair, const float* grad_loss, bool per_row,
                                        const float* derivative, void* stream);

}  // namespace cuda
}  // namespace kdkernels
