// How a kernel walks over the levels of a pyramid: all of them in one launch, described by a table that travels by
// value.
//
// A level is a set of lines of neighbouring elements. NCHW, and any other strides: a line is one channel's pixels (a
// row of them where rows do not follow each other); lines of one picture share the mask. channels_last: a line is one
// pixel's channels. A block has a tile: a range of a line's elements, for a range of lines. Vectors are aligned to the
// line's own addresses, so that odd sizes cost a peeled head and tail, never the wide access.
#pragma once

#include "pieces.cuh"
#include "table.cuh"

KD_NAMESPACE_BEGIN

constexpr int feature_threads = plan::tile_threads, tile_width = plan::tile_width;
static_assert(vector_size == plan::vector_size, "what a plan counts in");

struct FeatureSegment {
  FeatureView student, teacher, grad;
  const float* mask;
  int64_t outer;  // pictures (times rows): the sets of lines that share a mask. 1 for channels_last
  int64_t lines;  // per outer: channels; for channels_last the pixels of all pictures
  int length;     // elements per line
  int height, width;
  int line_step;        // lines that a block works on at once
  int lines_per_block;  // a multiple of line_step, or all
  bool channels_inner;
  bool rows_merge;      // NCHW: a line is all pixels of a channel, not one row
  int tiles;            // per line
  int64_t groups;       // of lines
  int64_t first_block;  // of the launch
  int level;            // index among the caller's levels

  int64_t blocks() const { return outer * groups * tiles; }
};

using FeatureTable = SegmentTable<FeatureSegment>;
static_assert(sizeof(FeatureTable) < 4000, "leaves room for a kernel's other arguments");

// Host: the plan of one level. No blocks where it is empty.
inline FeatureSegment plan_segment(const FeatureLevel& level, int index) {
  FeatureSegment s{};
  s.student = level.student;
  s.teacher = level.teacher;
  s.grad = level.grad;
  s.mask = static_cast<const float*>(level.mask);
  s.level = index;
  s.height = int(level.h);
  s.width = int(level.w);
  const auto inner = [](const FeatureView& v) { return v.stride[1] == 1 && v.stride[3] != 1; };
  const auto merges = [&](const FeatureView& v) {
    return !v.data || level.h <= 1 || v.stride[2] == level.w * v.stride[3];
  };
  s.channels_inner = inner(level.student);
  s.rows_merge = merges(level.student) && merges(level.teacher) && merges(level.grad);
  if (s.channels_inner) {
    s.outer = 1;
    s.lines = level.n * level.h * level.w;
    s.length = int(level.c);
  } else {
    s.outer = s.rows_merge ? level.n : level.n * level.h;
    s.lines = level.c;
    s.length = int(s.rows_merge ? level.h * level.w : level.w);
  }
  if (level.n * level.c * level.h * level.w == 0) return s;
  const plan::Tiles tiles = plan::plan_tiles(s.lines, s.length);
  s.tiles = tiles.tiles;
  s.line_step = tiles.line_step;
  s.lines_per_block = tiles.lines_per_block;
  s.groups = tiles.groups;
  return s;
}

// Where a block works.
struct Tile {
  const FeatureSegment* segment;
  int64_t block;  // within the segment
  int64_t outer, first_line, last_line;
  int begin, end;  // elements of each line
  int lane, line;  // of this thread: its vector in the line, its line among line_step
};

KD_DEVICE Tile find_tile(const FeatureSegment& s) {
  Tile tile;
  tile.segment = &s;
  tile.block = block_index() - s.first_block;
  const int64_t group = tile.block % s.groups, rest = tile.block / s.groups;
  const int column = int(rest % s.tiles);
  tile.outer = rest / s.tiles;
  tile.first_line = group * s.lines_per_block;
  tile.last_line = tile.first_line + s.lines_per_block;
  if (tile.last_line > s.lines) tile.last_line = s.lines;
  tile.begin = column * tile_width;
  tile.end = tile.begin + tile_width < s.length ? tile.begin + tile_width : s.length;
  const int lanes = feature_threads / s.line_step;
  tile.lane = thread_index() % lanes;
  tile.line = thread_index() / lanes;
  return tile;
}

// One tensor's side of a segment, for elements of type S.
template <class S>
struct Lines {
  S* data;  // of the outer's line 0
  int64_t line_stride, step;

  KD_DEVICE Lines(const FeatureSegment& s, const FeatureView& view, int64_t outer) {
    data = reinterpret_cast<S*>(view.data);
    if (s.channels_inner) {
      line_stride = 0;  // of_pixel() instead
      step = view.stride[1];
    } else {
      const int64_t n = s.rows_merge ? outer : outer / s.height, y = s.rows_merge ? 0 : outer % s.height;
      data += n * view.stride[0] + y * view.stride[2];
      line_stride = view.stride[1];
      step = view.stride[3];
    }
  }
  KD_DEVICE S* line(const FeatureSegment& s, const FeatureView& view, int64_t index) const {
    if (!s.channels_inner) return data + index * line_stride;
    const int64_t pixels = int64_t(s.height) * s.width, n = index / pixels, pixel = index % pixels;
    return data + n * view.stride[0] + pixel / s.width * view.stride[2] + pixel % s.width * view.stride[3];
  }
};

// The piece of a thread in a line: pieces are laid so that `line` is aligned at their first elements.
template <class S>
KD_DEVICE Piece piece_of(const Tile& tile, const S* line) {
  const int64_t address = int64_t(reinterpret_cast<uintptr_t>(line) / sizeof(S)) + tile.begin;
  const int ahead = int(address % vector_size);  // elements of the first vector that lie before the tile
  Piece p;
  p.first = tile.begin - ahead + tile.lane * vector_size;
  p.begin = p.first < tile.begin ? tile.begin - p.first : 0;
  p.end = tile.end - p.first < vector_size ? tile.end - p.first : vector_size;
  return p;
}

// Calls body(piece, student, teacher, line) for each of this thread's pieces of a tile, `batch` of them in flight.
template <int batch, class S, class T, class F>
KD_DEVICE void for_pieces(const Tile& tile, const F& body) {
  const FeatureSegment& segment = *tile.segment;
  if (tile.line >= segment.line_step) return;  // threads that are left over
  const Lines<const S> student(segment, segment.student, tile.outer);
  const Lines<const T> teacher(segment, segment.teacher, tile.outer);
  for (int64_t first = tile.first_line + tile.line; first < tile.last_line; first += batch * segment.line_step) {
    Piece piece[batch];
    Vector s[batch], t[batch];
    KD_UNROLL for (int b = 0; b < batch; ++b) {
      const int64_t line = first + b * segment.line_step;
      piece[b] = Piece{0, 0, 0};
      if (line >= tile.last_line) continue;
      const S* line_s = student.line(segment, segment.student, line);
      piece[b] = piece_of(tile, line_s);
      if (!piece[b].any()) continue;
      s[b] = load_piece(line_s, student.step, piece[b]);
      t[b] = load_piece(teacher.line(segment, segment.teacher, line), teacher.step, piece[b]);
    }
    KD_UNROLL for (int b = 0; b < batch; ++b) {
      if (piece[b].any()) body(piece[b], s[b], t[b], first + b * segment.line_step);
    }
  }
}

KD_NAMESPACE_END
