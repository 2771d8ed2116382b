// One channel of Pearson's loss: its statistics, from two sweeps over its planes, and the gradient that they give.
#pragma once

#include <stdlib.h>

#include "feature.h"
#include "moments.h"

KD_NAMESPACE_BEGIN

// gradient = factor_s * (((s - shift_s) - rest_s) * scale_s) - factor_t * (((t - shift_t) - rest_t) * scale_t). Factor
// and scale stay apart: their product leaves float's range long before the gradient does.
enum PearsonStatistic : int {
  shift_s,
  rest_s,
  scale_s,
  factor_s,
  shift_t,
  rest_t,
  scale_t,
  factor_t,
  statistics_per_channel
};

template <class A>
KD_HD void add_differences(DifferenceSums& sums, const A* s, const A* t, int n, const Standard<A>& of_s,
                           const Standard<A>& of_t) {
  using V = vec<A>;
  const A scale_s = A(of_s.scale), scale_t = A(of_t.scale);
  V u = constant<V>(0), v = constant<V>(0);
  const auto add = [&](V student, V teacher) {
    const V a = of_s.centred(student) * scale_s, difference = a - of_t.centred(teacher) * scale_t;
    u += difference * difference;
    v += a * difference;
  };
  for_each_vector<A>(
      n, [&](int i) { add(load(s + i), load(t + i)); },
      [&](int i, int k) {  // padded lanes would standardise to -rest * scale, which is not exactly 0
        V a = of_s.centred(load_part(s + i, k, A(0))) * scale_s;
        V difference = a - of_t.centred(load_part(t + i, k, A(0))) * scale_t;
        for (int j = k; j < lanes<A>; ++j) a[j] = difference[j] = 0;
        u += difference * difference;
        v += a * difference;
      });
  sums.u += sum_lanes<A>(u);
  sums.v += sum_lanes<A>(v);
}

// One channel's results: its loss, and its statistics for the backward.
template <class A>
double finish_channel(const Standard<A>& s, const Standard<A>& t, const DifferenceSums& rounded, double m, double share,
                      const PearsonOptions& options, A* row) {
  const DifferenceSums sums = with_exact_scales(rounded, s, t, m);
  const ChannelGradient gradient(s, m, sums.v, share, options.zero_on_constant);
  row[shift_s] = s.shift;
  row[rest_s] = s.rest;
  row[scale_s] = A(s.scale);
  row[factor_s] = A(gradient.student_factor);
  row[shift_t] = t.shift;
  row[rest_t] = t.rest;
  row[scale_t] = A(t.scale);
  row[factor_t] = A(gradient.teacher_factor);
  return m < 2 ? 0 : 0.5 * share * sums.u;
}

// NCHW: fills the statistics of channel c and returns its loss. A slice that fits the second-level cache comes from
// memory once.
template <class A>
double channel_forward(const FeatureLevel& level, const FeatureWalk& walk, int64_t c, double share,
                       const PearsonOptions& options, A* row, A* scratch_s, A* scratch_t) {
  const auto each_run = [&](const auto& body) {
    walk.channel_runs(c, [&](const FeatureRun& run) {
      body(read_block(level.student.data, level.student.dtype, run.student, walk.student_step, run.n, scratch_s),
           read_block(level.teacher.data, level.teacher.dtype, run.teacher, walk.teacher_step, run.n, scratch_t),
           run.n);
    });
  };
  Moments ms, mt;
  A first_s = 0, first_t = 0;
  bool started = false;
  each_run([&](const A* s, const A* t, int n) {
    if (!started) {
      first_s = s[0];
      first_t = t[0];
      started = true;
    }
    add_chunk(ms, s, n, first_s);
    add_chunk(mt, t, n, first_t);
  });
  const Standard<A> of_s(first_s, ms, options.eps), of_t(first_t, mt, options.eps);
  DifferenceSums sums;
  each_run([&](const A* s, const A* t, int n) { add_differences(sums, s, t, n, of_s, of_t); });
  return finish_channel(of_s, of_t, sums, ms.count, share, options, row);
}

// The statistics of a run's elements: its channel's (NCHW), or those of neighbouring channels (channels_last).
// at(k, i, n) is statistic k of elements i to i + n.
template <class A>
struct StatisticsOfChannel {
  vec<A> row[statistics_per_channel];

  explicit StatisticsOfChannel(const A* statistics) {
    for (int k = 0; k < statistics_per_channel; ++k) row[k] = constant<vec<A>>(0) + statistics[k];
  }
  KD_HD vec<A> operator()(int k, int, int) const { return row[k]; }
};

// Each statistic's channels side by side.
template <class A>
class StatisticsOfPixel {
 public:
  StatisticsOfPixel(const A* statistics, int64_t channels)
      : channels_(channels), columns_(static_cast<A*>(malloc(sizeof(A) * size_t(channels) * statistics_per_channel))) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int k = 0; k < statistics_per_channel; ++k)
        columns_[k * channels + c] = statistics[c * statistics_per_channel + k];
    }
  }
  StatisticsOfPixel(const StatisticsOfPixel&) = delete;
  StatisticsOfPixel& operator=(const StatisticsOfPixel&) = delete;
  ~StatisticsOfPixel() { free(columns_); }

  // From channel `first` on.
  auto from(int64_t first) const {
    const A* columns = columns_ + first;
    const int64_t channels = channels_;
    return [columns, channels](int k, int i, int n) __attribute__((always_inline)) -> vec<A> {
      const A* at = columns + k * channels + i;
      return n == lanes<A> ? load(at) : load_part(at, n, A(0));
    };
  }

 private:
  int64_t channels_;
  A* columns_;
};

// Elements i to i + n, but for the upstream gradient.
template <class V, class F>
KD_HD V pearson_gradient(V student, V teacher, int i, int n, const F& at) {
  const V from_s = ((student - at(shift_s, i, n)) - at(rest_s, i, n)) * at(scale_s, i, n);
  const V from_t = ((teacher - at(shift_t, i, n)) - at(rest_t, i, n)) * at(scale_t, i, n);
  return at(factor_s, i, n) * from_s - at(factor_t, i, n) * from_t;
}

KD_NAMESPACE_END
