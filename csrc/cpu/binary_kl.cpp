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

template <class A>
void forward(const RowPair& pair, double temperature, const RowReduction& reduction, A* loss, A* coefficients,
             const Threads& threads) {
  using V = vec<A>;
  const double factor = reduction.factor(double(pair.rows), double(pair.columns));
  const A* weight = static_cast<const A*>(pair.weight);
  const A inverse = A(1 / temperature);
  reduce_rows<A>(RowUnits(pair.rows, pair.columns), reduction, pair.columns, loss, threads,
                 [&](int64_t row, A* scratch_s, A* scratch_t) {
                   const RowReader<A> s(pair.student, row, scratch_s), t(pair.teacher, row, scratch_t);
                   double total = 0;
                   for (int64_t column = 0; column < pair.columns; column += block_size) {
                     const int n = int(pair.columns - column < block_size ? pair.columns - column : block_size);
                     const A *bs = s.block(column, n), *bt = t.block(column, n);
                     V sum = constant<V>(0);
                     const auto value = [&](V a, V b) {
                       return binary_kl_value(logistic<A>(a, inverse), logistic<A>(b, inverse), (a - b) * inverse);
                     };
                     for_each_vector<A>(
                         n, [&](int i) { sum += value(load(bs + i), load(bt + i)); },
                         [&](int i, int m) { sum += value(load_part(bs + i, m, A(0)), load_part(bt + i, m, A(0))); });
                     total += sum_lanes<A>(sum);
                   }
                   const double scale = weight ? factor * weight[row] : factor;
                   coefficients[row] = A(scale * temperature);
                   return scale * temperature * temperature * total;
                 });
}

template <class A>
void backward(const RowPair& pair, double temperature, const A* grad_loss, bool per_row, const A* coefficients,
              const Threads& threads) {
  const A inverse = A(1 / temperature);
  write_gradient<A>(RowUnits(pair.rows, pair.columns), pair.columns, pair.student, pair.teacher, pair.grad, threads,
                    [&](int64_t row, int64_t, int n, const A* s, const A* t, A* out) {
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

KD_NAMESPACE_END
