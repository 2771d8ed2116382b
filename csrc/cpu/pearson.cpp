// Pearson-normalised feature loss (PKD) on the CPU. Forward, per channel: one sweep for the moments, chunk by chunk,
// and one for the sums of the standardised difference; a channel's slice that fits the second-level cache comes from
// memory once. Backward: reads both features, writes the gradient. Eight numbers per channel are kept.
#include "pearson.h"

#include "pearson_pixels.h"

KD_NAMESPACE_BEGIN

namespace {

template <class A>
double planes_forward(const FeatureLevel& level, const FeatureWalk& walk, double share, const PearsonOptions& options,
                      A* statistics, double* losses, const Threads& threads) {
  parallel(threads, level.c, walk.channel_grain, [&](int64_t begin, int64_t end) {
    A scratch_s[block_size], scratch_t[block_size];
    for (int64_t c = begin; c < end; ++c) {
      losses[c] = channel_forward(level, walk, c, share, options, statistics + c * statistics_per_channel, scratch_s,
                                  scratch_t);
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

template <class A, class F>
KD_HD void gradient_run(A* grad, const A* s, const A* t, int n, A upstream, const F& at) {
  for_each_vector<A>(
      n, [&](int i) { store<A>(grad + i, upstream * pearson_gradient(load(s + i), load(t + i), i, lanes<A>, at)); },
      [&](int i, int k) {
        const vec<A> student = load_part(s + i, k, A(0)), teacher = load_part(t + i, k, A(0));
        store_part<A>(grad + i, upstream * pearson_gradient(student, teacher, i, k, at), k);
      });
}

template <class A>
void backward(const FeatureLevel& level, A upstream, const A* statistics, const Threads& threads) {
  const FeatureWalk walk(level);
  const StatisticsOfPixel<A> columns(statistics, walk.channels_inner ? level.c : 0);
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
          gradient_run(g, s, t, run.n, upstream, columns.from(run.channel));
        } else {
          gradient_run(g, s, t, run.n, upstream,
                       StatisticsOfChannel<A>(statistics + run.channel * statistics_per_channel));
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
