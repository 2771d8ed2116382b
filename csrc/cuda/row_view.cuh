// Where a row begins, whatever the strides.
#pragma once

#include "primitives.cuh"

KD_NAMESPACE_BEGIN

// In elements from view.data. `view` should be a kernel's own parameter: its arrays are then read where they lie.
KD_DEVICE int64_t row_offset(const RowView& view, int64_t row) {
  if (view.dims <= 1) return view.dims ? row * view.stride[0] : 0;
  int64_t offset = 0;
  for (int d = view.dims - 1; d > 0; --d) {
    offset += row % view.size[d] * view.stride[d];
    row /= view.size[d];
  }
  return offset + row * view.stride[0];
}

KD_NAMESPACE_END
