// The rows of temperature_kl and decoupled_kl as a Loss of row_kernels.cuh: kl_rows.cu has the kernels of their own,
// detection_distillation_heads.cu those of all heads together.
#pragma once

#include "kl_rows.h"

#include "../math/decoupled_kl.h"
#include "row_counts.cuh"
#include "row_kernels.cuh"

KD_NAMESPACE_BEGIN

namespace {

struct KlSums {
  KlState<float> state;
  float k;

  KD_DEVICE void clear() { state = KlState<float>(); }
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
  }
  template <class F>
  KD_DEVICE void all(F f) {
    f(state.student.maximum);
    f(state.teacher.maximum);
    each_sum(f);
  }
};

// Of a second read. For close rows, with u the difference of the logits, centred so that its mean is nearly 0:
struct KlSecond {
  float terms, mean;  // of exp(u) - 1 - u, and of u
  float half_dot;     // half the dot of a row whose first one left float32, of probabilities

  KD_DEVICE void clear() { terms = mean = half_dot = 0; }
  template <class F>
  KD_DEVICE void rebase(const F&) {}
  template <class F>
  KD_DEVICE void each_sum(const F& f) {
    f(terms);
    f(mean);
    f(half_dot);
  }
  template <class F>
  KD_DEVICE void all(F f) {
    each_sum(f);
  }
};

struct KlRow {
  float temperature, inverse, k, scale;
  int part;
  static constexpr bool skip = false;
};

// How a row is read again: u = ((s - from_s) - (t - from_t) - rest) / T, and exp(u) exp2((t - shift_t) k) is
// exp2((s - shift_s) k + power).
struct KlLook {
  bool again, careful;
  float from_s, from_t, rest, power;
};

struct KlShares {
  float of[2];
};

// gradient = coefficient * (exp2((s - shift_s) k) scale_s - the same of t).
struct KlGradientRow {
  float shift_s, scale_s, shift_t, scale_t, k, coefficient;

  KD_DEVICE float operator()(float s, float t) const {
    if (scale_s == 0 && scale_t == 0) return 0;
    return coefficient *
           (exp2_nonpositive((s - shift_s) * k) * scale_s - exp2_nonpositive((t - shift_t) * k) * scale_t);
  }
};

struct ForegroundRow {
  const bool* foreground;
  KD_DEVICE bool operator()(int64_t row) const { return foreground[row]; }
};

template <bool with_gradient>
struct KlLoss {
  static constexpr bool one_pass = with_gradient;
  static constexpr int parts = one_pass ? 2 : 1;  // foreground, and the rest
  using GradientRow = KlGradientRow;
  using Context = KlShares;
  using Row = KlRow;
  using Sums = KlSums;
  using Look = KlLook;
  using Second = KlSecond;
  static constexpr int batch = one_pass ? 1 : row_batch;  // two, and the gradient, are too many registers

  const bool* foreground;
  float temperature[2], inverse[2], k[2];
  RowFactor factor;
  DeviceScalar region_weight[2];
  DeviceScalar loss_weight;
  bool divide;
  int64_t rows;
  const float* counts;  // of foreground rows, by blocks of a launch before
  int counters;
  const float* weight;
  float* statistics;

  KD_DEVICE KlShares context(float* scratch) const {
    const float whole = scalar_value(loss_weight);
    if (!foreground) {
      const float share = whole * factor.get();
      return {{share, share}};
    }
    const float inside = divide ? counted_rows(ForegroundRow{foreground}, rows, counts, counters, scratch) : 0.0f;
    const float count[2] = {float(rows) - inside, inside};
    KlShares shares;
    KD_UNROLL for (int i = 0; i < 2; ++i) {
      shares.of[i] = whole * scalar_value(region_weight[i]);
      if (divide) shares.of[i] /= larger(1.0f, count[i]);
    }
    return shares;
  }

  KD_DEVICE KlRow row(const KlShares& shares, int64_t r) const {
    const bool inside = foreground && foreground[r];
    const float share = inside ? shares.of[1] : shares.of[0];
    return {inside ? temperature[1] : temperature[0], inside ? inverse[1] : inverse[0], inside ? k[1] : k[0],
            weight ? share * weight[r] : share, inside ? 0 : 1};
  }
  KD_DEVICE int part(const KlRow& row) const { return one_pass ? row.part : 0; }

  KD_DEVICE KlSums start(const KlRow& row) const { return {KlState<float>(), row.k}; }

  template <int n>
  KD_DEVICE void add(KlSums& sums, const KlRow& row, const float (&s)[n], const float (&t)[n], const Columns&,
                     int) const {
    KlState<float>& state = sums.state;
    float most_s = s[0], most_t = t[0];
    KD_UNROLL for (int i = 1; i < n; ++i) {
      most_s = fmaxf(most_s, s[i]);
      most_t = fmaxf(most_t, t[i]);
    }
    if (most_s > state.student.maximum || most_t > state.teacher.maximum) state.raise(most_s, most_t, row.k);
    const float shift_s = state.student.shift(), shift_t = state.teacher.shift();
    float sum_s = 0, sum_t = 0, dot = 0;
    KD_UNROLL for (int i = 0; i < n; ++i) {
      const float ds = s[i] - shift_s, dt = t[i] - shift_t;
      const float et = exp2_nonpositive(dt * row.k);
      sum_s += exp2_nonpositive(ds * row.k);
      sum_t += et;
      dot += kl_term(et, dt, ds);
    }
    state.student.sum += sum_s;
    state.teacher.sum += sum_t;
    state.dot += dot;
  }

  KD_DEVICE KlLook look(const KlRow& row, const KlSums& sums) const {
    const KlState<float>& state = sums.state;
    KlLook look{};
    if (state.empty()) return look;
    look.careful = magnitude(state.dot) == INFINITY;
    look.again = look.careful || state.value(row.inverse) < close_kl<float>;
    // u is the difference of the logits less that of the maxima. Whichever is taken first leaves the other exact: the
    // logits where the sides are close as they stand, the maxima where a common offset lies between them.
    const float shift_s = state.student.shift(), shift_t = state.teacher.shift();
    const float between = shift_s - shift_t, mean = look.careful ? 0.0f : -state.dot / state.teacher.sum;
    const bool offset = !(between > -1 && between < 1);
    look.from_s = offset ? shift_s : 0.0f;
    look.from_t = offset ? shift_t : 0.0f;
    look.rest = offset ? mean : between + mean;
    look.power = -mean * row.k;
    return look;
  }

  template <int n>
  KD_DEVICE void add_again(KlSecond& second, const KlRow& row, const KlSums& sums, const KlLook& look,
                           const float (&s)[n], const float (&t)[n], const Columns&) const {
    const float shift_s = sums.state.student.shift(), shift_t = sums.state.teacher.shift();
    const float inverse_t = 1.0f / sums.state.teacher.sum;
    float terms = 0, mean = 0;
    KD_UNROLL for (int i = 0; i < n; ++i) {
      const float u = (((s[i] - look.from_s) - (t[i] - look.from_t)) - look.rest) * row.inverse;
      const float es = exp2f((s[i] - shift_s) * row.k + look.power), et = exp2_nonpositive((t[i] - shift_t) * row.k);
      const float term = close_kl_term(es, et, u), product = et * u;
      terms += es == 0 && et == 0 ? 0.0f : term;
      mean += et == 0 ? 0.0f : product;
      if (look.careful) {
        const float half_s = 0.5f * s[i] - 0.5f * shift_s, half_t = 0.5f * t[i] - 0.5f * shift_t;
        second.half_dot += kl_term(et * inverse_t, half_t, half_s);
      }
    }
    second.terms += terms;
    second.mean += mean;
  }

  KD_DEVICE KlGradientRow gradient_row(const KlRow& row, int64_t, const KlSums& sums) const {
    const KlState<float>& state = sums.state;
    const bool empty = state.empty();
    return {state.student.shift(),
            empty ? 0.0f : 1.0f / state.student.sum,
            state.teacher.shift(),
            empty ? 0.0f : 1.0f / state.teacher.sum,
            row.k,
            row.scale * row.temperature};
  }
  KD_DEVICE float gradient(const KlGradientRow& row, float s, float t, int) const { return row(s, t); }

  // T^2 KL times the row's scale.
  template <class Sides>
  KD_DEVICE float finish(const KlRow& row, int64_t r, const KlSums& sums, const KlLook& look, const KlSecond& second,
                         const Sides&) const {
    const KlState<float>& state = sums.state;
    if (!one_pass) {
      const KlGradientRow found = gradient_row(row, r, sums);
      float* kept = statistics + r * kl_statistics;
      kept[kl_shift_s] = found.shift_s;
      kept[kl_inverse_s] = found.scale_s;
      kept[kl_shift_t] = found.shift_t;
      kept[kl_inverse_t] = found.scale_t;
      kept[kl_coefficient] = found.coefficient;
      kept[kl_k] = found.k;
    }
    if (state.empty()) return 0;
    float value = state.value(row.inverse);
    if (look.careful) {
      const float whole = second.half_dot * (2 * row.inverse) + logf(state.student.sum / state.teacher.sum);
      value = whole < 0 ? 0.0f : whole;
    }
    if (look.again && value < close_kl<float>) {
      const float inverse_t = 1.0f / state.teacher.sum;
      const float terms = second.terms * inverse_t, y = (second.mean + second.terms) * inverse_t;
      const float close = terms + log1p_remainder(y);
      value = close < 0 ? 0.0f : close;
    }
    return row.scale * row.temperature * row.temperature * value;
  }
};

// Host: blocks that count the foreground in a launch of their own.
inline int kl_counters(const RowPlan& plan, const RowPair& pair, const KlRegions& regions) {
  return regions.foreground && regions.divide ? row_counters(pair.rows, plan.blocks(), sizeof(bool)) : 0;
}

// Host: the loss of a call with this plan. `counts`: for row_counters' blocks.
template <bool one_pass>
KlLoss<one_pass> kl_loss(const RowPlan& plan, const RowPair& pair, const KlRegions& regions,
                         const DeviceScalar& loss_weight, const float* counts, float* statistics) {
  KlLoss<one_pass> kl{};
  kl.foreground = regions.foreground;
  for (int i = 0; i < 2; ++i) {
    kl.temperature[i] = float(regions.temperature[i]);
    kl.inverse[i] = float(1 / regions.temperature[i]);
    kl.k[i] = float(log2_e / regions.temperature[i]);
    kl.region_weight[i] = regions.weight[i];
  }
  kl.factor = row_factor(regions.reduction, double(pair.rows), double(pair.columns));
  kl.loss_weight = loss_weight;
  kl.divide = regions.divide;
  kl.rows = pair.rows;
  kl.counts = counts;
  kl.counters = kl_counters(plan, pair, regions);
  kl.weight = static_cast<const float*>(pair.weight);
  kl.statistics = statistics;
  return kl;
}

}  // namespace

KD_NAMESPACE_END
