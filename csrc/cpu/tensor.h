// The plain descriptions of tensors that cross from torch/ into cpu/. No torch, no code that depends on the instruction
// set: these types are shared by all builds of the kernels, so they hold data and nothing else.
#pragma once

#include <stdint.h>

namespace kdkernels {

enum class Dtype : int { float32, float64, bfloat16, float16 };

// One pyramid level, (N, C, H, W), as up to four views that share the sizes. Strides are in elements.
struct FeatureView {
  char* data;
  Dtype dtype;
  int64_t stride[4];
};
struct FeatureLevel {
  int64_t n, c, h, w;
  FeatureView student, teacher, grad;
  const void* mask;  // (N, H, W), contiguous, in the type of the arithmetic; null where the loss has none
};

// Rows of a (..., C) tensor: any leading dimensions, any strides.
constexpr int max_row_dims = 8;
struct RowView {
  char* data;
  Dtype dtype;
  int dims;
  int64_t size[max_row_dims], stride[max_row_dims];
  int64_t column_stride;
};

// A weight that is a number, or lives in a 0-d float32 tensor.
struct DeviceScalar {
  double value;
  const float* pointer;
  double get() const { return pointer ? static_cast<double>(*pointer) : value; }
};

// How a kernel asks for threads: run body(context, begin, end) over [0, count) in pieces of about `grain`. Pieces are
// only a schedule: no result may depend on where they begin.
struct Threads {
  using Body = void (*)(void* context, int64_t begin, int64_t end);
  void (*run)(int64_t count, int64_t grain, void* context, Body body);
};

}  // namespace kdkernels
