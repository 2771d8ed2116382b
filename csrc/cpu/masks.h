// The entry point of masks.cpp.
#pragma once

#include "capability.h"
#include "../arguments.h"

// `gaussian`: bumps instead of ones.
KD_KERNEL(draw_masks, (const MaskDrawing& drawing, bool gaussian, const Threads& threads), (drawing, gaussian, threads))
