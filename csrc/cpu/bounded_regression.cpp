// Teacher-bounded regression on the CPU. A row is four coordinates, too short for a vector, so a block of rows is taken
// at once, as a few plain loops over the first-level cache that the compiler turns into vectors: none of them branches
// on a value. The forward leaves the derivative, where a second pass is to multiply it by the upstream gradient or, in
// one pass, as the gradient itself.
#include "bounded_regression.h"

#include "../math/bounded_regression.h"
#include "rows.h"

KD_NAMESPACE_BEGIN

namespace {

constexpr int coordinates = 4, rows_per_block = 128, values_per_block = coordinates * rows_per_block;

// Whether rows follow each other without a gap, so that a block of them is one block of values.
bool packed(const RowView& view) {
  return view.column_stride == 1 && (view.dims == 0 || (view.dims == 1 && view.stride[0] == coordinates));
}

template <class A>
const A* read_rows(const RowView& view, int64_t first, int rows, A* scratch) {
  if (packed(view)) return read_block(view.data, view.dtype, first * coordinates, 1, rows * coordinates, scratch);
  for (int r = 0; r < rows; ++r) {
    A* to = scratch + r * coordinates;
    const A* from = RowReader<A>(view, first + r, to).block(0, coordinates);
    if (from != to) memcpy(to, from, sizeof(A) * coordinates);
  }
  return scratch;
}

template <class A>
void write_rows(const RowView& view, int64_t first, int rows, const A* from) {
  if (packed(view)) {
    write_block(view.data, view.dtype, first * coordinates, 1, rows * coordinates, from);
    return;
  }
  for (int r = 0; r < rows; ++r) {
    write_block(view.data, view.dtype, row_offset(view, first + r), view.column_stride, coordinates,
                from + r * coordinates);
  }
}

// Where a block of results goes: the tensor itself when it can, else scratch; then write_rows moves it.
template <class A>
A* result_rows(const RowView& view, int64_t first, A* scratch) {
  return packed(view) ? result_block(view.data, view.dtype, first * coordinates, 1, scratch) : scratch;
}

template <class A>
KD_HD A sum_of_squares(const A* d) {
  return (d[0] * d[0] + d[1] * d[1]) + (d[2] * d[2] + d[3] * d[3]);
}

// A block of rows: what either side is off the target, and what is charged by the bound.
template <class A>
struct Block {
  A student[values_per_block], teacher[values_per_block], charged[values_per_block];
  A scratch[3][values_per_block];
  double scale[values_per_block], value[values_per_block];

  void read(const RowPair& pair, const RowView& target, int64_t first, int rows) {
    const A* __restrict s = read_rows(pair.student, first, rows, scratch[0]);
    const A* __restrict t = read_rows(pair.teacher, first, rows, scratch[1]);
    const A* __restrict y = read_rows(target, first, rows, scratch[2]);
    for (int i = 0; i < rows * coordinates; ++i) {
      student[i] = s[i] - y[i];
      teacher[i] = t[i] - y[i];
    }
  }

  // The difference where the gate is open, else 0: then its square is 0 too, were it infinite with the gate open.
  void charge(Gate gate, A batch_gate, A margin, int rows) {
    if (gate == Gate::row) {
      for (int r = 0; r < rows; ++r) {
        const A *s = student + r * coordinates, *t = teacher + r * coordinates;
        const A open = bound_gate(sum_of_squares(s), sum_of_squares(t), margin);
        for (int i = 0; i < coordinates; ++i) charged[r * coordinates + i] = open == 0 ? A(0) : s[i];
      }
    } else if (gate == Gate::element) {
      for (int i = 0; i < rows * coordinates; ++i) {
        const A s = student[i], t = teacher[i];
        charged[i] = bound_gate(s * s, t * t, margin) == 0 ? A(0) : s;
      }
    } else {
      for (int i = 0; i < rows * coordinates; ++i) charged[i] = batch_gate == 0 ? A(0) : student[i];
    }
  }

  void weigh(const RowScale<A>& weight, int64_t first, int rows) {
    for (int i = 0; i < rows * coordinates; ++i) scale[i] = weight(first + i / coordinates);
  }

  // Each coordinate's value, and its derivative into `out`; the square in double, as A would overflow.
  void evaluate(double smooth, double bound, A beta, int rows, A* __restrict out) {
    for (int i = 0; i < rows * coordinates; ++i) {
      const A d = student[i];
      const double c = charged[i];
      value[i] = smooth * smooth_l1(d, beta) + bound * (c * c);
      out[i] = A(scale[i] * (smooth * smooth_l1_gradient(d, beta) + bound * (2 * c)));
    }
  }

  double row_value(int row) const {
    const double* v = value + row * coordinates;
    return scale[row * coordinates] * ((v[0] + v[1]) + (v[2] + v[3]));
  }
};

// Runs body(first row, rows, block) for the blocks of [first, last).
template <class A, class F>
void for_each_block(int64_t first, int64_t last, const F& body) {
  Block<A> block;
  for (; first < last; first += rows_per_block) {
    body(first, int(last - first < rows_per_block ? last - first : rows_per_block), block);
  }
}

template <class A>
void forward(const RowPair& pair, const RowView& target, const BoundedRegressionOptions& options, A* loss,
             const RowView& derivative, const Threads& threads) {
  const Gate gate = static_cast<Gate>(options.gate);
  const double bound = options.bound_weight.get(), smooth = options.smooth_l1_weight.get();
  const A margin = A(options.margin), beta = A(options.beta);
  const RowUnits units(pair.rows, coordinates, 0);
  A batch_gate = 0;
  if (gate == Gate::batch) {  // one comparison of the two means over all coordinates
    double squares[2];
    sum_units<A>(units, threads, squares, [&](int64_t first, int64_t last, RowScratch<A>&, double (&sums)[2]) {
      for_each_block<A>(first, last, [&](int64_t row, int rows, Block<A>& block) {
        block.read(pair, target, row, rows);
        for (int r = 0; r < rows; ++r) {
          sums[0] += sum_of_squares(block.student + r * coordinates);
          sums[1] += sum_of_squares(block.teacher + r * coordinates);
        }
      });
    });
    const double values = double(coordinates) * double(pair.rows);
    batch_gate = A(pair.rows ? bound_gate(squares[0] / values, squares[1] / values, options.margin) : 0);
  }
  const RowScale<A> scale(pair, options.reduction);
  // take(row, value): the row's value, weighted.
  const auto each_row = [&](int64_t begin, int64_t end, const auto& take) {
    for_each_block<A>(begin, end, [&](int64_t first, int rows, Block<A>& block) {
      block.read(pair, target, first, rows);
      block.charge(gate, batch_gate, margin, rows);
      block.weigh(scale, first, rows);
      A* __restrict out = result_rows(derivative, first, block.scratch[0]);
      block.evaluate(smooth, bound, beta, rows, out);
      write_rows(derivative, first, rows, out);
      for (int r = 0; r < rows; ++r) take(first + r, block.row_value(r));
    });
  };
  if (options.reduction.kind == RowReduction::none) {
    for_each_unit<A>(units, threads, [&](int64_t, int64_t first, int64_t last, RowScratch<A>&) {
      each_row(first, last, [&](int64_t row, double value) { loss[row] = A(value); });
    });
    return;
  }
  double total[1];
  sum_units<A>(units, threads, total, [&](int64_t first, int64_t last, RowScratch<A>&, double (&sums)[1]) {
    each_row(first, last, [&](int64_t, double value) { sums[0] += value; });
  });
  *loss = A(total[0]);
}

template <class A>
void backward(const RowPair& pair, const A* grad_loss, bool per_row, const A* derivative, const Threads& threads) {
  parallel(threads, pair.rows, 4096, [&](int64_t begin, int64_t end) {
    A scratch[values_per_block];
    for (int64_t first = begin; first < end; first += rows_per_block) {
      const int rows = int(end - first < rows_per_block ? end - first : rows_per_block);
      const A* __restrict from = derivative + first * coordinates;
      A* __restrict out = result_rows(pair.grad, first, scratch);
      if (per_row) {
        for (int i = 0; i < rows * coordinates; ++i) out[i] = grad_loss[first + i / coordinates] * from[i];
      } else {
        for (int i = 0; i < rows * coordinates; ++i) out[i] = *grad_loss * from[i];
      }
      write_rows(pair.grad, first, rows, out);
    }
  });
}

}  // namespace

void bounded_regression_forward(const RowPair& pair, const RowView& target, const BoundedRegressionOptions& options,
                                void* loss, const RowView& derivative, const Threads& threads) {
  if (pair.wide) {
    forward(pair, target, options, static_cast<double*>(loss), derivative, threads);
  } else {
    forward(pair, target, options, static_cast<float*>(loss), derivative, threads);
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
