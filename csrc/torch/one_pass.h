// What the registrations of one_pass_scale share.
#pragma once

#include "tensors.h"

namespace kdkernels {

// Whether a tensor's elements fill one span of memory: as every gradient that a forward allocated does.
inline bool is_dense(const Tensor& x) {
  int64_t expected = 1;
  std::vector<bool> used(x.dim(), false);
  for (int64_t i = 0; i < x.dim(); ++i) {
    int64_t found = -1;
    for (int64_t d = 0; d < x.dim() && found < 0; ++d) {
      if (!used[d] && (x.size(d) == 1 || x.stride(d) == expected)) found = d;
    }
    if (found < 0) return false;
    used[found] = true;
    expected *= x.size(found);
  }
  return true;
}

inline void check_one_pass(const std::vector<Tensor>& grads, const Tensor& upstream) {
  STD_TORCH_CHECK(upstream.numel() == 1 && upstream.scalar_type() == ScalarType::Float,
                  "upstream: expected one float32 number");
  for (const Tensor& grad : grads) {
    dtype_of(grad);  // or it throws
    STD_TORCH_CHECK(!is_wide(grad), "float64 has no one-pass kernel");
    STD_TORCH_CHECK(grad.numel() == 0 || is_dense(grad), "expected a gradient without gaps");
  }
}

}  // namespace kdkernels
