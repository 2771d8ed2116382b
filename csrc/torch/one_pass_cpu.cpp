// one_pass_scale and one_pass_scale_ for the CPU dispatch key. Schemas: kdkernels/losses/one_pass.py.
#include "../cpu/one_pass.h"

#include "one_pass.h"

namespace kdkernels {
namespace {

std::vector<Tensor> one_pass_scale(std::vector<Tensor> grads, Tensor upstream) {
  check_one_pass(grads, upstream);
  const float factor = *static_cast<const float*>(upstream.data_ptr());
  std::vector<Tensor> scaled;
  for (const Tensor& grad : grads) {
    scaled.push_back(new_gradient(grad));
    cpu::scale_gradient(data_of(grad), data_of(scaled.back()), dtype_of(grad), grad.numel(), factor, torch_threads());
  }
  return scaled;
}

void one_pass_scale_in_place(std::vector<Tensor> grads, Tensor upstream) {
  check_one_pass(grads, upstream);
  const float factor = *static_cast<const float*>(upstream.data_ptr());
  if (factor == 1) return;
  for (const Tensor& grad : grads) {
    cpu::scale_gradient(data_of(grad), data_of(grad), dtype_of(grad), grad.numel(), factor, torch_threads());
  }
}

}  // namespace
}  // namespace kdkernels

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("one_pass_scale", TORCH_BOX(&kdkernels::one_pass_scale));
  m.impl("one_pass_scale_", TORCH_BOX(&kdkernels::one_pass_scale_in_place));
}
