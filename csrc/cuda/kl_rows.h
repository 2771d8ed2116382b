// The entry points of kl_rows.cu: the row of temperature_kl and decoupled_kl.
#pragma once

#include "../arguments.h"
#include "row_sums.h"

namespace kdkernels {
namespace cuda {

// What the backward needs of a row: gradient = coefficient * (exp2((s - shift_s) k) inverse_s - the same of t).
enum KlStatistic : int { kl_shift_s, kl_inverse_s, kl_shift_t, kl_inverse_t, kl_coefficient, kl_k, kl_statistics };

// Rows of one kind, or of two, background and foreground.
struct KlRegions {
  const bool* foreground;  // one per row; null: all rows are of the first kind
  double temperature[2];
  RowReduction reduction;  // where all rows are of one kind
  DeviceScalar weight[2];  // where there are two
  bool divide;             // each by its own number of rows
};

// Floats of workspace that a forward needs; one pass too, with its gradient in pair.grad.
int64_t kl_rows_workspace(const RowPair& pair, const KlRegions& regions);

// Each returns what went wrong, or null.
const char* kl_rows_forward(const RowPair& pair, const KlRegions& regions, float* workspace, float* loss,
                            float* statistics, void* stream);
const char* kl_rows_backward(const RowPair& pair, const float* grad_loss, bool per_row, const float* statistics,
                             void* stream);
// The gradient, which goes to pair.grad, and what adds up to the loss, both times the loss weight. Of two parts, the
// first is the foreground's.
const char* kl_rows_sums(const RowPair& pair, const KlRegions& regions, const DeviceScalar& loss_weight,
                         float* workspace, RowSums* sums, void* stream);
// The same, and the sum. parts, unless null: the foreground's share of the loss, and the rest.
const char* kl_rows_one_pass(const RowPair& pair, const KlRegions& regions, const DeviceScalar& loss_weight,
                             float* workspace, float* loss, float* parts, void* stream);

}  // namespace cuda
}  // namespace kdkernels
