// temperature_kl for the CPU dispatch key. Schema: kdkernels/losses/temperature_kl.py.
#include "rows.h"

#include "../cpu/temperature_kl.h"

namespace kdkernels {
namespace {

constexpr int64_t statistics_per_row = 6;  // cpu/kl_rows.h

std::tuple<Tensor, Tensor> temperature_kl(Tensor student, Tensor teacher, double temperature,
                                          std::optional<Tensor> weight, int64_t reduction,
                                          std::optional<double> avg_factor, std::optional<Tensor> avg_factor_tensor) {
  const RowPair pair = row_pair(student, teacher, weight);
  Tensor loss = new_loss(student, pair.wide, reduction);
  Tensor statistics = new_statistics(student, pair, statistics_per_row);
  cpu::temperature_kl_forward(pair, temperature, row_reduction(reduction, avg_factor, avg_factor_tensor),
                              loss.data_ptr(), statistics.data_ptr(), torch_threads());
  return {loss, statistics};
}

Tensor temperature_kl_backward(Tensor grad_loss, Tensor student, Tensor teacher, Tensor statistics, bool per_row) {
  RowPair pair = row_pair(student, teacher, std::nullopt);
  check_backward(pair, grad_loss, per_row, statistics, statistics_per_row);
  Tensor grad = row_gradient(student, pair);
  cpu::temperature_kl_backward(pair, grad_loss.data_ptr(), per_row, statistics.data_ptr(), torch_threads());
  return grad;
}

std::tuple<Tensor, Tensor> temperature_kl_one_pass(Tensor student, Tensor teacher, double temperature,
                                                   std::optional<Tensor> weight, int64_t reduction,
                                                   std::optional<double> avg_factor,
                                                   std::optional<Tensor> avg_factor_tensor, double loss_weight,
                                                   std::optional<Tensor> loss_weight_tensor) {
  TemperatureCall call = temperature_call(student, teacher, temperature, weight, reduction, avg_factor,
                                          avg_factor_tensor, loss_weight, loss_weight_tensor);
  const RowPass pass = row_pass(call, new_gradient);
  cpu::temperature_kl_one_pass(call.pair, call.temperature, call.reduction, call.loss_weight, floats_of(pass.loss),
                               torch_threads());
  return {pass.loss, pass.grad};
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("temperature_kl", TORCH_BOX(&kdkernels::temperature_kl));
  m.impl("temperature_kl_backward", TORCH_BOX(&kdkernels::temperature_kl_backward));
  m.impl("temperature_kl_one_pass", TORCH_BOX(&kdkernels::temperature_kl_one_pass));
}
