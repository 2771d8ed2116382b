// soft_cross_entropy for the CPU dispatch key. Schema: kdkernels/losses/soft_cross_entropy.py.
#include "soft_cross_entropy.h"

#include "../cpu/soft_cross_entropy.h"

namespace kdkernels {
namespace {

constexpr int64_t statistics_per_row = 8;  // cpu/soft_cross_entropy.cpp

std::tuple<Tensor, Tensor> soft_cross_entropy(Tensor student, Tensor teacher, std::optional<Tensor> class_weight,
                                              double temperature, std::optional<Tensor> target, double hard_weight,
                                              std::optional<Tensor> hard_weight_tensor, int64_t ignore_index,
                                              std::optional<Tensor> weight, int64_t reduction,
                                              std::optional<double> avg_factor,
                                              std::optional<Tensor> avg_factor_tensor) {
  const RowPair pair = row_pair(student, teacher, weight);
  const SoftCrossEntropyOptions options =
      soft_cross_entropy_options(pair, class_weight, temperature, target, hard_weight, hard_weight_tensor, ignore_index,
                                 row_reduction(reduction, avg_factor, avg_factor_tensor));
  Tensor loss = new_loss(student, pair.wide, reduction);
  Tensor statistics = new_statistics(student, pair, statistics_per_row);
  cpu::soft_cross_entropy_forward(pair, options, loss.data_ptr(), statistics.data_ptr(), torch_threads());
  return {loss, statistics};
}

Tensor soft_cross_entropy_backward(Tensor grad_loss, Tensor student, Tensor teacher, std::optional<Tensor> class_weight,
                                   double temperature, std::optional<Tensor> target, Tensor statistics, bool per_row) {
  RowPair pair = row_pair(student, teacher, std::nullopt);
  check_backward(pair, grad_loss, per_row, statistics, statistics_per_row);
  Tensor grad = row_gradient(student, pair);
  cpu::soft_cross_entropy_backward(pair, temperature, class_weight_data(class_weight, pair),
                                   label_data(target, pair.rows), grad_loss.data_ptr(), per_row, statistics.data_ptr(),
                                   torch_threads());
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
  const RowPass pass = row_pass(call, new_gradient);
  cpu::soft_cross_entropy_one_pass(call.pair, call.options, call.loss_weight, floats_of(pass.loss), torch_threads());
  return {pass.loss, pass.grad};
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("soft_cross_entropy", TORCH_BOX(&kdkernels::soft_cross_entropy));
  m.impl("soft_cross_entropy_backward", TORCH_BOX(&kdkernels::soft_cross_entropy_backward));
  m.impl("soft_cross_entropy_one_pass", TORCH_BOX(&kdkernels::soft_cross_entropy_one_pass));
}
