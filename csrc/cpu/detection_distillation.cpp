// Masked MSE and Pearson on the same features, loss and gradient in one pass, on the CPU.
//
// Masked MSE alone: each feature is read once, the gradient is written once. With Pearson, NCHW: a channel's slice
// comes from memory once, and twice more from the cache where it fits: for the moments, the differences, and the
// gradient. channels_last: three reads from memory. Nothing of a feature's size is allocated beside the gradients.
#include "detection_distillation.h"

#include "pearson_pixels.h"
#include "region_scales.h"

KD_NAMESPACE_BEGIN

namespace {

// What a unit of work found; without its weights, but for the gradients' norms.
struct Part {
  double foreground, background, pearson, masked_mse_norm, pearson_norm;

  void add(const Part& other) {
    foreground += other.foreground;
    background += other.background;
    pearson += other.pearson;
    masked_mse_norm += other.masked_mse_norm;
    pearson_norm += other.pearson_norm;
  }

  void write(float* row) const {
    row[value_foreground] = float(foreground);
    row[value_background] = float(background);
    row[value_masked_mse] = float(foreground + background);
    row[value_pearson] = float(pearson);
    row[value_masked_mse_norm] = float(masked_mse_norm);
    row[value_pearson_norm] = float(pearson_norm);
  }
};

// What a level's elements are multiplied by in masked MSE's gradient.
struct RegionFactors {
  float foreground, background;
};

// One run's gradient, sums and norms. The mask is a run of its own (NCHW) or one value for all (channels_last).
template <bool masked, bool one_mask, bool pearson, bool norms, class F>
KD_HD void run_terms(Part& part, float* grad, const float* s, const float* t, const float* m, int n,
                     const RegionFactors& factors, const F& statistics) {
  using V = vec<float>;
  const V nothing = constant<V>(0);
  const V f = nothing + factors.foreground, b = nothing + factors.background;
  const V shared = masked && one_mask ? nothing + m[0] : nothing;
  RegionSums<V> sums{nothing, nothing};
  V of_masked = nothing, of_pearson = nothing;
  const auto term = [&](V student, V teacher, V mask, int i, int k) -> V {
    V g = nothing;
    if constexpr (masked) {
      add_squared_difference(sums, student, teacher, mask);
      g = masked_mse_gradient(student, teacher, mask, f, b);
      if (norms) of_masked += g * g;
    }
    if constexpr (pearson) {
      V p = pearson_gradient(student, teacher, i, k, statistics);
      g += p;
      if (norms) {
        for (int j = k; j < lanes<float>; ++j) p[j] = 0;
        of_pearson += p * p;
      }
    }
    return g;
  };
  for_each_vector<float>(
      n,
      [&](int i) {
        const V mask = masked ? (one_mask ? shared : load(m + i)) : nothing;
        // With Pearson the moments have read the run before.
        const V student = pearson ? load(s + i) : load_and_ask(s + i);
        const V teacher = pearson ? load(t + i) : load_and_ask(t + i);
        store<float>(grad + i, term(student, teacher, mask, i, lanes<float>));
      },
      [&](int i, int k) {
        const V mask = masked ? (one_mask ? shared : load_part(m + i, k, 0.0f)) : nothing;
        store_part<float>(grad + i, term(load_part(s + i, k, 0.0f), load_part(t + i, k, 0.0f), mask, i, k), k);
      });
  if (masked) {
    part.foreground += sum_lanes<float>(sums.foreground);
    part.background += sum_lanes<float>(sums.background);
    if (norms) part.masked_mse_norm += sum_lanes<float>(of_masked);
  }
  if (pearson && norms) part.pearson_norm += sum_lanes<float>(of_pearson);
}

struct Scratch {
  float s[block_size], t[block_size], g[block_size];
};

// One level. A unit is a channel's planes (with Pearson, NCHW), a plane, or a group of pixels.
template <bool masked, bool pearson, bool norms>
class Level {
 public:
  Level(const FeatureLevel& level, const RegionFactors& factors, double share, const PearsonOptions& options)
      : level_(level), walk_(level), factors_(factors), share_(share), options_(options) {}

  Part run(const Threads& threads) const {
    Part total{0, 0, 0, 0, 0};
    if (walk_.units == 0) return total;
    if (walk_.channels_inner) {
      pixels(total, threads);
    } else {
      planes(total, threads);
    }
    return total;
  }

 private:
  const FeatureLevel& level_;
  const FeatureWalk walk_;
  const RegionFactors factors_;
  const double share_;
  const PearsonOptions& options_;

  template <class F>
  void add_units(Part& total, int64_t units, int64_t grain, const Threads& threads, const F& unit_part) const {
    Part* parts = static_cast<Part*>(malloc(sizeof(Part) * size_t(units)));
    parallel(threads, units, grain, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      for (int64_t unit = begin; unit < end; ++unit) {
        parts[unit] = Part{0, 0, 0, 0, 0};
        unit_part(parts[unit], unit, scratch);
      }
    });
    for (int64_t unit = 0; unit < units; ++unit) total.add(parts[unit]);
    free(parts);
  }

  template <bool one_mask, class F>
  void terms(Part& part, const FeatureRun& run, Scratch& scratch, const F& statistics) const {
    const FeatureView &student = level_.student, &teacher = level_.teacher, &grad = level_.grad;
    const float* s = read_block(student.data, student.dtype, run.student, walk_.student_step, run.n, scratch.s);
    const float* t = read_block(teacher.data, teacher.dtype, run.teacher, walk_.teacher_step, run.n, scratch.t);
    const float* m = masked ? static_cast<const float*>(level_.mask) + run.pixel : nullptr;
    float* g = grad.data ? result_block(grad.data, grad.dtype, run.grad, walk_.grad_step, scratch.g) : scratch.g;
    run_terms<masked, one_mask, pearson, norms>(part, g, s, t, m, run.n, factors_, statistics);
    if (grad.data) write_block(grad.data, grad.dtype, run.grad, walk_.grad_step, run.n, g);
  }

  void planes(Part& total, const Threads& threads) const {
    if constexpr (!pearson) {
      add_units(total, walk_.units, walk_.grain, threads, [&](Part& part, int64_t unit, Scratch& scratch) {
        walk_.runs(unit, [&](const FeatureRun& run) { terms<false>(part, run, scratch, nullptr); });
      });
    } else {
      add_units(total, level_.c, walk_.channel_grain, threads, [&](Part& part, int64_t c, Scratch& scratch) {
        float row[statistics_per_channel];
        part.pearson = channel_forward(level_, walk_, c, share_, options_, row, scratch.s, scratch.t);
        const StatisticsOfChannel<float> statistics(row);
        walk_.channel_runs(c, [&](const FeatureRun& run) { terms<false>(part, run, scratch, statistics); });
      });
    }
  }

  void pixels(Part& total, const Threads& threads) const {
    float* rows = nullptr;
    if (pearson) {
      rows = static_cast<float*>(malloc(sizeof(float) * size_t(level_.c) * statistics_per_channel));
      double* losses = static_cast<double*>(malloc(sizeof(double) * size_t(level_.c)));
      total.pearson = pixels_forward(level_, walk_, share_, options_, rows, losses, threads);
      free(losses);
    }
    const StatisticsOfPixel<float> statistics(rows, pearson ? level_.c : 0);
    free(rows);
    add_units(total, walk_.units, walk_.grain, threads, [&](Part& part, int64_t unit, Scratch& scratch) {
      walk_.runs(unit, [&](const FeatureRun& run) { terms<true>(part, run, scratch, statistics.from(run.channel)); });
    });
  }
};

template <bool masked, bool pearson>
Part run_level(const FeatureLevel& level, const RegionFactors& factors, double share, const FeatureOptions& options,
               const Threads& threads) {
  return options.norms ? Level<masked, pearson, true>(level, factors, share, options.pearson).run(threads)
                       : Level<masked, pearson, false>(level, factors, share, options.pearson).run(threads);
}

}  // namespace

void detection_distillation_features(const FeatureLevel* levels, const bool* pearson, int count,
                                     const FeatureOptions& options, void* loss, void* values, const Threads& threads) {
  int masked_levels = 0, pearson_levels = 0;
  for (int i = 0; i < count; ++i) {
    masked_levels += levels[i].mask != nullptr;
    pearson_levels += pearson[i];
  }
  const double masked_share =
      options.masked_mse_weight.get() / (options.masked_mse.mean_levels && masked_levels ? masked_levels : 1);
  const double pearson_share =
      options.pearson_weight.get() / (options.pearson.mean_levels && pearson_levels ? pearson_levels : 1);
  Part all{0, 0, 0, 0, 0};
  float* row = static_cast<float*>(values);
  for (int i = 0; i < count; ++i, row += feature_values) {
    const FeatureLevel& level = levels[i];
    const double elements = double(level.c) * double(level.n) * double(level.h) * double(level.w);
    RegionSums<double> scales{0, 0};
    if (level.mask) scales = region_scales<float>(level, options.masked_mse, masked_share);
    const RegionFactors factors{float(2 * scales.foreground), float(2 * scales.background)};
    const double share = elements > 0 ? pearson_share / elements : 0;
    Part part{0, 0, 0, 0, 0};
    if (level.mask && pearson[i]) {
      part = run_level<true, true>(level, factors, share, options, threads);
    } else if (level.mask) {
      part = run_level<true, false>(level, factors, share, options, threads);
    } else if (pearson[i]) {
      part = run_level<false, true>(level, factors, share, options, threads);
    } else if (level.grad.data) {  // of neither term: a gradient of 0
      part = run_level<false, false>(level, factors, share, options, threads);
    }
    part.foreground *= scales.foreground;
    part.background *= scales.background;
    part.write(row);
    all.add(part);
  }
  all.write(row);
  *static_cast<float*>(loss) = float(all.foreground + all.background + all.pearson);
}

KD_NAMESPACE_END
