// Masks from boxes for the CUDA dispatch key. Schemas: kdkernels/masks.py.
#include "../cuda/masks.h"

#include "cuda.h"

namespace kdkernels {
namespace {

std::vector<Tensor> draw(const Tensor& boxes, const std::vector<int64_t>& heights, const std::vector<int64_t>& widths,
                         const std::vector<double>& strides, const std::vector<double>& thresholds, int64_t batch_size,
                         bool all_levels, bool gaussian) {
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 5 && boxes.scalar_type() == ScalarType::Float &&
                      boxes.is_contiguous() && batch_size >= 0,
                  "boxes: expected contiguous float32 (M, 5)");
  const size_t levels = heights.size();
  STD_TORCH_CHECK(widths.size() == levels && strides.size() == levels &&
                      (all_levels || levels == 0 || thresholds.size() + 1 == levels),
                  "expected one height, width and stride per level, and a threshold between each two");
  std::vector<Tensor> masks;
  std::vector<float*> data;
  for (size_t k = 0; k < levels; ++k) {
    STD_TORCH_CHECK(heights[k] >= 0 && widths[k] >= 0 && strides[k] > 0,
                    "sizes and strides: expected positive numbers");
    masks.push_back(new_buffer(boxes, {batch_size, heights[k], widths[k]}, ScalarType::Float));
    data.push_back(floats_of(masks[k]));
  }
  const Gpu gpu(boxes);
  const cuda::MaskGeometry geometry{batch_size,    int(levels),    heights.data(),
                                    widths.data(), strides.data(), all_levels ? nullptr : thresholds.data()};
  check_launch(cuda::draw_masks(floats_of(boxes), boxes.size(0), geometry, gaussian, data.data(), gpu.stream()));
  return masks;
}

std::vector<Tensor> ground_truth_masks(Tensor boxes, std::vector<int64_t> heights, std::vector<int64_t> widths,
                                       std::vector<double> strides, std::vector<double> thresholds, int64_t batch_size,
                                       bool all_levels) {
  return draw(boxes, heights, widths, strides, thresholds, batch_size, all_levels, false);
}

std::vector<Tensor> gaussian_masks(Tensor boxes, std::vector<int64_t> heights, std::vector<int64_t> widths,
                                   std::vector<double> strides, std::vector<double> thresholds, int64_t batch_size,
                                   bool all_levels) {
  return draw(boxes, heights, widths, strides, thresholds, batch_size, all_levels, true);
}

}  // namespace
}  // namespace kdkernels

KD_GPU_LIBRARY(m) {
  m.impl("ground_truth_masks", TORCH_BOX(&kdkernels::ground_truth_masks));
  m.impl("gaussian_masks", TORCH_BOX(&kdkernels::gaussian_masks));
}
