// What the feature losses' registrations share: levels of students, teachers and masks, and what a backward is given.
#pragma once

#include "tensors.h"

namespace kdkernels {

// One level per student; all in one arithmetic.
inline std::vector<FeatureLevel> feature_levels(const std::vector<Tensor>& student,
                                                const std::vector<Tensor>& teacher) {
  STD_TORCH_CHECK(!student.empty() && teacher.size() == student.size(), "expected one teacher per student level");
  std::vector<FeatureLevel> levels;
  for (size_t i = 0; i < student.size(); ++i) {
    STD_TORCH_CHECK(is_wide(student[i]) == is_wide(student[0]), "levels mix float64 with other dtypes");
    levels.push_back(feature_level(student[i], teacher[i]));
  }
  return levels;
}

inline void put_mask(FeatureLevel& level, const Tensor& mask, bool wide) {
  STD_TORCH_CHECK(mask.is_contiguous() && mask.scalar_type() == arithmetic_dtype(wide),
                  "mask: expected a contiguous tensor in the dtype of the arithmetic");
  STD_TORCH_CHECK(mask.dim() == 3 && mask.size(0) == level.n && mask.size(1) == level.h && mask.size(2) == level.w,
                  "mask: expected (N, H, W)");
  level.mask = mask.data_ptr();
}

inline std::vector<FeatureLevel> masked_levels(const std::vector<Tensor>& student, const std::vector<Tensor>& teacher,
                                               const std::vector<Tensor>& mask) {
  std::vector<FeatureLevel> levels = feature_levels(student, teacher);
  STD_TORCH_CHECK(mask.size() == levels.size(), "expected one mask per student level");
  for (size_t i = 0; i < levels.size(); ++i) put_mask(levels[i], mask[i], is_wide(student[i]));
  return levels;
}

// `saved` is what the forward left for its levels: `columns` values for each of its rows, of which each student of the
// backward has `rows(i)` from first[i] on.
template <class F>
void check_saved(const Tensor& grad_loss, const Tensor& saved, int64_t columns, const std::vector<int64_t>& first,
                 const std::vector<Tensor>& student, const F& rows) {
  STD_TORCH_CHECK(first.size() == student.size(), "expected one index per student");
  for (size_t i = 0; i < student.size(); ++i) {
    const ScalarType dtype = arithmetic_dtype(is_wide(student[i]));
    STD_TORCH_CHECK(grad_loss.scalar_type() == dtype && grad_loss.numel() == 1 && saved.scalar_type() == dtype &&
                        saved.is_contiguous() && saved.dim() == 2 && saved.size(1) == columns && first[i] >= 0 &&
                        first[i] <= saved.size(0) - rows(i),
                    "grad_loss or what the forward saved does not belong to this loss");
  }
}

}  // namespace kdkernels
