// masked_mse for the CPU dispatch key. Schema: kdkernels/losses/masked_mse.py.
#include "../cpu/masked_mse.h"

#include "features.h"

namespace kdkernels {
namespace {

std::tuple<Tensor, Tensor> masked_mse(std::vector<Tensor> student, std::vector<Tensor> teacher,
                                      std::vector<Tensor> mask, double foreground_weight,
                                      std::optional<Tensor> foreground_weight_tensor, double background_weight,
                                      std::optional<Tensor> background_weight_tensor, int64_t normalizer,
                                      bool mean_levels) {
  const std::vector<FeatureLevel> levels = masked_levels(student, teacher, mask);
  const bool wide = is_wide(student[0]);
  const MaskedMseOptions options{device_scalar(foreground_weight, foreground_weight_tensor),
                                 device_scalar(background_weight, background_weight_tensor),
                                 enumerator("normalizer", normalizer, 3), mean_levels};
  Tensor loss = new_buffer(student[0], {}, arithmetic_dtype(wide));
  Tensor scales = new_buffer(student[0], {int64_t(levels.size()), 2}, arithmetic_dtype(wide));
  cpu::masked_mse_forward(levels.data(), int(levels.size()), options, wide, loss.data_ptr(), scales.data_ptr(),
                          torch_threads());
  return {loss, scales};
}

std::vector<Tensor> masked_mse_backward(Tensor grad_loss, std::vector<Tensor> student, std::vector<Tensor> teacher,
                                        std::vector<Tensor> mask, Tensor scales, std::vector<int64_t> level_of) {
  std::vector<Tensor> grads;
  if (student.empty()) return grads;
  std::vector<FeatureLevel> levels = masked_levels(student, teacher, mask);
  check_saved(grad_loss, scales, 2, level_of, student, [](size_t) { return 1; });
  for (size_t i = 0; i < levels.size(); ++i) {
    grads.push_back(new_gradient(student[i]));
    levels[i].grad = feature_view(grads[i]);
    const char* row = data_of(scales) + level_of[i] * 2 * int64_t(scales.element_size());
    cpu::masked_mse_backward(levels[i], is_wide(student[i]), grad_loss.data_ptr(), row, torch_threads());
  }
  return grads;
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("masked_mse", TORCH_BOX(&kdkernels::masked_mse));
  m.impl("masked_mse_backward", TORCH_BOX(&kdkernels::masked_mse_backward));
}
