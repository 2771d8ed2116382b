// How a kernel walks over the samples of each channel of a pyramid, all levels in one launch.
//
// Planes (NCHW, and any other strides): a channel's samples are lines of neighbouring pixels, one per picture (per row
// where rows do not follow each other). A team of threads has a chunk of one channel's vectors, which are aligned to
// their line's own addresses: odd sizes cost a peeled head and tail, never the wide access. Small levels have small
// teams, several to a block.
// Pixels (channels_last): a thread has a vector of neighbouring channels, and every so many pixels of a chunk; the
// threads of a block share a few such vectors.
#pragma once

#include "packed.cuh"
#include "table.cuh"

KD_NAMESPACE_BEGIN

constexpr int plane_threads = 256, pixel_threads = plan::pixel_threads;
constexpr int most_pixel_vectors = plan::most_pixel_vectors;
static_assert(vector_size == plan::vector_size, "what a plan counts in");

struct ChannelSegment {
  FeatureView student, teacher, grad;
  int64_t channels;
  int64_t pixels;
  int height, width;
  bool merged;                    // pixels: each follows the one before
  int rows;                       // planes: lines per picture, one where its rows follow each other
  int length;                     // planes: pixels per line
  int vectors;                    // planes: per line, as many as it can touch; pixels: of channels
  int64_t all;                    // planes: vectors of a channel
  int team;                       // planes: threads of a team; pixels: vectors of a block; a power of two
  int64_t chunk, chunks, groups;  // a chunk: vectors (planes) or pixels of it; groups: of a block's channels
  int64_t first_block;            // of the launch
  int64_t first_channel;          // among all levels
  int64_t first_result;           // of the workspace

  int64_t blocks() const { return groups * chunks; }
};
using ChannelTable = SegmentTable<ChannelSegment>;
static_assert(sizeof(ChannelTable) < 4000, "leaves room for a kernel's other arguments");

// The host's plans.

using plan::divided;
using plan::power_of_two;

// Whether rows follow each other in memory, and pictures too if asked.
inline bool merges(const FeatureLevel& level, bool pictures) {
  const auto one = [&](const FeatureView& v) {
    const bool rows = level.h <= 1 || v.stride[2] == level.w * v.stride[3];
    return !v.data || (rows && (!pictures || level.n <= 1 || v.stride[0] == level.h * level.w * v.stride[3]));
  };
  return one(level.student) && one(level.teacher) && one(level.grad);
}

// Whether channels lie side by side. Pixels that do not follow each other are found by 32-bit division.
inline bool channels_inner(const FeatureLevel& level) {
  const bool inner = level.student.stride[1] == 1 && level.student.stride[3] != 1;
  return inner && (merges(level, true) || level.n * level.h * level.w <= INT32_MAX);
}

inline ChannelSegment start_of_plan(const FeatureLevel& level) {
  ChannelSegment s{};
  s.student = level.student;
  s.teacher = level.teacher;
  s.grad = level.grad;
  s.channels = level.c;
  s.height = int(level.h);
  s.width = int(level.w);
  s.pixels = level.n * level.h * level.w;
  return s;
}

// Enough blocks to fill a GPU several times, few enough for their partial results to be a small part of the bytes.
inline ChannelSegment plan_planes(const FeatureLevel& level) {
  ChannelSegment s = start_of_plan(level);
  if (level.c * s.pixels == 0) return s;
  const bool rows_merge = merges(level, false);
  s.rows = rows_merge ? 1 : int(level.h);
  s.length = int(rows_merge ? level.h * level.w : level.w);
  s.vectors = int(divided(s.length, vector_size) + 1);  // a line may begin inside a vector
  s.all = level.n * s.rows * s.vectors;
  const int64_t all = s.all;
  s.team = power_of_two(divided(all, 2), 8, plane_threads);
  const int64_t rounds = divided(all * s.channels, 1024 * plane_threads);
  const int64_t most = (rounds < 2 ? 2 : rounds > 16 ? 16 : rounds) * s.team;
  s.chunks = divided(all, most);
  s.chunk = divided(divided(all, s.chunks), s.team) * s.team;
  s.chunks = divided(all, s.chunk);
  s.groups = divided(s.channels, plane_threads / s.team);
  return s;
}

// `elements`: of all levels.
inline ChannelSegment plan_pixels(const FeatureLevel& level, int64_t elements) {
  ChannelSegment s = start_of_plan(level);
  if (level.c * s.pixels == 0) return s;
  s.merged = merges(level, true);
  const plan::Pixels pixels = plan::plan_pixels(s.channels, s.pixels, elements);
  s.vectors = pixels.vectors;
  s.team = pixels.team;
  s.groups = pixels.groups;
  s.chunk = pixels.chunk;
  s.chunks = pixels.chunks;
  return s;
}

// Planes.

// What a team works on. A team beyond the channels has no vectors.
struct PlaneTeam {
  const ChannelSegment& segment;
  int size, lane;  // lane: of this thread
  int64_t channel, chunk;
  int64_t first;  // of the chunk's vectors, counted over the channel's lines
  int count;

  KD_DEVICE explicit PlaneTeam(const ChannelSegment& s) : segment(s) {
    const int64_t block = block_index() - s.first_block;
    size = s.team;
    lane = thread_index() % size;
    chunk = block % s.chunks;  // neighbouring blocks read neighbouring memory
    channel = block / s.chunks * (block_threads() / size) + thread_index() / size;
    first = chunk * s.chunk;
    const int64_t rest = s.all - first;
    count = channel < s.channels ? int(rest < s.chunk ? rest : s.chunk) : 0;
  }
};

// Walks over a channel's vectors. Its line's addresses are worked out when it comes to the line, not for each vector.
template <class S, class T>
struct PlaneCursor {
  const ChannelSegment& segment;
  int64_t channel;
  int picture, row, vector;
  int ahead;  // elements of the line's vector 0 that lie before the line
  // Where the line's vector 0 begins; whether whole pieces are vectors.
  const S* s;
  const T* t;
  S* g;
  bool wide_s, wide_t, wide_g;

  KD_DEVICE PlaneCursor(const PlaneTeam& team, int index) : segment(team.segment), channel(team.channel) {
    const int64_t at = team.first + index, line = at / segment.vectors;
    vector = int(at % segment.vectors);
    picture = int(line / segment.rows);
    row = int(line % segment.rows);
    find_line();
  }

  KD_DEVICE void find_line() {
    s = line<const S>(segment.student);
    ahead = segment.student.stride[3] == 1 ? int(reinterpret_cast<uintptr_t>(s) / sizeof(S) % vector_size) : 0;
    s -= ahead * segment.student.stride[3];
    t = line<const T>(segment.teacher) - ahead * segment.teacher.stride[3];
    g = line<S>(segment.grad) - ahead * segment.grad.stride[3];
    wide_s = starts_vector(s, segment.student.stride[3]);
    wide_t = starts_vector(t, segment.teacher.stride[3]);
    wide_g = starts_vector(g, segment.grad.stride[3]);
  }
  template <class E>
  KD_DEVICE E* line(const FeatureView& view) const {
    return reinterpret_cast<E*>(view.data) + channel * view.stride[1] + picture * view.stride[0] + row * view.stride[2];
  }

  // `lines` and `vectors` further. Not beyond the last line.
  KD_DEVICE void go_on(int lines, int vectors) {
    vector += vectors;
    if (vector >= segment.vectors) {
      vector -= segment.vectors;
      ++lines;
    }
    if (lines == 0) return;
    row += lines;
    picture += row / segment.rows;
    row %= segment.rows;
    find_line();
  }

  KD_DEVICE Piece piece() const {
    Piece p;
    p.first = vector * vector_size;
    p.begin = p.first < ahead ? ahead - p.first : 0;
    const int left = segment.length + ahead - p.first;
    p.end = left < vector_size ? left : vector_size;
    return p;
  }
};

// Calls body(piece, student, teacher, the gradient's line, its step, whether whole pieces of it are vectors) for each
// of this thread's pieces, `batch` of them in flight. Elements outside a piece are undefined.
template <int batch, class S, class T, class F>
KD_DEVICE void for_pieces(const PlaneTeam& team, const F& body) {
  if (team.lane >= team.count) return;
  PlaneCursor<S, T> at(team, team.lane);
  const int lines_on = team.size / team.segment.vectors, vectors_on = team.size % team.segment.vectors;
  KD_NO_UNROLL for (int i = team.lane; i < team.count; i += batch * team.size) {
    Piece p[batch];
    Packed<S> s[batch];
    Packed<T> t[batch];
    S* g[batch];
    bool wide[batch];
    KD_UNROLL for (int b = 0; b < batch; ++b) {
      p[b] = Piece{0, 0, 0};
      if (i + b * team.size >= team.count) continue;
      if (i > team.lane || b > 0) at.go_on(lines_on, vectors_on);
      p[b] = at.piece();
      g[b] = at.g;
      wide[b] = at.wide_g;
      load_packed(s[b], at.s, team.segment.student.stride[3], p[b], at.wide_s);
      load_packed(t[b], at.t, team.segment.teacher.stride[3], p[b], at.wide_t);
    }
    KD_UNROLL for (int b = 0; b < batch; ++b) {
      if (p[b].any()) body(p[b], s[b], t[b], g[b], wide[b]);
    }
  }
}

// Pixels.

// What a block works on, and where its threads are.
struct PixelTeam {
  const ChannelSegment& segment;
  int64_t first_channel, chunk, first, last;  // first, last: pixels, counted over all pictures
  int channels;                               // of the block's that exist
  int vector, row, rows;  // of this thread: its vector, its first pixel after `first`, the distance to its next

  KD_DEVICE explicit PixelTeam(const ChannelSegment& s) : segment(s) {
    const int64_t block = block_index() - s.first_block;
    chunk = block / s.groups;  // neighbouring blocks read neighbouring memory
    first_channel = block % s.groups * s.team * vector_size;
    const int64_t left = s.channels - first_channel;
    channels = left < s.team * vector_size ? int(left) : s.team * vector_size;
    first = chunk * s.chunk;
    last = first + s.chunk < s.pixels ? first + s.chunk : s.pixels;
    vector = thread_index() % s.team;
    row = thread_index() / s.team;
    rows = pixel_threads / s.team;
  }

  // This thread's channels among the block's.
  KD_DEVICE Piece piece() const {
    const int left = channels - vector * vector_size;
    return {vector * vector_size, 0, left < vector_size ? left : vector_size};
  }
};

// The block's first channel of a pixel, in each tensor.
template <class S, class T>
struct PixelPlace {
  const S* s;
  const T* t;
  S* g;

  KD_DEVICE PixelPlace(const PixelTeam& team, int64_t pixel) {
    const ChannelSegment& segment = team.segment;
    int64_t n = 0, y = 0, x = pixel;
    if (!segment.merged) {
      const uint32_t width = uint32_t(segment.width), height = uint32_t(segment.height);
      const uint32_t line = uint32_t(pixel) / width, picture = line / height;
      x = uint32_t(pixel) - line * width;
      y = line - picture * height;
      n = picture;
    }
    const auto offset = [&](const FeatureView& view) {
      return team.first_channel * view.stride[1] + n * view.stride[0] + y * view.stride[2] + x * view.stride[3];
    };
    s = reinterpret_cast<const S*>(segment.student.data) + offset(segment.student);
    t = reinterpret_cast<const T*>(segment.teacher.data) + offset(segment.teacher);
    g = reinterpret_cast<S*>(segment.grad.data) + offset(segment.grad);
  }

  // `pixels` further, where each follows the one before.
  KD_DEVICE void go_on(const ChannelSegment& segment, int pixels) {
    s += pixels * segment.student.stride[3];
    t += pixels * segment.teacher.stride[3];
    g += pixels * segment.grad.stride[3];
  }
};

// Whether all pieces of a thread that begins at this pixel are vectors.
template <class S>
KD_DEVICE bool pixels_are_wide(const FeatureView& view, const S* pixel) {
  return starts_vector(pixel, view.stride[1]) && view.stride[3] % (16 / int(sizeof(S))) == 0;
}

// Calls body(students, teachers, the gradients' pixels, the first pixel) for `batch` of this thread's pixels at a time,
// which are team.rows apart, where they follow each other and are vectors; else, and at the end, for single ones.
// Elements outside team.piece() are undefined.
template <int batch, class S, class T, class F>
KD_DEVICE void for_pixels(const PixelTeam& team, const F& body) {
  const ChannelSegment& segment = team.segment;
  const Piece p = team.piece();
  if (!p.any()) return;
  int64_t pixel = team.first + team.row;
  PixelPlace<S, T> at(team, pixel);
  if (segment.merged && p.whole() && pixels_are_wide(segment.student, at.s) && pixels_are_wide(segment.teacher, at.t)) {
    KD_NO_UNROLL for (; pixel + (batch - 1) * team.rows < team.last; pixel += batch * team.rows) {
      Packed<S> s[batch];
      Packed<T> t[batch];
      S* g[batch];
      KD_UNROLL for (int b = 0; b < batch; ++b) {
        load_packed(s[b], at.s, 1, Piece{p.first, 0, vector_size}, true);
        load_packed(t[b], at.t, 1, Piece{p.first, 0, vector_size}, true);
        g[b] = at.g;
        at.go_on(segment, team.rows);
      }
      body(s, t, g, pixel);
    }
  }
  KD_NO_UNROLL for (; pixel < team.last; pixel += team.rows) {
    at = PixelPlace<S, T>(team, pixel);
    const int64_t step_s = segment.student.stride[1], step_t = segment.teacher.stride[1];
    Packed<S> s[1];
    Packed<T> t[1];
    S* const g[1] = {at.g};
    load_packed(s[0], at.s, step_s, p, starts_vector(at.s, step_s));
    load_packed(t[0], at.t, step_t, p, starts_vector(at.t, step_t));
    body(s, t, g, pixel);
  }
}

KD_NAMESPACE_END
