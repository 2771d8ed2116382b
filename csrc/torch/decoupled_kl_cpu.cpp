// decoupled_kl for the CPU dispatch key. Schema: kdkernels/losses/decoupled_kl.py.
#include "decoupled_kl.h"

#include "../cpu/decoupled_kl.h"

namespace kdkernels {
namespace {

constexpr int64_t statistics_per_row = 6;  // cpu/kl_rows.h

std::tuple<Tensor, Tensor> decoupled_kl(Tensor student, Tensor teacher, Tensor foreground, double foreground_weight,
                                        std::optional<Tensor> foreground_weight_tensor, double background_weight,
                                        std::optional<Tensor> background_weight_tensor, double foreground_temperature,
                                        double background_temperature, std::optional<Tensor> weight,
                                        int64_t reduction) {
  const RowPair pair = row_pair(student, teacher, weight);
  const DecoupledKlOptions options =
      decoupled_kl_options(pair, foreground, foreground_weight, foreground_weight_tensor, background_weight,
                           background_weight_tensor, foreground_temperature, background_temperature, reduction);
  Tensor loss = new_loss(student, pair.wide, reduction);
  Tensor statistics = new_statistics(student, pair, statistics_per_row);
  cpu::decoupled_kl_forward(pair, options, loss.data_ptr(), statistics.data_ptr(), torch_threads());
  return {loss, statistics};
}

Tensor decoupled_kl_backward(Tensor grad_loss, Tensor student, Tensor teacher, Tensor statistics, bool per_row) {
  RowPair pair = row_pair(student, teacher, std::nullopt);
  check_backward(pair, grad_loss, per_row, statistics, statistics_per_row);
  Tensor grad = row_gradient(student, pair);
  cpu::decoupled_kl_backward(pair, grad_loss.data_ptr(), per_row, statistics.data_ptr(), torch_threads());
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
  const RowPass pass = row_pass(call, new_gradient);
  Tensor parts = new_buffer(student, {2}, ScalarType::Float);
  cpu::decoupled_kl_one_pass(call.pair, call.options, call.loss_weight, floats_of(pass.loss), floats_of(parts),
                             torch_threads());
  return {pass.loss, parts, pass.grad};
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("decoupled_kl", TORCH_BOX(&kdkernels::decoupled_kl));
  m.impl("decoupled_kl_backward", TORCH_BOX(&kdkernels::decoupled_kl_backward));
  m.impl("decoupled_kl_one_pass", TORCH_BOX(&kdkernels::decoupled_kl_one_pass));
}
