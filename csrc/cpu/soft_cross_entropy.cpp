// Class-weighted soft cross-entropy with a hard part, on the CPU: one read forward, one read and one write backward. In
// one pass, a row of one block keeps its exponentials for its gradient; a longer one is read once more, from the
// second-level cache.
#include "soft_cross_entropy.h"

#include "../math/soft_cross_entropy.h"
#include "rows.h"

KD_NAMESPACE_BEGIN

namespace {

// gradient = soft * (exp2((s - shift_s) k) * mass_s - w_c exp2((t - shift_t) k) * inverse_t)
//          + hard * (exp2((s - shift_s) log2 e) * inverse_hard - [c is the label])
enum Statistic : int { shift_s, mass_s, shift_t, inverse_t, inverse_hard, soft, hard, alive, statistics_per_row };

// `keep`: leaves the exponentials in kept: student's, teacher's and, where it has its own, the hard part's.
template <bool keep, class A>
KD_HD void add_block(SoftCrossEntropyState<double>& state, const A* s, const A* t, const A* w, int n, double k,
                     bool separate, A (*kept)[block_size]) {
  using V = vec<A>;
  state.raise(maximum_of(s, n), maximum_of(t, n), k);
  const A from_s = A(state.student.shift()), from_t = A(state.teacher.shift()), factor = A(k);
  V sum_s = constant<V>(0), sum_t = constant<V>(0), dot = constant<V>(0), weighted = constant<V>(0),
    hard_sum = constant<V>(0);
  V es, et, eh;
  const auto add = [&](V student, V teacher, V weight) {
    const V ds = student - from_s, dt = teacher - from_t;
    es = exp2_nonpositive(ds * factor), et = exp2_nonpositive(dt * factor);
    const V wet = weight * et;
    sum_s += es;
    sum_t += et;
    weighted += wet;
    dot += soft_term(wet, ds);
    if (separate) {
      eh = exp2_nonpositive(ds * A(log2_e));
      hard_sum += eh;
    }
  };
  const V one = constant<V>(1);
  for_each_vector<A>(
      n,
      [&](int i) {
        add(load(s + i), load(t + i), w ? load(w + i) : one);
        if (keep) store<A>(kept[0] + i, es), store<A>(kept[1] + i, et);
        if (keep && separate) store<A>(kept[2] + i, eh);
      },
      [&](int i, int m) {
        add(load_part(s + i, m, A(-INFINITY)), load_part(t + i, m, A(-INFINITY)), w ? load_part(w + i, m, A(0)) : one);
        if (keep) store_part<A>(kept[0] + i, es, m), store_part<A>(kept[1] + i, et, m);
        if (keep && separate) store_part<A>(kept[2] + i, eh, m);
      });
  const double added = sum_lanes<A>(sum_s);
  state.student.sum += added;
  state.teacher.sum += sum_lanes<A>(sum_t);
  state.weighted += sum_lanes<A>(weighted);
  state.dot += sum_lanes<A>(dot);
  state.hard_sum += separate ? sum_lanes<A>(hard_sum) : added;
}

// One row's value; fills its statistics. `keep`: leaves the exponentials in the scratch; for a row of one block.
template <bool keep, class A>
double row_loss(const RowPair& pair, const SoftCrossEntropyOptions& options, int64_t row, double scale, double mix,
                A* stat, RowScratch<A>& scratch) {
  for (int i = 0; i < statistics_per_row; ++i) stat[i] = 0;
  const int64_t label = options.target ? options.target[row] : 0;
  if (options.target && label == options.ignore_index) return 0;
  const RowReader<A> s(pair.student, row, scratch.s), t(pair.teacher, row, scratch.t);
  const A* w = static_cast<const A*>(options.class_weight);
  const double k = log2_e / options.temperature;
  SoftCrossEntropyState<double> state;
  for (int64_t column = 0; column < pair.columns; column += block_size) {
    const int n = int(pair.columns - column < block_size ? pair.columns - column : block_size);
    add_block<keep, A>(state, s.block(column, n), t.block(column, n), w ? w + column : nullptr, n, k,
                       options.temperature != 1, scratch.kept);
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

// What a row's value is multiplied by. Rows whose label is ignored do not count in a mean.
template <class A>
RowScale<A> scale_of_rows(const RowPair& pair, const SoftCrossEntropyOptions& options) {
  int64_t ignored = 0;
  for (int64_t row = 0; options.target && row < pair.rows; ++row)
    ignored += options.target[row] == options.ignore_index;
  return RowScale<A>(pair, options.reduction, pair.rows - ignored);
}

template <class A>
void forward(const RowPair& pair, const SoftCrossEntropyOptions& options, A* loss, A* statistics,
             const Threads& threads) {
  const RowScale<A> scale = scale_of_rows<A>(pair, options);
  const double mix = options.hard_weight.get();
  reduce_rows<A>(RowUnits(pair.rows, pair.columns), options.reduction, loss, threads,
                 [&](int64_t row, RowScratch<A>& scratch) {
                   A* kept = statistics + row * statistics_per_row;
                   return row_loss<false, A>(pair, options, row, scale(row), mix, kept, scratch);
                 });
}

// A row's gradient from its statistics.
template <class A>
struct SoftGradient {
  using V = vec<A>;
  A k, soft_c, hard_c, from_s, from_t, mass, inverse, hard_scale;
  const A* weights;
  int64_t label;
  bool live, with_hard, separate;

  KD_HD SoftGradient(const A* stat, A upstream, double temperature, const A* w, const int64_t* target, int64_t row)
      : k(A(log2_e / temperature)),
        soft_c(upstream * stat[soft]),
        hard_c(upstream * stat[hard]),
        from_s(stat[shift_s]),
        from_t(stat[shift_t]),
        mass(stat[mass_s]),
        inverse(stat[inverse_t]),
        hard_scale(hard_c * stat[inverse_hard]),
        weights(w),
        label(target ? target[row] : -1),
        live(stat[alive] != 0),
        with_hard(stat[hard] != 0),
        separate(temperature != 1) {}

  KD_HD V of_exponentials(V es, V et, V weight) const { return soft_c * (es * mass - weight * (et * inverse)); }

  // One block, from its logits or, where `kept` has them, from its exponentials.
  template <bool with_kept>
  KD_HD void fill(int64_t column, int n, const A* s, const A* t, const A* eh, A* out) const {
    if (!live) {  // ignored, or an all -inf side
      for (int i = 0; i < n; ++i) out[i] = 0;
      return;
    }
    const auto gradient = [&](V a, V b, V h, V weight) -> V {
      if (with_kept) {
        const V g = of_exponentials(a, b, weight);
        return with_hard ? g + h * hard_scale : g;
      }
      const V ds = a - from_s;
      const V g = of_exponentials(exp2_nonpositive(ds * k), exp2_nonpositive((b - from_t) * k), weight);
      return with_hard ? g + exp2_nonpositive(ds * A(log2_e)) * hard_scale : g;
    };
    const V one = constant<V>(1);
    const A *w = weights ? weights + column : nullptr, *h = with_kept ? eh : s;
    for_each_vector<A>(
        n, [&](int i) { store<A>(out + i, gradient(load(s + i), load(t + i), load(h + i), w ? load(w + i) : one)); },
        [&](int i, int m) {
          const V weight = w ? load_part(w + i, m, A(0)) : one;
          const V a = load_part(s + i, m, A(0)), b = load_part(t + i, m, A(0)), c = load_part(h + i, m, A(0));
          store_part<A>(out + i, gradient(a, b, c, weight), m);
        });
    if (with_hard && label >= column && label < column + n) out[label - column] -= hard_c;
  }
  KD_HD void operator()(int64_t column, int n, const A* s, const A* t, A* out) const {
    fill<false>(column, n, s, t, nullptr, out);
  }
  KD_HD void from_kept(int n, const A (*kept)[block_size], A* out) const {
    fill<true>(0, n, kept[0], kept[1], separate ? kept[2] : kept[0], out);
  }
};

template <class A>
void backward(const RowPair& pair, double temperature, const A* w, const int64_t* target, const A* grad_loss,
              bool per_row, const A* statistics, const Threads& threads) {
  write_gradient<A>(pair, threads, [&](int64_t row) {
    return SoftGradient<A>(statistics + row * statistics_per_row, grad_loss[per_row ? row : 0], temperature, w, target,
                           row);
  });
}

// row_loss, and the row's gradient, with `scale` in both.
double row_one_pass(const RowPair& pair, const SoftCrossEntropyOptions& options, int64_t row, double scale, double mix,
                    RowScratch<float>& scratch) {
  float statistics[statistics_per_row];
  const auto gradient = [&] {
    return SoftGradient<float>(statistics, 1, options.temperature, static_cast<const float*>(options.class_weight),
                               options.target, row);
  };
  if (pair.columns > block_size) {
    const double value = row_loss<false, float>(pair, options, row, scale, mix, statistics, scratch);
    write_row<float>(pair, row, scratch, gradient());
    return value;
  }
  const double value = row_loss<true, float>(pair, options, row, scale, mix, statistics, scratch);
  const int n = int(pair.columns);
  RowWriter<float>(pair.grad, row, scratch.g).block(0, n, [&](float* out) {
    gradient().from_kept(n, scratch.kept, out);
  });
  return value;
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

void soft_cross_entropy_one_pass(const RowPair& pair, const SoftCrossEntropyOptions& options,
                                 const DeviceScalar& loss_weight, float* loss, const Threads& threads) {
  const double factor = loss_weight.get(), mix = options.hard_weight.get();
  const RowScale<float> scale = scale_of_rows<float>(pair, options);
  reduce_rows<float>(RowUnits(pair.rows, pair.columns), options.reduction, loss, threads,
                     [&](int64_t row, RowScratch<float>& scratch) {
                       return row_one_pass(pair, options, row, factor * scale(row), mix, scratch);
                     });
}

KD_NAMESPACE_END
