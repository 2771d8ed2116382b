// The entry points of pearson.cpp.
#pragma once

#include "capability.h"
#include "../arguments.h"

// statistics: (channels of all levels, 8), see pearson.cpp; the backward gets one level's rows.
KD_KERNEL(pearson_forward,
          (const FeatureLevel* levels, int count, const PearsonOptions& options, bool wide, void* loss,
           void* statistics, const Threads& threads),
          (levels, count, options, wide, loss, statistics, threads))
KD_KERNEL(pearson_backward,
          (const FeatureLevel& level, bool wide, const void* grad_loss, const void* statistics, const Threads& threads),
          (level, wide, grad_loss, statistics, threads))
