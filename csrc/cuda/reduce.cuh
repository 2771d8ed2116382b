// Sums over the threads of a block, in an order that depends on the block's size alone.
#pragma once

#include "primitives.cuh"

KD_NAMESPACE_BEGIN

KD_DEVICE double shuffle_xor_double(double value, int bits) {
  uint64_t word;
  memcpy(&word, &value, 8);
  const uint32_t low = uint32_t(word), high = uint32_t(word >> 32);
  float half[2];
  memcpy(&half[0], &low, 4);
  memcpy(&half[1], &high, 4);
  half[0] = shuffle_xor(half[0], bits);
  half[1] = shuffle_xor(half[1], bits);
  uint32_t other[2];
  memcpy(&other[0], &half[0], 4);
  memcpy(&other[1], &half[1], 4);
  word = uint64_t(other[1]) << 32 | other[0];
  memcpy(&value, &word, 8);
  return value;
}

// The sum over each group of `lanes` neighbouring lanes (a power of two), in each of them.
KD_DEVICE float sum_of_lanes(float value, int lanes = warp_size) {
  KD_UNROLL for (int bits = warp_size / 2; bits > 0; bits /= 2) {
    if (bits < lanes) value += shuffle_xor(value, bits);
  }
  return value;
}

// Adds up each of n values over the block; thread 0 has the results. `scratch`: n floats per warp, free to be
// overwritten when all threads arrive here, and again after the next block_sync.
template <int n>
KD_DEVICE void sum_of_block(float (&values)[n], float* scratch) {
  const int warp = thread_index() / warp_size, lane = thread_index() % warp_size, warps = block_threads() / warp_size;
  KD_UNROLL for (int k = 0; k < n; ++k) {
    values[k] = sum_of_lanes(values[k]);
    if (lane == 0) scratch[warp * n + k] = values[k];
  }
  block_sync();
  if (thread_index() == 0) {
    KD_UNROLL for (int k = 0; k < n; ++k) {
      float total = 0;
      for (int i = 0; i < warps; ++i) total += scratch[i * n + k];
      values[k] = total;
    }
  }
}

KD_NAMESPACE_END
