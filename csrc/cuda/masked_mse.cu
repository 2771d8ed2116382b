// Masked MSE on the GPU. Forward: one launch for all levels, which reads each feature once (2b per element; the mask,
// once per tile of pixels, is under a tenth of that) and leaves four sums per block, and one block that adds them up.
// Backward: one launch, 3b. Workspace: 16 bytes per 32,768 elements.
#include "masked_mse.h"

#include "../math/masked_mse.h"
#include "mask_tile.cuh"
#include "reduce.cuh"

KD_NAMESPACE_BEGIN

namespace {

// Lines that a thread has in flight.
constexpr int batch = 2;

// A block's sums.
enum Part : int { foreground, background, mask_inside, mask_outside, parts };

// Sum of the mask, and of one minus it, over the tile; each tile of pixels is counted by its first group of lines.
KD_DEVICE void count_regions(const Tile& tile, const MaskTile& mask, float (&sums)[parts]) {
  const FeatureSegment& s = *tile.segment;
  if (s.channels_inner) {
    if (tile.begin > 0) return;
    for (int64_t line = tile.first_line + thread_index(); line < tile.last_line; line += feature_threads) {
      sums[mask_inside] += s.mask[line];
      sums[mask_outside] += 1.0f - s.mask[line];
    }
  } else if (tile.first_line == 0) {
    for (int i = thread_index(); i < tile.end - tile.begin; i += feature_threads) {
      sums[mask_inside] += mask(i);
      sums[mask_outside] += 1.0f - mask(i);
    }
  }
}

template <class S, class T>
KD_GLOBAL(feature_threads, 2)
masked_mse_sums(const FeatureTable table, float* results) {
  const Tile tile = find_tile(find_segment(table));
  const FeatureSegment& segment = *tile.segment;
  const MaskTile mask{shared_memory<float>()};
  if (!segment.channels_inner) mask.load(tile);
  float sums[parts] = {};
  count_regions(tile, mask, sums);
  RegionSums<float> squares{0, 0};
  for_pieces<batch, S, T>(tile, [&](const Piece& p, const Vector& s, const Vector& t, int64_t line) {
    const Vector m = mask_of_piece(tile, mask, line, p);
    KD_UNROLL for (int i = 0; i < vector_size; ++i) add_squared_difference(squares, s.x[i], t.x[i], m.x[i]);
  });
  sums[foreground] = squares.foreground;
  sums[background] = squares.background;
  block_sync();  // the mask has been read: its memory serves the sums
  sum_of_block(sums, shared_memory<float>());
  if (thread_index() == 0) {
    KD_UNROLL for (int k = 0; k < parts; ++k) results[block_index() * parts + k] = sums[k];
  }
}

// One block: adds up what the blocks of each level left, in their order, and forms the scales and the loss.
struct FinishLevel {
  int64_t first_block, blocks;
  double channels, pictures;
  int level;
};
constexpr int max_finish_levels = 64;
struct FinishTable {
  int count;
  bool first;  // the first of several launches starts the loss
  double share;
  FinishLevel level[max_finish_levels];
};
constexpr int finish_threads = 256;

KD_GLOBAL(finish_threads, 1)
masked_mse_finish(const FinishTable table, const float* results, MaskedMseOptions options, float* loss, float* scales) {
  double* scratch = shared_memory<double>();
  double total = 0;
  for (int i = 0; i < table.count; ++i) {
    const FinishLevel& level = table.level[i];
    double sums[parts] = {};
    for (int64_t b = thread_index(); b < level.blocks; b += finish_threads) {
      KD_UNROLL for (int k = 0; k < parts; ++k) sums[k] += results[(level.first_block + b) * parts + k];
    }
    KD_UNROLL for (int k = 0; k < parts; ++k) scratch[k * finish_threads + thread_index()] = sums[k];
    block_sync();
    for (int half = finish_threads / 2; half > 0; half /= 2) {
      if (thread_index() < half) {
        KD_UNROLL for (int k = 0; k < parts; ++k) {
          double* column = scratch + k * finish_threads;
          column[thread_index()] += column[thread_index() + half];
        }
      }
      block_sync();
    }
    if (thread_index() == 0) {
      const Normalizer normalizer = static_cast<Normalizer>(options.normalizer);
      const double f = region_scale(scalar_value(options.foreground_weight), normalizer,
                                    scratch[mask_inside * finish_threads], level.channels, level.pictures, table.share);
      const double b =
          region_scale(scalar_value(options.background_weight), normalizer, scratch[mask_outside * finish_threads],
                       level.channels, level.pictures, table.share);
      total += f * scratch[foreground * finish_threads] + b * scratch[background * finish_threads];
      scales[2 * level.level] = float(2 * f);
      scales[2 * level.level + 1] = float(2 * b);
    }
    block_sync();
  }
  if (thread_index() == 0) *loss = float(table.first ? total : *loss + total);
}

template <class S, class T>
KD_GLOBAL(feature_threads, 2)
masked_mse_gradients(const FeatureTable table, const float* grad_loss, const float* scales) {
  const Tile tile = find_tile(find_segment(table));
  const FeatureSegment& segment = *tile.segment;
  const MaskTile mask{shared_memory<float>()};
  if (!segment.channels_inner) mask.load(tile);
  const float upstream = *grad_loss;
  const float inside = upstream * scales[2 * segment.level], outside = upstream * scales[2 * segment.level + 1];
  const Lines<S> grad(segment, segment.grad, tile.outer);
  for_pieces<batch, S, T>(tile, [&](const Piece& p, const Vector& s, const Vector& t, int64_t line) {
    const Vector m = mask_of_piece(tile, mask, line, p);
    Vector g;
    KD_UNROLL for (int i = 0; i < vector_size; ++i) {
      g.x[i] = masked_mse_gradient(s.x[i], t.x[i], m.x[i], inside, outside);
    }
    store_piece(grad.line(segment, segment.grad, line), grad.step, p, g);
  });
}

}  // namespace

int64_t masked_mse_workspace(const FeatureLevel* levels, int count) {
  int64_t blocks = 0;
  for (int i = 0; i < count; ++i) blocks += plan_segment(levels[i], i).blocks();
  return blocks * parts;
}

const char* masked_mse_forward(const FeatureLevel* levels, int count, const MaskedMseOptions& options, float* workspace,
                               float* loss, float* scales, void* stream) {
  int64_t launched = 0;
  FinishLevel finish[max_finish_levels];
  int waiting = 0;
  bool first = true;
  const double share = options.mean_levels ? 1.0 / count : 1.0;
  const auto finish_waiting = [&]() -> const char* {
    FinishTable table{};
    table.count = waiting;
    table.first = first;
    table.share = share;
    for (int i = 0; i < waiting; ++i) table.level[i] = finish[i];
    waiting = 0;
    first = false;
    const Launch how{1, finish_threads, int(sizeof(double)) * parts * finish_threads, stream};
    return launch(masked_mse_finish, how, table, workspace, options, loss, scales);
  };
  for (int i = 0; i < count; ++i) {  // empty levels have no blocks, but scales
    if (plan_segment(levels[i], i).blocks() > 0) continue;
    if (waiting == max_finish_levels) {
      if (const char* error = finish_waiting()) return error;
    }
    finish[waiting++] = FinishLevel{0, 0, double(levels[i].c), double(levels[i].n), i};
  }
  const char* error = for_each_table<FeatureSegment>(
      levels, count, plan_segment, [&](auto s, auto t, const FeatureTable& table) -> const char* {
        using S = decltype(s);
        using T = decltype(t);
        const Launch how{table.blocks, feature_threads, int(sizeof(float)) * MaskTile::floats, stream};
        if (const char* e = launch(masked_mse_sums<S, T>, how, table, workspace + launched * parts)) return e;
        for (int i = 0; i < table.count; ++i) {
          const FeatureSegment& segment = table.segment[i];
          const FeatureLevel& level = levels[segment.level];
          if (waiting == max_finish_levels) {
            if (const char* e = finish_waiting()) return e;
          }
          finish[waiting++] = FinishLevel{launched + segment.first_block, segment.blocks(), double(level.c),
                                          double(level.n), segment.level};
        }
        launched += table.blocks;
        return nullptr;
      });
  return error ? error : finish_waiting();
}

const char* masked_mse_backward(const FeatureLevel* levels, int count, const float* grad_loss, const float* scales,
                                const int64_t* level_of, void* stream) {
  return for_each_table<FeatureSegment>(
      levels, count, plan_segment, [&](auto s, auto t, FeatureTable table) -> const char* {
        for (int i = 0; i < table.count; ++i) table.segment[i].level = int(level_of[table.segment[i].level]);
        const Launch how{table.blocks, feature_threads, int(sizeof(float)) * MaskTile::floats, stream};
        return launch(masked_mse_gradients<decltype(s), decltype(t)>, how, table, grad_loss, scales);
      });
}

KD_NAMESPACE_END
