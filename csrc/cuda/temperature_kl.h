// The entry points of temperature_kl.cu.
#pragma once

#include "kl_rows.h"

namespace kdkernels {
namespace cuda {

inline KlRegions temperature_kl_regions(double temperature, const RowReduction& reduction) {
  return KlRegions{nullptr, {temperature, temperature}, reduction, {}, false};
}

// Floats of workspace that a forward needs; one pass too, with its gradient in pair.grad.
int64_t temperature_kl_workspace(const RowPair& pair);

// Each returns what went wrong, or null. statistics: six numbers per row, for the backward.
const char* temperature_kl_forward(const RowPair& pair, double temperature, const RowReduction& reduction,
                                   float* workspace, float* loss, float* statistics, void* stream);
const char* temperature_kl_backward(const RowPair& pair, const float* grad_loss, bool per_row, const float* statistics,
                                    void* stream);
// The loss and its gradient, which goes to pair.grad, times the loss weight.
const char* temperature_kl_one_pass(const RowPair& pair, double temperature, const RowReduction& reduction,
                                    const DeviceScalar& loss_weight, float* workspace, float* loss, void* stream);

}  // namespace cuda
}  // namespace kdkernels
