// pearson for the CUDA dispatch key. Schema: kdkernels/losses/pearson.py.
#include "../cuda/pearson.h"

#include "cuda.h"
#include "features.h"

namespace kdkernels {
namespace {

constexpr int64_t statistics_per_channel = 8;  // cuda/pearson_planes.cuh

std::tuple<Tensor, Tensor> pearson(std::vector<Tensor> student, std::vector<Tensor> teacher, double eps,
                                   bool mean_levels, bool zero_on_constant) {
  const std::vector<FeatureLevel> levels = feature_levels(student, teacher);
  STD_TORCH_CHECK(!is_wide(student[0]), "float64 has no kernel on a GPU");
  const Gpu gpu(student[0]);
  const int count = int(levels.size());
  int64_t channels = 0;
  for (const FeatureLevel& level : levels) channels += level.c;
  Tensor loss = new_buffer(student[0], {}, ScalarType::Float);
  Tensor statistics = new_buffer(student[0], {channels, statistics_per_channel}, ScalarType::Float);
  Tensor workspace = new_workspace(student[0], cuda::pearson_workspace(levels.data(), count));
  check_launch(cuda::pearson_forward(levels.data(), count, PearsonOptions{eps, mean_levels, zero_on_constant},
                                     floats_of(workspace), floats_of(loss), floats_of(statistics), gpu.stream()));
  return {loss, statistics};
}

std::vector<Tensor> pearson_backward(Tensor grad_loss, std::vector<Tensor> student, std::vector<Tensor> teacher,
                                     Tensor statistics, std::vector<int64_t> first_channel) {
  std::vector<Tensor> grads;
  if (student.empty()) return grads;
  std::vector<FeatureLevel> levels = feature_levels(student, teacher);
  STD_TORCH_CHECK(!is_wide(student[0]), "float64 has no kernel on a GPU");
  check_saved(grad_loss, statistics, statistics_per_channel, first_channel, student,
              [&](size_t i) { return levels[i].c; });
  const Gpu gpu(student[0]);
  for (size_t i = 0; i < levels.size(); ++i) {
    grads.push_back(torch::stable::empty_like(student[i]));
    levels[i].grad = feature_view(grads[i]);
  }
  check_launch(cuda::pearson_backward(levels.data(), int(levels.size()), floats_of(grad_loss), floats_of(statistics),
                                      first_channel.data(), gpu.stream()));
  return grads;
}

}  // namespace
}  // namespace kdkernels

KD_GPU_LIBRARY(m) {
  m.impl("pearson", TORCH_BOX(&kdkernels::pearson));
  m.impl("pearson_backward", TORCH_BOX(&kdkernels::pearson_backward));
}
