// From PyTorch's tensors (stable ABI) to the plain views of arguments.h. Arguments were checked in Python; the checks
// here are the last line before memory is touched, and hold whatever calls the operator directly.
#pragma once

#include <sys/mman.h>

#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "../arguments.h"

namespace kdkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::Double:
      return Dtype::float64;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Half:
      return Dtype::float16;
    default:
      STD_TORCH_CHECK(false, "expected float32, float64, bfloat16 or float16");
  }
}

// Arithmetic in double: for a float64 student. The teacher is alike or narrower.
inline bool is_wide(const Tensor& student) { return student.scalar_type() == ScalarType::Double; }
inline ScalarType arithmetic_dtype(bool wide) { return wide ? ScalarType::Double : ScalarType::Float; }

inline char* data_of(const Tensor& x) { return static_cast<char*>(x.data_ptr()); }
inline float* floats_of(const Tensor& x) { return static_cast<float*>(x.data_ptr()); }

inline FeatureView feature_view(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, "expected (N, C, H, W)");
  FeatureView view{data_of(x), dtype_of(x), {}};
  for (int i = 0; i < 4; ++i) view.stride[i] = x.stride(i);
  return view;
}

inline void check_same_sizes(const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(a.dim() == b.dim(), "student and teacher differ in their number of dimensions");
  for (int64_t i = 0; i < a.dim(); ++i) STD_TORCH_CHECK(a.size(i) == b.size(i), "student and teacher differ in shape");
}

inline FeatureLevel feature_level(const Tensor& student, const Tensor& teacher) {
  check_same_sizes(student, teacher);
  FeatureLevel level{student.size(0),       student.size(1),       student.size(2), student.size(3),
                     feature_view(student), feature_view(teacher), FeatureView{},   nullptr};
  return level;
}

// Neighbouring dimensions are merged where both strides allow, so that a contiguous (..., C) is one dimension of rows.
inline RowView row_view(const Tensor& x) {
  const int64_t dims = x.dim();
  STD_TORCH_CHECK(dims >= 1, "expected (..., C), got a 0-d tensor");
  RowView view{data_of(x), dtype_of(x), 0, {}, {}, x.stride(dims - 1)};
  for (int64_t i = 0; i + 1 < dims; ++i) {
    const int64_t size = x.size(i), stride = x.stride(i);
    if (size == 1) continue;
    if (view.dims && view.stride[view.dims - 1] == size * stride) {
      view.size[view.dims - 1] *= size;
      view.stride[view.dims - 1] = stride;
    } else {
      STD_TORCH_CHECK(view.dims < max_row_dims, "expected rows of at most 8 dimensions that cannot be merged");
      view.size[view.dims] = size;
      view.stride[view.dims] = stride;
      ++view.dims;
    }
  }
  return view;
}

inline int64_t row_count(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  return rows;
}

inline std::vector<int64_t> row_shape(const Tensor& x) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) shape.push_back(x.size(i));
  return shape;
}

inline DeviceScalar device_scalar(double value, const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return DeviceScalar{value, nullptr};
  STD_TORCH_CHECK(tensor->numel() == 1 && tensor->scalar_type() == ScalarType::Float, "expected a 0-d float32 tensor");
  return DeviceScalar{0, static_cast<const float*>(tensor->data_ptr())};
}

// An enumerator that travelled as an integer: below `count`.
inline int enumerator(const char* name, int64_t value, int64_t count) {
  STD_TORCH_CHECK(value >= 0 && value < count, name, ": expected a value below ", count, ", got ", value);
  return int(value);
}

inline Tensor new_buffer(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), dtype);
}

// The gradient has the student's dtype and memory format. A large fresh allocation is written once, front to back:
// huge pages spare it hundreds of page faults per megabyte. Advice only: where it is refused, nothing changes.
inline Tensor new_gradient(const Tensor& student) {
  Tensor grad = torch::stable::empty_like(student);
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t huge = uintptr_t(1) << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(grad.data_ptr());
  const uintptr_t first = (begin + huge - 1) / huge * huge;
  const uintptr_t last = (begin + size_t(grad.numel()) * grad.element_size()) / huge * huge;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return grad;
}

inline Threads torch_threads() {
  return Threads{[](int64_t count, int64_t grain, void* context, Threads::Body body) {
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
  }};
}

}  // namespace kdkernels
