// The row of temperature_kl and decoupled_kl: each block is read once for its maxima and once more from the first-level
// cache for its sums. In one pass, a row of one block keeps its exponentials for its gradient; a longer one is read
// once more, from the second-level cache.
#pragma once

#include "../math/temperature_kl.h"
#include "rows.h"

KD_NAMESPACE_BEGIN

// What the backward needs of a row: gradient = coefficient * (exp2((s - shift_s) k) inverse_s - the same of t).
enum KlStatistic : int { kl_shift_s, kl_inverse_s, kl_shift_t, kl_inverse_t, kl_coefficient, kl_k, kl_statistics };

// `keep`: leaves the exponentials in kept_s and kept_t.
template <bool keep, class A>
KD_HD void kl_block(KlState<double>& state, const A* s, const A* t, int n, double k, A* kept_s, A* kept_t) {
  using V = vec<A>;
  state.raise(maximum_of(s, n), maximum_of(t, n), k);
  const A shift_s = A(state.student.shift()), shift_t = A(state.teacher.shift()), factor = A(k);
  V sum_s = constant<V>(0), sum_t = constant<V>(0), dot = constant<V>(0);
  V es, et;
  const auto add = [&](V student, V teacher) {
    const V ds = student - shift_s, dt = teacher - shift_t;
    es = exp2_nonpositive(ds * factor), et = exp2_nonpositive(dt * factor);
    sum_s += es;
    sum_t += et;
    dot += kl_term(et, dt, ds);
  };
  for_each_vector<A>(
      n,
      [&](int i) {
        add(load(s + i), load(t + i));
        if (keep) store<A>(kept_s + i, es), store<A>(kept_t + i, et);
      },
      [&](int i, int m) {
        add(load_part(s + i, m, A(-INFINITY)), load_part(t + i, m, A(-INFINITY)));
        if (keep) store_part<A>(kept_s + i, es, m), store_part<A>(kept_t + i, et, m);
      });
  state.student.sum += sum_lanes<A>(sum_s);
  state.teacher.sum += sum_lanes<A>(sum_t);
  state.dot += sum_lanes<A>(dot);
}

// KL of a row that turned out to be close, from its final maxima and the teacher's sum.
template <class A>
KD_HD double close_kl_value(const RowPair& pair, const RowReader<A>& s, const RowReader<A>& t,
                            const KlState<double>& state, double temperature) {
  using V = vec<A>;
  const A shift_s = A(state.student.shift()), shift_t = A(state.teacher.shift());
  // u is the difference of the logits less that of the maxima. Whichever is taken first leaves the other exact: the
  // logits where the sides are close as they stand, the maxima where a common offset lies between them.
  const double between = state.student.shift() - state.teacher.shift();
  const bool offset = !(between > -1 && between < 1);
  const A from_s = offset ? shift_s : A(0), from_t = offset ? shift_t : A(0), rest = offset ? A(0) : A(between);
  const A factor = A(log2_e / temperature), inverse = A(1 / temperature);
  double terms = 0, mean = 0;
  for (int64_t column = 0; column < pair.columns; column += block_size) {
    const int n = int(pair.columns - column < block_size ? pair.columns - column : block_size);
    const A *bs = s.block(column, n), *bt = t.block(column, n);
    V block_terms = constant<V>(0), block_mean = constant<V>(0);
    const auto add = [&](V student, V teacher) {
      const V u = (((student - from_s) - (teacher - from_t)) - rest) * inverse;
      const V es = exp2_nonpositive((student - shift_s) * factor), et = exp2_nonpositive((teacher - shift_t) * factor);
      const V nothing = constant<V>(0);
      const V term = close_kl_term(es, et, u), product = et * u;
      block_terms += es == nothing ? (et == nothing ? nothing : term) : term;
      block_mean += et == nothing ? nothing : product;
    };
    for_each_vector<A>(
        n, [&](int i) { add(load(bs + i), load(bt + i)); },
        [&](int i, int m) { add(load_part(bs + i, m, A(-INFINITY)), load_part(bt + i, m, A(-INFINITY))); });
    terms += sum_lanes<A>(block_terms);
    mean += sum_lanes<A>(block_mean);
  }
  const double y = (mean + terms) / state.teacher.sum;
  const double kl = terms / state.teacher.sum + (log1p(y) - y);
  return kl < 0 ? 0 : kl;
}

// T^2 KL of one row; fills its statistics, with `scale` (weight / divisor) in the coefficient. `keep`: leaves the
// exponentials in the scratch; for a row of one block.
template <bool keep, class A>
KD_HD double kl_row(const RowPair& pair, int64_t row, double temperature, double scale, A* statistics,
                    RowScratch<A>& scratch) {
  const RowReader<A> s(pair.student, row, scratch.s), t(pair.teacher, row, scratch.t);
  const double k = log2_e / temperature;
  KlState<double> state;
  for (int64_t column = 0; column < pair.columns; column += block_size) {
    const int n = int(pair.columns - column < block_size ? pair.columns - column : block_size);
    kl_block<keep, A>(state, s.block(column, n), t.block(column, n), n, k, scratch.kept[0], scratch.kept[1]);
  }
  if (isinf(state.dot)) {
    const double shift_s = state.student.shift(), shift_t = state.teacher.shift();
    state.dot = careful_dot<A>(s, t, pair.columns, shift_t, k, [&](A student, A teacher, double p, int64_t) {
      return kl_term(p, double(teacher) - shift_t, double(student) - shift_s);
    });
  }
  const bool empty = state.empty();
  statistics[kl_shift_s] = A(state.student.shift());
  statistics[kl_inverse_s] = A(empty ? 0 : 1 / state.student.sum);
  statistics[kl_shift_t] = A(state.teacher.shift());
  statistics[kl_inverse_t] = A(empty ? 0 : 1 / state.teacher.sum);
  statistics[kl_coefficient] = A(scale * temperature);
  statistics[kl_k] = A(k);
  if (empty) return 0;
  double value = state.value(1 / temperature);
  if (value < close_kl<double>) value = close_kl_value<A>(pair, s, t, state, temperature);
  return scale * temperature * temperature * value;
}

// A row's gradient from its statistics.
template <class A>
struct KlGradient {
  using V = vec<A>;
  A c, k, shift_s, shift_t, scale_s, scale_t;

  KD_HD KlGradient(const A* stat, A upstream)
      : c(upstream * stat[kl_coefficient]),
        k(stat[kl_k]),
        shift_s(stat[kl_shift_s]),
        shift_t(stat[kl_shift_t]),
        scale_s(stat[kl_inverse_s]),
        scale_t(stat[kl_inverse_t]) {}

  KD_HD bool empty() const { return scale_s == 0 && scale_t == 0; }  // an all -inf side
  KD_HD V of_exponentials(V es, V et) const { return c * (es * scale_s - et * scale_t); }
  KD_HD V of_logits(V s, V t) const {
    return of_exponentials(exp2_nonpositive((s - shift_s) * k), exp2_nonpositive((t - shift_t) * k));
  }

  // One block, from its logits or from its exponentials.
  template <bool kept>
  KD_HD void fill(int n, const A* s, const A* t, A* out) const {
    if (empty()) {
      for (int i = 0; i < n; ++i) out[i] = 0;
      return;
    }
    const auto gradient = [&](V a, V b) { return kept ? of_exponentials(a, b) : of_logits(a, b); };
    for_each_vector<A>(
        n, [&](int i) { store<A>(out + i, gradient(load(s + i), load(t + i))); },
        [&](int i, int m) {
          store_part<A>(out + i, gradient(load_part(s + i, m, A(0)), load_part(t + i, m, A(0))), m);
        });
  }
  KD_HD void operator()(int64_t, int n, const A* s, const A* t, A* out) const { fill<false>(n, s, t, out); }
};

template <class A>
void kl_gradient(const RowPair& pair, const A* grad_loss, bool per_row, const A* statistics, const Threads& threads) {
  write_gradient<A>(pair, threads, [&](int64_t row) {
    return KlGradient<A>(statistics + row * kl_statistics, grad_loss[per_row ? row : 0]);
  });
}

// kl_row, and the row's gradient, with `scale` in both.
template <class A>
double kl_row_one_pass(const RowPair& pair, int64_t row, double temperature, double scale, RowScratch<A>& scratch) {
  A statistics[kl_statistics];
  if (pair.columns > block_size) {
    const double value = kl_row<false, A>(pair, row, temperature, scale, statistics, scratch);
    write_row<A>(pair, row, scratch, KlGradient<A>(statistics, 1));
    return value;
  }
  const double value = kl_row<true, A>(pair, row, temperature, scale, statistics, scratch);
  const KlGradient<A> gradient(statistics, 1);
  const int n = int(pair.columns);
  RowWriter<A>(pair.grad, row, scratch.g).block(0, n, [&](A* out) {
    gradient.template fill<true>(n, scratch.kept[0], scratch.kept[1], out);
  });
  return value;
}

KD_NAMESPACE_END
