// How a kernel walks over the samples of each channel of a pyramid, all levels in one launch.
//
// Planes (NCHW, and any other strides): a channel's samples are lines of neighbouring pixels, one per picture (per row
// where rows do not follow each other). A team of threads has a chunk of one channel's vectors, which are aligned to
// their line's own addresses: odd sizes cost a peeled head and tail, never the wide access. Small levels have small
// teams, several to a block.
// Pixels (channels_last): a thread has a vector of neighbouring channels, and every so many pixels of a chunk; the
// threads of a block share a few such vectors.
#pragma once

#include "pieces.cuh"
#include "table.cuh"

KD_NAMESPACE_BEGIN

constexpr int plane_threads = 256, pixel_threads = 128;
constexpr int most_pixel_vectors = 4;  // 64 bytes of 16-bit channels

struct ChannelSegment {
  FeatureView student, teacher, grad;
  int64_t channels;
  int64_t lines;  // planes: per channel; pixels: 1
  int64_t pixels;
  int height, width;
  bool merged;  // planes: a line is all pixels of a picture, not one row; pixels: each follows the one before
  int length;   // planes: pixels per line
  int vectors;  // planes: per line, as many as it can touch; pixels: of channels
  int team;     // planes: threads of a team; pixels: vectors of a block; a power of two
  int64_t chunk, chunks, groups;  // a chunk: vectors (planes) or pixels of it; groups: of a block's channels
  int64_t first_block;            // of the launch
  int64_t first_channel;          // among all levels
  int64_t first_result;           // of the workspace

  int64_t blocks() const { return groups * chunks; }
};
using ChannelTable = SegmentTable<ChannelSegment>;
static_assert(sizeof(ChannelTable) < 4000, "leaves room for a kernel's other arguments");

// The host's plans.

inline int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int power_of_two(int64_t least, int lowest, int highest) {
  int x = lowest;
  while (x < highest && x < least) x *= 2;
  return x;
}

inline bool channels_inner(const FeatureLevel& level) {
  return level.student.stride[1] == 1 && level.student.stride[3] != 1;
}

// Whether rows follow each other in memory, and pictures too if asked.
inline bool merges(const FeatureLevel& level, bool pictures) {
  const auto one = [&](const FeatureView& v) {
    const bool rows = level.h <= 1 || v.stride[2] == level.w * v.stride[3];
    return !v.data || (rows && (!pictures || level.n <= 1 || v.stride[0] == level.h * level.w * v.stride[3]));
  };
  return one(level.student) && one(level.teacher) && one(level.grad);
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
  s.merged = merges(level, false);
  s.lines = s.merged ? level.n : level.n * level.h;
  s.length = int(s.merged ? level.h * level.w : level.w);
  s.vectors = int(divided(s.length, vector_size) + 1);  // a line may begin inside a vector
  const int64_t all = s.lines * s.vectors;
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
  s.lines = 1;
  s.merged = merges(level, true);
  s.vectors = int(divided(s.channels, vector_size));
  s.team = power_of_two(s.vectors, 1, most_pixel_vectors);
  s.groups = divided(s.vectors, s.team);
  const int64_t at_once = pixel_threads / s.team;
  const int64_t wanted = divided(divided(elements, 2048 * s.team * vector_size), at_once) * at_once;
  s.chunk = wanted < 8 * at_once ? 8 * at_once : wanted;
  s.chunks = divided(s.pixels, s.chunk);
  return s;
}

// A piece as it lies in memory: 16-bit floats take half the registers until they are used.
template <class S>
struct Packed {
  static constexpr int words = vector_size * int(sizeof(S)) / 4;
  uint32_t word[words];

  // `wide`: the line's elements follow each other, and whole pieces of it are aligned.
  KD_DEVICE void load(const S* line, int64_t step, const Piece& p, bool wide) {
    if (p.whole() && wide) {
      KD_UNROLL for (int k = 0; k < words; k += 4) {
        const Bytes16 bytes = load16(reinterpret_cast<const uint32_t*>(line + p.first) + k);
        KD_UNROLL for (int j = 0; j < 4; ++j) word[k + j] = bytes.word[j];
      }
      return;
    }
    KD_UNROLL for (int k = 0; k < words; ++k) word[k] = 0;
    KD_UNROLL for (int i = 0; i < vector_size; ++i) {
      if (i >= p.begin && i < p.end) put(i, line[(p.first + i) * step]);
    }
  }
  KD_DEVICE float operator[](int i) const { return get(i, S{}); }
  KD_DEVICE Vector unpacked() const {
    Vector v;
    KD_UNROLL for (int i = 0; i < vector_size; ++i) v.x[i] = (*this)[i];
    return v;
  }

 private:
  KD_DEVICE void put(int i, float x) { memcpy(&word[i], &x, 4); }
  template <class H>
  KD_DEVICE void put(int i, H x) {
    word[i / 2] |= uint32_t(x.bits) << (i % 2 * 16);
  }
  KD_DEVICE float get(int i, float x) const {
    memcpy(&x, &word[i], 4);
    return x;
  }
  template <class H>
  KD_DEVICE float get(int i, H) const {
    return to_float(H{uint16_t(word[i / 2] >> (i % 2 * 16))});
  }
};

template <class S>
KD_DEVICE bool starts_vector(const S* line, int64_t step) {
  return step == 1 && reinterpret_cast<uintptr_t>(line) % 16 == 0;
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
    channel = block / s.chunks * (plane_threads / size) + thread_index() / size;
    first = chunk * s.chunk;
    const int64_t rest = s.lines * s.vectors - first;
    count = channel < s.channels ? int(rest < s.chunk ? rest : s.chunk) : 0;
  }
};

// One tensor's side of a channel.
template <class S>
struct PlaneSide {
  S* channel;
  int64_t picture, row, step;  // strides
  S* line;                     // of the current one: where its vector 0 begins, at most a vector before its element 0
  bool wide;

  KD_DEVICE PlaneSide(const FeatureView& view, int64_t index)
      : channel(reinterpret_cast<S*>(view.data) + index * view.stride[1]),
        picture(view.stride[0]),
        row(view.stride[2]),
        step(view.stride[3]) {}

  KD_DEVICE void go_to(int n, int y) { line = channel + n * picture + y * row; }
  KD_DEVICE void go_back(int elements) {
    line -= elements * step;
    wide = starts_vector(line, step);
  }
};

// Walks over a channel's vectors. Its line's addresses are worked out when it comes to the line, not for each vector.
template <class S, class T>
struct PlaneCursor {
  const ChannelSegment& segment;
  PlaneSide<const S> s;
  PlaneSide<const T> t;
  PlaneSide<S> g;
  int line, vector, ahead;  // ahead: elements of the line's vector 0 that lie before the line

  KD_DEVICE PlaneCursor(const PlaneTeam& team, int index)
      : segment(team.segment),
        s(segment.student, team.channel),
        t(segment.teacher, team.channel),
        g(segment.grad, team.channel) {
    const int64_t at = team.first + index;
    line = int(at / segment.vectors);
    vector = int(at % segment.vectors);
    find_line();
  }

  KD_DEVICE void find_line() {
    const int n = segment.merged ? line : line / segment.height, y = segment.merged ? 0 : line % segment.height;
    s.go_to(n, y);
    t.go_to(n, y);
    g.go_to(n, y);
    ahead = s.step == 1 ? int(reinterpret_cast<uintptr_t>(s.line) / sizeof(S) % vector_size) : 0;
    s.go_back(ahead);
    t.go_back(ahead);
    g.go_back(ahead);
  }

  // `lines` and `vectors` further. Not beyond the last line.
  KD_DEVICE void go_on(int lines, int vectors) {
    vector += vectors;
    line += lines;
    const bool next = vector >= segment.vectors;
    if (next) {
      vector -= segment.vectors;
      ++line;
    }
    if (next || lines > 0) find_line();
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
      g[b] = at.g.line;
      wide[b] = at.g.wide;
      s[b].load(at.s.line, at.s.step, p[b], at.s.wide);
      t[b].load(at.t.line, at.t.step, p[b], at.t.wide);
    }
    KD_UNROLL for (int b = 0; b < batch; ++b) {
      if (p[b].any()) body(p[b], s[b].unpacked(), t[b].unpacked(), g[b], wide[b]);
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

  // The block's first channel of a pixel; `data`: of pixel 0.
  template <class S>
  KD_DEVICE S* at(S* data, const FeatureView& view, int64_t pixel) const {
    if (segment.merged) return data + pixel * view.stride[3];
    const int64_t plane = int64_t(segment.height) * segment.width, n = pixel / plane, rest = pixel % plane;
    const int64_t y = rest / segment.width, x = rest % segment.width;
    return data + n * view.stride[0] + y * view.stride[2] + x * view.stride[3];
  }
  template <class S>
  KD_DEVICE S* origin(const FeatureView& view) const {
    return reinterpret_cast<S*>(view.data) + first_channel * view.stride[1];
  }

  // Calls body(students, teachers, origin of the gradient, the first pixel) for `batch` of this thread's pixels at a
  // time, which are `rows` apart, and for single ones at the end. Elements outside the piece are undefined.
  template <int batch, class S, class T, class F>
  KD_DEVICE void for_pixels(const F& body) const {
    const Piece p = piece();
    if (!p.any()) return;
    int64_t pixel = first + row;
    KD_NO_UNROLL for (; pixel + (batch - 1) * rows < last; pixel += batch * rows)
        some_pixels<batch, S, T>(p, pixel, body);
    KD_NO_UNROLL for (; pixel < last; pixel += rows) some_pixels<1, S, T>(p, pixel, body);
  }

 private:
  template <int count, class S, class T, class F>
  KD_DEVICE void some_pixels(const Piece& p, int64_t pixel, const F& body) const {
    Packed<S> s[count];
    Packed<T> t[count];
    KD_UNROLL for (int b = 0; b < count; ++b) {
      const S* of_s = at(origin<const S>(segment.student), segment.student, pixel + b * rows);
      const T* of_t = at(origin<const T>(segment.teacher), segment.teacher, pixel + b * rows);
      const int64_t step_s = segment.student.stride[1], step_t = segment.teacher.stride[1];
      s[b].load(of_s, step_s, p, starts_vector(of_s, step_s));
      t[b].load(of_t, step_t, p, starts_vector(of_t, step_t));
    }
    body(s, t, origin<S>(segment.grad), pixel);
  }
};

KD_NAMESPACE_END
