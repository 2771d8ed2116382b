// Masked MSE and Pearson on the same features, loss and gradient in one pass, on the GPU. First the masks are counted,
// or drawn and counted, then each feature is read and its gradient written (feature_plan.h: by which kernel, and what
// stays on chip), then one block adds up what the others left. Three launches for a pyramid of planes. The losses of a
// detector's heads ride with the first and the last of them (detection_distillation_heads.cu). Workspace: 20 bytes per
// block, and for Pearson on channels_last a few thousandths of the features' bytes.
#include "detection_distillation.h"

#include "detection_distillation_heads.cuh"
#include "mask_tile.cuh"
#include "pass_pixels.cuh"
#include "pass_planes.cuh"
#include "pass_sums.cuh"

KD_NAMESPACE_BEGIN

namespace {

using plan::FeatureKernel;

struct TilesSegment : FeatureSegment {
  Region region;
};
using TilesTable = SegmentTable<TilesSegment>;
static_assert(sizeof(TilesTable) + sizeof(PassOptions) < 4000, "leaves room for a kernel's other arguments");

constexpr int tile_floats = MaskTile::floats + 4 + pass_parts * (feature_threads / warp_size);

// Masked MSE alone.
template <class S, class T>
KD_GLOBAL(feature_threads, 2)
feature_tiles(const TilesTable table, const float* counts, const PassOptions options, float* parts) {
  constexpr int batch = 2;
  const TilesSegment& segment = find_segment(table);
  const Tile tile = find_tile(segment);
  const MaskTile mask{shared_memory<float>()};
  float* scratch = mask.values + MaskTile::floats;
  RegionFactors* found = reinterpret_cast<RegionFactors*>(scratch);
  find_factors(segment.region, counts, options, found);
  if (segment.channels_inner) {
    block_sync();
  } else {
    mask.load(tile);  // ends with a barrier
  }
  const RegionFactors factors = *found;
  const Lines<S> grad(segment, segment.grad, tile.outer);
  PassSums sums;
  for_pieces<batch, S, T>(tile, [&](const Piece& p, const Vector& s, const Vector& t, int64_t line) {
    const Vector m = mask_of_piece(tile, mask, line, p);
    RegionSums<float> squares{0, 0};
    float norm = 0;
    Vector g;
    KD_UNROLL for (int i = 0; i < vector_size; ++i) {
      g.x[i] = PassSums::masked_mse(squares, norm, s.x[i], t.x[i], m.x[i], factors);
    }
    sums.add(squares, norm, 0);
    if (segment.grad.data) store_piece(grad.line(segment, segment.grad, line), grad.step, p, g);
  });
  sums.leave(scratch + 4, parts);
}

// The host's side: the plan of a call, and where in the workspace its launches leave what.
class Pass {
 public:
  explicit Pass(const Objective& objective)
      : objective_(objective), levels_(objective.levels), pearson_(objective.pearson), count_(objective.count) {
    for (int i = 0; i < count_; ++i) {
      const FeatureLevel& level = levels_[i];
      const Dtype student = level.student.dtype, teacher = level.teacher.dtype;
      const auto bytes = [](Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; };
      plan::FeatureShape shape{level.n,
                               level.c,
                               level.h,
                               level.w,
                               int(student) * 4 + int(teacher),
                               bytes(student),
                               bytes(teacher),
                               false,
                               merges(level, false),
                               level.mask != nullptr,
                               pearson_[i],
                               level.grad.data != nullptr};
      shape.channels_inner = pearson_[i] ? channels_inner(level) : plan_segment(level, i).channels_inner;
      shapes_.push_back(shape);
      elements_ += shape.elements();
    }
    const int code = capability_of(feature_planes<float, float>);
    plans_ = plan::plan_features(shapes_, plan::architecture(compute_capability(), code));
    finish_.resize(size_t(count_));
    for (int i = 0; i < count_; ++i) {
      const FeatureLevel& level = levels_[i];
      const plan::FeatureShape& shape = shapes_[size_t(i)];
      const plan::FeaturePlan& p = plans_.levels[size_t(i)];
      FinishLevel& f = finish_[size_t(i)];
      f = FinishLevel{};
      f.level = i;
      const int counts = shape.masked && shape.elements() > 0 ? count_blocks(i) : 0;
      f.region = Region{static_cast<const float*>(level.mask), counts_, counts, level.c, level.n};
      counts_ += counts;
      parts_ += p.blocks;
      if (p.kernel == FeatureKernel::pixels) {
        results_ += plan_pixels(level, elements_).chunks * partial_floats * level.c;
        channels_ += level.c;
        parts_ += divided(level.c, plan::statistics_channels);
      }
    }
  }

  int64_t workspace_floats() const {
    return 2 * counts_ + results_ + channels_ * statistics_per_channel + parts_ * pass_parts +
           heads_workspace(objective_.heads, objective_.head_count);
  }

  const char* run(float* workspace, float* loss, float* values, float* told, void* stream) {
    const FeatureOptions& options = objective_.options;
    options_ = PassOptions{options, 1, 1};
    int masked = 0, pearson = 0;
    for (const plan::FeatureShape& shape : shapes_) {
      masked += shape.masked;
      pearson += shape.pearson;
    }
    if (options.masked_mse.mean_levels && masked) options_.masked_mse_share = 1.0 / masked;
    if (options.pearson.mean_levels && pearson) options_.pearson_share = 1.0 / pearson;
    counts_at_ = workspace;
    results_at_ = counts_at_ + 2 * counts_;
    statistics_at_ = results_at_ + results_;
    parts_at_ = statistics_at_ + channels_ * statistics_per_channel;
    heads_.count = objective_.head_count;
    heads_.told = told;
    heads_at_ = parts_at_ + parts_ * pass_parts;
    stream_ = stream;
    const char* error = heads_and_masks();
    if (!error) error = planes();
    if (!error) error = tiles();
    if (!error) error = pixels();
    return error ? error : finish(loss, values);
  }

 private:
  const Objective& objective_;
  const FeatureLevel* levels_;
  const bool* pearson_;
  int count_;
  int64_t elements_ = 0;
  std::vector<plan::FeatureShape> shapes_;
  plan::FeaturePlans plans_;
  std::vector<FinishLevel> finish_;
  int64_t counts_ = 0, results_ = 0, channels_ = 0, parts_ = 0;
  PassOptions options_;
  FinishHeads heads_{};
  float *counts_at_ = nullptr, *results_at_ = nullptr, *statistics_at_ = nullptr, *parts_at_ = nullptr;
  float* heads_at_ = nullptr;
  int64_t left_ = 0;  // blocks whose parts were left so far
  void* stream_ = nullptr;

  // Where the next launch leaves its parts, and that its segments' levels find them there.
  template <class Table>
  float* parts_of(const Table& table, int range) {
    float* at = parts_at_ + left_ * pass_parts;
    for (int i = 0; i < table.count; ++i) {
      FinishLevel& level = finish_[size_t(table.segment[i].level)];
      level.first_part[range] = left_ + table.segment[i].first_block;
      level.parts[range] = table.segment[i].blocks();
    }
    left_ += table.blocks;
    return at;
  }

  // Blocks that count level i's mask.
  int count_blocks(int i) const {
    const FeatureLevel& level = levels_[i];
    if (!objective_.drawing) return plan::count_blocks(level.n * level.h * level.w);
    const MaskSegment s = drawn_segment(i);
    return int(divided(level.n * s.tiles, s.per_block));
  }

  MaskSegment drawn_segment(int i) const {
    const MaskDrawing& drawing = *objective_.drawing;
    const int64_t k = objective_.mask_of[i];
    MaskSegment s = mask_segment(drawing.geometry, int(k), drawing.masks[k]);
    s.per_block = tiles_per_block(levels_[i].n * s.tiles);
    return s;
  }

  // The first masks are counted beside the heads, if any of these shares a launch.
  const char* heads_and_masks() {
    int next = 0;
    MaskTable table = next_masks(&next);
    bool counted = false;
    if (heads_.count > 0) {
      if (const char* error = launch_heads(objective_.heads, heads_.count, table, counts_at_, heads_at_, heads_.head,
                                           &counted, stream_)) {
        return error;
      }
    }
    float* at = counts_at_;
    for (; table.blocks() > 0; table = next_masks(&next)) {
      if (!counted) {
        const Launch how{table.blocks(), plan::count_threads, count_scratch_bytes, stream_};
        const char* error =
            table.draws ? launch_draw(table.drawn, false, at, stream_) : launch(feature_counts, how, table.counted, at);
        if (error) return error;
      }
      counted = false;
      at += 2 * table.blocks();
    }
    return nullptr;
  }

  // As many masks as a table holds, from level *next on.
  MaskTable next_masks(int* next) const {
    const MaskDrawing* drawing = objective_.drawing;
    MaskTable table{};
    table.draws = drawing != nullptr;
    if (!drawing) {
      fill(table.counted, next, [&](int i) { return counted_segment(i); });
      return table;
    }
    table.drawn = DrawTable{{}, drawing->boxes, drawing->count, int(drawing->geometry.pictures)};
    fill(table.drawn.levels, next, [&](int i) { return drawn_segment(i); });
    return table;
  }
  template <class Table, class F>
  void fill(Table& table, int* next, const F& segment_of) const {
    for (; *next < count_ && table.count < max_segments; ++*next) {
      const int blocks = finish_[size_t(*next)].region.counts;
      if (blocks == 0) continue;
      auto s = segment_of(*next);
      s.first_block = table.blocks;
      table.blocks += blocks;
      table.segment[table.count++] = s;
    }
  }
  CountSegment counted_segment(int i) const {
    const Region& region = finish_[size_t(i)].region;
    const FeatureLevel& level = levels_[i];
    CountSegment s{region.mask, level.n * level.h * level.w, 0, 0, region.counts, 0};
    s.ahead = int(reinterpret_cast<uintptr_t>(region.mask) / sizeof(float) % vector_size);
    s.per_block = divided(divided(s.ahead + s.pixels, vector_size), s.counted_by) * vector_size;
    return s;
  }

  const char* planes() {
    const auto segment_of = [&](const FeatureLevel& level, int i) {
      PlanesSegment s{};
      const plan::FeaturePlan& p = plans_.levels[size_t(i)];
      if (p.kernel != FeatureKernel::planes) return s;
      static_cast<ChannelSegment&>(s) = start_of_plan(level);
      s.rows = p.rows;
      s.length = p.length;
      s.vectors = p.vectors;
      s.all = p.all;
      s.team = p.team;
      s.chunk = p.chunk;
      s.chunks = p.chunks;
      s.region = finish_[size_t(i)].region;
      s.kept = p.kept;
      s.of_launch = p.blocks;
      s.pearson = pearson_[i];
      s.level = i;
      return s;
    };
    return for_each_table<PlanesSegment>(
        levels_, count_, segment_of, [&](auto s, auto t, const PlanesTable& table) -> const char* {
          Launch how{table.blocks, 0, 0, stream_};
          for (int i = 0; i < table.count; ++i) {
            const plan::FeaturePlan& p = plans_.levels[size_t(table.segment[i].level)];
            how.threads = p.threads;
            how.cluster = p.cluster;
            how.shared_bytes = p.shared_bytes > how.shared_bytes ? int(p.shared_bytes) : how.shared_bytes;
          }
          return launch(feature_planes<decltype(s), decltype(t)>, how, table, counts_at_, options_, parts_of(table, 0));
        });
  }

  const char* tiles() {
    const auto segment_of = [&](const FeatureLevel& level, int i) {
      TilesSegment s{};
      if (plans_.levels[size_t(i)].kernel != FeatureKernel::tiles) return s;
      static_cast<FeatureSegment&>(s) = plan_segment(level, i);
      s.region = finish_[size_t(i)].region;
      return s;
    };
    return for_each_table<TilesSegment>(
        levels_, count_, segment_of, [&](auto s, auto t, const TilesTable& table) -> const char* {
          const Launch how{table.blocks, feature_threads, int(sizeof(float)) * tile_floats, stream_};
          return launch(feature_tiles<decltype(s), decltype(t)>, how, table, counts_at_, options_, parts_of(table, 0));
        });
  }

  const char* pixels() {
    std::vector<StatisticsSegment> statistics(static_cast<size_t>(count_));
    int64_t result = 0, channel = 0;
    for (int i = 0; i < count_; ++i) {
      if (plans_.levels[size_t(i)].kernel != FeatureKernel::pixels) continue;
      const FeatureLevel& level = levels_[i];
      const int64_t chunks = plan_pixels(level, elements_).chunks;
      statistics[size_t(i)] = {result, channel, chunks, level.c, level.n * level.h * level.w, 0, i};
      result += chunks * partial_floats * level.c;
      channel += level.c;
    }
    if (channel == 0) return nullptr;
    const auto segment_of = [&](const FeatureLevel& level, int i) {
      PixelsSegment s{};
      if (plans_.levels[size_t(i)].kernel != FeatureKernel::pixels) return s;
      static_cast<ChannelSegment&>(s) = plan_pixels(level, elements_);
      s.first_result = statistics[size_t(i)].first_result;
      s.first_channel = statistics[size_t(i)].first_channel;
      s.region = finish_[size_t(i)].region;
      s.level = i;
      return s;
    };
    const auto sums_of = [&](const FeatureLevel& level, int i) -> ChannelSegment { return segment_of(level, i); };
    const char* error = for_each_table<ChannelSegment>(
        levels_, count_, sums_of, [&](auto s, auto t, const ChannelTable& table) -> const char* {
          const Launch how{table.blocks, pixel_threads, int(sizeof(float)) * PixelMemory::floats, stream_};
          return launch(pearson_pixel_sums<decltype(s), decltype(t)>, how, table, results_at_);
        });
    int next = 0;
    while (next < count_ && !error) {
      StatisticsTable table{};
      for (; next < count_ && table.count < max_segments; ++next) {
        StatisticsSegment s = statistics[size_t(next)];
        if (s.blocks() == 0) continue;
        s.first_block = table.blocks;
        table.blocks += s.blocks();
        table.segment[table.count++] = s;
      }
      const Launch how{table.blocks, plan::statistics_threads,
                       int(sizeof(float)) * pass_parts * (plan::statistics_threads / warp_size), stream_};
      error = launch(feature_statistics_finish, how, table, results_at_, options_, statistics_at_, parts_of(table, 1));
    }
    if (error) return error;
    return for_each_table<PixelsSegment>(
        levels_, count_, segment_of, [&](auto s, auto t, const PixelsTable& table) -> const char* {
          const Launch how{table.blocks, pixel_threads, int(sizeof(float)) * feature_pixel_floats, stream_};
          return launch(feature_pixels<decltype(s), decltype(t)>, how, table, counts_at_, options_, statistics_at_,
                        parts_of(table, 0));
        });
  }

  const char* finish(float* loss, float* values) {
    int next = 0;
    do {
      FinishTable table{};
      table.first = next == 0;
      table.levels = count_;
      for (; next < count_ && table.count < plan::max_finish_levels; ++next) {
        table.level[table.count++] = finish_[size_t(next)];
      }
      const int doubles =
          table.count * (finish_warps + 1) * pass_parts + heads_.count * (finish_warps * most_row_parts + 1);
      const Launch how{1, finish_threads, int(sizeof(double)) * doubles, stream_};
      const char* error = launch(feature_finish, how, table, parts_at_, counts_at_, options_, heads_, loss, values);
      if (error) return error;
      heads_.count = 0;  // they are told
    } while (next < count_);
    return nullptr;
  }
};

}  // namespace

int64_t detection_distillation_workspace(const Objective& objective) { return Pass(objective).workspace_floats(); }

const char* detection_distillation(const Objective& objective, float* workspace, float* loss, float* values,
                                   float* told, void* stream) {
  if (objective.head_count > most_heads) return "more heads than a launch adds up";
  return Pass(objective).run(workspace, loss, values, told, stream);
}

KD_NAMESPACE_END
