// detection_distillation_features and detection_distillation for the CUDA dispatch key. Schemas:
// kdkernels/losses/feature_pass.py and joint_pass.py.
#include "../cuda/detection_distillation.h"

#include "../cuda/decoupled_kl.h"
#include "../cuda/temperature_kl.h"

#include "bounded_regression.h"
#include "cuda.h"
#include "decoupled_kl.h"
#include "detection_distillation.h"
#include "masks.h"
#include "packed_calls.h"
#include "soft_cross_entropy.h"

namespace kdkernels {
namespace {

void run(const cuda::Objective& objective, const Tensor& loss, const Tensor& values, float* told, const Gpu& gpu) {
  Tensor workspace = new_workspace(loss, cuda::detection_distillation_workspace(objective));
  check_launch(cuda::detection_distillation(objective, floats_of(workspace), floats_of(loss), floats_of(values), told,
                                            gpu.stream()));
}

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
  const Gpu gpu(student[0]);
  const FeaturePass pass = feature_pass(call, torch::stable::empty_like);
  run({pass.levels.data(), pass.pearson.get(), pass.count(), call.options, nullptr, 0, nullptr, nullptr}, pass.loss,
      pass.values, nullptr, gpu);
  return {pass.loss, pass.values, pass.grads};
}

// As in losses/joint_pass.py.
enum Packed : int64_t {
  packed_features,
  packed_decoupled_kl,
  packed_temperature_kl,
  packed_soft_cross_entropy,
  packed_binary_kl,
  packed_bounded_regression,
  packed_ground_truth_masks
};

cuda::Head head_of(cuda::Head::Kind kind, const RowCall& call, std::vector<Tensor>& grads) {
  grads.push_back(torch::stable::empty_like(call.student));
  cuda::Head head{};
  head.kind = kind;
  head.pair = call.pair;
  head.pair.grad = row_view(grads.back());
  head.loss_weight = call.loss_weight;
  return head;
}

cuda::Head next_head(int64_t packed, PackedCalls& calls, std::vector<Tensor>& grads) {
  if (packed == packed_decoupled_kl) {
    const DecoupledKlCall call = calls.call(decoupled_kl_call);
    cuda::Head head = head_of(cuda::Head::kl, call, grads);
    head.kl_regions = cuda::decoupled_kl_regions(call.options);
    return head;
  }
  if (packed == packed_soft_cross_entropy) {
    const SoftCrossEntropyCall call = calls.call(soft_cross_entropy_call);
    cuda::Head head = head_of(cuda::Head::soft_cross_entropy, call, grads);
    head.soft = call.options;
    return head;
  }
  if (packed == packed_bounded_regression) {
    const BoundedRegressionCall call = calls.call(bounded_regression_call);
    cuda::Head head = head_of(cuda::Head::boxes, call, grads);
    head.target = call.target;
    head.boxes_options = call.options;
    return head;
  }
  STD_TORCH_CHECK(packed == packed_temperature_kl || packed == packed_binary_kl, "no such op: ", packed);
  const TemperatureCall call = calls.call(temperature_call);
  cuda::Head head = head_of(packed == packed_binary_kl ? cuda::Head::binary_kl : cuda::Head::kl, call, grads);
  head.kl_regions = cuda::temperature_kl_regions(call.temperature, call.reduction);
  head.temperature = call.temperature;
  head.reduction = call.reduction;
  return head;
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> detection_distillation(std::vector<Tensor> tensors,
                                                                               std::vector<int64_t> integers,
                                                                               std::vector<double> numbers) {
  STD_TORCH_CHECK(!tensors.empty(), "expected a call");
  const Gpu gpu(tensors[0]);
  PackedCalls calls(tensors, integers, numbers);
  FeatureCall features{};
  FeaturePass pass{};
  std::vector<Tensor> grads;
  std::vector<cuda::Head> heads;
  MaskCall boxes{};
  std::optional<NewMasks> drawn;
  while (!calls.done()) {
    const int64_t packed = calls.integer();
    if (packed == packed_ground_truth_masks) {
      STD_TORCH_CHECK(heads.empty() && pass.levels.empty() && !drawn, "masks come before features, and once");
      boxes = calls.call(mask_call);
      drawn.emplace(boxes);
    } else if (packed == packed_features) {
      STD_TORCH_CHECK(heads.empty() && pass.levels.empty(), "features come first, and once");
      features = calls.call(feature_call);
      if (drawn) {
        STD_TORCH_CHECK(features.mask.empty(), "masks that are drawn, and others");
        features.mask = drawn->masks;
      }
      pass = feature_pass(features, torch::stable::empty_like);
      grads = pass.grads;
    } else {
      heads.push_back(next_head(packed, calls, grads));
    }
  }
  if (pass.levels.empty()) {
    pass.loss = new_buffer(tensors[0], {}, ScalarType::Float);
    pass.values = new_buffer(tensors[0], {1, feature_values}, ScalarType::Float);
  }
  Tensor told = new_buffer(tensors[0], {int64_t(heads.size()) + 1, cuda::told_columns}, ScalarType::Float);
  MaskDrawing drawing{};
  if (drawn) drawing = drawn->drawing(boxes);
  run({pass.levels.data(), pass.pearson.get(), pass.count(), features.options, heads.data(), int(heads.size()),
       drawn ? &drawing : nullptr, features.mask_of.data()},
      pass.loss, pass.values, floats_of(told), gpu);
  return {pass.loss, told, pass.values, grads};
}

}  // namespace
}  // namespace kdkernels

KD_GPU_LIBRARY(m) {
  m.impl("detection_distillation_features", TORCH_BOX(&kdkernels::detection_distillation_features));
  m.impl("detection_distillation", TORCH_BOX(&kdkernels::detection_distillation));
}
