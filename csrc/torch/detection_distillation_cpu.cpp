// detection_distillation_features for the CPU dispatch key. Schema: kdkernels/losses/feature_pass.py.
#include "../cpu/detection_distillation.h"

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
  const FeatureCall call = feature_call(
      student, teacher, mask, mask_of, pearson, wanted, foreground_weight, foreground_weight_tensor, background_weight,
      background_weight_tensor, normalizer, masked_mse_mean, eps, pearson_mean, zero_on_constant, masked_mse_weight,
      masked_mse_weight_tensor, pearson_weight, pearson_weight_tensor, norms);
  FeaturePass pass = feature_pass(call, new_gradient);
  cpu::detection_distillation_features(pass.levels.data(), pass.pearson.get(), pass.count(), call.options,
                                       pass.loss.data_ptr(), pass.values.data_ptr(), torch_threads());
  return {pass.loss, pass.values, pass.grads};
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("detection_distillation_features", TORCH_BOX(&kdkernels::detection_distillation_features));
}
