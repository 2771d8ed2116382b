// Counts of rows: a few blocks count, and each warp of the kernel that needs the number adds up what they left.
#pragma once

#include "reduce.cuh"

KD_NAMESPACE_BEGIN

constexpr int count_threads = 256;
constexpr int rows_per_counter = 4096;
constexpr int most_counters = warp_size;

// Host: blocks that count, each of which leaves a float; none where there are no rows.
inline int row_counters(int64_t rows) {
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
const char* launch_count_rows(const F& counts, int64_t rows, float* results, void* stream) {
  const int counters = row_counters(rows);
  if (counters == 0) return nullptr;
  const Launch how{counters, count_threads, int(sizeof(float)) * count_threads / warp_size, stream};
  return launch(count_rows<F>, how, counts, rows, (rows + counters - 1) / counters, results);
}

// The number, in every lane. The whole warp takes part.
KD_DEVICE float counted_rows(const float* results, int counters) {
  const int lane = thread_index() % warp_size;
  return sum_of_lanes(lane < counters ? results[lane] : 0.0f);
}

KD_NAMESPACE_END
