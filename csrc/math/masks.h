// Boxes in cells: a box's level, the cells that it covers there, and its Gaussian. The definition is
// kdkernels/_boxes.py; every operation here is its, in its order, so that the cells are the same to the last one.
#pragma once

#include "../arguments.h"
#include "number.h"

KD_NAMESPACE_BEGIN

struct Box {
  float x1, y1, x2, y2;
};

// A level's geometry, with the scales of the boxes that it takes: low <= scale < high, where they are asked for.
struct MaskLevel {
  int height, width;
  float stride;
  float low, high;
  bool has_low, has_high;
};

inline MaskLevel mask_level(const MaskGeometry& geometry, int k) {
  const bool scales = geometry.thresholds != nullptr;
  const bool has_low = scales && k > 0, has_high = scales && k + 1 < geometry.levels;
  return {int(geometry.heights[k]),
          int(geometry.widths[k]),
          float(geometry.strides[k]),
          has_low ? float(geometry.thresholds[k - 1]) : 0,
          has_high ? float(geometry.thresholds[k]) : 0,
          has_low,
          has_high};
}

// Whether a row of boxes (picture, x1, y1, x2, y2) is of this picture; NaN is nobody's.
KD_HD bool belongs_to(const float* row, int64_t picture, int64_t pictures) {
  return row[0] >= 0 && row[0] < float(pictures) && int64_t(row[0]) == picture;
}

// One axis of a box in cells: [first, last) within the picture, and the span before its borders cut it.
struct CellSpan {
  int first, last, start, length;
};
struct CellBox {
  CellSpan rows, columns;
  bool marks;  // anything at all
};

// Cells farther out count as this far: infinite coordinates become finite, and cell arithmetic stays exact in float.
constexpr int far_cell = 1 << 22;

KD_HD int cell_of(float pixel, float stride) {
  const float cell = truncf(pixel / stride);
  return int(cell < float(-far_cell) ? float(-far_cell) : (cell > float(far_cell) ? float(far_cell) : cell));
}

KD_HD bool span_of(float low, float high, float stride, int size, CellSpan& span) {
  const int start = cell_of(low, stride), stop = cell_of(high, stride);
  span.first = start > 0 ? start : 0;
  span.last = stop < size ? stop : size;
  span.start = start;
  span.length = stop - start;
  return span.first < size && stop >= 0;
}

// A box that covers no whole column or row: its first cell, the middle of a span of two, where the Gaussian is 1.
KD_HD void make_single(CellSpan& span) {
  span.last = span.first + 1;
  span.start = span.first - 1;
  span.length = 2;
}

KD_HD bool level_takes(const MaskLevel& level, const Box& b) {
  const float scale = sqrtf((b.x2 - b.x1 + 1) * (b.y2 - b.y1 + 1));
  return (!level.has_low || scale >= level.low) && !(level.has_high && scale >= level.high);
}

// What a box covers of a level. Reversed boxes and boxes with a NaN mark nothing.
KD_HD CellBox cells_of(const MaskLevel& level, const Box& b) {
  CellBox cells{};
  if (!(b.x2 >= b.x1 && b.y2 >= b.y1) || !level_takes(level, b)) return cells;
  const bool on_x = span_of(b.x1, b.x2, level.stride, level.width, cells.columns);
  const bool on_y = span_of(b.y1, b.y2, level.stride, level.height, cells.rows);
  cells.marks = on_x && on_y;
  if (cells.columns.first == cells.columns.last || cells.rows.first == cells.rows.last) {
    make_single(cells.columns);
    make_single(cells.rows);
  }
  return cells;
}

// How far a cell lies from the centre of a span, in half spans, squared: the Gaussian is exp of minus half the sum over
// the two axes. The numerator is exact.
KD_HD float squared_distance(int cell, int start, int length) {
  const float d = float(2 * (cell - start) - length) / float(length);
  return d * d;
}

KD_NAMESPACE_END
