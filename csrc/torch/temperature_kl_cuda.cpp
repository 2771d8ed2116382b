// temperature_kl for the CUDA dispatch key. Schema: kdkernels/losses/temperature_kl.py.
#include "../cuda/temperature_kl.h"

#include "cuda.h"
#include "rows.h"

namespace kdkernels {
namespace {

constexpr int64_t statistics_per_row = 6;  // cuda/kl_rows.h

std::tuple<Tensor, Tensor> temperature_kl(Tensor student, Tensor teacher, double temperature,
                                          std::optional<Tensor> weight, int64_t reduction,
                                          std::optional<double> avg_factor, std::optional<Tensor> avg_factor_tensor) {
  const RowPair pair = row_pair(student, teacher, weight);
  STD_TORCH_CHECK(!pair.wide, "float64 has no kernel on a GPU");
  const RowReduction reduced = row_reduction(reduction, avg_factor, avg_factor_tensor);
  const Gpu gpu(student);
  Tensor loss = new_loss(student, pair.wide, reduction);
  Tensor statistics = new_statistics(student, pair, statistics_per_row);
  Tensor workspace = new_workspace(student, cuda::temperature_kl_workspace(pair));
  check_launch(cuda::temperature_kl_forward(pair, temperature, reduced, floats_of(workspace), floats_of(loss),
                                            floats_of(statistics), gpu.stream()));
  return {loss, statistics};
}

Tensor temperature_kl_backward(Tensor grad_loss, Tensor student, Tensor teacher, Tensor statistics, bool per_row) {
  RowPair pair = row_pair(student, teacher, std::nullopt);
  STD_TORCH_CHECK(!pair.wide, "float64 has no kernel on a GPU");
  check_backward(pair, grad_loss, per_row, statistics, statistics_per_row);
  const Gpu gpu(student);
  Tensor grad = torch::stable::empty_like(student);
  pair.grad = row_view(grad);
  check_launch(cuda::temperature_kl_backward(pair, floats_of(grad_loss), per_row, floats_of(statistics), gpu.stream()));
  return grad;
}

std::tuple<Tensor, Tensor> temperature_kl_one_pass(Tensor student, Tensor teacher, double temperature,
                                                   std::optional<Tensor> weight, int64_t reduction,
                                                   std::optional<double> avg_factor,
                                                   std::optional<Tensor> avg_factor_tensor, double loss_weight,
                                                   std::optional<Tensor> loss_weight_tensor) {
  TemperatureCall call = temperature_call(student, teacher, temperature, weight, reduction, avg_factor,
                                          avg_factor_tensor, loss_weight, loss_weight_tensor);
  const Gpu gpu(student);
  const RowPass pass = row_pass(call, torch::stable::empty_like);
  Tensor workspace = new_workspace(student, cuda::temperature_kl_workspace(call.pair));
  check_launch(cuda::temperature_kl_one_pass(call.pair, call.temperature, call.reduction, call.loss_weight,
                                             floats_of(workspace), floats_of(pass.loss), gpu.stream()));
  return {pass.loss, pass.grad};
}

}  // namespace
}  // namespace kdkernels

KD_GPU_LIBRARY(m) {
  m.impl("temperature_kl", TORCH_BOX(&kdkernels::temperature_kl));
  m.impl("temperature_kl_backward", TORCH_BOX(&kdkernels::temperature_kl_backward));
  m.impl("temperature_kl_one_pass", TORCH_BOX(&kdkernels::temperature_kl_one_pass));
}
