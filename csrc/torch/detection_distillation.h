// What the objective's registrations share: the arguments of detection_distillation_features as plain views.
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

// `new_grad(student)` allocates a gradient.
template <class F>
FeaturePass feature_pass(const std::vector<Tensor>& student, const std::vector<Tensor>& teacher,
                         const std::vector<Tensor>& mask, const std::vector<int64_t>& mask_of,
                         const std::vector<int64_t>& pearson, const std::vector<int64_t>& wanted,
                         const FeatureOptions& options, const F& new_grad) {
  FeaturePass pass{feature_levels(student, teacher), nullptr, options, {}, Tensor(), Tensor()};
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
  for (const int64_t i : pearson) {
    STD_TORCH_CHECK(i >= 0 && i < count, "no such level");
    pass.pearson[i] = true;
  }
  for (const int64_t i : wanted) {
    STD_TORCH_CHECK(i >= 0 && i < count && pass.levels[i].grad.data == nullptr, "no such level, or one twice");
    pass.grads.push_back(new_grad(student[i]));
    pass.levels[i].grad = feature_view(pass.grads.back());
  }
  pass.loss = new_buffer(student[0], {}, ScalarType::Float);
  pass.values = new_buffer(student[0], {count + 1, feature_values}, ScalarType::Float);
  return pass;
}

}  // namespace kdkernels
