// What masked MSE multiplies the regions' sums of one level by.
#pragma once

#include "../math/masked_mse.h"
#include "feature.h"

KD_NAMESPACE_BEGIN

// `share`: the level's share of the loss. The gradient's scales are twice these.
template <class A>
RegionSums<double> region_scales(const FeatureLevel& level, const MaskedMseOptions& options, double share) {
  const A* mask = static_cast<const A*>(level.mask);
  const int64_t pixels = level.n * level.h * level.w;
  double inside = 0, outside = 0;
  for (int64_t p = 0; p < pixels; ++p) {
    inside += mask[p];
    outside += 1.0 - mask[p];
  }
  const Normalizer normalizer = static_cast<Normalizer>(options.normalizer);
  return {region_scale(options.foreground_weight.get(), normalizer, inside, level.c, level.n, share),
          region_scale(options.background_weight.get(), normalizer, outside, level.c, level.n, share)};
}

KD_NAMESPACE_END
