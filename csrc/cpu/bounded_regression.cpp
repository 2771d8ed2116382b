// Teacher-bounded regression on the CPU. Rows have four coordinates, so nothing here is worth a vector: the derivative
// of a row (four numbers) is kept by the forward, and the backward multiplies it by the upstream gradient.
#include "bounded_regression.h"

#include "../math/bounded_regression.h"
#include "rows.h"

KD_NAMESPACE_BEGIN

namespace {

constexpr int coordinates = 4;

template <class A>
struct Row {
  A student[coordinates], teacher[coordinates];  // differences to the target

  Row(const RowPair& pair, const RowView& target, int64_t row) {
    A ss[coordinates] = {}, st[coordinates] = {}, sy[coordinates] = {};
    const A* s = RowReader<A>(pair.student, row, ss).block(0, coordinates);
    const A* t = RowReader<A>(pair.teacher, row, st).block(0, coordinates);
    const A* y = RowReader<A>(target, row, sy).block(0, coordinates);
    for (int i = 0; i < coordinates; ++i) {
      student[i] = s[i] - y[i];
      teacher[i] = t[i] - y[i];
    }
  }
  static A squares(const A* d) { return (d[0] * d[0] + d[1] * d[1]) + (d[2] * d[2] + d[3] * d[3]); }
};

template <class A>
void forward(const RowPair& pair, const RowView& target, const BoundedRegressionOptions& options, A* loss,
             A* derivative, const Threads& threads) {
  const Gate gate = static_cast<Gate>(options.gate);
  const double bound = options.bound_weight.get(), smooth = options.smooth_l1_weight.get();
  const A margin = A(options.margin), beta = A(options.beta);
  A batch_gate = 0;
  if (gate == Gate::batch) {  // one comparison of the two means over all coordinates
    double student = 0, teacher = 0;
    for (int64_t row = 0; row < pair.rows; ++row) {
      const Row<A> r(pair, target, row);
      student += Row<A>::squares(r.student);
      teacher += Row<A>::squares(r.teacher);
    }
    const double values = double(coordinates) * double(pair.rows);
    batch_gate = A(pair.rows ? bound_gate(student / values, teacher / values, options.margin) : 0);
  }
  const double factor = options.reduction.factor(double(pair.rows), 1);
  const A* weight = static_cast<const A*>(pair.weight);
  reduce_rows<A>(
      RowUnits(pair.rows, coordinates), options.reduction, coordinates, loss, threads,
      [&](int64_t row, RowScratch<A>&) {
        const Row<A> r(pair, target, row);
        const A row_gate =
            gate == Gate::row ? bound_gate(Row<A>::squares(r.student), Row<A>::squares(r.teacher), margin) : batch_gate;
        const double scale = weight ? factor * weight[row] : factor;
        double value = 0;
        for (int i = 0; i < coordinates; ++i) {
          const A d = r.student[i];
          const A open = gate == Gate::element ? bound_gate(d * d, r.teacher[i] * r.teacher[i], margin) : row_gate;
          // A closed gate gives 0 whatever the square is, infinity included.
          const double square = open == 0 ? 0.0 : double(d) * double(d);
          const double slope = open == 0 ? 0.0 : 2 * double(d);
          value += smooth * smooth_l1(d, beta) + bound * square;
          derivative[row * coordinates + i] = A(scale * (smooth * smooth_l1_gradient(d, beta) + bound * slope));
        }
        return scale * value;
      });
}

template <class A>
void backward(const RowPair& pair, const A* grad_loss, bool per_row, const A* derivative, const Threads& threads) {
  const RowView& grad = pair.grad;
  parallel(threads, pair.rows, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const A upstream = grad_loss[per_row ? row : 0];
      A out[coordinates];
      for (int i = 0; i < coordinates; ++i) out[i] = upstream * derivative[row * coordinates + i];
      write_block<A>(grad.data, grad.dtype, row_offset(grad, row), grad.column_stride, coordinates, out);
    }
  });
}

}  // namespace

void bounded_regression_forward(const RowPair& pair, const RowView& target, const BoundedRegressionOptions& options,
                                void* loss, void* derivative, const Threads& threads) {
  if (pair.wide) {
    forward(pair, target, options, static_cast<double*>(loss), static_cast<double*>(derivative), threads);
  } else {
    forward(pair, target, options, static_cast<float*>(loss), static_cast<float*>(derivative), threads);
  }
}

void bounded_regression_backward(const RowPair& pair, const void* grad_loss, bool per_row, const void* derivative,
                                 const Threads& threads) {
  if (pair.wide) {
    backward(pair, static_cast<const double*>(grad_loss), per_row, static_cast<const double*>(derivative), threads);
  } else {
    backward(pair, static_cast<const float*>(grad_loss), per_row, static_cast<const float*>(derivative), threads);
  }
}

KD_NAMESPACE_END
