// bounded_regression for the CUDA dispatch key. Schema: kdkernels/losses/bounded_regression.py.
#include "../cuda/bounded_regression.h"

#include "bounded_regression.h"
#include "cuda.h"

namespace kdkernels {
namespace {

std::tuple<Tensor, Tensor> bounded_regression(Tensor student, Tensor teacher, Tensor target, double margin,
                                              double bound_weight, std::optional<Tensor> bound_weight_tensor,
                                              double smooth_l1_weight, std::optional<Tensor> smooth_l1_weight_tensor,
                                              double beta, int64_t gate, std::optional<Tensor> weight,
                                              int64_t reduction, std::optional<double> avg_factor,
                                              std::optional<Tensor> avg_factor_tensor) {
  const RowPair pair = row_pair(student, teacher, weight);
  STD_TORCH_CHECK(!pair.wide, "float64 has no kernel on a GPU");
  const BoundedRegressionOptions options =
      bounded_regression_options(pair, student, target, margin, bound_weight, bound_weight_tensor, smooth_l1_weight,
                                 smooth_l1_weight_tensor, beta, gate, reduction, avg_factor, avg_factor_tensor);
  const Gpu gpu(student);
  Tensor loss = new_loss(student, pair.wide, reduction);
  Tensor derivative = new_statistics(student, pair, coordinates);
  Tensor workspace = new_workspace(student, cuda::bounded_regression_workspace(pair.rows));
  check_launch(cuda::bounded_regression_forward(pair, row_view(target), options, floats_of(workspace), floats_of(loss),
                                                floats_of(derivative), gpu.stream()));
  return {loss, derivative};
}

Tensor bounded_regression_backward(Tensor grad_loss, Tensor student, Tensor derivative, bool per_row) {
  RowPair pair = row_pair(student, student, std::nullopt);
  STD_TORCH_CHECK(pair.columns == coordinates, "expected (..., 4)");
  STD_TORCH_CHECK(!pair.wide, "float64 has no kernel on a GPU");
  check_backward(pair, grad_loss, per_row, derivative, coordinates);
  const Gpu gpu(student);
  Tensor grad = torch::stable::empty_like(student);
  pair.grad = row_view(grad);
  check_launch(
      cuda::bounded_regression_backward(pair, floats_of(grad_loss), per_row, floats_of(derivative), gpu.stream()));
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
  const Gpu gpu(student);
  const RowPass pass = row_pass(call, torch::stable::empty_like);
  Tensor workspace = new_workspace(student, cuda::bounded_regression_workspace(call.pair.rows));
  check_launch(cuda::bounded_regression_one_pass(call.pair, call.target, call.options, call.loss_weight,
                                                 floats_of(workspace), floats_of(pass.loss), gpu.stream()));
  return {pass.loss, pass.grad};
}

}  // namespace
}  // namespace kdkernels

KD_GPU_LIBRARY(m) {
  m.impl("bounded_regression", TORCH_BOX(&kdkernels::bounded_regression));
  m.impl("bounded_regression_backward", TORCH_BOX(&kdkernels::bounded_regression_backward));
  m.impl("bounded_regression_one_pass", TORCH_BOX(&kdkernels::bounded_regression_one_pass));
}
