// The entry points of decoupled_kl.cu.
#pragma once

#include "../arguments.h"

namespace kdkernels {
namespace cuda {

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
