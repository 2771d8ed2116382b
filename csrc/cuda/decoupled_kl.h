// The entry points of decoupled_kl.cu.
#pragma once

#include "kl_rows.h"

namespace kdkernels {
namespace cuda {

inline KlRegions decoupled_kl_regions(const DecoupledKlOptions& options) {
  return KlRegions{options.foreground,
                   {options.background_temperature, options.foreground_temperature},
                   RowReduction{options.reduction, false, DeviceScalar{0, nullptr}},
                   {options.background_weight, options.foreground_weight},
                   options.reduction == RowReduction::mean_rows};
}

// Floats of workspace that a forward needs; one pass too, with its gradient in pair.grad.
int64_t decoupled_kl_workspace(const RowPair& pair, const DecoupledKlOptions& options);

// Each returns what went wrong, or null. statistics: six numbers per row, for the backward.
const char* decoupled_kl_forward(const RowPair& pair, const DecoupledKlOptions& options, float* workspace, float* loss,
                                 float* statistics, void* stream);
const char* decoupled_kl_backward(const RowPair& pair, const float* grad_loss, bool per_row, const float* statistics,
                                  void* stream);
// The loss and its gradient, which goes to pair.grad, times the loss weight. parts: the foreground's share of the loss,
// and the background's.
const char* decoupled_kl_one_pass(const RowPair& pair, const DecoupledKlOptions& options,
                                  const DeviceScalar& loss_weight, float* workspace, float* loss, float* parts,
                                  void* stream);

}  // namespace cuda
}  // namespace kdkernels
