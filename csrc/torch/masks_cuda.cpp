// Masks from boxes for the CUDA dispatch key. Schemas: kdkernels/masks.py.
#include "../cuda/masks.h"

#include "cuda.h"
#include "masks.h"

namespace kdkernels {
namespace {

std::vector<Tensor> draw(const MaskCall& call, bool gaussian) {
  const NewMasks made(call);
  const Gpu gpu(call.boxes);
  check_launch(cuda::draw_masks(made.drawing(call), gaussian, gpu.stream()));
  return made.masks;
}

std::vector<Tensor> ground_truth_masks(Tensor boxes, std::vector<int64_t> heights, std::vector<int64_t> widths,
                                       std::vector<double> strides, std::vector<double> thresholds, int64_t batch_size,
                                       bool all_levels) {
  return draw(mask_call(boxes, heights, widths, strides, thresholds, batch_size, all_levels), false);
}

std::vector<Tensor> gaussian_masks(Tensor boxes, std::vector<int64_t> heights, std::vector<int64_t> widths,
                                   std::vector<double> strides, std::vector<double> thresholds, int64_t batch_size,
                                   bool all_levels) {
  return draw(mask_call(boxes, heights, widths, strides, thresholds, batch_size, all_levels), true);
}

}  // namespace
}  // namespace kdkernels

KD_GPU_LIBRARY(m) {
  m.impl("ground_truth_masks", TORCH_BOX(&kdkernels::ground_truth_masks));
  m.impl("gaussian_masks", TORCH_BOX(&kdkernels::gaussian_masks));
}
