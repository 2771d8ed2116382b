// The entry points of detection_distillation.cu.
#pragma once

#include <stdint.h>

#include "../arguments.h"

namespace kdkernels {
namespace cuda {

// Floats of workspace that a call over these levels needs. pearson[i]: whether level i is one of Pearson's; a level
// with a mask is one of masked MSE's.
int64_t detection_distillation_workspace(const FeatureLevel* levels, const bool* pearson, int count);

// Writes loss, values (levels + 1, feature_values) and the gradient of each level that has one. Returns what went
// wrong, or null.
const char* detection_distillation_features(const FeatureLevel* levels, const bool* pearson, int count,
                                            const FeatureOptions& options, float* workspace, float* loss, float* values,
                                            void* stream);

}  // namespace cuda
}  // namespace kdkernels
