// A softmax that sees its row block by block: the running maximum and the sum of exp2((x - maximum) * k), k = log2(e) /
// T. Shifting by the maximum before anything else makes every result exact under x -> x + constant.
#pragma once

#include "number.h"

KD_NAMESPACE_BEGIN

constexpr double log2_e = 1.4426950408889634074;

// A: the type of the accumulators.
template <class A>
struct SoftmaxState {
  A maximum = -INFINITY;
  A sum = 0;

  // What is subtracted from x. A row without finite values has no maximum; 0 keeps its exponents at -inf.
  KD_HD A shift() const { return maximum == -INFINITY ? A(0) : maximum; }
  // All values -inf, and none of them NaN.
  KD_HD bool empty() const { return maximum == -INFINITY && sum == 0; }
};

// Takes a new block's maximum into account, before the block's own sums: returns the factor by which sums taken
// under the old maximum shrink.
template <class A>
KD_HD A raise_maximum(SoftmaxState<A>& state, A block_maximum, A k) {
  if (!(block_maximum > state.maximum)) return A(1);
  const A factor = state.sum == 0 ? A(0) : A(exp2((state.maximum - block_maximum) * k));
  state.maximum = block_maximum;
  state.sum *= factor;
  return factor;
}

KD_NAMESPACE_END
