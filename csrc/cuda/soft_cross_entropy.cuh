// Class-weighted soft cross-entropy with a hard part as a Loss of row_kernels.cuh.
#pragma once

#include "soft_cross_entropy.h"

#include "../math/soft_cross_entropy.h"
#include "row_counts.cuh"
#include "row_kernels.cuh"

KD_NAMESPACE_BEGIN

namespace {

// gradient = soft * (exp2((s - shift_s) k) * mass_s - w_c exp2((t - shift_t) k) * inverse_t)
//          + hard * (exp2((s - shift_s) log2 e) * inverse_hard - [c is the label])
enum Statistic : int { shift_s, mass_s, shift_t, inverse_t, inverse_hard, soft, hard, alive, statistics_per_row };

struct SoftSums {
  SoftCrossEntropyState<float> state;
  float k;

  KD_DEVICE void clear() { state = SoftCrossEntropyState<float>(); }
  template <class F>
  KD_DEVICE void rebase(const F& maximum) {
    const float s = maximum(state.student.maximum), t = maximum(state.teacher.maximum);
    state.raise(s, t, k);
  }
  template <class F>
  KD_DEVICE void each_sum(const F& f) {
    f(state.student.sum);
    f(state.teacher.sum);
    f(state.dot);
    f(state.weighted);
    f(state.hard_sum);
  }
  template <class F>
  KD_DEVICE void all(F f) {
    f(state.student.maximum);
    f(state.teacher.maximum);
    each_sum(f);
  }
};
static_assert(7 <= exchange_floats, "all of them fit");

// Half the dot of a row whose first one left float32, of probabilities.
struct SoftSecond {
  float half_dot;

  KD_DEVICE void clear() { half_dot = 0; }
  template <class F>
  KD_DEVICE void rebase(const F&) {}
  template <class F>
  KD_DEVICE void each_sum(const F& f) {
    f(half_dot);
  }
  template <class F>
  KD_DEVICE void all(F f) {
    f(half_dot);
  }
};

struct SoftRow {
  float scale;
  int label;  // -1: none, or out of range
  bool valid, skip;
};

struct SoftLook {
  bool again;
};

KD_DEVICE int label_of(const int64_t* target, int64_t r, int columns) {
  const int64_t label = target ? target[r] : -1;
  return label >= 0 && label < columns ? int(label) : -1;
}

// own and others: the soft part's factors of either side's exponentials.
struct SoftGradientRow {
  float from_s, own, from_t, others, hard, hard_scale;
  int label;
  bool live;
};

// `weight`: the class's.
KD_DEVICE float soft_gradient(const SoftGradientRow& row, float s, float t, int column, float weight, float k) {
  if (!row.live) return 0;  // ignored, or an all -inf side
  const float ds = s - row.from_s;
  float g = exp2_nonpositive(ds * k) * row.own - weight * (exp2_nonpositive((t - row.from_t) * k) * row.others);
  if (row.label >= 0) g += exp2_nonpositive(ds * float(log2_e)) * row.hard_scale;
  return column == row.label ? g - row.hard : g;
}

// From what finish() keeps.
KD_DEVICE SoftGradientRow soft_gradient_row(const float* kept, float upstream, int label) {
  const float h = upstream * kept[hard], c = upstream * kept[soft];
  return {kept[shift_s],
          c * kept[mass_s],
          kept[shift_t],
          c * kept[inverse_t],
          h,
          h * kept[inverse_hard],
          kept[hard] != 0 ? label : -1,
          kept[alive] != 0};
}

struct CountedRow {
  const int64_t* target;
  int64_t ignore_index;
  KD_DEVICE bool operator()(int64_t row) const { return target[row] != ignore_index; }
};

template <bool with_gradient>
struct SoftLoss {
  static constexpr bool one_pass = with_gradient;
  static constexpr int parts = 1;
  using GradientRow = SoftGradientRow;
  using Context = float;
  using Row = SoftRow;
  using Sums = SoftSums;
  using Look = SoftLook;
  using Second = SoftSecond;
  static constexpr int batch = 1;

  float temperature, inverse, k;
  bool separate;  // the hard part's exponents are not the soft part's
  int columns;
  const float* class_weight;
  const int64_t* target;
  int64_t ignore_index;
  FloatScalar hard_weight;
  DeviceScalar loss_weight;
  RowFactor factor;
  bool counted;         // whether the mean divides by the labels that are not ignored
  const float* counts;  // of them, by blocks of a launch before
  int counters;
  int64_t rows;
  float classes;  // that a counted mean divides by as well
  const float* weight;
  float* statistics;

  KD_DEVICE float context(float* scratch) const {
    float whole = factor.get();
    if (counted) {
      const float number = counted_rows(CountedRow{target, ignore_index}, rows, counts, counters, scratch);
      whole = number <= 0 ? 0.0f : 1.0f / (number * classes);
    }
    return scalar_value(loss_weight) * whole;
  }

  KD_DEVICE SoftRow row(float whole, int64_t r) const {
    SoftRow row{weight ? whole * weight[r] : whole, label_of(target, r, columns), true, false};
    row.valid = !target || row.label >= 0;
    row.skip = target && target[r] == ignore_index;
    return row;
  }

  KD_DEVICE int part(const SoftRow&) const { return 0; }
  KD_DEVICE SoftSums start(const SoftRow&) const { return {SoftCrossEntropyState<float>(), k}; }

  KD_DEVICE float weight_of(int column) const {
    return !class_weight ? 1.0f : column < columns ? class_weight[column] : 0.0f;
  }

  template <int n>
  KD_DEVICE void add(SoftSums& sums, const SoftRow&, const float (&s)[n], const float (&t)[n], const Columns& at,
                     int) const {
    SoftCrossEntropyState<float>& state = sums.state;
    float most_s = s[0], most_t = t[0];
    KD_UNROLL for (int i = 1; i < n; ++i) {
      most_s = fmaxf(most_s, s[i]);
      most_t = fmaxf(most_t, t[i]);
    }
    if (most_s > state.student.maximum || most_t > state.teacher.maximum) state.raise(most_s, most_t, k);
    const float from_s = state.student.shift(), from_t = state.teacher.shift();
    float sum_s = 0, sum_t = 0, dot = 0, weighted = 0, hard_sum = 0;
    KD_UNROLL for (int i = 0; i < n; ++i) {
      const float ds = s[i] - from_s;
      const float et = exp2_nonpositive((t[i] - from_t) * k), wet = weight_of(at(i)) * et;
      sum_s += exp2_nonpositive(ds * k);
      sum_t += et;
      weighted += wet;
      dot += soft_term(wet, ds);
      if (separate) hard_sum += exp2_nonpositive(ds * float(log2_e));
    }
    state.student.sum += sum_s;
    state.teacher.sum += sum_t;
    state.weighted += weighted;
    state.dot += dot;
    state.hard_sum += separate ? hard_sum : sum_s;
  }

  KD_DEVICE SoftLook look(const SoftRow&, const SoftSums& sums) const {
    return {!sums.state.empty() && magnitude(sums.state.dot) == INFINITY};
  }

  template <int n>
  KD_DEVICE void add_again(SoftSecond& second, const SoftRow&, const SoftSums& sums, const SoftLook&,
                           const float (&s)[n], const float (&t)[n], const Columns& at) const {
    const float from_s = sums.state.student.shift(), from_t = sums.state.teacher.shift();
    const float inverse_sum = 1.0f / sums.state.teacher.sum;
    KD_UNROLL for (int i = 0; i < n; ++i) {
      const float p = exp2_nonpositive((t[i] - from_t) * k) * inverse_sum;
      second.half_dot += soft_term(weight_of(at(i)) * p, 0.5f * s[i] - 0.5f * from_s);
    }
  }

  KD_DEVICE void keep(const SoftRow& row, const SoftSums& sums, float* kept) const {
    const float mix = hard_weight.get();
    const SoftCrossEntropyState<float>& state = sums.state;
    const bool live = !row.skip && !state.empty();
    const float inverse_sum = 1.0f / state.teacher.sum;
    kept[shift_s] = live ? state.student.shift() : 0.0f;
    kept[mass_s] = live ? state.weighted * inverse_sum / state.student.sum : 0.0f;
    kept[shift_t] = live ? state.teacher.shift() : 0.0f;
    kept[inverse_t] = live ? inverse_sum : 0.0f;
    kept[inverse_hard] = live ? 1.0f / state.hard_sum : 0.0f;
    kept[soft] = !live ? 0.0f : row.valid ? row.scale * (1 - mix) * inverse : NAN;
    kept[hard] = live && target ? row.scale * mix : 0.0f;
    kept[alive] = live ? 1.0f : 0.0f;
  }
  KD_DEVICE SoftGradientRow gradient_row(const SoftRow& row, int64_t, const SoftSums& sums) const {
    float kept[statistics_per_row];
    keep(row, sums, kept);
    return soft_gradient_row(kept, 1, row.label);
  }
  KD_DEVICE float gradient(const SoftGradientRow& row, float s, float t, int column) const {
    return soft_gradient(row, s, t, column, column < 0 ? 0.0f : weight_of(column), k);
  }

  template <class Sides>
  KD_DEVICE float finish(const SoftRow& row, int64_t r, const SoftSums& sums, const SoftLook& look,
                         const SoftSecond& second, const Sides& sides) const {
    const SoftCrossEntropyState<float>& state = sums.state;
    if (!one_pass) keep(row, sums, statistics + r * statistics_per_row);
    if (row.skip || state.empty()) return 0;
    const float mix = hard_weight.get();
    const float inverse_sum = 1.0f / state.teacher.sum, mass = state.weighted * inverse_sum;
    float soft_part = state.soft(inverse);
    if (look.again) {
      soft_part = (mass == 0 ? 0.0f : mass * logf(state.student.sum)) - second.half_dot * (2 * inverse);
    }
    // A factor of 0 silences an infinite part, as in the formula, but never NaN.
    float value = mix == 1 ? (soft_part == soft_part ? 0.0f : soft_part) : (1 - mix) * soft_part;
    if (row.label >= 0 && mix != 0) value += mix * state.hard(to_float(sides.s[row.label * sides.step_s]));
    return row.valid ? row.scale * value : NAN;
  }
};

// Whether the mean divides by rows that must be counted.
inline bool counts_rows(const SoftCrossEntropyOptions& options) {
  return options.target && !options.reduction.has_average &&
         (options.reduction.kind == RowReduction::mean_rows || options.reduction.kind == RowReduction::mean_elements);
}

// Host: blocks that count the labels in a launch of their own.
inline int soft_counters(const RowPlan& plan, const RowPair& pair, const SoftCrossEntropyOptions& options) {
  return counts_rows(options) ? row_counters(pair.rows, plan.blocks(), sizeof(int64_t)) : 0;
}

// Host: the loss of a call with this plan. `counts`: for row_counters' blocks.
template <bool one_pass>
SoftLoss<one_pass> soft_loss(const RowPlan& plan, const RowPair& pair, const SoftCrossEntropyOptions& options,
                             const DeviceScalar& loss_weight, const float* counts, float* statistics) {
  SoftLoss<one_pass> loss{};
  loss.temperature = float(options.temperature);
  loss.inverse = float(1 / options.temperature);
  loss.k = float(log2_e / options.temperature);
  loss.separate = options.temperature != 1;
  loss.columns = int(pair.columns);
  loss.class_weight = static_cast<const float*>(options.class_weight);
  loss.target = options.target;
  loss.ignore_index = options.ignore_index;
  loss.hard_weight = float_scalar(options.hard_weight);
  loss.loss_weight = loss_weight;
  loss.factor = row_factor(options.reduction, double(pair.rows), double(pair.columns));
  loss.counted = counts_rows(options);
  loss.counts = counts;
  loss.counters = soft_counters(plan, pair, options);
  loss.rows = pair.rows;
  loss.classes = options.reduction.kind == RowReduction::mean_elements ? float(pair.columns) : 1.0f;
  loss.weight = static_cast<const float*>(pair.weight);
  loss.statistics = statistics;
  return loss;
}

}  // namespace

KD_NAMESPACE_END
