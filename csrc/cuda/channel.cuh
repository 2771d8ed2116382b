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
  s.team = power_of_two(s.vectors, 1, 4);
  s.groups = divided(s.vectors, s.team);
  const int64_t at_once = pixel_threads / s.team;
  const int64_t wanted = divided(divided(elements, 2048 * s.team * vector_size), at_once) * at_once;
  s.chunk = wanted < 8 * at_once ? 8 * at_once : wanted;
  s.chunks = divided(s.pixels, s.chunk);
  return s;
}

// Planes.

// A vector of a channel's samples.
struct Place {
  int64_t line;
  int vector;
};

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

  KD_DEVICE Place place(int index) const {
    const int64_t at = first + index;
    return {at / segment.vectors, int(at % segment.vectors)};
  }

  template <class S>
  KD_DEVICE S* line(const FeatureView& view, int64_t index) const {
    const int64_t n = segment.merged ? index : index / segment.height, y = segment.merged ? 0 : index % segment.height;
    return reinterpret_cast<S*>(view.data) + n * view.stride[0] + channel * view.stride[1] + y * view.stride[2];
  }

  // Laid so that `line` is aligned where the piece begins.
  template <class S>
  KD_DEVICE Piece piece(const S* line, int vector) const {
    const int ahead = int(reinterpret_cast<uintptr_t>(line) / sizeof(S) % vector_size);
    Piece p;
    p.first = vector * vector_size - ahead;
    p.begin = p.first < 0 ? -p.first : 0;
    p.end = segment.length - p.first < vector_size ? segment.length - p.first : vector_size;
    return p;
  }

  // Calls body(line's index, piece, student, teacher) for each of this thread's pieces, `batch` of them in flight.
  // Elements outside a piece are undefined.
  template <int batch, class S, class T, class F>
  KD_DEVICE void for_pieces(const F& body) const {
    Place at = place(lane);
    const int lines_on = size / segment.vectors, vectors_on = size % segment.vectors;
    KD_NO_UNROLL for (int i = lane; i < count; i += batch * size) {
      int64_t line[batch];
      Piece p[batch];
      Vector s[batch], t[batch];
      KD_UNROLL for (int b = 0; b < batch; ++b) {
        p[b] = Piece{0, 0, 0};
        if (i + b * size >= count) continue;
        line[b] = at.line;
        const S* line_s = this->line<const S>(segment.student, at.line);
        p[b] = piece(line_s, at.vector);
        if (p[b].any()) {
          s[b] = load_piece(line_s, segment.student.stride[3], p[b]);
          t[b] = load_piece(this->line<const T>(segment.teacher, at.line), segment.teacher.stride[3], p[b]);
        }
        at.line += lines_on;
        at.vector += vectors_on;
        if (at.vector >= segment.vectors) {
          at.vector -= segment.vectors;
          ++at.line;
        }
      }
      KD_UNROLL for (int b = 0; b < batch; ++b) {
        if (p[b].any()) body(line[b], p[b], s[b], t[b]);
      }
    }
  }
};

KD_NAMESPACE_END
