// What the objective's registrations share: the arguments of detection_distillation_features, and as plain views.
#pragma once

#include <memory>

#include "features.h"

namespace kdkernels {

struct FeaturePass {
  std::vector<FeatureLevel> levels;
  std::unique_ptr<bool[]> pearson;  // one per level
  FeatureOptions options;
  std::vector<Tensor> grads;  // one per wanted level
  Tensor loss, values;        // 0-d, (levels + 1, feature_values)

  int count() const { return int(levels.size()); }
};

// Everything that detection_distillation_features is given.
struct FeatureCall {
  std::vector<Tensor> student, teacher, mask;
  std::vector<int64_t> mask_of, pearson, wanted;
  FeatureOptions options;
};
inline FeatureCall feature_call(std::vector<Tensor> student, std::vector<Tensor> teacher, std::vector<Tensor> mask,
                                std::vector<int64_t> mask_of, std::vector<int64_t> pearson, std::vector<int64_t> wanted,
                                double foreground_weight, std::optional<Tensor> foreground_weight_tensor,
                                double background_weight, std::optional<Tensor> background_weight_tensor,
                                int64_t normalizer, bool masked_mse_mean, double eps, bool pearson_mean,
                                bool zero_on_constant, double masked_mse_weight,
                                std::optional<Tensor> masked_mse_weight_tensor, double pearson_weight,
                                std::optional<Tensor> pearson_weight_tensor, bool norms) {
  STD_TORCH_CHECK(!student.empty(), "expected a level");
  const FeatureOptions options{{device_scalar(foreground_weight, foreground_weight_tensor),
                                device_scalar(background_weight, background_weight_tensor),
                                enumerator("normalizer", normalizer, 3), masked_mse_mean},
                               {eps, pearson_mean, zero_on_constant},
                               device_scalar(masked_mse_weight, masked_mse_weight_tensor),
                               device_scalar(pearson_weight, pearson_weight_tensor),
                               norms};
  return {student, teacher, mask, mask_of, pearson, wanted, options};
}

// `new_grad(student)` allocates a gradient.
template <class F>
FeaturePass feature_pass(const FeatureCall& call, const F& new_grad) {
  const std::vector<Tensor>&student = call.student, &mask = call.mask;
  const std::vector<int64_t>& mask_of = call.mask_of;
  FeaturePass pass{feature_levels(student, call.teacher), nullptr, call.options, {}, Tensor(), Tensor()};
  const int64_t count = pass.count();
  STD_TORCH_CHECK(!is_wide(student[0]), "float64 has no one-pass kernel");
  STD_TORCH_CHECK(int64_t(mask_of.size()) == count, "expected the index of a mask, or -1, per level");
  for (int64_t i = 0; i < count; ++i) {
    if (mask_of[i] < 0) continue;
    STD_TORCH_CHECK(mask_of[i] < int64_t(mask.size()), "no such mask");
    put_mask(pass.levels[i], mask[mask_of[i]], false);
    static const float nothing = 0;
    // An empty mask may have no memory, but its level counts among those of a mean.
    if (mask[mask_of[i]].numel() == 0) pass.levels[i].mask = &nothing;
    STD_TORCH_CHECK(pass.levels[i].mask != nullptr, "mask: a tensor without memory");
  }
  pass.pearson = std::make_unique<bool[]>(count);
  for (const int64_t i : call.pearson) {
    STD_TORCH_CHECK(i >= 0 && i < count, "no such level");
    pass.pearson[i] = true;
  }
  for (const int64_t i : call.wanted) {
    STD_TORCH_CHECK(i >= 0 && i < count && pass.levels[i].grad.data == nullptr, "no such level, or one twice");
    pass.grads.push_back(new_grad(student[i]));
    pass.levels[i].grad = feature_view(pass.grads.back());
  }
  pass.loss = new_buffer(student[0], {}, ScalarType::Float);
  pass.values = new_buffer(student[0], {count + 1, feature_values}, ScalarType::Float);
  return pass;
}

}  // namespace kdkernels
