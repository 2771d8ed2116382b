// What the registrations that draw masks share: the arguments of ground_truth_masks and gaussian_masks, and the masks.
#pragma once

#include "tensors.h"

namespace kdkernels {

struct MaskCall {
  Tensor boxes;
  std::vector<int64_t> heights, widths;
  std::vector<double> strides, thresholds;
  int64_t batch_size;
  bool all_levels;
};
inline MaskCall mask_call(Tensor boxes, std::vector<int64_t> heights, std::vector<int64_t> widths,
                          std::vector<double> strides, std::vector<double> thresholds, int64_t batch_size,
                          bool all_levels) {
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 5 && boxes.scalar_type() == ScalarType::Float &&
                      boxes.is_contiguous() && batch_size >= 0,
                  "boxes: expected contiguous float32 (M, 5)");
  const size_t levels = heights.size();
  STD_TORCH_CHECK(widths.size() == levels && strides.size() == levels &&
                      (all_levels || levels == 0 || thresholds.size() + 1 == levels),
                  "expected one height, width and stride per level, and a threshold between each two");
  for (size_t k = 0; k < levels; ++k) {
    STD_TORCH_CHECK(heights[k] >= 0 && widths[k] >= 0 && strides[k] > 0,
                    "sizes and strides: expected positive numbers");
  }
  return {boxes, heights, widths, strides, thresholds, batch_size, all_levels};
}

// The masks of a call, allocated, and the view of both, which lasts as long as they do.
struct NewMasks {
  std::vector<Tensor> masks;
  std::vector<float*> data;

  explicit NewMasks(const MaskCall& call) {
    for (size_t k = 0; k < call.heights.size(); ++k) {
      masks.push_back(new_buffer(call.boxes, {call.batch_size, call.heights[k], call.widths[k]}, ScalarType::Float));
      data.push_back(floats_of(masks[k]));
    }
  }
  MaskDrawing drawing(const MaskCall& call) const {
    const MaskGeometry geometry{call.batch_size,     int(masks.size()),
                                call.heights.data(), call.widths.data(),
                                call.strides.data(), call.all_levels ? nullptr : call.thresholds.data()};
    return {floats_of(call.boxes), call.boxes.size(0), geometry, data.data()};
  }
};

}  // namespace kdkernels
