// Counts of rows that a divisor needs. Where a launch would cost more than all its blocks' reads, each block counts for
// itself; else a few blocks count first, and each warp of the kernel that needs the number adds up what they left.
#pragma once

#include "reduce.cuh"

KD_NAMESPACE_BEGIN

constexpr int count_threads = 256;
constexpr int rows_per_counter = 4096;
constexpr int most_counters = warp_size;
constexpr int64_t most_bytes_counted_again = int64_t(1) << 24;  // from the second-level cache, some microseconds

// Host: blocks that count in a launch of their own, each of which leaves a float. None where there are no rows, or
// where each of `blocks` blocks may count for itself what has `bytes` bytes per row.
inline int row_counters(int64_t rows, int64_t blocks, int64_t bytes) {
  if (rows * bytes * blocks <= most_bytes_counted_again) return 0;
  const int64_t wanted = (rows + rows_per_counter - 1) / rows_per_counter;
  return int(wanted < most_counters ? wanted : most_counters);
}

namespace {

// The rows for which `counts(row)` holds. Whole numbers in float32 are exact up to 2^24 per block.
template <class F>
KD_GLOBAL(count_threads, 1)
count_rows(const F counts, int64_t rows, int64_t span, float* results) {
  const int64_t begin = block_index() * span, end = begin + span < rows ? begin + span : rows;
  float found[1] = {0};
  for (int64_t row = begin + thread_index(); row < end; row += count_threads) found[0] += counts(row) ? 1.0f : 0.0f;
  sum_of_block(found, shared_memory<float>());
  if (thread_index() == 0) results[block_index()] = found[0];
}

}  // namespace

// Host.
template <class F>
const char* launch_count_rows(const F& counts, int64_t rows, int counters, float* results, void* stream) {
  if (counters == 0) return nullptr;
  const Launch how{counters, count_threads, int(sizeof(float)) * count_threads / warp_size, stream};
  return launch(count_rows<F>, how, counts, rows, (rows + counters - 1) / counters, results);
}

// The number, in every thread: what `counters` blocks left, or, where there are none, what the block finds. The whole
// block takes part. `scratch`: a float per warp, free again afterwards.
template <class F>
KD_DEVICE float counted_rows(const F& counts, int64_t rows, const float* results, int counters, float* scratch) {
  const int lane = thread_index() % warp_size, warps = block_threads() / warp_size;
  if (counters > 0) return sum_of_lanes(lane < counters ? results[lane] : 0.0f);
  float found = 0;
  for (int64_t row = thread_index(); row < rows; row += block_threads()) found += counts(row) ? 1.0f : 0.0f;
  found = sum_of_lanes(found);
  if (lane == 0) scratch[thread_index() / warp_size] = found;
  block_sync();
  found = sum_of_lanes(lane < warps ? scratch[lane] : 0.0f);
  block_sync();
  return found;
}

KD_NAMESPACE_END
