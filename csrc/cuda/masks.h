// The entry points of masks.cu.
#pragma once

#include <stdint.h>

#include "../arguments.h"

namespace kdkernels {
namespace cuda {

struct MaskGeometry {
  int64_t pictures;
  int levels;
  const int64_t *heights, *widths;  // in cells
  const double* strides;            // pixels per cell
  const double*
      thresholds;  // levels - 1: the smallest scale of a box on level 1, 2, ...; null: every box on every level
};

// boxes: (count, 5) of float32, contiguous: picture, x1, y1, x2, y2; a picture below 0 is padding. masks[k] is written:
// (pictures, heights[k], widths[k]), contiguous.
struct MaskDrawing {
  const float* boxes;
  int64_t count;
  MaskGeometry geometry;
  float* const* masks;
};

// `gaussian`: bumps instead of ones. Returns what went wrong, or null.
const char* draw_masks(const MaskDrawing& drawing, bool gaussian, void* stream);

}  // namespace cuda
}  // namespace kdkernels
