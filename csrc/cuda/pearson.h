// The entry points of pearson.cu.
#pragma once

#include <stdint.h>

#include "../arguments.h"

namespace kdkernels {
namespace cuda {

// Floats of workspace that a forward over these levels needs.
int64_t pearson_workspace(const FeatureLevel* levels, int count);

// Each returns what went wrong, or null. statistics: (channels of all levels, 8), what standardises a channel in the
// backward.
const char* pearson_forward(const FeatureLevel* levels, int count, const PearsonOptions& options, float* workspace,
                            float* loss, float* statistics, void* stream);

// levels[i].grad is written, from the rows of statistics that begin at first_channel[i].
const char* pearson_backward(const FeatureLevel* levels, int count, const float* grad_loss, const float* statistics,
                             const int64_t* first_channel, void* stream);

}  // namespace cuda
}  // namespace kdkernels
