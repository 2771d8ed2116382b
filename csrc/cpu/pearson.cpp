// Pearson-normalised feature loss (PKD) on the CPU. Forward, per channel: one pass for the moments, chunk by chunk, and
// one for the sums of the standardised difference; a channel's slice that fits the second-level cache comes from memory
// once. Backward: reads both features, writes the gradient. Six numbers per channel are kept.
#include "pearson.h"

#include <stdlib.h>

#include "../math/pearson.h"
#include "feature.h"

KD_NAMESPACE_BEGIN

namespace {

// gradient = factor_s * ((s - shift_s) - rest_s) - factor_t * ((t - shift_t) - rest_t)
enum Statistic : int { shift_s, rest_s, factor_s, shift_t, rest_t, factor_t, statistics_per_channel };

// v = sum s^ (s^ - t^), u = sum (s^ - t^)^2.
struct DifferenceSums {
  double u = 0, v = 0;
};

template <class A>
KD_HD void add_chunk(Moments& moments, const A* x, int n, A shift) {
  using V = vec<A>;
  V sum = constant<V>(0), squares = constant<V>(0);
  for_each_vector<A>(
      n, [&](int i) { sum += load(x + i) - shift; }, [&](int i, int k) { sum += load_part(x + i, k, shift) - shift; });
  const double mean = sum_lanes<A>(sum) / n;
  const A middle = A(mean);
  const auto square = [&](V value) -> V {
    const V d = (value - shift) - middle;
    return d * d;
  };
  const V padding = square(constant<V>(0) + shift);
  for_each_vector<A>(
      n, [&](int i) { squares += square(load(x + i)); },
      [&](int i, int k) {
        V last = square(load_part(x + i, k, shift));
        for (int j = k; j < lanes<A>; ++j) last[j] -= padding[j];
        squares += last;
      });
  // The squares are about the rounded mean: exact after removing n (mean - middle)^2.
  const double rounding = mean - double(middle);
  moments.merge(n, mean, sum_lanes<A>(squares) - n * rounding * rounding);
}

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
double finish(const Standard<A>& s, const Standard<A>& t, const DifferenceSums& sums, double m, double share,
              const PearsonOptions& options, A* row) {
  const ChannelGradient gradient(s, t, m, sums.v, share, options.zero_on_constant);
  row[shift_s] = s.shift;
  row[rest_s] = s.rest;
  row[factor_s] = A(gradient.student_factor);
  row[shift_t] = t.shift;
  row[rest_t] = t.rest;
  row[factor_t] = A(gradient.teacher_factor);
  return m < 2 ? 0 : 0.5 * share * sums.u;
}

template <class A>
double planes_forward(const FeatureLevel& level, const FeatureWalk& walk, double share, const PearsonOptions& options,
                      A* statistics, double* losses, const Threads& threads) {
  const double m = double(level.n) * double(level.h) * double(level.w);
  parallel(threads, level.c, 1 + int64_t(16384 / m), [&](int64_t begin, int64_t end) {
    A scratch_s[block_size], scratch_t[block_size];
    for (int64_t c = begin; c < end; ++c) {
      const auto each_run = [&](const auto& body) {
        for (int64_t n = 0; n < level.n; ++n) {
          walk.runs(n * level.c + c, [&](const FeatureRun& run) {
            body(read_block(level.student.data, level.student.dtype, run.student, walk.student_step, run.n, scratch_s),
                 read_block(level.teacher.data, level.teacher.dtype, run.teacher, walk.teacher_step, run.n, scratch_t),
                 run.n);
          });
        }
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
      losses[c] = finish(of_s, of_t, sums, m, share, options, statistics + c * statistics_per_channel);
    }
  });
  double total = 0;
  for (int64_t c = 0; c < level.c; ++c) total += losses[c];
  return total;
}

// channels_last: a task has up to `group` channels and all pixels, in chunks whose values are used twice from the
// cache.
constexpr int group = 64, chunk = 64;

template <class A>
struct PixelChunk {
  const A* s[chunk];
  const A* t[chunk];
  A scratch_s[chunk][group], scratch_t[chunk][group];

  void read(const FeatureLevel& level, const FeatureWalk& walk, int64_t first, int count, int64_t channel,
            int channels) {
    for (int i = 0; i < count; ++i) {
      s[i] = read_block(level.student.data, level.student.dtype, walk.at_pixel(level.student, first + i, channel),
                        walk.student_step, channels, scratch_s[i]);
      t[i] = read_block(level.teacher.data, level.teacher.dtype, walk.at_pixel(level.teacher, first + i, channel),
                        walk.teacher_step, channels, scratch_t[i]);
    }
  }
};

// Moments of `channels` neighbouring channels over one chunk of pixels. Plain loops over channels: the compiler's
// vectors.
template <class A>
void add_pixels(Moments* moments, const A* const* x, int count, int channels, const A* shift) {
  A sum[group], middle[group], squares[group];
  for (int c = 0; c < channels; ++c) sum[c] = squares[c] = 0;
  for (int i = 0; i < count; ++i) {
    const A* row = x[i];
    for (int c = 0; c < channels; ++c) sum[c] += row[c] - shift[c];
  }
  for (int c = 0; c < channels; ++c) middle[c] = sum[c] / A(count);
  for (int i = 0; i < count; ++i) {
    const A* row = x[i];
    for (int c = 0; c < channels; ++c) {
      const A d = (row[c] - shift[c]) - middle[c];
      squares[c] += d * d;
    }
  }
  for (int c = 0; c < channels; ++c) {
    const double mean = double(sum[c]) / count, rounding = mean - double(middle[c]);
    moments[c].merge(count, mean, double(squares[c]) - count * rounding * rounding);
  }
}

template <class A>
double pixels_forward(const FeatureLevel& level, const FeatureWalk& walk, double share, const PearsonOptions& options,
                      A* statistics, double* losses, const Threads& threads) {
  const int64_t pixels = level.n * level.h * level.w, groups = (level.c + group - 1) / group;
  parallel(threads, groups, 1, [&](int64_t begin, int64_t end) {
    PixelChunk<A> values;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t channel = task * group;
      const int channels = int(level.c - channel < group ? level.c - channel : group);
      const auto each_chunk = [&](const auto& body) {
        for (int64_t first = 0; first < pixels; first += chunk) {
          const int count = int(pixels - first < chunk ? pixels - first : chunk);
          values.read(level, walk, first, count, channel, channels);
          body(count);
        }
      };
      Moments ms[group], mt[group];
      A first_s[group], first_t[group];
      bool started = false;
      each_chunk([&](int count) {
        if (!started) {
          for (int c = 0; c < channels; ++c) {
            first_s[c] = values.s[0][c];
            first_t[c] = values.t[0][c];
          }
          started = true;
        }
        add_pixels(ms, values.s, count, channels, first_s);
        add_pixels(mt, values.t, count, channels, first_t);
      });
      A center_s[group], rests[group], scales[group], center_t[group], rest_of_t[group], scale_of_t[group];
      DifferenceSums sums[group];
      for (int c = 0; c < channels; ++c) {
        const Standard<A> of_s(first_s[c], ms[c], options.eps), of_t(first_t[c], mt[c], options.eps);
        center_s[c] = of_s.shift, rests[c] = of_s.rest, scales[c] = A(of_s.scale);
        center_t[c] = of_t.shift, rest_of_t[c] = of_t.rest, scale_of_t[c] = A(of_t.scale);
      }
      each_chunk([&](int count) {
        A u[group], v[group];
        for (int c = 0; c < channels; ++c) u[c] = v[c] = 0;
        for (int i = 0; i < count; ++i) {
          const A *s = values.s[i], *t = values.t[i];
          for (int c = 0; c < channels; ++c) {
            const A a = ((s[c] - center_s[c]) - rests[c]) * scales[c];
            const A difference = a - ((t[c] - center_t[c]) - rest_of_t[c]) * scale_of_t[c];
            u[c] += difference * difference;
            v[c] += a * difference;
          }
        }
        for (int c = 0; c < channels; ++c) {
          sums[c].u += u[c];
          sums[c].v += v[c];
        }
      });
      for (int c = 0; c < channels; ++c) {
        const Standard<A> of_s(first_s[c], ms[c], options.eps), of_t(first_t[c], mt[c], options.eps);
        losses[channel + c] = finish(of_s, of_t, sums[c], double(pixels), share, options,
                                     statistics + (channel + c) * statistics_per_channel);
      }
    }
  });
  double total = 0;
  for (int64_t c = 0; c < level.c; ++c) total += losses[c];
  return total;
}

template <class A>
void forward(const FeatureLevel* levels, int count, const PearsonOptions& options, A* loss, A* statistics,
             const Threads& threads) {
  double total = 0;
  for (int i = 0; i < count; ++i) {
    const FeatureLevel& level = levels[i];
    const FeatureWalk walk(level);
    const double m = double(level.n) * double(level.h) * double(level.w);
    if (m == 0) {
      for (int64_t j = 0; j < level.c * statistics_per_channel; ++j) statistics[j] = 0;
    } else if (level.c > 0) {
      const double share = (options.mean_levels ? 1.0 / count : 1.0) / (double(level.c) * m);
      double* losses = static_cast<double*>(malloc(sizeof(double) * size_t(level.c)));
      total += walk.channels_inner ? pixels_forward(level, walk, share, options, statistics, losses, threads)
                                   : planes_forward(level, walk, share, options, statistics, losses, threads);
      free(losses);
    }
    statistics += level.c * statistics_per_channel;
  }
  *loss = A(total);
}

template <class A>
KD_HD void gradient_run(A* grad, const A* s, const A* t, int n, const A* stat, A upstream) {
  using V = vec<A>;
  const A fs = upstream * stat[factor_s], ft = upstream * stat[factor_t];
  const A cs = stat[shift_s], rs = stat[rest_s], ct = stat[shift_t], rt = stat[rest_t];
  const auto gradient = [&](V student, V teacher) -> V {
    return fs * ((student - cs) - rs) - ft * ((teacher - ct) - rt);
  };
  for_each_vector<A>(
      n, [&](int i) { store<A>(grad + i, gradient(load(s + i), load(t + i))); },
      [&](int i, int k) {
        store_part<A>(grad + i, gradient(load_part(s + i, k, A(0)), load_part(t + i, k, A(0))), k);
      });
}

template <class A>
void backward(const FeatureLevel& level, A upstream, const A* statistics, const Threads& threads) {
  const FeatureWalk walk(level);
  parallel(threads, walk.units, walk.grain, [&](int64_t begin, int64_t end) {
    A scratch_s[block_size], scratch_t[block_size], scratch_g[block_size];
    for (int64_t unit = begin; unit < end; ++unit) {
      walk.runs(unit, [&](const FeatureRun& run) {
        const A* s =
            read_block(level.student.data, level.student.dtype, run.student, walk.student_step, run.n, scratch_s);
        const A* t =
            read_block(level.teacher.data, level.teacher.dtype, run.teacher, walk.teacher_step, run.n, scratch_t);
        A* g = result_block(level.grad.data, level.grad.dtype, run.grad, walk.grad_step, scratch_g);
        const A* stat = statistics + run.channel * statistics_per_channel;
        if (walk.channels_inner) {
          for (int i = 0; i < run.n; ++i) {
            const A* row = stat + i * statistics_per_channel;
            g[i] = upstream * (row[factor_s] * ((s[i] - row[shift_s]) - row[rest_s]) -
                               row[factor_t] * ((t[i] - row[shift_t]) - row[rest_t]));
          }
        } else {
          gradient_run(g, s, t, run.n, stat, upstream);
        }
        write_block(level.grad.data, level.grad.dtype, run.grad, walk.grad_step, run.n, g);
      });
    }
  });
}

}  // namespace

void pearson_forward(const FeatureLevel* levels, int count, const PearsonOptions& options, bool wide, void* loss,
                     void* statistics, const Threads& threads) {
  if (wide) {
    forward(levels, count, options, static_cast<double*>(loss), static_cast<double*>(statistics), threads);
  } else {
    forward(levels, count, options, static_cast<float*>(loss), static_cast<float*>(statistics), threads);
  }
}

void pearson_backward(const FeatureLevel& level, bool wide, const void* grad_loss, const void* statistics,
                      const Threads& threads) {
  if (wide) {
    backward(level, *static_cast<const double*>(grad_loss), static_cast<const double*>(statistics), threads);
  } else {
    backward(level, *static_cast<const float*>(grad_loss), static_cast<const float*>(statistics), threads);
  }
}

KD_NAMESPACE_END
