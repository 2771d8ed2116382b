// Decoupled KL on the GPU: temperature_kl's rows, of two kinds, of which the foreground is counted.
#include "decoupled_kl.h"

#include "primitives.cuh"

KD_NAMESPACE_BEGIN

int64_t decoupled_kl_workspace(const RowPair& pair, const DecoupledKlOptions& options) {
  return kl_rows_workspace(pair, decoupled_kl_regions(options));
}

const char* decoupled_kl_forward(const RowPair& pair, const DecoupledKlOptions& options, float* workspace, float* loss,
                                 float* statistics, void* stream) {
  return kl_rows_forward(pair, decoupled_kl_regions(options), workspace, loss, statistics, stream);
}

const char* decoupled_kl_one_pass(const RowPair& pair, const DecoupledKlOptions& options,
                                  const DeviceScalar& loss_weight, float* workspace, float* loss, float* parts,
                                  void* stream) {
  return kl_rows_one_pass(pair, decoupled_kl_regions(options), loss_weight, workspace, loss, parts, stream);
}

const char* decoupled_kl_backward(const RowPair& pair, const float* grad_loss, bool per_row, const float* statistics,
                                  void* stream) {
  return kl_rows_backward(pair, grad_loss, per_row, statistics, stream);
}

KD_NAMESPACE_END
