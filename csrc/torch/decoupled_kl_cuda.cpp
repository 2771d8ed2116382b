// decoupled_kl for the CUDA dispatch key. Schema: kdkernels/losses/decoupled_kl.py.
#include "../cuda/decoupled_kl.h"

#include "cuda.h"
#include "decoupled_kl.h"

namespace kdkernels {
namespace {

constexpr int64_t statistics_per_row = 6;  // cuda/kl_rows.h

std::tuple<Tensor, Tensor> decoupled_kl(Tensor student, Tensor teacher, Tensor foreground, double foreground_weight,
                                        std::optional<Tensor> foreground_weight_tensor, double background_weight,
                                        std::optional<Tensor> background_weight_tensor, double foreground_temperature,
                                        double background_temperature, std::optional<Tensor> weight,
                                        int64_t reduction) {
  const RowPair pair = row_pair(student, teacher, weight);
  STD_TORCH_CHECK(!pair.wide, "float64 has no kernel on a GPU");
  const DecoupledKlOptions options =
      decoupled_kl_options(pair, foreground, foreground_weight, foreground_weight_tensor, background_weight,
                           background_weight_tensor, foreground_temperature, background_temperature, reduction);
  const Gpu gpu(student);
  Tensor loss = new_loss(student, pair.wide, reduction);
  Tensor statistics = new_statistics(student, pair, statistics_per_row);
  Tensor workspace = new_workspace(student, cuda::decoupled_kl_workspace(pair, options));
  check_launch(cuda::decoupled_kl_forward(pair, options, floats_of(workspace), floats_of(loss), floats_of(statistics),
                                          gpu.stream()));
  return {loss, statistics};
}

Tensor decoupled_kl_backward(Tensor grad_loss, Tensor student, Tensor teacher, Tensor statistics, bool per_row) {
  RowPair pair = row_pair(student, teacher, std::nullopt);
  STD_TORCH_CHECK(!pair.wide, "float64 has no kernel on a GPU");
  check_backward(pair, grad_loss, per_row, statistics, statistics_per_row);
  const Gpu gpu(student);
  Tensor grad = torch::stable::empty_like(student);
  pair.grad = row_view(grad);
  check_launch(cuda::decoupled_kl_backward(pair, floats_of(grad_loss), per_row, floats_of(statistics), gpu.stream()));
  return grad;
}

std::tuple<Tensor, Tensor, Tensor> decoupled_kl_one_pass(
    Tensor student, Tensor teacher, Tensor foreground, double foreground_weight,
    std::optional<Tensor> foreground_weight_tensor, double background_weight,
    std::optional<Tensor> background_weight_tensor, double foreground_temperature, double background_temperature,
    std::optional<Tensor> weight, int64_t reduction, double loss_weight, std::optional<Tensor> loss_weight_tensor) {
  DecoupledKlCall call = decoupled_kl_call(student, teacher, foreground, foreground_weight, foreground_weight_tensor,
                                           background_weight, background_weight_tensor, foreground_temperature,
                                           background_temperature, weight, reduction, loss_weight, loss_weight_tensor);
  const Gpu gpu(student);
  const RowPass pass = row_pass(call, torch::stable::empty_like);
  Tensor parts = new_buffer(student, {2}, ScalarType::Float);
  Tensor workspace = new_workspace(student, cuda::decoupled_kl_workspace(call.pair, call.options));
  check_launch(cuda::decoupled_kl_one_pass(call.pair, call.options, call.loss_weight, floats_of(workspace),
                                           floats_of(pass.loss), floats_of(parts), gpu.stream()));
  return {pass.loss, parts, pass.grad};
}

}  // namespace
}  // namespace kdkernels

KD_GPU_LIBRARY(m) {
  m.impl("decoupled_kl", TORCH_BOX(&kdkernels::decoupled_kl));
  m.impl("decoupled_kl_backward", TORCH_BOX(&kdkernels::decoupled_kl_backward));
  m.impl("decoupled_kl_one_pass", TORCH_BOX(&kdkernels::decoupled_kl_one_pass));
}
