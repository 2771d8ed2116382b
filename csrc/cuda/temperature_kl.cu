// Temperature KL on the GPU: all rows are of one kind.
#include "temperature_kl.h"

#include "primitives.cuh"

KD_NAMESPACE_BEGIN

int64_t temperature_kl_workspace(const RowPair& pair) { return kl_rows_workspace(pair, temperature_kl_regions(1, {})); }

const char* temperature_kl_forward(const RowPair& pair, double temperature, const RowReduction& reduction,
                                   float* workspace, float* loss, float* statistics, void* stream) {
  return kl_rows_forward(pair, temperature_kl_regions(temperature, reduction), workspace, loss, statistics, stream);
}

const char* temperature_kl_one_pass(const RowPair& pair, double temperature, const RowReduction& reduction,
                                    const DeviceScalar& loss_weight, float* workspace, float* loss, void* stream) {
  return kl_rows_one_pass(pair, temperature_kl_regions(temperature, reduction), loss_weight, workspace, loss, nullptr,
                          stream);
}

const char* temperature_kl_backward(const RowPair& pair, const float* grad_loss, bool per_row, const float* statistics,
                                    void* stream) {
  return kl_rows_backward(pair, grad_loss, per_row, statistics, stream);
}

KD_NAMESPACE_END
