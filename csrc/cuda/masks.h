// The entry points of masks.cu.
#pragma once

#include "../arguments.h"

namespace kdkernels {
namespace cuda {

// `gaussian`: bumps instead of ones. Returns what went wrong, or null.
const char* draw_masks(const MaskDrawing& drawing, bool gaussian, void* stream);

}  // namespace cuda
}  // namespace kdkernels
