// Masked MSE on the CPU. Forward: each feature is read once, partial sums per plane (or group of pixels) are added up
// in a fixed order. Backward: reads both features and the mask, writes the gradient. Nothing of a feature's size is
// allocated.
#include "masked_mse.h"

#include <stdlib.h>

#include "region_scales.h"

KD_NAMESPACE_BEGIN

namespace {

struct PartialSums {
  double foreground, background;
};

// One run of n elements. The mask is a run of its own (NCHW), or one value for all of them (channels_last).
template <class A, bool one_mask>
KD_HD void add_run(PartialSums& total, const A* s, const A* t, const A* m, int n) {
  using V = vec<A>;
  RegionSums<V> sums{constant<V>(0), constant<V>(0)};
  const V shared = constant<V>(0) + m[0];
  for_each_vector<A>(
      n,
      [&](int i) {
        add_squared_difference(sums, load_and_ask(s + i), load_and_ask(t + i), one_mask ? shared : load(m + i));
      },
      [&](int i, int k) {
        add_squared_difference(sums, load_part(s + i, k, A(0)), load_part(t + i, k, A(0)),
                               one_mask ? shared : load_part(m + i, k, A(0)));
      });
  total.foreground += sum_lanes<A>(sums.foreground);
  total.background += sum_lanes<A>(sums.background);
}

template <class A, bool one_mask>
KD_HD void gradient_run(A* grad, const A* s, const A* t, const A* m, int n, A foreground, A background) {
  using V = vec<A>;
  const V f = constant<V>(0) + foreground, b = constant<V>(0) + background, shared = constant<V>(0) + m[0];
  for_each_vector<A>(
      n,
      [&](int i) {
        store<A>(grad + i,
                 masked_mse_gradient(load_and_ask(s + i), load_and_ask(t + i), one_mask ? shared : load(m + i), f, b));
      },
      [&](int i, int k) {
        store_part<A>(grad + i,
                      masked_mse_gradient(load_part(s + i, k, A(0)), load_part(t + i, k, A(0)),
                                          one_mask ? shared : load_part(m + i, k, A(0)), f, b),
                      k);
      });
}

template <class A>
void level_sums(const FeatureLevel& level, PartialSums& total, const Threads& threads) {
  const FeatureWalk walk(level);
  PartialSums* parts = static_cast<PartialSums*>(malloc(sizeof(PartialSums) * size_t(walk.units)));
  parallel(threads, walk.units, walk.grain, [&](int64_t begin, int64_t end) {
    A scratch_s[block_size], scratch_t[block_size];
    for (int64_t unit = begin; unit < end; ++unit) {
      PartialSums part{0, 0};
      walk.runs(unit, [&](const FeatureRun& run) {
        const A* s =
            read_block(level.student.data, level.student.dtype, run.student, walk.student_step, run.n, scratch_s);
        const A* t =
            read_block(level.teacher.data, level.teacher.dtype, run.teacher, walk.teacher_step, run.n, scratch_t);
        const A* m = static_cast<const A*>(level.mask) + run.pixel;
        if (walk.channels_inner) {
          add_run<A, true>(part, s, t, m, run.n);
        } else {
          add_run<A, false>(part, s, t, m, run.n);
        }
      });
      parts[unit] = part;
    }
  });
  for (int64_t unit = 0; unit < walk.units; ++unit) {
    total.foreground += parts[unit].foreground;
    total.background += parts[unit].background;
  }
  free(parts);
}

template <class A>
void forward(const FeatureLevel* levels, int count, const MaskedMseOptions& options, A* loss, A* scales,
             const Threads& threads) {
  const double share = options.mean_levels ? 1.0 / (count > 0 ? count : 1) : 1.0;
  double total = 0;
  for (int i = 0; i < count; ++i) {
    PartialSums sums{0, 0};
    level_sums<A>(levels[i], sums, threads);
    const RegionSums<double> of_regions = region_scales<A>(levels[i], options, share);
    total += of_regions.foreground * sums.foreground + of_regions.background * sums.background;
    scales[2 * i] = static_cast<A>(2 * of_regions.foreground);
    scales[2 * i + 1] = static_cast<A>(2 * of_regions.background);
  }
  *loss = static_cast<A>(total);
}

template <class A>
void backward(const FeatureLevel& level, const A* grad_loss, const A* scales, const Threads& threads) {
  const FeatureWalk walk(level);
  const A foreground = *grad_loss * scales[0], background = *grad_loss * scales[1];
  parallel(threads, walk.units, walk.grain, [&](int64_t begin, int64_t end) {
    A scratch_s[block_size], scratch_t[block_size], scratch_g[block_size];
    for (int64_t unit = begin; unit < end; ++unit) {
      walk.runs(unit, [&](const FeatureRun& run) {
        const A* s =
            read_block(level.student.data, level.student.dtype, run.student, walk.student_step, run.n, scratch_s);
        const A* t =
            read_block(level.teacher.data, level.teacher.dtype, run.teacher, walk.teacher_step, run.n, scratch_t);
        const A* m = static_cast<const A*>(level.mask) + run.pixel;
        A* g = result_block(level.grad.data, level.grad.dtype, run.grad, walk.grad_step, scratch_g);
        if (walk.channels_inner) {
          gradient_run<A, true>(g, s, t, m, run.n, foreground, background);
        } else {
          gradient_run<A, false>(g, s, t, m, run.n, foreground, background);
        }
        write_block(level.grad.data, level.grad.dtype, run.grad, walk.grad_step, run.n, g);
      });
    }
  });
}

}  // namespace

void masked_mse_forward(const FeatureLevel* levels, int count, const MaskedMseOptions& options, bool wide, void* loss,
                        void* scales, const Threads& threads) {
  if (wide) {
    forward(levels, count, options, static_cast<double*>(loss), static_cast<double*>(scales), threads);
  } else {
    forward(levels, count, options, static_cast<float*>(loss), static_cast<float*>(scales), threads);
  }
}

void masked_mse_backward(const FeatureLevel& level, bool wide, const void* grad_loss, const void* scales,
                         const Threads& threads) {
  if (wide) {
    backward(level, static_cast<const double*>(grad_loss), static_cast<const double*>(scales), threads);
  } else {
    backward(level, static_cast<const float*>(grad_loss), static_cast<const float*>(scales), threads);
  }
}

KD_NAMESPACE_END
