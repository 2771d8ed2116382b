// detection_distillation_features for the CUDA dispatch key. Schema: kdkernels/losses/feature_pass.py.
#include "../cuda/detection_distillation.h"

#include "cuda.h"
#include "detection_distillation.h"

namespace kdkernels {
namespace {

std::tuple<Tensor, Tensor, std::vector<Tensor>> detection_distillation_features(
    std::vector<Tensor> student, std::vector<Tensor> teacher, std::vector<Tensor> mask, std::vector<int64_t> mask_of,
    std::vector<int64_t> pearson, std::vector<int64_t> wanted, double foreground_weight,
    std::optional<Tensor> foreground_weight_tensor, double background_weight,
    std::optional<Tensor> background_weight_tensor, int64_t normalizer, bool masked_mse_mean, double eps,
    bool pearson_mean, bool zero_on_constant, double masked_mse_weight, std::optional<Tensor> masked_mse_weight_tensor,
    double pearson_weight, std::optional<Tensor> pearson_weight_tensor, bool norms) {
  const FeatureOptions options{{device_scalar(foreground_weight, foreground_weight_tensor),
                                device_scalar(background_weight, background_weight_tensor),
                                enumerator("normalizer", normalizer, 3), masked_mse_mean},
                               {eps, pearson_mean, zero_on_constant},
                               device_scalar(masked_mse_weight, masked_mse_weight_tensor),
                               device_scalar(pearson_weight, pearson_weight_tensor),
                               norms};
  STD_TORCH_CHECK(!student.empty(), "expected a level");
  const Gpu gpu(student[0]);
  FeaturePass pass = feature_pass(student, teacher, mask, mask_of, pearson, wanted, options,
                                  [](const Tensor& s) { return torch::stable::empty_like(s); });
  const FeatureLevel* levels = pass.levels.data();
  Tensor workspace =
      new_workspace(student[0], cuda::detection_distillation_workspace(levels, pass.pearson.get(), pass.count()));
  check_launch(cuda::detection_distillation_features(levels, pass.pearson.get(), pass.count(), options,
                                                     floats_of(workspace), floats_of(pass.loss), floats_of(pass.values),
                                                     gpu.stream()));
  return {pass.loss, pass.values, pass.grads};
}

}  // namespace
}  // namespace kdkernels

KD_GPU_LIBRARY(m) { m.impl("detection_distillation_features", TORCH_BOX(&kdkernels::detection_distillation_features)); }
