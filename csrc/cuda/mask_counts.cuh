// The counts of masks' regions, block by block, of masks as they are or of masks that the blocks draw: a launch of
// their own, or one with the heads (detection_distillation_heads.cu).
#pragma once

#include "masks.cuh"
#include "pieces.cuh"
#include "reduce.cuh"
#include "table.cuh"

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

// What one of the blocks does: the sum of its part of a mask, and of one minus it.
KD_DEVICE void block_of_counts(int64_t block, const CountTable& table, float* counts) {
  const CountSegment& segment = find_segment(table, block);
  const int64_t first = (block - segment.first_block) * segment.per_block;
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
    counts[2 * block] = sums[0];
    counts[2 * block + 1] = sums[1];
  }
}

constexpr int count_scratch_bytes = int(sizeof(float)) * 2 * (plan::count_threads / warp_size);

// Host: blocks that draw a level's ground truth and count it, so few that whoever adds up their counts is soon done.
constexpr int64_t most_draw_blocks = 4 * plan::most_count_blocks;
inline int tiles_per_block(int64_t tiles) { return int(plan::divided(tiles > 0 ? tiles : 1, most_draw_blocks)); }

// All masks of a launch are drawn, or none is.
struct MaskTable {
  bool draws;
  union {
    CountTable counted;
    DrawTable drawn;
  };

  int64_t blocks() const { return draws ? drawn.levels.blocks : counted.blocks; }
  int shared_bytes() const { return draws ? BoxList::bytes(false) : count_scratch_bytes; }
};
static_assert(mask_threads == plan::count_threads, "blocks of both kinds share a launch");

KD_NAMESPACE_END
