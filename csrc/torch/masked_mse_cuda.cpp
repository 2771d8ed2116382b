// masked_mse for the CUDA dispatch key. Schema: kdkernels/losses/masked_mse.py.
#include "../cuda/masked_mse.h"

#include "cuda.h"
#include "features.h"

namespace kdkernels {
namespace {

std::tuple<Tensor, Tensor> masked_mse(std::vector<Tensor> student, std::vector<Tensor> teacher,
                                      std::vector<Tensor> mask, double foreground_weight,
                                      std::optional<Tensor> foreground_weight_tensor, double background_weight,
                                      std::optional<Tensor> background_weight_tensor, int64_t normalizer,
                                      bool mean_levels) {
  const std::vector<FeatureLevel> levels = masked_levels(student, teacher, mask);
  STD_TORCH_CHECK(!is_wide(student[0]), "float64 has no kernel on a GPU");
  const MaskedMseOptions options{device_scalar(foreground_weight, foreground_weight_tensor),
                                 device_scalar(background_weight, background_weight_tensor),
                                 enumerator("normalizer", normalizer, 3), mean_levels};
  const Gpu gpu(student[0]);
  const int count = int(levels.size());
  Tensor loss = new_buffer(student[0], {}, ScalarType::Float);
  Tensor scales = new_buffer(student[0], {int64_t(count), 2}, ScalarType::Float);
  Tensor workspace = new_workspace(student[0], cuda::masked_mse_workspace(levels.data(), count));
  check_launch(cuda::masked_mse_forward(levels.data(), count, options, floats_of(workspace), floats_of(loss),
                                        floats_of(scales), gpu.stream()));
  return {loss, scales};
}

std::vector<Tensor> masked_mse_backward(Tensor grad_loss, std::vector<Tensor> student, std::vector<Tensor> teacher,
                                        std::vector<Tensor> mask, Tensor scales, std::vector<int64_t> level_of) {
  std::vector<Tensor> grads;
  if (student.empty()) return grads;
  std::vector<FeatureLevel> levels = masked_levels(student, teacher, mask);
  STD_TORCH_CHECK(!is_wide(student[0]), "float64 has no kernel on a GPU");
  check_saved(grad_loss, scales, 2, level_of, student, [](size_t) { return 1; });
  const Gpu gpu(student[0]);
  for (size_t i = 0; i < levels.size(); ++i) {
    grads.push_back(torch::stable::empty_like(student[i]));
    levels[i].grad = feature_view(grads[i]);
  }
  check_launch(cuda::masked_mse_backward(levels.data(), int(levels.size()), floats_of(grad_loss), floats_of(scales),
                                         level_of.data(), gpu.stream()));
  return grads;
}

}  // namespace
}  // namespace kdkernels

KD_GPU_LIBRARY(m) {
  m.impl("masked_mse", TORCH_BOX(&kdkernels::masked_mse));
  m.impl("masked_mse_backward", TORCH_BOX(&kdkernels::masked_mse_backward));
}
