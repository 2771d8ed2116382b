// What bounded_regression's registrations share: its options, and what its one pass is given.
#pragma once

#include "rows.h"

namespace kdkernels {

constexpr int64_t coordinates = 4;

inline BoundedRegressionOptions bounded_regression_options(
    const RowPair& pair, const Tensor& student, const Tensor& target, double margin, double bound_weight,
    const std::optional<Tensor>& bound_weight_tensor, double smooth_l1_weight,
    const std::optional<Tensor>& smooth_l1_weight_tensor, double beta, int64_t gate, int64_t reduction,
    std::optional<double> avg_factor, const std::optional<Tensor>& avg_factor_tensor) {
  check_same_sizes(student, target);
  STD_TORCH_CHECK(pair.columns == coordinates, "expected (..., 4)");
  STD_TORCH_CHECK(reduction != RowReduction::mean_elements, "reduction: a mean over coordinates has no kernel");
  return {margin,
          beta,
          device_scalar(bound_weight, bound_weight_tensor),
          device_scalar(smooth_l1_weight, smooth_l1_weight_tensor),
          enumerator("gate", gate, 3),
          row_reduction(reduction, avg_factor, avg_factor_tensor)};
}

struct BoundedRegressionCall : RowCall {
  RowView target;
  BoundedRegressionOptions options;
};
inline BoundedRegressionCall bounded_regression_call(
    Tensor student, Tensor teacher, Tensor target, double margin, double bound_weight,
    std::optional<Tensor> bound_weight_tensor, double smooth_l1_weight, std::optional<Tensor> smooth_l1_weight_tensor,
    double beta, int64_t gate, std::optional<Tensor> weight, int64_t reduction, std::optional<double> avg_factor,
    std::optional<Tensor> avg_factor_tensor, double loss_weight, std::optional<Tensor> loss_weight_tensor) {
  const RowCall call = row_call(student, teacher, weight, reduction, loss_weight, loss_weight_tensor);
  return {call, row_view(target),
          bounded_regression_options(call.pair, student, target, margin, bound_weight, bound_weight_tensor,
                                     smooth_l1_weight, smooth_l1_weight_tensor, beta, gate, reduction, avg_factor,
                                     avg_factor_tensor)};
}

}  // namespace kdkernels
