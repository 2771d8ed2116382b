// Class-weighted soft cross-entropy with a hard part, on the CPU: one read forward, one read and one write backward.
#include "soft_cross_entropy.h"

#include "../math/soft_cross_entropy.h"
#include "rows.h"

KD_NAMESPACE_BEGIN

namespace {

// gradient = soft * (exp2((s - shift_s) k) * mass_s - w_c exp2((t - shift_t) k) * inverse_t)
//          + hard * (exp2((s - shift_s) log2 e) * inverse_hard - [c is the label])
enum Statistic : int { shift_s, mass_s, shift_t, inverse_t, inverse_hard, soft, hard, alive, statistics_per_row };

template <class A>
KD_HD void add_block(SoftCrossEntropyState<double>& state, const A* s, const A* t, const A* w, int n, double k,
                     bool separate) {
  using V = vec<A>;
  state.raise(maximum_of(s, n), maximum_of(t, n), k);
  const A from_s = A(state.student.shift()), from_t = A(state.teacher.shift()), factor = A(k);
  V sum_s = constant<V>(0), sum_t = constant<V>(0), dot = constant<V>(0), weighted = constant<V>(0),
    hard_sum = constant<V>(0);
  const auto add = [&](V student, V teacher, V weight) {
    const V ds = student - from_s, dt = teacher - from_t;
    const V et = exp2_nonpositive(dt * factor), wet = weight * et;
    sum_s += exp2_nonpositive(ds * factor);
    sum_t += et;
    weighted += wet;
    dot += soft_term(wet, ds);
    if (separate) hard_sum += exp2_nonpositive(ds * A(log2_e));
  };
  const V one = constant<V>(1);
  for_each_vector<A>(
      n, [&](int i) { add(load(s + i), load(t + i), w ? load(w + i) : one); },
      [&](int i, int m) {
        add(load_part(s + i, m, A(-INFINITY)), load_part(t + i, m, A(-INFINITY)), w ? load_part(w + i, m, A(0)) : one);
      });
  const double added = sum_lanes<A>(sum_s);
  state.student.sum += added;
  state.teacher.sum += sum_lanes<A>(sum_t);
  state.weighted += sum_lanes<A>(weighted);
  state.dot += sum_lanes<A>(dot);
  state.hard_sum += separate ? sum_lanes<A>(hard_sum) : added;
}

template <class A>
double row_loss(const RowPair& pair, const SoftCrossEntropyOptions& options, int64_t row, double scale, double mix,
                A* stat, A* scratch_s, A* scratch_t) {
  for (int i = 0; i < statistics_per_row; ++i) stat[i] = 0;
  const int64_t label = options.target ? options.target[row] : 0;
  if (options.target && label == options.ignore_index) return 0;
  const RowReader<A> s(pair.student, row, scratch_s), t(pair.teacher, row, scratch_t);
  const A* w = static_cast<const A*>(options.class_weight);
  const double k = log2_e / options.temperature;
  SoftCrossEntropyState<double> state;
  for (int64_t column = 0; column < pair.columns; column += block_size) {
    const int n = int(pair.columns - column < block_size ? pair.columns - column : block_size);
    add_block<A>(state, s.block(column, n), t.block(column, n), w ? w + column : nullptr, n, k,
                 options.temperature != 1);
  }
  if (isinf(state.dot)) {
    const double shift_s = state.student.shift();
    state.dot = careful_dot<A>(s, t, pair.columns, state.teacher.shift(), k, [&](A student, A, double p, int64_t c) {
      return soft_term(w ? double(w[c]) * p : p, double(student) - shift_s);
    });
  }
  if (state.empty()) return 0;
  const bool valid = !options.target || (label >= 0 && label < pair.columns);
  const double soft_part = state.soft(1 / options.temperature);
  // A factor of 0 silences an infinite part, as in the formula, but never NaN.
  double value = mix == 1 ? (isnan(soft_part) ? soft_part : 0) : (1 - mix) * soft_part;
  if (options.target && mix != 0) value += mix * state.hard(valid ? double(*s.block(label, 1)) : double(NAN));
  stat[shift_s] = A(state.student.shift());
  stat[mass_s] = A(state.weighted / state.teacher.sum / state.student.sum);
  stat[shift_t] = A(state.teacher.shift());
  stat[inverse_t] = A(1 / state.teacher.sum);
  stat[inverse_hard] = A(1 / state.hard_sum);
  stat[soft] = A(scale * (1 - mix) / options.temperature);
  stat[hard] = A(options.target ? scale * mix : 0);
  stat[alive] = A(1);
  if (!valid) {
    stat[soft] = A(NAN);
    return NAN;
  }
  return scale * value;
}

template <class A>
void forward(const RowPair& pair, const SoftCrossEntropyOptions& options, A* loss, A* statistics,
             const Threads& threads) {
  int64_t ignored = 0;
  for (int64_t row = 0; options.target && row < pair.rows; ++row)
    ignored += options.target[row] == options.ignore_index;
  const double factor = options.reduction.factor(double(pair.rows - ignored), double(pair.columns));
  const double mix = options.hard_weight.get();
  const A* weight = static_cast<const A*>(pair.weight);
  reduce_rows<A>(RowUnits(pair.rows, pair.columns), options.reduction, pair.columns, loss, threads,
                 [&](int64_t row, A* scratch_s, A* scratch_t) {
                   return row_loss<A>(pair, options, row, weight ? factor * weight[row] : factor, mix,
                                      statistics + row * statistics_per_row, scratch_s, scratch_t);
                 });
}

template <class A>
void backward(const RowPair& pair, double temperature, const A* w, const int64_t* target, const A* grad_loss,
              bool per_row, const A* statistics, const Threads& threads) {
  const A k = A(log2_e / temperature), k1 = A(log2_e);
  const RowUnits units(pair.rows, pair.columns);
  write_gradient<A>(
      units, pair.columns, pair.student, pair.teacher, pair.grad, threads,
      [&](int64_t row, int64_t column, int n, const A* s, const A* t, A* out) {
        using V = vec<A>;
        const A* stat = statistics + row * statistics_per_row;
        if (stat[alive] == 0) {  // ignored, or an all -inf side
          for (int i = 0; i < n; ++i) out[i] = 0;
          return;
        }
        const A upstream = grad_loss[per_row ? row : 0];
        const A c = upstream * stat[soft], h = upstream * stat[hard];
        const A from_s = stat[shift_s], from_t = stat[shift_t], mass = stat[mass_s], inverse = stat[inverse_t];
        const A hard_scale = h * stat[inverse_hard];
        const bool with_hard = stat[hard] != 0;
        const auto gradient = [&](V student, V teacher, V weight) -> V {
          const V ds = student - from_s;
          V g = c * (exp2_nonpositive(ds * k) * mass - weight * (exp2_nonpositive((teacher - from_t) * k) * inverse));
          if (with_hard) g += exp2_nonpositive(ds * k1) * hard_scale;
          return g;
        };
        const V one = constant<V>(1);
        for_each_vector<A>(
            n, [&](int i) { store<A>(out + i, gradient(load(s + i), load(t + i), w ? load(w + column + i) : one)); },
            [&](int i, int m) {
              store_part<A>(out + i,
                            gradient(load_part(s + i, m, A(0)), load_part(t + i, m, A(0)),
                                     w ? load_part(w + column + i, m, A(0)) : one),
                            m);
            });
        if (with_hard) {
          const int64_t label = target[row] - column;
          if (label >= 0 && label < n) out[label] -= h;
        }
      });
}

}  // namespace

void soft_cross_entropy_forward(const RowPair& pair, const SoftCrossEntropyOptions& options, void* loss,
                                void* statistics, const Threads& threads) {
  if (pair.wide) {
    forward(pair, options, static_cast<double*>(loss), static_cast<double*>(statistics), threads);
  } else {
    forward(pair, options, static_cast<float*>(loss), static_cast<float*>(statistics), threads);
  }
}

void soft_cross_entropy_backward(const RowPair& pair, double temperature, const void* class_weight,
                                 const int64_t* target, const void* grad_loss, bool per_row, const void* statistics,
                                 const Threads& threads) {
  if (pair.wide) {
    backward(pair, temperature, static_cast<const double*>(class_weight), target, static_cast<const double*>(grad_loss),
             per_row, static_cast<const double*>(statistics), threads);
  } else {
    backward(pair, temperature, static_cast<const float*>(class_weight), target, static_cast<const float*>(grad_loss),
             per_row, static_cast<const float*>(statistics), threads);
  }
}

KD_NAMESPACE_END
