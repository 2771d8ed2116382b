// binary_kl for the CPU dispatch key. Schema: kdkernels/losses/binary_kl.py.
#include "rows.h"

#include "../cpu/binary_kl.h"

namespace kdkernels {
namespace {

std::tuple<Tensor, Tensor> binary_kl(Tensor student, Tensor teacher, double temperature, std::optional<Tensor> weight,
                                     int64_t reduction, std::optional<double> avg_factor,
                                     std::optional<Tensor> avg_factor_tensor) {
  const RowPair pair = row_pair(student, teacher, weight);
  Tensor loss = new_loss(student, pair.wide, reduction);
  Tensor coefficients = new_statistics(student, pair, 1);
  cpu::binary_kl_forward(pair, temperature, row_reduction(reduction, avg_factor, avg_factor_tensor), loss.data_ptr(),
                         coefficients.data_ptr(), torch_threads());
  return {loss, coefficients};
}

Tensor binary_kl_backward(Tensor grad_loss, Tensor student, Tensor teacher, double temperature, Tensor coefficients,
                          bool per_row) {
  RowPair pair = row_pair(student, teacher, std::nullopt);
  check_backward(pair, grad_loss, per_row, coefficients, 1);
  Tensor grad = row_gradient(student, pair);
  cpu::binary_kl_backward(pair, temperature, grad_loss.data_ptr(), per_row, coefficients.data_ptr(), torch_threads());
  return grad;
}

std::tuple<Tensor, Tensor> binary_kl_one_pass(Tensor student, Tensor teacher, double temperature,
                                              std::optional<Tensor> weight, int64_t reduction,
                                              std::optional<double> avg_factor, std::optional<Tensor> avg_factor_tensor,
                                              double loss_weight, std::optional<Tensor> loss_weight_tensor) {
  TemperatureCall call = temperature_call(student, teacher, temperature, weight, reduction, avg_factor,
                                          avg_factor_tensor, loss_weight, loss_weight_tensor);
  const RowPass pass = row_pass(call, new_gradient);
  cpu::binary_kl_one_pass(call.pair, call.temperature, call.reduction, call.loss_weight, floats_of(pass.loss),
                          torch_threads());
  return {pass.loss, pass.grad};
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("binary_kl", TORCH_BOX(&kdkernels::binary_kl));
  m.impl("binary_kl_backward", TORCH_BOX(&kdkernels::binary_kl_backward));
  m.impl("binary_kl_one_pass", TORCH_BOX(&kdkernels::binary_kl_one_pass));
}
