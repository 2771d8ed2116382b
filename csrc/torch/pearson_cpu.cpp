// pearson for the CPU dispatch key. Schema: kdkernels/losses/pearson.py.
#include "../cpu/pearson.h"

#include "features.h"

namespace kdkernels {
namespace {

constexpr int64_t statistics_per_channel = 8;  // cpu/pearson.cpp

std::tuple<Tensor, Tensor> pearson(std::vector<Tensor> student, std::vector<Tensor> teacher, double eps,
                                   bool mean_levels, bool zero_on_constant) {
  const std::vector<FeatureLevel> levels = feature_levels(student, teacher);
  const bool wide = is_wide(student[0]);
  int64_t channels = 0;
  for (const FeatureLevel& level : levels) channels += level.c;
  Tensor loss = new_buffer(student[0], {}, arithmetic_dtype(wide));
  Tensor statistics = new_buffer(student[0], {channels, statistics_per_channel}, arithmetic_dtype(wide));
  cpu::pearson_forward(levels.data(), int(levels.size()), PearsonOptions{eps, mean_levels, zero_on_constant}, wide,
                       loss.data_ptr(), statistics.data_ptr(), torch_threads());
  return {loss, statistics};
}

std::vector<Tensor> pearson_backward(Tensor grad_loss, std::vector<Tensor> student, std::vector<Tensor> teacher,
                                     Tensor statistics, std::vector<int64_t> first_channel) {
  std::vector<Tensor> grads;
  if (student.empty()) return grads;
  std::vector<FeatureLevel> levels = feature_levels(student, teacher);
  check_saved(grad_loss, statistics, statistics_per_channel, first_channel, student,
              [&](size_t i) { return levels[i].c; });
  for (size_t i = 0; i < levels.size(); ++i) {
    grads.push_back(new_gradient(student[i]));
    levels[i].grad = feature_view(grads[i]);
    const char* rows =
        data_of(statistics) + first_channel[i] * statistics_per_channel * int64_t(statistics.element_size());
    cpu::pearson_backward(levels[i], is_wide(student[i]), grad_loss.data_ptr(), rows, torch_threads());
  }
  return grads;
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("pearson", TORCH_BOX(&kdkernels::pearson));
  m.impl("pearson_backward", TORCH_BOX(&kdkernels::pearson_backward));
}
