// Pearson's statistics in channels_last.
#pragma once

#include "pearson_channel.h"

KD_NAMESPACE_BEGIN

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
        losses[channel + c] = finish_channel(Standard<A>(first_s[c], ms[c], options.eps),
                                             Standard<A>(first_t[c], mt[c], options.eps), sums[c], double(pixels),
                                             share, options, statistics + (channel + c) * statistics_per_channel);
      }
    }
  });
  double total = 0;
  for (int64_t c = 0; c < level.c; ++c) total += losses[c];
  return total;
}

KD_NAMESPACE_END
