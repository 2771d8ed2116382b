// Masks from boxes on the GPU: one launch for all pictures and levels. A block
// has a tile of cells of one picture. It goes through all boxes, a chunk at a
// time: each thread finds the cells of one box, those that touch the tile are
// listed in shared memory, and each thread combines the listed boxes in its own
// four cells. Nothing depends on the order of boxes: a cell is covered or not,
// or keeps the nearest centre.
#include "masks.h"

#include "../math/masks.h"
#include "primitives.cuh"

KD_NAMESPACE_BEGIN

namespace {

constexpr int threads = 256;
constexpr int cells_per_thread = 4;
constexpr int tile_width = 64, tile_height = threads * cells_per_thread / tile_width;

struct Segment {
  MaskLevel level;
  float* mask;
  int across;           // tiles side by side
  int tiles;            // per picture
  int64_t first_block;  // of the launch
};
constexpr int max_segments = 32;
struct Table {
  int count;
  float pictures;
  int64_t blocks;
  Segment segment[max_segments];
};
static_assert(sizeof(Table) < 4000, "fits the kernel arguments that every driver takes");

struct alignas(16) Rectangle {
  int left, right, top, bottom;
};
struct alignas(16) Bump {
  int x, width, y, height;  // the box before the borders cut it
};

// The boxes of a chunk that touch the tile, in the order of the chunk.
struct List {
  Rectangle* rectangles;
  Bump* bumps;
  int* found;  // one per warp

  static constexpr int bytes(bool gaussian) {
    return threads * int(sizeof(Rectangle) + (gaussian ? sizeof(Bump) : 0)) + threads / warp_size * int(sizeof(int));
  }
  template <bool gaussian>
  KD_DEVICE static List in_shared_memory() {
    List list;
    list.rectangles = shared_memory<Rectangle>();
    list.bumps = reinterpret_cast<Bump*>(list.rectangles + threads);
    list.found = reinterpret_cast<int*>(list.bumps + (gaussian ? threads : 0));
    return list;
  }
  // Each thread may add one box. Returns how many there are; the list may be
  // overwritten after the next block_sync.
  template <bool gaussian>
  KD_DEVICE int fill(bool touches, const CellBox& cells) const {
    const int lane = thread_index() % warp_size, warp = thread_index() / warp_size;
    const uint32_t lanes = ballot(touches);
    if (lane == 0) found[warp] = count_bits(lanes);
    block_sync();
    int total = 0, before = count_bits(lanes & ((1u << lane) - 1u));
    KD_UNROLL for (int i = 0; i < threads / warp_size; ++i) {
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

template <bool gaussian>
KD_GLOBAL(threads, 4)
draw_boxes(const Table table, const float* boxes, int64_t count) {
  int index = 0;
  while (index + 1 < table.count && table.segment[index + 1].first_block <= block_index()) ++index;
  const Segment& segment = table.segment[index];
  const MaskLevel& level = segment.level;
  const int64_t block = block_index() - segment.first_block, picture = block / segment.tiles;
  const int tile = int(block % segment.tiles);
  const int top = tile / segment.across * tile_height, left = tile % segment.across * tile_width;
  constexpr int per_row = tile_width / cells_per_thread;
  const int row = top + thread_index() / per_row, column = left + thread_index() % per_row * cells_per_thread;
  const List list = List::in_shared_memory<gaussian>();

  // The squared distance to the nearest centre; for ground truth 0, where there
  // is a box.
  float nearest[cells_per_thread];
  KD_UNROLL for (int i = 0; i < cells_per_thread; ++i) nearest[i] = INFINITY;
  for (int64_t first = 0; first < count; first += threads) {
    CellBox cells{};
    bool touches = false;
    if (first + thread_index() < count) {
      const float* box = boxes + (first + thread_index()) * 5;
      const float owner = box[0];  // NaN is nobody
      if (owner >= 0 && owner < table.pictures && int64_t(owner) == picture) {
        cells = cells_of(level, Box{box[1], box[2], box[3], box[4]});
        touches = cells.marks && cells.rows.first < top + tile_height && cells.rows.last > top &&
                  cells.columns.first < left + tile_width && cells.columns.last > left;
      }
    }
    const int listed = list.fill<gaussian>(touches, cells);
    for (int k = 0; k < listed; ++k) {
      const Rectangle r = list.rectangles[k];
      if (row < r.top || row >= r.bottom) continue;
      if (gaussian) {
        const Bump b = list.bumps[k];
        const float y = squared_distance(row, b.y, b.height);
        KD_UNROLL for (int i = 0; i < cells_per_thread; ++i) {
          if (column + i < r.left || column + i >= r.right) continue;
          const float distance = y + squared_distance(column + i, b.x, b.width);
          nearest[i] = distance < nearest[i] ? distance : nearest[i];
        }
      } else {
        KD_UNROLL for (int i = 0; i < cells_per_thread; ++i) {
          if (column + i >= r.left && column + i < r.right) nearest[i] = 0;
        }
      }
    }
  }

  if (row >= level.height) return;
  Bytes16 values;
  KD_UNROLL for (int i = 0; i < cells_per_thread; ++i) {
    // expf rises with its argument, so the nearest centre has the largest bump.
    const float bump = gaussian ? expf(-0.5f * nearest[i]) : 1.0f;
    const float value = nearest[i] < INFINITY ? bump : 0.0f;
    memcpy(&values.word[i], &value, 4);
  }
  float* out = segment.mask + (picture * level.height + row) * level.width + column;
  if (column + cells_per_thread <= level.width && reinterpret_cast<uintptr_t>(out) % 16 == 0) {
    store16(out, values);
  } else {
    KD_UNROLL for (int i = 0; i < cells_per_thread; ++i) {
      if (column + i < level.width) memcpy(out + i, &values.word[i], 4);
    }
  }
}

}  // namespace

const char* draw_masks(const float* boxes, int64_t count, const MaskGeometry& geometry, bool gaussian,
                       float* const* masks, void* stream) {
  int next = 0;
  while (next < geometry.levels) {
    Table table{};
    table.pictures = float(geometry.pictures);
    for (; next < geometry.levels && table.count < max_segments; ++next) {
      Segment& s = table.segment[table.count];
      const bool scales = geometry.thresholds != nullptr;
      s.level.height = int(geometry.heights[next]);
      s.level.width = int(geometry.widths[next]);
      s.level.stride = float(geometry.strides[next]);
      s.level.has_low = scales && next > 0;
      s.level.has_high = scales && next + 1 < geometry.levels;
      s.level.low = s.level.has_low ? float(geometry.thresholds[next - 1]) : 0;
      s.level.high = s.level.has_high ? float(geometry.thresholds[next]) : 0;
      s.mask = masks[next];
      s.across = (s.level.width + tile_width - 1) / tile_width;
      s.tiles = s.across * ((s.level.height + tile_height - 1) / tile_height);
      s.first_block = table.blocks;
      const int64_t blocks = geometry.pictures * s.tiles;
      if (blocks == 0) continue;
      table.blocks += blocks;
      ++table.count;
    }
    const Launch how{table.blocks, threads, List::bytes(gaussian), stream};
    const char* error = gaussian ? launch(draw_boxes<true>, how, table, boxes, count)
                                 : launch(draw_boxes<false>, how, table, boxes, count);
    if (error) return error;
  }
  return nullptr;
}

KD_NAMESPACE_END
