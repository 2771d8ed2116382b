// Masked MSE of one level: sum over elements of w * (S - T)^2 in two regions, M and 1 - M, each divided by twice its
// count. DeFeat eq. 5; with a background weight of 0 it is FGFI's and TADF's loss, with a mask of ones Mimic's.
#pragma once

#include "number.h"

KD_NAMESPACE_BEGIN

// What a region's sum is divided by, apart from the 2: elements (pixels x channels), pixels, or pictures.
enum class Normalizer : int { elements, pixels, batch };

template <class V>
struct RegionSums {
  V foreground, background;
};

// Adds one element (or vector of elements) with mask value m.
template <class V>
KD_HD void add_squared_difference(RegionSums<V>& sums, V student, V teacher, V mask) {
  const V difference = student - teacher;
  const V square = difference * difference;
  sums.foreground += mask * square;
  sums.background += (constant<V>(1) - mask) * square;
}

// d loss / d student = (S - T) * (M * foreground_scale + (1 - M) * background_scale).
template <class V>
KD_HD V masked_mse_gradient(V student, V teacher, V mask, V foreground_scale, V background_scale) {
  return (student - teacher) * (mask * foreground_scale + (constant<V>(1) - mask) * background_scale);
}

// What a region's sum is multiplied by in the loss; the gradient's scale is twice that. `mask_sum` is the region's
// number of pixels over the batch. An empty region has sum 0, and the clamp keeps the division finite.
KD_HD double region_scale(double weight, Normalizer normalizer, double mask_sum, double channels, double pictures,
                          double level_share) {
  double divisor;
  switch (normalizer) {
    case Normalizer::elements:
      divisor = larger(1.0, 2 * mask_sum * channels);
      break;
    case Normalizer::pixels:
      divisor = larger(1.0, 2 * mask_sum);
      break;
    default:
      divisor = larger(1.0, 2 * pictures);
      break;
  }
  return weight * level_share / divisor;
}

KD_NAMESPACE_END
