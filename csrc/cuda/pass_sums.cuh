// What comes before the features and after them: the counts of the masks' regions, and the sums of what blocks left,
// those of the heads among them.
#pragma once

#include "feature_pass.cuh"
#include "mask_counts.cuh"
#include "row_sums.h"

KD_NAMESPACE_BEGIN

KD_GLOBAL(plan::count_threads, 4)
feature_counts(const CountTable table, float* counts) { block_of_counts(block_index(), table, counts); }

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
// What the heads' blocks left, and where their losses go: `told` has a row for the features, then one for each head, of
// the loss and its parts. None: null.
struct FinishHeads {
  int count;
  RowSums head[most_heads];
  float* told;
};
static_assert(sizeof(FinishTable) + sizeof(PassOptions) + sizeof(FinishHeads) < 4000,
              "leaves room for a kernel's other arguments");
constexpr int finish_threads = 512, finish_warps = finish_threads / warp_size;

KD_DEVICE void write_values(const double (&sums)[pass_parts], const PassOptions& options, float* row) {
  row[value_foreground] = float(sums[part_foreground]);
  row[value_background] = float(sums[part_background]);
  row[value_masked_mse] = float(sums[part_foreground] + sums[part_background]);
  row[value_pearson] = float(sums[part_pearson]);
  row[value_masked_mse_norm] = options.terms.norms ? float(sums[part_masked_mse_norm]) : 0.0f;
  row[value_pearson_norm] = options.terms.norms ? float(sums[part_pearson_norm]) : 0.0f;
}

// The sum over a warp, in each of its lanes.
KD_DEVICE double sum_of_lanes_double(double value) {
  KD_UNROLL for (int bits = warp_size / 2; bits > 0; bits /= 2) value += shuffle_xor_double(value, bits);
  return value;
}

KD_GLOBAL(finish_threads, 1)
feature_finish(const FinishTable table, const float* parts, const float* counts, const PassOptions options,
               const FinishHeads heads, float* loss, float* values) {
  double* of_warps = shared_memory<double>();  // [level][warp][part], then the levels' [level][part]
  double* totals = of_warps + table.count * finish_warps * pass_parts;
  double* of_heads = totals + table.count * pass_parts;  // [head][warp][part], then the heads' [head]
  double* losses = of_heads + heads.count * finish_warps * most_row_parts;
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
      sums[k] = sum_of_lanes_double(sums[k]);
      if (thread_index() % warp_size == 0) of_warps[(i * finish_warps + warp) * pass_parts + k] = sums[k];
    }
  }
  for (int i = 0; i < heads.count; ++i) {
    const RowSums& head = heads.head[i];
    double sums[most_row_parts] = {};
    for (int64_t b = thread_index(); b < head.blocks; b += finish_threads) {
      KD_UNROLL for (int k = 0; k < most_row_parts; ++k) {
        if (k < head.parts) sums[k] += head.values[b * head.parts + k];
      }
    }
    KD_UNROLL for (int k = 0; k < most_row_parts; ++k) {
      sums[k] = sum_of_lanes_double(sums[k]);
      if (thread_index() % warp_size == 0) of_heads[(i * finish_warps + warp) * most_row_parts + k] = sums[k];
    }
  }
  block_sync();
  if (thread_index() < heads.count) {
    const int i = thread_index();
    double sums[most_row_parts] = {};
    for (int w = 0; w < finish_warps; ++w) {
      KD_UNROLL for (int k = 0; k < most_row_parts; ++k) sums[k] +=
          of_heads[(i * finish_warps + w) * most_row_parts + k];
    }
    losses[i] = 0;
    float* told = heads.told + (i + 1) * told_columns;
    KD_UNROLL for (int k = 0; k < most_row_parts; ++k) {
      losses[i] += sums[k];
      told[1 + k] = float(sums[k]);
    }
    told[0] = float(losses[i]);
  }
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
  double of_all_heads = 0;
  for (int i = 0; i < heads.count; ++i) of_all_heads += losses[i];
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
  *loss = float(table.first ? total + of_all_heads : *loss + (total + of_all_heads));
  if (heads.told) heads.told[0] = float(table.first ? total : heads.told[0] + total);
}

KD_NAMESPACE_END
