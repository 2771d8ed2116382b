// The entry points of masked_mse.cpp.
#pragma once

#include "capability.h"
#include "../arguments.h"

// `wide`: arithmetic, loss and scales in double. `scales` receives two gradient scales per level.
KD_KERNEL(masked_mse_forward,
          (const FeatureLevel* levels, int count, const MaskedMseOptions& options, bool wide, void* loss, void* scales,
           const Threads& threads),
          (levels, count, options, wide, loss, scales, threads))
KD_KERNEL(masked_mse_backward,
          (const FeatureLevel& level, bool wide, const void* grad_loss, const void* scales, const Threads& threads),
          (level, wide, grad_loss, scales, threads))
