// The entry point of detection_distillation.cpp.
#pragma once

#include "capability.h"
#include "../arguments.h"

// values: (levels + 1, feature_values), see arguments.h. A level without a mask has no masked MSE.
KD_KERNEL(detection_distillation_features,
          (const FeatureLevel* levels, const bool* pearson, int count, const FeatureOptions& options, void* loss,
           void* values, const Threads& threads),
          (levels, pearson, count, options, loss, values, threads))
