// soft_cross_entropy for the CPU dispatch key. Schema: kdkernels/losses/soft_cross_entropy.py.
#include "rows.h"

#include "../cpu/soft_cross_entropy.h"

namespace kdkernels {
namespace {

constexpr int64_t statistics_per_row = 8;  // cpu/soft_cross_entropy.cpp

const void* class_weight_data(const std::optional<Tensor>& class_weight, const RowPair& pair) {
  if (!class_weight.has_value()) return nullptr;
  STD_TORCH_CHECK(class_weight->is_contiguous() && class_weight->scalar_type() == arithmetic_dtype(pair.wide) &&
                      class_weight->numel() == pair.columns,
                  "class_weight: expected a contiguous value per class, in the dtype of the arithmetic");
  return class_weight->data_ptr();
}

std::tuple<Tensor, Tensor> soft_cross_entropy(Tensor student, Tensor teacher, std::optional<Tensor> class_weight,
                                              double temperature, std::optional<Tensor> target, double hard_weight,
                                              std::optional<Tensor> hard_weight_tensor, int64_t ignore_index,
                                              std::optional<Tensor> weight, int64_t reduction,
                                              std::optional<double> avg_factor,
                                              std::optional<Tensor> avg_factor_tensor) {
  const RowPair pair = row_pair(student, teacher, weight);
  const SoftCrossEntropyOptions options{temperature,
                                        class_weight_data(class_weight, pair),
                                        label_data(target, pair.rows),
                                        device_scalar(hard_weight, hard_weight_tensor),
                                        ignore_index,
                                        row_reduction(reduction, avg_factor, avg_factor_tensor)};
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

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("soft_cross_entropy", TORCH_BOX(&kdkernels::soft_cross_entropy));
  m.impl("soft_cross_entropy_backward", TORCH_BOX(&kdkernels::soft_cross_entropy_backward));
}
