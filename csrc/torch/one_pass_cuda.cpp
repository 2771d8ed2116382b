// one_pass_scale and one_pass_scale_ for the CUDA dispatch key. Schemas: kdkernels/losses/one_pass.py.
#include "../cuda/one_pass.h"

#include "cuda.h"
#include "one_pass.h"

namespace kdkernels {
namespace {

void scale(const std::vector<Tensor>& from, const std::vector<Tensor>& to, const Tensor& upstream) {
  if (from.empty()) return;
  std::vector<cuda::ScaledGradient> gradients;
  for (size_t i = 0; i < from.size(); ++i) {
    gradients.push_back({data_of(from[i]), data_of(to[i]), dtype_of(from[i]), from[i].numel()});
  }
  const Gpu gpu(from[0]);
  check_launch(cuda::scale_gradients(gradients.data(), int(gradients.size()), floats_of(upstream), gpu.stream()));
}

std::vector<Tensor> one_pass_scale(std::vector<Tensor> grads, Tensor upstream) {
  check_one_pass(grads, upstream);
  std::vector<Tensor> scaled;
  for (const Tensor& grad : grads) scaled.push_back(torch::stable::empty_like(grad));
  scale(grads, scaled, upstream);
  return scaled;
}

void one_pass_scale_in_place(std::vector<Tensor> grads, Tensor upstream) {
  check_one_pass(grads, upstream);
  scale(grads, grads, upstream);
}

}  // namespace
}  // namespace kdkernels

KD_GPU_LIBRARY(m) {
  m.impl("one_pass_scale", TORCH_BOX(&kdkernels::one_pass_scale));
  m.impl("one_pass_scale_", TORCH_BOX(&kdkernels::one_pass_scale_in_place));
}
