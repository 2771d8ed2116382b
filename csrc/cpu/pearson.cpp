// Pearson-normalised feature loss (PKD) on the CPU. Forward, per channel: one pass for the moments, chunk by chunk, and
// one for the sums of the standardised difference; a channel's slice that fits the second-level cache comes from memory
// once. Backward: reads both features, writes the gradient. Eight numbers per channel are kept.
#include "pearson.h"

#include <stdlib.h>

#include "feature.h"
#include "moments.h"

KD_NAMESPACE_BEGIN

namespace {

// gradient = factor_s * (((s - shift_s) - rest_s) * scale_s) - factor_t * (((t - shift_t) - rest_t) * scale_t). Factor
// and scale stay apart: their product leaves float's range long before the gradient does.
enum Statistic : int { shift_s, rest_s, scale_s, factor_s, shift_t, rest_t, scale_t, factor_t, statistics_per_channel };

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
double finish(const Standard<A>& s, const Standard<A>& t, const DifferenceSums& rounded, double m, double share,
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
// cache. A vector holds neighbouring channels, so its sums stay in registers while the pixels go by.
constexpr int group = 64, chunk = 128;

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

// Calls body(c, at) for each vector of channels c, c + 1, ...; at(row) loads it from a row of `channels` values.
template <class A, class F>
KD_HD void each_channel_vector(int channels, const F& body) {
  int c = 0;
  for (; c + lanes<A> <= channels; c += lanes<A>) body(c, [&](const A* row) { return load(row + c); });
  const int rest = channels - c;
  if (rest) body(c, [&](const A* row) { return load_part(row + c, rest, A(0)); });
}

// A chunk's pixels in strips, whose sums are added up: 128 additions in one chain would round 128 times in a row.
constexpr int strip = 16;

template <class F>
KD_HD void each_strip(int count, const F& body) {
  for (int begin = 0; begin < count; begin += strip) body(begin, begin + strip < count ? begin + strip : count);
}

// Moments of `channels` neighbouring channels over one chunk of pixels.
template <class A>
void add_pixels(Moments* moments, const A* const* x, int count, int channels, const A* shift) {
  using V = vec<A>;
  each_channel_vector<A>(channels, [&](int c, const auto& at) {
    const V from = at(shift);
    V sum = constant<V>(0), squares = constant<V>(0);
    each_strip(count, [&](int begin, int end) {
      V part = constant<V>(0);
      for (int i = begin; i < end; ++i) part += at(x[i]) - from;
      sum += part;
    });
    const V middle = sum / A(count);
    each_strip(count, [&](int begin, int end) {
      V part = constant<V>(0);
      for (int i = begin; i < end; ++i) {
        const V d = (at(x[i]) - from) - middle;
        part += d * d;
      }
      squares += part;
    });
    for (int j = 0; j < lanes<A> && c + j < channels; ++j) {
      if (out_of_range(squares[j])) {
        add_in_double(moments[c + j], count, shift[c + j], [&](int i) { return x[i][c + j]; });
        continue;
      }
      const double mean = double(sum[j]) / count, rounding = mean - double(middle[j]);
      moments[c + j].merge(count, mean, double(squares[j]) - count * rounding * rounding);
    }
  });
}

// What standardises `channels` neighbouring channels of one side.
template <class A>
struct StandardGroup {
  A shift[group], rest[group], scale[group];

  void set(int c, const Standard<A>& of) {
    shift[c] = of.shift;
    rest[c] = of.rest;
    scale[c] = A(of.scale);
  }
};

template <class A>
void add_pixel_differences(DifferenceSums* sums, const PixelChunk<A>& values, int count, int channels,
                           const StandardGroup<A>& of_s, const StandardGroup<A>& of_t) {
  using V = vec<A>;
  each_channel_vector<A>(channels, [&](int c, const auto& at) {
    const V shift_s = at(of_s.shift), rest_s = at(of_s.rest), scale_s = at(of_s.scale);
    const V shift_t = at(of_t.shift), rest_t = at(of_t.rest), scale_t = at(of_t.scale);
    V u = constant<V>(0), v = constant<V>(0);
    each_strip(count, [&](int begin, int end) {
      V part_u = constant<V>(0), part_v = constant<V>(0);
      for (int i = begin; i < end; ++i) {
        const V a = ((at(values.s[i]) - shift_s) - rest_s) * scale_s;
        const V difference = a - ((at(values.t[i]) - shift_t) - rest_t) * scale_t;
        part_u += difference * difference;
        part_v += a * difference;
      }
      u += part_u;
      v += part_v;
    });
    for (int j = 0; j < lanes<A> && c + j < channels; ++j) {
      sums[c + j].u += u[j];
      sums[c + j].v += v[j];
    }
  });
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
          body(count, first == 0);
        }
      };
      Moments ms[group], mt[group];
      A first_s[group], first_t[group];
      each_chunk([&](int count, bool start) {
        for (int c = 0; start && c < channels; ++c) {
          first_s[c] = values.s[0][c];
          first_t[c] = values.t[0][c];
        }
        add_pixels(ms, values.s, count, channels, first_s);
        add_pixels(mt, values.t, count, channels, first_t);
      });
      StandardGroup<A> of_s, of_t;
      for (int c = 0; c < channels; ++c) {
        of_s.set(c, Standard<A>(first_s[c], ms[c], options.eps));
        of_t.set(c, Standard<A>(first_t[c], mt[c], options.eps));
      }
      DifferenceSums sums[group];
      each_chunk([&](int count, bool) { add_pixel_differences(sums, values, count, channels, of_s, of_t); });
      for (int c = 0; c < channels; ++c) {
        losses[channel + c] =
            finish(Standard<A>(first_s[c], ms[c], options.eps), Standard<A>(first_t[c], mt[c], options.eps), sums[c],
                   double(pixels), share, options, statistics + (channel + c) * statistics_per_channel);
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

// One run of the gradient. `at(k, i)` is statistic k: the channel's for every i (NCHW), or of channel i
// (channels_last).
template <class A, class F>
KD_HD void gradient_run(A* grad, const A* s, const A* t, int n, A upstream, const F& at) {
  using V = vec<A>;
  const auto gradient = [&](V student, V teacher, int i, int k) -> V {
    const V from_s = ((student - at(shift_s, i, k)) - at(rest_s, i, k)) * at(scale_s, i, k);
    const V from_t = ((teacher - at(shift_t, i, k)) - at(rest_t, i, k)) * at(scale_t, i, k);
    return upstream * (at(factor_s, i, k) * from_s - at(factor_t, i, k) * from_t);
  };
  for_each_vector<A>(
      n, [&](int i) { store<A>(grad + i, gradient(load(s + i), load(t + i), i, lanes<A>)); },
      [&](int i, int k) {
        store_part<A>(grad + i, gradient(load_part(s + i, k, A(0)), load_part(t + i, k, A(0)), i, k), k);
      });
}

template <class A>
void backward(const FeatureLevel& level, A upstream, const A* statistics, const Threads& threads) {
  using V = vec<A>;
  const FeatureWalk walk(level);
  // For channels_last, each statistic's channels side by side.
  A* columns = nullptr;
  if (walk.channels_inner) {
    columns = static_cast<A*>(malloc(sizeof(A) * size_t(level.c) * statistics_per_channel));
    for (int64_t c = 0; c < level.c; ++c) {
      for (int k = 0; k < statistics_per_channel; ++k)
        columns[k * level.c + c] = statistics[c * statistics_per_channel + k];
    }
  }
  parallel(threads, walk.units, walk.grain, [&](int64_t begin, int64_t end) {
    A scratch_s[block_size], scratch_t[block_size], scratch_g[block_size];
    for (int64_t unit = begin; unit < end; ++unit) {
      walk.runs(unit, [&](const FeatureRun& run) {
        const A* s =
            read_block(level.student.data, level.student.dtype, run.student, walk.student_step, run.n, scratch_s);
        const A* t =
            read_block(level.teacher.data, level.teacher.dtype, run.teacher, walk.teacher_step, run.n, scratch_t);
        A* g = result_block(level.grad.data, level.grad.dtype, run.grad, walk.grad_step, scratch_g);
        if (walk.channels_inner) {
          gradient_run(g, s, t, run.n, upstream, [&](int k, int i, int n) -> V {
            const A* from = columns + k * level.c + run.channel + i;
            return n == lanes<A> ? load(from) : load_part(from, n, A(0));
          });
        } else {
          V row[statistics_per_channel];
          for (int k = 0; k < statistics_per_channel; ++k) {
            row[k] = constant<V>(0) + statistics[run.channel * statistics_per_channel + k];
          }
          gradient_run(g, s, t, run.n, upstream, [&](int k, int, int) -> V { return row[k]; });
        }
        write_block(level.grad.data, level.grad.dtype, run.grad, walk.grad_step, run.n, g);
      });
    }
  });
  free(columns);
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
