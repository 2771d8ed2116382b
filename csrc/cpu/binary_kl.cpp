// Binary KL on the CPU: elementwise in the logits, summed over classes; one number per row is kept for the backward.
#include "binary_kl.h"

#include "../math/binary_kl.h"
#include "rows.h"

KD_NAMESPACE_BEGIN

namespace {

template <class A>
KD_HD Logistic<vec<A>> logistic(vec<A> logit, A inverse_temperature) {
  const vec<A> x = logit * inverse_temperature;
  const vec<A> e = exp2_nonpositive(magnitude(x) * A(-1.4426950408889634074));
  return {x, e, log1p_unit<A>(e)};
}

// One block's sum; with `grad`, its gradient as well, c times that of each logit.
template <bool with_grad, class A>
KD_HD double add_block(const A* s, const A* t, int n, A inverse, A c, A* grad) {
  using V = vec<A>;
  V sum = constant<V>(0);
  const auto add = [&](V a, V b) -> V {
    const Logistic<V> x = logistic<A>(a, inverse), y = logistic<A>(b, inverse);
    sum += binary_kl_value(x, y, (a - b) * inverse);
    return with_grad ? c * sigmoid_difference(x, y) : constant<V>(0);
  };
  for_each_vector<A>(
      n,
      [&](int i) {
        const V g = add(load(s + i), load(t + i));
        if (with_grad) store<A>(grad + i, g);
      },
      [&](int i, int m) {
        const V g = add(load_part(s + i, m, A(0)), load_part(t + i, m, A(0)));
        if (with_grad) store_part<A>(grad + i, g, m);
      });
  return sum_lanes<A>(sum);
}

template <class A>
void forward(const RowPair& pair, double temperature, const RowReduction& reduction, A* loss, A* coefficients,
             const Threads& threads) {
  const RowScale<A> scale(pair, reduction);
  const A inverse = A(1 / temperature);
  reduce_rows<A>(RowUnits(pair.rows, pair.columns), reduction, loss, threads, [&](int64_t row, RowScratch<A>& scratch) {
    const RowReader<A> s(pair.student, row, scratch.s), t(pair.teacher, row, scratch.t);
    double total = 0;
    for (int64_t column = 0; column < pair.columns; column += block_size) {
      const int n = int(pair.columns - column < block_size ? pair.columns - column : block_size);
      total += add_block<false, A>(s.block(column, n), t.block(column, n), n, inverse, 0, nullptr);
    }
    coefficients[row] = A(scale(row) * temperature);
    return scale(row) * temperature * temperature * total;
  });
}

template <class A>
void backward(const RowPair& pair, double temperature, const A* grad_loss, bool per_row, const A* coefficients,
              const Threads& threads) {
  const A inverse = A(1 / temperature);
  write_gradient<A>(pair, threads, [&](int64_t row) {
    return [=](int64_t, int n, const A* s, const A* t, A* out) {
      using V = vec<A>;
      const A c = grad_loss[per_row ? row : 0] * coefficients[row];
      const auto gradient = [&](V a, V b) -> V {
        return c * sigmoid_difference(logistic<A>(a, inverse), logistic<A>(b, inverse));
      };
      for_each_vector<A>(
          n, [&](int i) { store<A>(out + i, gradient(load(s + i), load(t + i))); },
          [&](int i, int m) {
            store_part<A>(out + i, gradient(load_part(s + i, m, A(0)), load_part(t + i, m, A(0))), m);
          });
    };
  });
}

}  // namespace

void binary_kl_forward(const RowPair& pair, double temperature, const RowReduction& reduction, void* loss,
                       void* coefficients, const Threads& threads) {
  if (pair.wide) {
    forward(pair, temperature, reduction, static_cast<double*>(loss), static_cast<double*>(coefficients), threads);
  } else {
    forward(pair, temperature, reduction, static_cast<float*>(loss), static_cast<float*>(coefficients), threads);
  }
}

void binary_kl_backward(const RowPair& pair, double temperature, const void* grad_loss, bool per_row,
                        const void* coefficients, const Threads& threads) {
  if (pair.wide) {
    backward(pair, temperature, static_cast<const double*>(grad_loss), per_row,
             static_cast<const double*>(coefficients), threads);
  } else {
    backward(pair, temperature, static_cast<const float*>(grad_loss), per_row, static_cast<const float*>(coefficients),
             threads);
  }
}

void binary_kl_one_pass(const RowPair& pair, double temperature, const RowReduction& reduction,
                        const DeviceScalar& loss_weight, float* loss, const Threads& threads) {
  const double factor = loss_weight.get();
  const RowScale<float> row_scale(pair, reduction);
  const float inverse = float(1 / temperature);
  reduce_rows<float>(
      RowUnits(pair.rows, pair.columns), reduction, loss, threads, [&](int64_t row, RowScratch<float>& scratch) {
        const double scale = factor * row_scale(row);
        const float c = float(scale * temperature);
        double total = 0;
        write_row<float>(pair, row, scratch, [&](int64_t, int n, const float* s, const float* t, float* out) {
          total += add_block<true, float>(s, t, n, inverse, c, out);
        });
        return scale * temperature * temperature * total;
      });
}

KD_NAMESPACE_END
