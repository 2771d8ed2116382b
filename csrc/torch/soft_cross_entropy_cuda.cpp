// soft_cross_entropy for the CUDA dispatch key. Schema: kdkernels/losses/soft_cross_entropy.py.
#include "../cuda/soft_cross_entropy.h"

#include "cuda.h"
#include "soft_cross_entropy.h"

namespace kdkernels {
namespace {

constexpr int64_t statistics_per_row = 8;  // cuda/soft_cross_entropy.cu

std::tuple<Tensor, Tensor> soft_cross_entropy(Tensor student, Tensor teacher, std::optional<Tensor> class_weight,
                                              double temperature, std::optional<Tensor> target, double hard_weight,
                                              std::optional<Tensor> hard_weight_tensor, int64_t ignore_index,
                                              std::optional<Tensor> weight, int64_t reduction,
                                              std::optional<double> avg_factor,
                                              std::optional<Tensor> avg_factor_tensor) {
  const RowPair pair = row_pair(student, teacher, weight);
  STD_TORCH_CHECK(!pair.wide, "float64 has no kernel on a GPU");
  const SoftCrossEntropyOptions options =
      soft_cross_entropy_options(pair, class_weight, temperature, target, hard_weight, hard_weight_tensor, ignore_index,
                                 row_reduction(reduction, avg_factor, avg_factor_tensor));
  const Gpu gpu(student);
  Tensor loss = new_loss(student, pair.wide, reduction);
  Tensor statistics = new_statistics(student, pair, statistics_per_row);
  Tensor workspace = new_workspace(student, cuda::soft_cross_entropy_workspace(pair, options));
  check_launch(cuda::soft_cross_entropy_forward(pair, options, floats_of(workspace), floats_of(loss),
                                                floats_of(statistics), gpu.stream()));
  return {loss, statistics};
}

Tensor soft_cross_entropy_backward(Tensor grad_loss, Tensor student, Tensor teacher, std::optional<Tensor> class_weight,
                                   double temperature, std::optional<Tensor> target, Tensor statistics, bool per_row) {
  RowPair pair = row_pair(student, teacher, std::nullopt);
  STD_TORCH_CHECK(!pair.wide, "float64 has no kernel on a GPU");
  check_backward(pair, grad_loss, per_row, statistics, statistics_per_row);
  const Gpu gpu(student);
  Tensor grad = torch::stable::empty_like(student);
  pair.grad = row_view(grad);
  check_launch(cuda::soft_cross_entropy_backward(
      pair, temperature, static_cast<const float*>(class_weight_data(class_weight, pair)),
      label_data(target, pair.rows), floats_of(grad_loss), per_row, floats_of(statistics), gpu.stream()));
  return grad;
}

std::tuple<Tensor, Tensor> soft_cross_entropy_one_pass(
    Tensor student, Tensor teacher, std::optional<Tensor> class_weight, double temperature,
    std::optional<Tensor> target, double hard_weight, std::optional<Tensor> hard_weight_tensor, int64_t ignore_index,
    std::optional<Tensor> weight, int64_t reduction, std::optional<double> avg_factor,
    std::optional<Tensor> avg_factor_tensor, double loss_weight, std::optional<Tensor> loss_weight_tensor) {
  SoftCrossEntropyCall call = soft_cross_entropy_call(student, teacher, class_weight, temperature, target, hard_weight,
                                                      hard_weight_tensor, ignore_index, weight, reduction, avg_factor,
                                                      avg_factor_tensor, loss_weight, loss_weight_tensor);
  const Gpu gpu(student);
  const RowPass pass = row_pass(call, torch::stable::empty_like);
  Tensor workspace = new_workspace(student, cuda::soft_cross_entropy_workspace(call.pair, call.options));
  check_launch(cuda::soft_cross_entropy_one_pass(call.pair, call.options, call.loss_weight, floats_of(workspace),
                                                 floats_of(pass.loss), gpu.stream()));
  return {pass.loss, pass.grad};
}

}  // namespace
}  // namespace kdkernels

KD_GPU_LIBRARY(m) {
  m.impl("soft_cross_entropy", TORCH_BOX(&kdkernels::soft_cross_entropy));
  m.impl("soft_cross_entropy_backward", TORCH_BOX(&kdkernels::soft_cross_entropy_backward));
  m.impl("soft_cross_entropy_one_pass", TORCH_BOX(&kdkernels::soft_cross_entropy_one_pass));
}
