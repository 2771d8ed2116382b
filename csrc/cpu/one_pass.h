// The entry point of one_pass.cpp.
#pragma once

#include <stdint.h>

#include "capability.h"
#include "../arguments.h"

// to = from * factor for `count` neighbouring elements, rounded once. `to` may be `from`.
KD_KERNEL(scale_gradient,
          (const char* from, char* to, Dtype dtype, int64_t count, float factor, const Threads& threads),
          (from, to, dtype, count, factor, threads))
