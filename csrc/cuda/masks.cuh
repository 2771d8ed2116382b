// Masks from boxes: what a block does, in a launch of masks.cu or in the one that the objective's heads share, where it
// also leaves the counts of what it drew (mask_counts.cuh). A block has tiles of cells, each of one picture. It goes
// through all boxes, a chunk at a time: each thread finds the cells of one box, those that touch the tile are listed in
// shared memory, and each thread combines the listed boxes in its own four cells. Nothing depends on the order of
// boxes: a cell is covered or not, or keeps the nearest centre.
#pragma once

#include "../math/masks.h"
#include "masks.h"
#include "reduce.cuh"
#include "table.cuh"

KD_NAMESPACE_BEGIN

constexpr int mask_threads = 256;
constexpr int cells_per_thread = 4;
constexpr int mask_tile_width = 64, mask_tile_height = mask_threads * cells_per_thread / mask_tile_width;

struct MaskSegment {
  MaskLevel level;
  float* mask;
  int tiles, per_block;  // of a picture, and of a block, whatever the picture
  int64_t first_block;   // of the launch
};
struct DrawTable {
  SegmentTable<MaskSegment> levels;
  const float* boxes;
  int64_t count;
  int pictures;
};

// The boxes of a chunk that touch the tile, in the order of the chunk.
struct BoxList {
  struct alignas(16) Rectangle {
    int left, right, top, bottom;
  };
  struct alignas(16) Bump {
    int x, width, y, height;  // the box before the borders cut it
  };
  static constexpr int warps = mask_threads / warp_size;

  Rectangle* rectangles;
  Bump* bumps;
  int* found;     // one per warp
  float* counts;  // two per warp, for the sums of what was drawn

  static constexpr int bytes(bool gaussian) {
    return mask_threads * int(sizeof(Rectangle) + (gaussian ? sizeof(Bump) : 0)) +
           warps * int(sizeof(int) + 2 * sizeof(float));
  }
  template <bool gaussian>
  KD_DEVICE static BoxList in_shared_memory() {
    BoxList list;
    list.rectangles = shared_memory<Rectangle>();
    list.bumps = reinterpret_cast<Bump*>(list.rectangles + mask_threads);
    list.found = reinterpret_cast<int*>(list.bumps + (gaussian ? mask_threads : 0));
    list.counts = reinterpret_cast<float*>(list.found + warps);
    return list;
  }
  // Each thread may add one box. Returns how many there are; the list may be overwritten after the next block_sync.
  template <bool gaussian>
  KD_DEVICE int fill(bool touches, const CellBox& cells) const {
    const int lane = thread_index() % warp_size, warp = thread_index() / warp_size;
    const uint32_t lanes = ballot(touches);
    if (lane == 0) found[warp] = count_bits(lanes);
    block_sync();
    int total = 0, before = count_bits(lanes & ((1u << lane) - 1u));
    KD_UNROLL for (int i = 0; i < warps; ++i) {
      const int n = found[i];
      if (i < warp) before += n;
      total += n;
    }
    if (touches) {
      rectangles[before] = Rectangle{cells.columns.first, cells.columns.last, cells.rows.first, cells.rows.last};
      if (gaussian) {
        bumps[before] = Bump{cells.columns.start, cells.columns.length, cells.rows.start, cells.rows.length};
      }
    }
    block_sync();
    return total;
  }
};

namespace {

// A thread's four neighbouring cells of a tile. `nearest`: the squared distance to the nearest centre; for ground truth
// 0, where there is a box.
struct MaskCells {
  int row, column;
  float nearest[cells_per_thread];
};

template <bool gaussian>
KD_DEVICE void combine_boxes(const DrawTable& table, const MaskLevel& level, int64_t picture, int top, int left,
                             const BoxList& list, MaskCells& own) {
  for (int64_t first = 0; first < table.count; first += mask_threads) {
    CellBox cells{};
    bool touches = false;
    if (first + thread_index() < table.count) {
      const float* box = table.boxes + (first + thread_index()) * 5;
      if (belongs_to(box, picture, table.pictures)) {
        cells = cells_of(level, Box{box[1], box[2], box[3], box[4]});
        touches = cells.marks && cells.rows.first < top + mask_tile_height && cells.rows.last > top &&
                  cells.columns.first < left + mask_tile_width && cells.columns.last > left;
      }
    }
    const int listed = list.fill<gaussian>(touches, cells);
    for (int k = 0; k < listed; ++k) {
      const BoxList::Rectangle r = list.rectangles[k];
      if (own.row < r.top || own.row >= r.bottom) continue;
      if (gaussian) {
        const BoxList::Bump b = list.bumps[k];
        const float y = squared_distance(own.row, b.y, b.height);
        KD_UNROLL for (int i = 0; i < cells_per_thread; ++i) {
          if (own.column + i < r.left || own.column + i >= r.right) continue;
          const float distance = y + squared_distance(own.column + i, b.x, b.width);
          own.nearest[i] = distance < own.nearest[i] ? distance : own.nearest[i];
        }
      } else {
        KD_UNROLL for (int i = 0; i < cells_per_thread; ++i) {
          if (own.column + i >= r.left && own.column + i < r.right) own.nearest[i] = 0;
        }
      }
    }
  }
}

// Writes the cells, and adds to `sums` their values, and one minus each.
template <bool gaussian>
KD_DEVICE void write_cells(const MaskSegment& segment, int64_t picture, const MaskCells& own, float (&sums)[2]) {
  const MaskLevel& level = segment.level;
  if (own.row >= level.height) return;
  Bytes16 values;
  KD_UNROLL for (int i = 0; i < cells_per_thread; ++i) {
    // expf rises with its argument, so the nearest centre has the largest bump.
    const float bump = gaussian ? expf(-0.5f * own.nearest[i]) : 1.0f;
    const float value = own.nearest[i] < INFINITY ? bump : 0.0f;
    memcpy(&values.word[i], &value, 4);
    if (own.column + i < level.width) {
      sums[0] += value;
      sums[1] += 1.0f - value;
    }
  }
  float* out = segment.mask + (picture * level.height + own.row) * level.width + own.column;
  if (own.column + cells_per_thread <= level.width && reinterpret_cast<uintptr_t>(out) % 16 == 0) {
    store16(out, values);
  } else {
    KD_UNROLL for (int i = 0; i < cells_per_thread; ++i) {
      if (own.column + i < level.width) memcpy(out + i, &values.word[i], 4);
    }
  }
}

// What one of the blocks does. counts, unless null, gets the two sums over its cells: exact, where these are 0 and 1.
template <bool gaussian>
KD_DEVICE void block_of_mask(int64_t block, const DrawTable& table, float* counts) {
  const MaskSegment& segment = find_segment(table.levels, block);
  const int across = (segment.level.width + mask_tile_width - 1) / mask_tile_width;
  const int64_t first = (block - segment.first_block) * segment.per_block;
  const int64_t all = int64_t(table.pictures) * segment.tiles;
  const int64_t last = first + segment.per_block < all ? first + segment.per_block : all;
  const BoxList list = BoxList::in_shared_memory<gaussian>();
  float sums[2] = {};
  for (int64_t at = first; at < last; ++at) {
    const int64_t picture = at / segment.tiles;
    const int tile = int(at % segment.tiles);
    const int top = tile / across * mask_tile_height, left = tile % across * mask_tile_width;
    constexpr int per_row = mask_tile_width / cells_per_thread;
    MaskCells own;
    own.row = top + thread_index() / per_row;
    own.column = left + thread_index() % per_row * cells_per_thread;
    KD_UNROLL for (int i = 0; i < cells_per_thread; ++i) own.nearest[i] = INFINITY;
    combine_boxes<gaussian>(table, segment.level, picture, top, left, list, own);
    write_cells<gaussian>(segment, picture, own, sums);
  }
  if (!counts) return;
  sum_of_block(sums, list.counts);
  if (thread_index() == 0) {
    counts[2 * block] = sums[0];
    counts[2 * block + 1] = sums[1];
  }
}

}  // namespace

// Host: the level `k` of a geometry, to be drawn at `mask`.
inline MaskSegment mask_segment(const MaskGeometry& geometry, int k, float* mask) {
  MaskSegment s{};
  s.level = mask_level(geometry, k);
  s.mask = mask;
  s.tiles = (s.level.width + mask_tile_width - 1) / mask_tile_width *
            ((s.level.height + mask_tile_height - 1) / mask_tile_height);
  s.per_block = 1;
  return s;
}

// Host: the blocks of a launch of their own.
const char* launch_draw(const DrawTable& table, bool gaussian, float* counts, void* stream);

KD_NAMESPACE_END
