// The entry points of detection_distillation.cu.
#pragma once

#include <stdint.h>

#include "../arguments.h"
#include "kl_rows.h"
#include "masks.h"
#include "row_sums.h"

namespace kdkernels {
namespace cuda {

// A loss of the objective beside its features, with the options of its kind. Its gradient goes to pair.grad.
struct Head {
  enum Kind : int { kl, soft_cross_entropy, binary_kl, boxes };
  Kind kind;
  RowPair pair;
  DeviceScalar loss_weight;
  KlRegions kl_regions;
  SoftCrossEntropyOptions soft;
  double temperature;      // of binary KL
  RowReduction reduction;  // likewise
  RowView target;          // of boxes
  BoundedRegressionOptions boxes_options;
};

// The levels of a call, none or more, and its heads, at most most_heads. pearson[i]: whether level i is one of
// Pearson's; a level with a mask is one of masked MSE's. With a drawing, masks are drawn where they are counted: that
// of level i is drawing->masks[mask_of[i]].
struct Objective {
  const FeatureLevel* levels;
  const bool* pearson;
  int count;
  FeatureOptions options;
  const Head* heads;
  int head_count;
  const MaskDrawing* drawing;  // of ground truth; null: the masks are there
  const int64_t* mask_of;      // one per level, where there is a drawing
};

// Floats of workspace that a call needs.
int64_t detection_distillation_workspace(const Objective& objective);

// Writes the loss, values (levels + 1, feature_values), and the gradient of each level that has one and of each head.
// told, unless null, (heads + 1, told_columns): the features' loss, and each head's with its parts. Returns what went
// wrong, or null.
const char* detection_distillation(const Objective& objective, float* workspace, float* loss, float* values,
                                   float* told, void* stream);

}  // namespace cuda
}  // namespace kdkernels
