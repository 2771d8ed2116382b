// pearson for the CPU dispatch key. Schema: kdkernels/losses/pearson.py.
#include "tensors.h"

#include "../cpu/pearson.h"

namespace kdkernels {
namespace {

constexpr int64_t statistics_per_channel = 8;  // cpu/pearson.cpp

std::tuple<Tensor, Tensor> pearson(std::vector<Tensor> student, std::vector<Tensor> teacher, double eps,
                                   bool mean_levels, bool zero_on_constant) {
  const size_t count = student.size();
  STD_TORCH_CHECK(count > 0 && teacher.size() == count, "one teacher per student level");
  const bool wide = is_wide(student[0]);
  std::vector<FeatureLevel> levels;
  int64_t channels = 0;
  for (size_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(is_wide(student[i]) == wide, "levels mix float64 with other dtypes");
    levels.push_back(feature_level(student[i], teacher[i]));
    channels += levels.back().c;
  }
  Tensor loss = new_buffer(student[0], {}, arithmetic_dtype(wide));
  Tensor statistics = new_buffer(student[0], {channels, statistics_per_channel}, arithmetic_dtype(wide));
  cpu::pearson_forward(levels.data(), int(count), PearsonOptions{eps, mean_levels, zero_on_constant}, wide,
                       loss.data_ptr(), statistics.data_ptr(), torch_threads());
  return {loss, statistics};
}

std::vector<Tensor> pearson_backward(Tensor grad_loss, std::vector<Tensor> student, std::vector<Tensor> teacher,
                                     Tensor statistics, std::vector<int64_t> first_channel) {
  STD_TORCH_CHECK(teacher.size() == student.size() && first_channel.size() == student.size(),
                  "one teacher and first channel per student");
  std::vector<Tensor> grads;
  for (size_t i = 0; i < student.size(); ++i) {
    const bool wide = is_wide(student[i]);
    FeatureLevel level = feature_level(student[i], teacher[i]);
    STD_TORCH_CHECK(grad_loss.scalar_type() == arithmetic_dtype(wide) && grad_loss.numel() == 1 &&
                        statistics.scalar_type() == arithmetic_dtype(wide) && statistics.is_contiguous() &&
                        statistics.dim() == 2 && statistics.size(1) == statistics_per_channel &&
                        first_channel[i] >= 0 && first_channel[i] <= statistics.size(0) - level.c,
                    "grad_loss or statistics do not belong to this loss");
    Tensor grad = new_gradient(student[i]);
    level.grad = feature_view(grad);
    const char* rows =
        data_of(statistics) + first_channel[i] * statistics_per_channel * int64_t(statistics.element_size());
    cpu::pearson_backward(level, wide, grad_loss.data_ptr(), rows, torch_threads());
    grads.push_back(grad);
  }
  return grads;
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("pearson", TORCH_BOX(&kdkernels::pearson));
  m.impl("pearson_backward", TORCH_BOX(&kdkernels::pearson_backward));
}
