// What soft_cross_entropy's registrations share: its options, and what its one pass is given.
#pragma once

#include "rows.h"

namespace kdkernels {

inline const void* class_weight_data(const std::optional<Tensor>& class_weight, const RowPair& pair) {
  if (!class_weight.has_value()) return nullptr;
  STD_TORCH_CHECK(class_weight->is_contiguous() && class_weight->scalar_type() == arithmetic_dtype(pair.wide) &&
                      class_weight->numel() == pair.columns,
                  "class_weight: expected a contiguous value per class, in the dtype of the arithmetic");
  return class_weight->data_ptr();
}

inline SoftCrossEntropyOptions soft_cross_entropy_options(const RowPair& pair,
                                                          const std::optional<Tensor>& class_weight, double temperature,
                                                          const std::optional<Tensor>& target, double hard_weight,
                                                          const std::optional<Tensor>& hard_weight_tensor,
                                                          int64_t ignore_index, const RowReduction& reduction) {
  return SoftCrossEntropyOptions{temperature,
                                 class_weight_data(class_weight, pair),
                                 label_data(target, pair.rows),
                                 device_scalar(hard_weight, hard_weight_tensor),
                                 ignore_index,
                                 reduction};
}

struct SoftCrossEntropyCall : RowCall {
  SoftCrossEntropyOptions options;
};
inline SoftCrossEntropyCall soft_cross_entropy_call(Tensor student, Tensor teacher, std::optional<Tensor> class_weight,
                                                    double temperature, std::optional<Tensor> target,
                                                    double hard_weight, std::optional<Tensor> hard_weight_tensor,
                                                    int64_t ignore_index, std::optional<Tensor> weight,
                                                    int64_t reduction, std::optional<double> avg_factor,
                                                    std::optional<Tensor> avg_factor_tensor, double loss_weight,
                                                    std::optional<Tensor> loss_weight_tensor) {
  const RowCall call = row_call(student, teacher, weight, reduction, loss_weight, loss_weight_tensor);
  return {call,
          soft_cross_entropy_options(call.pair, class_weight, temperature, target, hard_weight, hard_weight_tensor,
                                     ignore_index, row_reduction(reduction, avg_factor, avg_factor_tensor))};
}

}  // namespace kdkernels
