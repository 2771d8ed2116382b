// Class-weighted soft cross-entropy with a hard part, on the GPU: each logit is read once forward, once backward; in
// one pass, a row's gradient follows its sums. The labels that are not ignored are counted, where the mean divides by
// them.
#include "soft_cross_entropy.cuh"

#include "row_gradients.cuh"

KD_NAMESPACE_BEGIN

namespace {

struct SoftGradient {
  using Row = SoftGradientRow;
  static constexpr int batch = 1;
  float k;
  int columns;
  const float* class_weight;
  const int64_t* target;
  const float* statistics;
  const float* grad_loss;
  bool per_row;

  KD_DEVICE SoftGradientRow row(int64_t r) const {
    return soft_gradient_row(statistics + r * statistics_per_row, grad_loss[per_row ? r : 0],
                             label_of(target, r, columns));
  }
  KD_DEVICE float operator()(const SoftGradientRow& row, float s, float t, int column) const {
    const float w = class_weight && column >= 0 && column < columns ? class_weight[column] : 1.0f;
    return soft_gradient(row, s, t, column, w, k);
  }
};

// Leaves the sums of the rows' values; `keep`: each value instead, at `values`.
template <bool one_pass>
const char* launch_soft(const RowPair& pair, const SoftCrossEntropyOptions& options, const DeviceScalar& loss_weight,
                        float* workspace, bool keep, float* values, float* statistics, RowSums* sums, void* stream) {
  const RowPlan plan = plan_rows(pair, rows_capability());
  float* counts = workspace + rows_workspace(plan);
  const SoftLoss<one_pass> loss = soft_loss<one_pass>(plan, pair, options, loss_weight, counts, statistics);
  const CountedRow counted{options.target, options.ignore_index};
  if (const char* e = launch_count_rows(counted, pair.rows, loss.counters, counts, stream)) return e;
  return launch_rows(plan, pair, loss, keep, workspace, values, sums, stream);
}

}  // namespace

int64_t soft_cross_entropy_workspace(const RowPair& pair, const SoftCrossEntropyOptions& options) {
  const RowPlan plan = plan_rows(pair, rows_capability());
  return rows_workspace(plan) + soft_counters(plan, pair, options);
}

const char* soft_cross_entropy_forward(const RowPair& pair, const SoftCrossEntropyOptions& options, float* workspace,
                                       float* result, float* statistics, void* stream) {
  RowSums sums;
  const bool keep = options.reduction.kind == RowReduction::none;
  const DeviceScalar one{1, nullptr};
  if (const char* e = launch_soft<false>(pair, options, one, workspace, keep, result, statistics, &sums, stream)) {
    return e;
  }
  return keep ? nullptr : launch_finish_rows(sums.values, sums.blocks, result, stream);
}

const char* soft_cross_entropy_sums(const RowPair& pair, const SoftCrossEntropyOptions& options,
                                    const DeviceScalar& loss_weight, float* workspace, RowSums* sums, void* stream) {
  return launch_soft<true>(pair, options, loss_weight, workspace, false, nullptr, nullptr, sums, stream);
}

const char* soft_cross_entropy_one_pass(const RowPair& pair, const SoftCrossEntropyOptions& options,
                                        const DeviceScalar& loss_weight, float* workspace, float* result,
                                        void* stream) {
  RowSums sums;
  if (const char* e = soft_cross_entropy_sums(pair, options, loss_weight, workspace, &sums, stream)) return e;
  return launch_finish_rows(sums.values, sums.blocks, result, stream);
}

const char* soft_cross_entropy_backward(const RowPair& pair, double temperature, const float* class_weight,
                                        const int64_t* target, const float* grad_loss, bool per_row,
                                        const float* statistics, void* stream) {
  return launch_gradients(pair,
                          SoftGradient{float(log2_e / temperature), int(pair.columns), class_weight, target, statistics,
                                       grad_loss, per_row},
                          stream);
}

KD_NAMESPACE_END
