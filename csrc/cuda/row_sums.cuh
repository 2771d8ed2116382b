// The ends of a row loss: the factor of a reduction, a block's partial sum, and one block that adds the partial sums
// up. A row kernel multiplies each row's value by factor * weight; what follows only adds, in an order that depends on
// the number of blocks and threads alone.
#pragma once

#include "reduce.cuh"

KD_NAMESPACE_BEGIN

// What a row's value is multiplied by: a number, unless the average lives on the device. Travels by value.
struct RowFactor {
  float value;
  const float* average;  // null, or what to divide by, before `columns`
  float columns;

  KD_DEVICE float get() const {
    if (!average) return value;
    const float divisor = *average;
    return divisor <= 0 ? 0.0f : 1.0f / (divisor * columns);  // NaN stays
  }
};

// A weight that is read again and again: rounded on the host, unless it lives on the device.
struct FloatScalar {
  float value;
  const float* pointer;
  KD_DEVICE float get() const { return pointer ? *pointer : value; }
};
inline FloatScalar float_scalar(const DeviceScalar& s) { return {float(s.value), s.pointer}; }

// Host: rows that are counted, and columns, as for RowReduction::factor, which reads `average` and cannot here.
inline RowFactor row_factor(const RowReduction& reduction, double counted_rows, double columns) {
  const bool divides = reduction.kind == RowReduction::mean_rows || reduction.kind == RowReduction::mean_elements;
  if (divides && reduction.has_average && reduction.average.pointer) {
    return {0, reduction.average.pointer, reduction.kind == RowReduction::mean_elements ? float(columns) : 1.0f};
  }
  return {float(reduction.factor(counted_rows, columns)), nullptr, 1};
}

// Adds up each of n values over the block and leaves the sums at partials[block * n]. All threads take part. `scratch`:
// n floats per warp, as for sum_of_block.
template <int n>
KD_DEVICE void store_partials(int64_t block, float (&values)[n], float* scratch, float* partials) {
  sum_of_block(values, scratch);
  if (thread_index() == 0) {
    KD_UNROLL for (int k = 0; k < n; ++k) partials[block * n + k] = values[k];
  }
}
KD_DEVICE void store_partial(int64_t block, float value, float* scratch, float* partials) {
  float values[1] = {value};
  store_partials(block, values, scratch, partials);
}

constexpr int finish_row_threads = 512;

// For a launch of one block of finish_row_threads: adds up the n sums of `count` blocks, in double. Every thread gets
// the totals. `scratch`: n doubles per thread; free again after the next block_sync.
template <int n>
KD_DEVICE void add_partials(const float* partials, int64_t count, double (&totals)[n], double* scratch) {
  KD_UNROLL for (int k = 0; k < n; ++k) totals[k] = 0;
  for (int64_t b = thread_index(); b < count; b += finish_row_threads) {
    KD_UNROLL for (int k = 0; k < n; ++k) totals[k] += partials[b * n + k];
  }
  KD_UNROLL for (int k = 0; k < n; ++k) scratch[k * finish_row_threads + thread_index()] = totals[k];
  block_sync();
  for (int half = finish_row_threads / 2; half > 0; half /= 2) {
    if (thread_index() < half) {
      KD_UNROLL for (int k = 0; k < n; ++k) {
        double* column = scratch + k * finish_row_threads;
        column[thread_index()] += column[thread_index() + half];
      }
    }
    block_sync();
  }
  KD_UNROLL for (int k = 0; k < n; ++k) totals[k] = scratch[k * finish_row_threads];
}

namespace {

template <int n>
KD_GLOBAL(finish_row_threads, 1)
finish_rows(const float* partials, int64_t count, float* loss, float* parts) {
  double totals[n];
  add_partials(partials, count, totals, shared_memory<double>());
  double total = 0;
  KD_UNROLL for (int k = 0; k < n; ++k) total += totals[k];
  if (thread_index() == 0) {
    *loss = float(total);
    if (parts) {
      KD_UNROLL for (int k = 0; k < n; ++k) parts[k] = float(totals[k]);
    }
  }
}

}  // namespace

// Host: one launch that writes the sum of `count` x n partial sums, 0 where there are none, and each of the n to
// `parts`, unless that is null. One processor reads them: a row kernel should leave thousands, not millions.
template <int n = 1>
const char* launch_finish_rows(const float* partials, int64_t count, float* loss, void* stream,
                               float* parts = nullptr) {
  const Launch how{1, finish_row_threads, int(sizeof(double)) * n * finish_row_threads, stream};
  return launch(finish_rows<n>, how, partials, count, loss, parts);
}

KD_NAMESPACE_END
