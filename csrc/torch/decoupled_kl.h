// What decoupled_kl's registrations share: its options, and what its one pass is given.
#pragma once

#include "rows.h"

namespace kdkernels {

inline DecoupledKlOptions decoupled_kl_options(const RowPair& pair, const Tensor& foreground, double foreground_weight,
                                               const std::optional<Tensor>& foreground_weight_tensor,
                                               double background_weight,
                                               const std::optional<Tensor>& background_weight_tensor,
                                               double foreground_temperature, double background_temperature,
                                               int64_t reduction) {
  STD_TORCH_CHECK(
      foreground.scalar_type() == ScalarType::Bool && foreground.is_contiguous() && foreground.numel() == pair.rows,
      "foreground: expected one contiguous bool per row");
  return DecoupledKlOptions{device_scalar(foreground_weight, foreground_weight_tensor),
                            device_scalar(background_weight, background_weight_tensor),
                            foreground_temperature,
                            background_temperature,
                            static_cast<const bool*>(foreground.data_ptr()),
                            enumerator("reduction", reduction, 4)};
}

struct DecoupledKlCall : RowCall {
  DecoupledKlOptions options;
};
inline DecoupledKlCall decoupled_kl_call(Tensor student, Tensor teacher, Tensor foreground, double foreground_weight,
                                         std::optional<Tensor> foreground_weight_tensor, double background_weight,
                                         std::optional<Tensor> background_weight_tensor, double foreground_temperature,
                                         double background_temperature, std::optional<Tensor> weight, int64_t reduction,
                                         double loss_weight, std::optional<Tensor> loss_weight_tensor) {
  const RowCall call = row_call(student, teacher, weight, reduction, loss_weight, loss_weight_tensor);
  return {call,
          decoupled_kl_options(call.pair, foreground, foreground_weight, foreground_weight_tensor, background_weight,
                               background_weight_tensor, foreground_temperature, background_temperature, reduction)};
}

}  // namespace kdkernels
