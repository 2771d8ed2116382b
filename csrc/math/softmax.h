// A softmax that sees its row block by block: the running maximum and the sum of exp2((x - maximum) * k), k = log2(e) /
// T. Shifting by the maximum before anything else makes every result exact under x -> x + constant.
#pragma once

#include "number.h"

KD_NAMESPACE_BEGIN

constexpr double log2_e = 1.4426950408889634074;

struct SoftmaxState {
  double maximum = -INFINITY;
  double sum = 0;

  // What is subtracted from x. A row without finite values has no maximum; 0 keeps its exponents at -inf.
  KD_HD double shift() const { return maximum == -INFINITY ? 0.0 : maximum; }
  // All values -inf, and none of them NaN.
  KD_HD bool empty() const { return maximum == -INFINITY && sum == 0; }
};

// Takes a new block's maximum into account, before the block's own sums: returns the factor by which sums taken
// under the old maximum shrink.
KD_HD double raise_maximum(SoftmaxState& state, double block_maximum, double k) {
  if (!(block_maximum > state.maximum)) return 1.0;
  const double factor = state.sum == 0 ? 0.0 : exp2((state.maximum - block_maximum) * k);
  state.maximum = block_maximum;
  state.sum *= factor;
  return factor;
}

KD_NAMESPACE_END
