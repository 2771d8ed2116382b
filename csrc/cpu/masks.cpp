// Masks from boxes: a level of a picture at a time, box by box. Nothing depends on the order of boxes: a cell is
// covered or not, or keeps the nearest centre.
#include "masks.h"

#include <math.h>

#include "../math/masks.h"
#include "block.h"

KD_NAMESPACE_BEGIN
namespace {

// Fewer cells than this are drawn sooner by one thread than handed to others.
constexpr int64_t cells_of_a_thread = 1 << 19;

void fill(float* from, float* to, float value) {
  for (; from != to; ++from) *from = value;
}

// The cells of a row become the squared distance to the nearest centre so far.
void approach(float* row, const CellSpan& columns, float vertical) {
  for (int x = columns.first; x < columns.last; ++x) {
    const float distance = vertical + squared_distance(x, columns.start, columns.length);
    row[x] = distance < row[x] ? distance : row[x];
  }
}

void draw(const MaskDrawing& drawing, const MaskLevel& level, int64_t picture, bool gaussian, float* mask) {
  const int64_t cells_in_all = int64_t(level.height) * level.width;
  fill(mask, mask + cells_in_all, gaussian ? INFINITY : 0.0f);
  for (int64_t i = 0; i < drawing.count; ++i) {
    const float* box = drawing.boxes + i * 5;
    if (!belongs_to(box, picture, drawing.geometry.pictures)) continue;
    const CellBox cells = cells_of(level, Box{box[1], box[2], box[3], box[4]});
    if (!cells.marks) continue;
    for (int y = cells.rows.first; y < cells.rows.last; ++y) {
      float* row = mask + int64_t(y) * level.width;
      if (gaussian) {
        approach(row, cells.columns, squared_distance(y, cells.rows.start, cells.rows.length));
      } else {
        fill(row + cells.columns.first, row + cells.columns.last, 1.0f);
      }
    }
  }
  if (!gaussian) return;
  // expf rises with its argument, so the nearest centre has the largest bump.
  for (int64_t i = 0; i < cells_in_all; ++i) mask[i] = mask[i] < INFINITY ? expf(-0.5f * mask[i]) : 0.0f;
}

}  // namespace

void draw_masks(const MaskDrawing& drawing, bool gaussian, const Threads& threads) {
  const MaskGeometry& geometry = drawing.geometry;
  int64_t all = 0;
  for (int k = 0; k < geometry.levels; ++k) all += geometry.pictures * geometry.heights[k] * geometry.widths[k];
  // A unit is a level of a picture; the first level is most of the work, so that units go picture by picture.
  const int64_t units = geometry.pictures * geometry.levels;
  const int64_t grain = all < cells_of_a_thread ? units : geometry.levels;
  parallel(threads, units, grain, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t picture = unit / geometry.levels;
      const int k = int(unit % geometry.levels);
      const MaskLevel level = mask_level(geometry, k);
      draw(drawing, level, picture, gaussian, drawing.masks[k] + picture * int64_t(level.height) * level.width);
    }
  });
}

KD_NAMESPACE_END
