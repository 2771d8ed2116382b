// bounded_regression for the CPU dispatch key. Schema: kdkernels/losses/bounded_regression.py.
#include "../cpu/bounded_regression.h"

#include "bounded_regression.h"

namespace kdkernels {
namespace {

std::tuple<Tensor, Tensor> bounded_regression(Tensor student, Tensor teacher, Tensor target, double margin,
                                              double bound_weight, std::optional<Tensor> bound_weight_tensor,
                                              double smooth_l1_weight, std::optional<Tensor> smooth_l1_weight_tensor,
                                              double beta, int64_t gate, std::optional<Tensor> weight,
                                              int64_t reduction, std::optional<double> avg_factor,
                                              std::optional<Tensor> avg_factor_tensor) {
  const RowPair pair = row_pair(student, teacher, weight);
  const BoundedRegressionOptions options =
      bounded_regression_options(pair, student, target, margin, bound_weight, bound_weight_tensor, smooth_l1_weight,
                                 smooth_l1_weight_tensor, beta, gate, reduction, avg_factor, avg_factor_tensor);
  Tensor loss = new_loss(student, pair.wide, reduction);
  Tensor derivative = new_statistics(student, pair, coordinates);
  cpu::bounded_regression_forward(pair, row_view(target), options, loss.data_ptr(), row_view(derivative),
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

std::tuple<Tensor, Tensor> bounded_regression_one_pass(
    Tensor student, Tensor teacher, Tensor target, double margin, double bound_weight,
    std::optional<Tensor> bound_weight_tensor, double smooth_l1_weight, std::optional<Tensor> smooth_l1_weight_tensor,
    double beta, int64_t gate, std::optional<Tensor> weight, int64_t reduction, std::optional<double> avg_factor,
    std::optional<Tensor> avg_factor_tensor, double loss_weight, std::optional<Tensor> loss_weight_tensor) {
  BoundedRegressionCall call = bounded_regression_call(
      student, teacher, target, margin, bound_weight, bound_weight_tensor, smooth_l1_weight, smooth_l1_weight_tensor,
      beta, gate, weight, reduction, avg_factor, avg_factor_tensor, loss_weight, loss_weight_tensor);
  const RowPass pass = row_pass(call, new_gradient);
  // The weight enters both terms' weights, which the host may read, and so the derivative.
  const double whole = call.loss_weight.get();
  call.options.bound_weight = {whole * call.options.bound_weight.get(), nullptr};
  call.options.smooth_l1_weight = {whole * call.options.smooth_l1_weight.get(), nullptr};
  cpu::bounded_regression_forward(call.pair, call.target, call.options, pass.loss.data_ptr(), call.pair.grad,
                                  torch_threads());
  return {pass.loss, pass.grad};
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("bounded_regression", TORCH_BOX(&kdkernels::bounded_regression));
  m.impl("bounded_regression_backward", TORCH_BOX(&kdkernels::bounded_regression_backward));
  m.impl("bounded_regression_one_pass", TORCH_BOX(&kdkernels::bounded_regression_one_pass));
}
