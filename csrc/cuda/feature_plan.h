// Launch plans of the feature losses: which kernel takes a level, how many blocks, which clusters, what stays on chip.
// Plain host code, for the launches themselves and for whoever asks without a GPU.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <vector>

namespace kdkernels {
namespace plan {

constexpr int vector_size = 8;  // elements that a thread moves at a time
// Levels of a launch: a table stays below the 4 KB of arguments that every driver takes.
constexpr int max_segments = 12;
constexpr int max_finish_levels = 40;

inline int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int power_of_two(int64_t least, int lowest, int highest) {
  int x = lowest;
  while (x < highest && x < least) x *= 2;
  return x;
}

// Masked MSE alone: a block has a tile, a range of a line's elements for a range of lines (feature.cuh).

constexpr int tile_threads = 256;
// Elements of a line per tile: with a peeled head and tail, one vector per thread.
constexpr int tile_width = (tile_threads - 2) * vector_size;
// Elements per block, about: enough to make the mask's tile and the block's partial results a small part of the bytes.
constexpr int64_t tile_elements = 32768;

struct Tiles {
  int tiles;            // per line
  int line_step;        // lines that a block works on at once
  int lines_per_block;  // a multiple of line_step, or all
  int64_t groups;       // of lines
};

inline Tiles plan_tiles(int64_t lines, int length) {
  Tiles t{};
  t.tiles = int(divided(length, tile_width));
  const int width = length < tile_width ? length : tile_width;
  const int vectors = int(divided(width, vector_size)) + 1;  // a line may begin inside a vector
  t.line_step = tile_threads / (vectors < tile_threads ? vectors : tile_threads);
  const int64_t wanted = divided(tile_elements / width, t.line_step) * t.line_step;
  t.lines_per_block = int(wanted < t.line_step ? t.line_step : wanted);
  t.groups = divided(lines, t.lines_per_block);
  return t;
}

// Pearson, channels_last: a thread has a vector of channels and every so many pixels of a chunk (channel.cuh).

constexpr int pixel_threads = 128;
constexpr int most_pixel_vectors = 4;  // 64 bytes of 16-bit channels

struct Pixels {
  int vectors, team;              // of channels; those of a block, a power of two
  int64_t groups, chunk, chunks;  // of a block's channels; pixels of a chunk
};

// `elements`: of all levels.
inline Pixels plan_pixels(int64_t channels, int64_t pixels, int64_t elements) {
  Pixels p{};
  p.vectors = int(divided(channels, vector_size));
  p.team = power_of_two(p.vectors, 1, most_pixel_vectors);
  p.groups = divided(p.vectors, p.team);
  const int64_t at_once = pixel_threads / p.team;
  const int64_t wanted = divided(divided(elements, 2048 * p.team * vector_size), at_once) * at_once;
  p.chunk = wanted < 8 * at_once ? 8 * at_once : wanted;
  p.chunks = divided(pixels, p.chunk);
  return p;
}

// Threads of a block that finish channels from the sums of their chunks, and how many share one.
constexpr int statistics_threads = 128, statistics_lanes = 4;
constexpr int statistics_channels = statistics_threads / statistics_lanes;

// Masks are counted first, by a few blocks each: whoever needs a level's count adds up what they left.

constexpr int count_threads = 256;
constexpr int64_t count_pixels = 4096, most_count_blocks = 64;

inline int count_blocks(int64_t pixels) {
  const int64_t wanted = divided(pixels, count_pixels);
  return int(wanted < most_count_blocks ? wanted : most_count_blocks);
}

// Loss and gradient in one pass.

// The most threads of a block, where one has a multiprocessor for itself; two blocks have half as many each.
constexpr int slice_threads = 512;
constexpr int slice_team = 32;  // the fewest threads of a channel
// Beside a channel's slice: sums of the warps, partial results and statistics of the teams, scales of the regions.
constexpr int slice_warps = slice_threads / 32, slice_teams = slice_threads / slice_team;
constexpr int slice_scratch_floats = 17 * slice_warps + 20 * slice_teams + 16;
constexpr int64_t slice_scratch_bytes = 4 * slice_scratch_floats;
static_assert(slice_scratch_bytes % 16 == 0, "slices are aligned");

struct Architecture {
  int64_t shared_bytes;  // that a block can have
  int cluster;           // blocks of the largest cluster that every device has; 1: no clusters
};

// capability: 10 * major + minor of the device. code: what the kernels are compiled for, where that is older.
inline Architecture architecture(int capability, int code) {
  const int major = capability / 10;
  int kilobytes = 64;
  if (major == 8) kilobytes = capability == 80 || capability == 87 ? 163 : 99;
  if (major >= 9) kilobytes = major == 12 ? 99 : 227;
  return {int64_t(kilobytes) * 1024, code >= 90 && capability >= 90 ? 8 : 1};
}

struct FeatureShape {
  int64_t n, c, h, w;
  int types;  // levels of one launch agree in it
  int student_bytes, teacher_bytes;
  bool channels_inner;  // channels lie side by side
  bool rows_merge;      // else: a picture's rows follow each other
  bool masked, pearson;
  bool wanted;  // its gradient, which is 0 where neither term has the level

  int64_t elements() const { return n * c * h * w; }
};

// none: an empty level. tiles: masked MSE alone. planes: a block, or some blocks of a cluster, have one channel (or
// a block has several small ones), which stays on chip from the statistics to the gradient as far as it fits. pixels:
// channels_last with Pearson, sums first, then the gradient.
enum class FeatureKernel : int { none, tiles, planes, pixels };

struct FeaturePlan {
  FeatureKernel kernel;
  int64_t blocks;
  int threads, cluster;
  int64_t shared_bytes;  // of the level's blocks, without what its launch adds for others
  double transfers;      // of a feature's bytes: student and teacher read, gradient written, and what is read again

  // planes
  int rows, length, vectors;  // lines of a picture; pixels of a line; its vectors, as many as it can touch
  int64_t all;                // vectors of a channel
  int team;                   // threads that work on one channel in a block, a power of two
  int64_t chunks, chunk;      // blocks that share a channel; vectors of one
  int64_t kept;               // vectors of a team that stay on chip

  int channels_per_block() const { return threads / team; }
  double kept_share() const { return kept < chunk ? double(kept * chunks) / double(all) : 1; }
};

inline void plan_lines(FeaturePlan& p, const FeatureShape& shape) {
  p.rows = shape.rows_merge ? 1 : int(shape.h);
  p.length = int(shape.rows_merge ? shape.h * shape.w : shape.w);
  p.vectors = int(divided(p.length, vector_size) + 1);  // a line may begin inside a vector
  p.all = shape.n * p.rows * p.vectors;
}

// Bytes of student and teacher per vector.
inline int64_t slice_bytes(const FeatureShape& shape) {
  return vector_size * (shape.student_bytes + shape.teacher_bytes);
}

// What the blocks of a launch may have of a multiprocessor.
struct SliceRoom {
  int threads;
  int64_t bytes;  // for slices
  int cluster;
};

inline SliceRoom slice_room(const Architecture& on, int blocks_at_once) {
  constexpr int64_t reserved = 1024;  // by the system, of each block
  const int64_t bytes = (on.shared_bytes + reserved) / blocks_at_once - reserved;
  return {slice_threads / blocks_at_once, bytes - slice_scratch_bytes, on.cluster};
}

// As many blocks of a cluster as hold the channel together, else all of them, and the rest is read again. Small
// channels share a block.
inline void plan_slice(FeaturePlan& p, const FeatureShape& shape, const SliceRoom& room) {
  const int64_t fits = room.bytes / slice_bytes(shape);  // vectors
  p.threads = room.threads;
  p.chunks = power_of_two(divided(p.all, fits), 1, room.cluster);
  p.chunk = divided(p.all, p.chunks);
  p.team = p.chunks > 1 ? p.threads : power_of_two(divided(p.all, 2), slice_team, p.threads);
  p.kept = p.chunk < fits ? p.chunk : fits;
  p.transfers = 3 + 2 * (1 - p.kept_share());
}

// A level without Pearson beside others with it: nothing is kept.
inline void plan_unkept(FeaturePlan& p, const SliceRoom& room) {
  p.threads = room.threads;
  p.team = power_of_two(divided(p.all, 2), slice_team, p.threads);
  p.chunks = divided(p.all, 16 * p.threads);
  p.chunk = divided(p.all, p.chunks);
  p.transfers = 3;
}

struct FeaturePlans {
  std::vector<FeaturePlan> levels;
  int launches;
};

inline int64_t launches_of(const std::vector<FeatureShape>& shapes, const FeaturePlans& plans, FeatureKernel kernel) {
  int64_t launches = 0;
  std::vector<bool> seen(shapes.size(), false);
  for (size_t i = 0; i < shapes.size(); ++i) {
    int64_t alike = 0;
    for (size_t j = i; j < shapes.size(); ++j) {
      if (seen[j] || plans.levels[j].kernel != kernel || shapes[j].types != shapes[i].types) continue;
      seen[j] = true;
      ++alike;
    }
    launches += divided(alike, max_segments);
  }
  return launches;
}

// Plans the slices of all levels, and returns the room that they have. Two blocks at once hide each other's waits: one
// alone only where that keeps more of the largest channel, and at least half of it.
inline SliceRoom plan_slices(const std::vector<FeatureShape>& shapes, FeaturePlans& plans, const Architecture& on) {
  const auto plan_with = [&](const SliceRoom& room) {
    double least = 1;
    for (size_t i = 0; i < shapes.size(); ++i) {
      FeaturePlan& p = plans.levels[i];
      if (p.kernel != FeatureKernel::planes || !shapes[i].pearson) continue;
      plan_lines(p, shapes[i]);
      plan_slice(p, shapes[i], room);
      least = p.kept_share() < least ? p.kept_share() : least;
    }
    return least;
  };
  const SliceRoom two = slice_room(on, 2), one = slice_room(on, 1);
  if (plan_with(two) == 1) return two;
  if (plan_with(one) >= 0.5) return one;
  plan_with(two);
  return two;
}

// Whether Pearson's planes of these types have a launch.
inline bool pearson_planes(const std::vector<FeatureShape>& shapes, const FeaturePlans& plans, int types) {
  for (size_t i = 0; i < shapes.size(); ++i) {
    const bool planes = shapes[i].pearson && plans.levels[i].kernel == FeatureKernel::planes;
    if (planes && shapes[i].types == types) return true;
  }
  return false;
}

// The plans of a call that forms loss and gradient together.
inline FeaturePlans plan_features(const std::vector<FeatureShape>& shapes, const Architecture& on) {
  FeaturePlans plans{std::vector<FeaturePlan>(shapes.size()), 0};
  int64_t elements = 0, masks = 0, statistics = 0;
  for (size_t i = 0; i < shapes.size(); ++i) {
    const FeatureShape& shape = shapes[i];
    FeaturePlan& p = plans.levels[i];
    p = FeaturePlan{};
    p.cluster = 1;
    elements += shape.elements();
    if (shape.elements() == 0 || !(shape.masked || shape.pearson || shape.wanted)) continue;
    masks += shape.masked;
    p.kernel = shape.pearson || !shape.masked ? FeatureKernel::planes : FeatureKernel::tiles;
    if (shape.pearson && shape.channels_inner) p.kernel = FeatureKernel::pixels;
  }
  const SliceRoom room = plan_slices(shapes, plans, on);
  int cluster = 1;
  for (const FeaturePlan& p : plans.levels) cluster = p.chunks > cluster ? int(p.chunks) : cluster;
  for (size_t i = 0; i < shapes.size(); ++i) {
    const FeatureShape& shape = shapes[i];
    FeaturePlan& p = plans.levels[i];
    if (p.kernel == FeatureKernel::tiles && !shape.channels_inner && pearson_planes(shapes, plans, shape.types)) {
      p.kernel = FeatureKernel::planes;  // spares a launch
    }
    if (p.kernel == FeatureKernel::planes && !shape.pearson) {
      plan_lines(p, shape);
      plan_unkept(p, room);
    }
    if (p.kernel == FeatureKernel::planes) {
      p.cluster = cluster;
      p.blocks = divided(divided(shape.c, p.channels_per_block()) * p.chunks, cluster) * cluster;
      p.shared_bytes = slice_scratch_bytes + p.channels_per_block() * p.kept * slice_bytes(shape);
    } else if (p.kernel == FeatureKernel::tiles) {
      const int64_t pixels = shape.n * shape.h * shape.w, rows = shape.rows_merge ? shape.n : shape.n * shape.h;
      const int length = int(shape.rows_merge ? shape.h * shape.w : shape.w);
      const Tiles t = plan_tiles(shape.channels_inner ? pixels : shape.c, shape.channels_inner ? int(shape.c) : length);
      p.threads = tile_threads;
      p.blocks = (shape.channels_inner ? 1 : rows) * t.groups * t.tiles;
      p.transfers = 3;
    } else if (p.kernel == FeatureKernel::pixels) {
      const Pixels t = plan_pixels(shape.c, shape.n * shape.h * shape.w, elements);
      p.threads = pixel_threads;
      p.blocks = t.groups * t.chunks;
      p.transfers = 5;
      ++statistics;
    }
  }
  const int64_t pixels = launches_of(shapes, plans, FeatureKernel::pixels);
  plans.launches = int(divided(masks, max_segments) + launches_of(shapes, plans, FeatureKernel::planes) +
                       launches_of(shapes, plans, FeatureKernel::tiles) + 2 * pixels +
                       divided(statistics, max_segments) + divided(int64_t(shapes.size()), max_finish_levels));
  return plans;
}

}  // namespace plan
}  // namespace kdkernels
