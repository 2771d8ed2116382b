// bounded_regression for the CPU dispatch key. Schema: kdkernels/losses/bounded_regression.py.
#include "rows.h"

#include "../cpu/bounded_regression.h"

namespace kdkernels {
namespace {

constexpr int64_t coordinates = 4;

std::tuple<Tensor, Tensor> bounded_regression(Tensor student, Tensor teacher, Tensor target, double margin,
                                              double bound_weight, std::optional<Tensor> bound_weight_tensor,
                                              double smooth_l1_weight, std::optional<Tensor> smooth_l1_weight_tensor,
                                              double beta, int64_t gate, std::optional<Tensor> weight,
                                              int64_t reduction, std::optional<double> avg_factor,
                                              std::optional<Tensor> avg_factor_tensor) {
  const RowPair pair = row_pair(student, teacher, weight);
  check_same_sizes(student, target);
  STD_TORCH_CHECK(pair.columns == coordinates, "expected (..., 4)");
  const BoundedRegressionOptions options{margin,
                                         beta,
                                         device_scalar(bound_weight, bound_weight_tensor),
                                         device_scalar(smooth_l1_weight, smooth_l1_weight_tensor),
                                         enumerator("gate", gate, 3),
                                         row_reduction(reduction, avg_factor, avg_factor_tensor)};
  Tensor loss = new_loss(student, pair.wide, reduction);
  Tensor derivative = new_statistics(student, pair, coordinates);
  cpu::bounded_regression_forward(pair, row_view(target), options, loss.data_ptr(), derivative.data_ptr(),
                                  torch_threads());
  return {loss, derivative};
}

Tensor bounded_regression_backward(Tensor grad_loss, Tensor student, Tensor derivative, bool per_row) {
  RowPair pair = row_pair(student, student, std::nullopt);
  STD_TORCH_CHECK(pair.columns == coordinates, "expected (..., 4)");
  check_backward(pair, grad_loss, per_row, derivative, coordinates);
  Tensor grad = row_gradient(student, pair);
  cpu::bounded_regression_backward(pair, grad_loss.data_ptr(), per_row, derivative.data_ptr(), torch_threads());
  return grad;
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("bounded_regression", TORCH_BOX(&kdkernels::bounded_regression));
  m.impl("bounded_regression_backward", TORCH_BOX(&kdkernels::bounded_regression_backward));
}
