// What soft_cross_entropy's registrations share: its options.
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

}  // namespace kdkernels
