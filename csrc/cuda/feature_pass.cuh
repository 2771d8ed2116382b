// What the kernels that form loss and gradient in one pass share: the scales of masked MSE's regions, from counts that
// a launch before them left, and the sums that each of their blocks leaves.
#pragma once

#include "../math/masked_mse.h"
#include "pearson_planes.cuh"

KD_NAMESPACE_BEGIN

struct PassOptions {
  FeatureOptions terms;
  double masked_mse_share, pearson_share;  // of a level in its term
};

// What masked MSE needs to know of a level beside its elements.
struct Region {
  const float* mask;    // null: the level is not masked MSE's
  int64_t first_count;  // of the blocks that counted it
  int counts;
  int64_t channels, pictures;
};

KD_DEVICE double weight_value(const DeviceScalar& s) { return s.pointer ? double(*s.pointer) : s.value; }

// What the sums of a level's regions are multiplied by. A whole warp takes part; each lane has the result.
KD_DEVICE RegionSums<double> region_scales(const Region& region, const float* counts, const PassOptions& options) {
  double inside = 0, outside = 0;
  for (int i = thread_index() % warp_size; i < region.counts; i += warp_size) {
    inside += counts[2 * (region.first_count + i)];
    outside += counts[2 * (region.first_count + i) + 1];
  }
  KD_UNROLL for (int bits = warp_size / 2; bits > 0; bits /= 2) {
    inside += shuffle_xor_double(inside, bits);
    outside += shuffle_xor_double(outside, bits);
  }
  const MaskedMseOptions& o = options.terms.masked_mse;
  const Normalizer normalizer = static_cast<Normalizer>(o.normalizer);
  const double share = weight_value(options.terms.masked_mse_weight) * options.masked_mse_share;
  const double channels = double(region.channels), pictures = double(region.pictures);
  return {region_scale(weight_value(o.foreground_weight), normalizer, inside, channels, pictures, share),
          region_scale(weight_value(o.background_weight), normalizer, outside, channels, pictures, share)};
}

// What masked MSE's gradient has of the two regions.
struct RegionFactors {
  float foreground, background;
};

// Leaves the gradient's factors of both regions at `to`, in shared memory. The block's warp 1 does it.
KD_DEVICE void find_factors(const Region& region, const float* counts, const PassOptions& options, RegionFactors* to) {
  if (!region.mask || thread_index() / warp_size != 1) return;
  const RegionSums<double> scales = region_scales(region, counts, options);
  if (thread_index() == warp_size) {
    to->foreground = float(2 * scales.foreground);
    to->background = float(2 * scales.background);
  }
}

// What a block leaves: the terms' sums, those of the regions without their scales, and the gradients' squared norms.
enum PassPart : int {
  part_foreground,
  part_background,
  part_pearson,
  part_masked_mse_norm,
  part_pearson_norm,
  pass_parts
};

// A thread's, and at the end a block's.
struct PassSums {
  float value[pass_parts] = {};

  // Adds one element to masked MSE's sums, and to `norm`; returns its gradient.
  KD_DEVICE static float masked_mse(RegionSums<float>& squares, float& norm, float s, float t, float m,
                                    const RegionFactors& factors) {
    add_squared_difference(squares, s, t, m);
    const float g = masked_mse_gradient(s, t, m, factors.foreground, factors.background);
    norm += g * g;
    return g;
  }
  KD_DEVICE void add(const RegionSums<float>& squares, float masked_mse_norm, float pearson_norm) {
    value[part_foreground] += squares.foreground;
    value[part_background] += squares.background;
    value[part_masked_mse_norm] += masked_mse_norm;
    value[part_pearson_norm] += pearson_norm;
  }
  // The block's sums. `scratch`: pass_parts floats per warp, free when all threads arrive here.
  KD_DEVICE void leave(float* scratch, float* parts) {
    sum_of_block(value, scratch);
    if (thread_index() != 0) return;
    KD_UNROLL for (int k = 0; k < pass_parts; ++k) parts[block_index() * pass_parts + k] = value[k];
  }
};

KD_NAMESPACE_END
