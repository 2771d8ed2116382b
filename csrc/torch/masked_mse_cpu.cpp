// masked_mse for the CPU dispatch key. Schema: kdkernels/losses/masked_mse.py.
#include "tensors.h"

#include "../cpu/masked_mse.h"

namespace kdkernels {
namespace {

FeatureLevel masked_level(const Tensor& student, const Tensor& teacher, const Tensor& mask, bool wide) {
  FeatureLevel level = feature_level(student, teacher);
  STD_TORCH_CHECK(mask.is_contiguous() && mask.scalar_type() == arithmetic_dtype(wide), "mask: expected a contiguous ",
                  wide ? "float64" : "float32", " tensor");
  STD_TORCH_CHECK(mask.dim() == 3 && mask.size(0) == level.n && mask.size(1) == level.h && mask.size(2) == level.w,
                  "mask: expected (N, H, W)");
  level.mask = mask.data_ptr();
  return level;
}

std::tuple<Tensor, Tensor> masked_mse(std::vector<Tensor> student, std::vector<Tensor> teacher,
                                      std::vector<Tensor> mask, double foreground_weight,
                                      std::optional<Tensor> foreground_weight_tensor, double background_weight,
                                      std::optional<Tensor> background_weight_tensor, int64_t normalizer,
                                      bool mean_levels) {
  const size_t count = student.size();
  STD_TORCH_CHECK(count > 0 && teacher.size() == count && mask.size() == count,
                  "one teacher and mask per student level");
  const bool wide = is_wide(student[0]);
  std::vector<FeatureLevel> levels;
  for (size_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(is_wide(student[i]) == wide, "levels mix float64 with other dtypes");
    levels.push_back(masked_level(student[i], teacher[i], mask[i], wide));
  }
  const MaskedMseOptions options{device_scalar(foreground_weight, foreground_weight_tensor),
                                 device_scalar(background_weight, background_weight_tensor),
                                 enumerator("normalizer", normalizer, 3), mean_levels};
  Tensor loss = new_buffer(student[0], {}, arithmetic_dtype(wide));
  Tensor scales = new_buffer(student[0], {int64_t(count), 2}, arithmetic_dtype(wide));
  cpu::masked_mse_forward(levels.data(), int(count), options, wide, loss.data_ptr(), scales.data_ptr(),
                          torch_threads());
  return {loss, scales};
}

std::vector<Tensor> masked_mse_backward(Tensor grad_loss, std::vector<Tensor> student, std::vector<Tensor> teacher,
                                        std::vector<Tensor> mask, Tensor scales, std::vector<int64_t> level_of) {
  STD_TORCH_CHECK(
      teacher.size() == student.size() && mask.size() == student.size() && level_of.size() == student.size(),
      "one teacher, mask and level index per student");
  std::vector<Tensor> grads;
  for (size_t i = 0; i < student.size(); ++i) {
    const bool wide = is_wide(student[i]);
    STD_TORCH_CHECK(grad_loss.scalar_type() == arithmetic_dtype(wide) && grad_loss.numel() == 1 &&
                        scales.scalar_type() == arithmetic_dtype(wide) && scales.is_contiguous() && scales.dim() == 2 &&
                        scales.size(1) == 2 && level_of[i] >= 0 && level_of[i] < scales.size(0),
                    "grad_loss or scales do not belong to this loss");
    FeatureLevel level = masked_level(student[i], teacher[i], mask[i], wide);
    Tensor grad = new_gradient(student[i]);
    level.grad = feature_view(grad);
    const char* row = data_of(scales) + level_of[i] * 2 * int64_t(scales.element_size());
    cpu::masked_mse_backward(level, wide, grad_loss.data_ptr(), row, torch_threads());
    grads.push_back(grad);
  }
  return grads;
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("masked_mse", TORCH_BOX(&kdkernels::masked_mse));
  m.impl("masked_mse_backward", TORCH_BOX(&kdkernels::masked_mse_backward));
}
