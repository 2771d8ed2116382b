// Pearson's kernels over planes: a team of threads per chunk of a channel (channel.cuh).
#pragma once

#include "channel.cuh"
#include "moments.cuh"

KD_NAMESPACE_BEGIN

// What the backward keeps of a channel, as cpu/pearson.cpp does: gradient = factor_s * (((s - shift_s) - rest_s) *
// scale_s) - factor_t * (((t - shift_t) - rest_t) * scale_t).
enum Statistic : int { shift_s, rest_s, scale_s, factor_s, shift_t, rest_t, scale_t, factor_t, statistics_per_channel };

struct Gradient {
  float row[statistics_per_channel];

  KD_DEVICE void read(const float* statistics) {
    KD_UNROLL for (int k = 0; k < statistics_per_channel; ++k) row[k] = statistics[k];
  }
  KD_DEVICE float operator()(float s, float t) const {
    const float a = ((s - row[shift_s]) - row[rest_s]) * row[scale_s];
    const float b = ((t - row[shift_t]) - row[rest_t]) * row[scale_t];
    return row[factor_s] * a - row[factor_t] * b;
  }
  KD_DEVICE float operator()(float upstream, float s, float t) const { return upstream * (*this)(s, t); }
};

// A channel's loss from its moments; writes its statistics. `share`: of the loss, divided by the level's elements.
KD_DEVICE double finish_channel(const ChannelMoments& moments, double m, double share, const PearsonOptions& options,
                                float* row) {
  if (m == 0) {
    KD_UNROLL for (int k = 0; k < statistics_per_channel; ++k) row[k] = 0;
    return 0;
  }
  const Standard<float> s(0.0f, Moments{moments.count, moments.mean_s, moments.ss}, options.eps);
  const Standard<float> t(0.0f, Moments{moments.count, moments.mean_t, moments.tt}, options.eps);
  const double product = s.scale * t.scale * moments.st, of_s = s.scale * s.scale * moments.paired_ss;
  const double v = of_s - product, u = v + (t.scale * t.scale * moments.tt - product);
  const ChannelGradient gradient(s, m, v, share, options.zero_on_constant);
  row[shift_s] = s.shift;
  row[rest_s] = s.rest;
  row[scale_s] = float(s.scale);
  row[factor_s] = float(gradient.student_factor);
  row[shift_t] = t.shift;
  row[rest_t] = t.rest;
  row[scale_t] = float(t.scale);
  row[factor_t] = float(gradient.teacher_factor);
  return m < 2 ? 0 : 0.5 * share * (u < 0 ? 0 : u);
}

// How often a chunk may be read: about a guess, about what that found, and with a slope where the guess was so far off
// that there was none.
constexpr int most_passes = 3;

// Where the sums of a team begin: at the means of a sample that is spread over its chunk, up to a warp's vectors. Each
// warp of a team reads the same sample and finds the same base. All threads take part.
template <class S, class T>
KD_DEVICE Base sampled_base(const PlaneTeam& team) {
  const ChannelSegment& segment = team.segment;
  const int lanes = team.size < warp_size ? team.size : warp_size;
  Packed<S> s{};
  Packed<T> t{};
  Piece p{0, 0, 0};
  Base base;
  if (team.count > 0) {
    // A sample's mean is of differences to one of the values: exact where all are equal.
    const PlaneCursor<S, T> start(team, 0);
    const Piece one = start.piece();
    const int element = one.first + one.begin, last = start.ahead + segment.length - 1;
    base.s.from = to_float(start.s[(element < last ? element : last) * segment.student.stride[3]]);
    base.t.from = to_float(start.t[(element < last ? element : last) * segment.teacher.stride[3]]);
    const PlaneCursor<S, T> at(team, int(int64_t(team.count) * (team.lane % lanes) / lanes));
    p = at.piece();
    load_packed(s, at.s, segment.student.stride[3], p, at.wide_s);
    load_packed(t, at.t, segment.teacher.stride[3], p, at.wide_t);
  }
  float x = 0, y = 0, xx = 0, yy = 0, xy = 0;
  KD_UNROLL for (int i = 0; i < vector_size; ++i) {
    const bool inside = i >= p.begin && i < p.end;
    x += inside ? s[i] - base.s.from : 0.0f;
    y += inside ? t[i] - base.t.from : 0.0f;
  }
  const float count = sum_of_lanes(p.any() ? float(p.end - p.begin) : 0.0f, lanes);
  x = sum_of_lanes(x, lanes) / count;
  y = sum_of_lanes(y, lanes) / count;
  move(base.s, x, false, 0);
  move(base.t, y, false, 0);
  KD_UNROLL for (int i = 0; i < vector_size; ++i) {
    const bool inside = i >= p.begin && i < p.end;
    const float a = inside ? base.s(s[i]) : 0.0f, b = inside ? base.t(t[i]) : 0.0f;
    xx += a * a;
    yy += b * b;
    xy += a * b;
  }
  base.slope = slope_of_sample(sum_of_lanes(xx, lanes), sum_of_lanes(yy, lanes), sum_of_lanes(xy, lanes));
  return base;
}

// Adds a piece to a thread's sums. `found`: its samples.
template <class S, class T>
KD_DEVICE void add_piece(PairSums& sums, int& found, const Base& base, const Piece& p, const Packed<S>& s,
                         const Packed<T>& t) {
  float of_s[vector_size], of_t[vector_size];
  KD_UNROLL for (int i = 0; i < vector_size; ++i) {
    of_s[i] = s[i];
    of_t[i] = t[i];
  }
  if (!p.whole()) {
    KD_UNROLL for (int i = 0; i < vector_size; ++i) {
      const bool inside = i >= p.begin && i < p.end;
      of_s[i] = inside ? of_s[i] : base.s.from;  // 0 about the base
      of_t[i] = inside ? of_t[i] : base.t.from;
    }
  }
  sums.add(base, of_s, of_t);
  found += p.end - p.begin;
}

// One read of the team's chunk by this thread. `count`: its samples.
template <int batch, class S, class T>
KD_DEVICE PairSums sum_pieces(const PlaneTeam& team, const Base& base, float& count) {
  PairSums sums;
  int found = 0;
  for_pieces<batch, S, T>(team, [&](const Piece& p, const Packed<S>& s, const Packed<T>& t, S*, bool) {
    add_piece(sums, found, base, p, s, t);
  });
  count = float(found);
  return sums;
}

// The sums of the whole team, in each of its threads. `scratch`: 16 floats per warp.
KD_DEVICE void sum_team(const PlaneTeam& team, PairSums& sums, float& count, float* scratch) {
  const int lanes = team.size < warp_size ? team.size : warp_size;
  sums.each_sum([&](float& x) { x = sum_of_lanes(x, lanes); });
  sums.each_maximum([&](float& x) { x = maximum_of_lanes(x, lanes); });
  count = sum_of_lanes(count, lanes);
  if (team.size <= warp_size) return;
  const int warp = thread_index() / warp_size, warps = team.size / warp_size, first = warp / warps * warps;
  if (thread_index() % warp_size == 0) {
    float* slot = scratch + warp * 16;
    int k = 0;
    sums.each_sum([&](float& x) { slot[k++] = x; });
    sums.each_maximum([&](float& x) { slot[k++] = x; });
    slot[k] = count;
  }
  block_sync();
  sums = PairSums();
  count = 0;
  for (int w = first; w < first + warps; ++w) {
    const float* slot = scratch + w * 16;
    PairSums other;
    int k = 0;
    other.each_sum([&](float& x) { x = slot[k++]; });
    other.each_maximum([&](float& x) { x = slot[k++]; });
    sums.add(other);
    count += slot[k];
  }
}

// Whether any thread of the block says so. `scratch`: a float per warp, which must not be in use.
KD_DEVICE bool any_of_block(bool mine, float* scratch) {
  const float found = sum_of_lanes(mine ? 1.0f : 0.0f);
  if (thread_index() % warp_size == 0) scratch[thread_index() / warp_size] = found;
  block_sync();
  float total = 0;
  for (int w = 0; w < block_threads() / warp_size; ++w) total += scratch[w];
  block_sync();  // before the next answers are written
  return total > 0;
}

constexpr int plane_warps = plane_threads / warp_size, plane_floats = plane_warps * 17;

template <class S, class T>
KD_GLOBAL(plane_threads, 2)
pearson_plane_sums(const ChannelTable table, float* results) {
  constexpr int batch = sizeof(T) == 2 ? 4 : 2;
  const PlaneTeam team(find_segment(table));
  float* scratch = shared_memory<float>();
  Base base = sampled_base<S, T>(team);
  PairSums sums;
  float count;
  for (int pass = 1;; ++pass) {
    sums = sum_pieces<batch, S, T>(team, base, count);
    sum_team(team, sums, count, scratch);
    const bool again = pass < most_passes && count > 0 && improve(base, sums, count);
    if (!any_of_block(again, scratch + plane_warps * 16)) break;
  }
  const ChannelSegment& segment = team.segment;
  if (team.count == 0 || team.lane != 0) return;
  float* partial = results + segment.first_result + team.chunk * partial_floats * segment.channels + team.channel;
  each_of_partial(base, sums, count, [&](int k, float value) { partial[k * segment.channels] = value; });
}

template <class S, class T>
KD_GLOBAL(plane_threads, 3)
pearson_plane_gradients(const ChannelTable table, const float* grad_loss, const float* statistics) {
  constexpr int batch = 4 / sizeof(T);
  const PlaneTeam team(find_segment(table));
  if (team.count == 0) return;
  const ChannelSegment& segment = team.segment;
  Gradient gradient;
  gradient.read(statistics + (segment.first_channel + team.channel) * statistics_per_channel);
  const float upstream = *grad_loss;
  for_pieces<batch, S, T>(team, [&](const Piece& p, const Packed<S>& s, const Packed<T>& t, S* to, bool wide) {
    Packed<S> g;
    KD_UNROLL for (int i = 0; i < vector_size; i += 2) {
      g.set(i, gradient(upstream, s[i], t[i]), gradient(upstream, s[i + 1], t[i + 1]));
    }
    store_packed(g, to, segment.grad.stride[3], p, wide);
  });
}

KD_NAMESPACE_END
