// What comes before the features and after them: the counts of the masks' regions, and the sums of what blocks left.
#pragma once

#include "feature_pass.cuh"

KD_NAMESPACE_BEGIN

struct CountSegment {
  const float* mask;
  int64_t pixels, per_block;  // per_block: whole vectors
  int ahead;                  // pixels of the first vector that lie before the mask: vectors are aligned
  int counted_by;             // blocks
  int64_t first_block;        // of the launch

  int64_t blocks() const { return counted_by; }
};
using CountTable = SegmentTable<CountSegment>;

// Each block: the sum of its part of a mask, and of one minus it.
KD_GLOBAL(plan::count_threads, 4)
feature_counts(const CountTable table, float* counts) {
  const CountSegment& segment = find_segment(table);
  const int64_t first = (block_index() - segment.first_block) * segment.per_block;
  const int64_t end = segment.ahead + segment.pixels, last = first + segment.per_block;
  float sums[2] = {};
  for (int64_t at = first + thread_index() * vector_size; at < last && at < end;
       at += plan::count_threads * vector_size) {
    const Piece p{0, at == 0 ? segment.ahead : 0, end - at < vector_size ? int(end - at) : vector_size};
    const Vector m = load_piece(segment.mask - segment.ahead + at, 1, p);
    float inside = 0, outside = 0;
    KD_UNROLL for (int i = 0; i < vector_size; ++i) {
      inside += m.x[i];
      outside += i >= p.begin && i < p.end ? 1.0f - m.x[i] : 0.0f;
    }
    sums[0] += inside;
    sums[1] += outside;
  }
  sum_of_block(sums, shared_memory<float>());
  if (thread_index() == 0) {
    counts[2 * block_index()] = sums[0];
    counts[2 * block_index() + 1] = sums[1];
  }
}

// One block: adds up what the blocks of each level left, in their order.
struct FinishLevel {
  int64_t first_part[2], parts[2];  // of the level's blocks, and of those that found its statistics
  Region region;
  int level;
};
struct FinishTable {
  int count;
  bool first;  // the first of several launches starts the loss and the values of all levels together
  int levels;  // of the call
  FinishLevel level[plan::max_finish_levels];
};
static_assert(sizeof(FinishTable) + sizeof(PassOptions) < 4000, "leaves room for a kernel's other arguments");
constexpr int finish_threads = 512, finish_warps = finish_threads / warp_size;

KD_DEVICE void write_values(const double (&sums)[pass_parts], const PassOptions& options, float* row) {
  row[value_foreground] = float(sums[part_foreground]);
  row[value_background] = float(sums[part_background]);
  row[value_masked_mse] = float(sums[part_foreground] + sums[part_background]);
  row[value_pearson] = float(sums[part_pearson]);
  row[value_masked_mse_norm] = options.terms.norms ? float(sums[part_masked_mse_norm]) : 0.0f;
  row[value_pearson_norm] = options.terms.norms ? float(sums[part_pearson_norm]) : 0.0f;
}

KD_GLOBAL(finish_threads, 1)
feature_finish(const FinishTable table, const float* parts, const float* counts, const PassOptions options, float* loss,
               float* values) {
  double* of_warps = shared_memory<double>();  // [level][warp][part], then the levels' [level][part]
  double* totals = of_warps + table.count * finish_warps * pass_parts;
  const int warp = thread_index() / warp_size;
  for (int i = 0; i < table.count; ++i) {
    double sums[pass_parts] = {};
    for (int range = 0; range < 2; ++range) {
      const float* from = parts + table.level[i].first_part[range] * pass_parts;
      for (int64_t b = thread_index(); b < table.level[i].parts[range]; b += finish_threads) {
        KD_UNROLL for (int k = 0; k < pass_parts; ++k) sums[k] += from[b * pass_parts + k];
      }
    }
    KD_UNROLL for (int k = 0; k < pass_parts; ++k) {
      KD_UNROLL for (int bits = warp_size / 2; bits > 0; bits /= 2) sums[k] += shuffle_xor_double(sums[k], bits);
      if (thread_index() % warp_size == 0) of_warps[(i * finish_warps + warp) * pass_parts + k] = sums[k];
    }
  }
  block_sync();
  for (int i = warp; i < table.count; i += finish_warps) {
    const FinishLevel& level = table.level[i];
    RegionSums<double> scales{0, 0};
    if (level.region.mask) scales = region_scales(level.region, counts, options);
    if (thread_index() % warp_size != 0) continue;
    double sums[pass_parts] = {};
    for (int w = 0; w < finish_warps; ++w) {
      KD_UNROLL for (int k = 0; k < pass_parts; ++k) sums[k] += of_warps[(i * finish_warps + w) * pass_parts + k];
    }
    sums[part_foreground] *= scales.foreground;
    sums[part_background] *= scales.background;
    write_values(sums, options, values + level.level * feature_values);
    KD_UNROLL for (int k = 0; k < pass_parts; ++k) totals[i * pass_parts + k] = sums[k];
  }
  block_sync();
  if (thread_index() != 0) return;
  float* row = values + table.levels * feature_values;
  double sums[pass_parts] = {};
  for (int i = 0; i < table.count; ++i) {
    KD_UNROLL for (int k = 0; k < pass_parts; ++k) sums[k] += totals[i * pass_parts + k];
  }
  const double total = sums[part_foreground] + sums[part_background] + sums[part_pearson];
  float before[feature_values] = {};
  KD_UNROLL for (int k = 0; k < feature_values; ++k) before[k] = table.first ? 0.0f : row[k];
  write_values(sums, options, row);
  KD_UNROLL for (int k = 0; k < feature_values; ++k) row[k] += before[k];
  *loss = float(table.first ? total : *loss + total);
}

KD_NAMESPACE_END
