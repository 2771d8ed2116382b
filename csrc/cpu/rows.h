// Rows of a (..., C) tensor in blocks, the reductions over them, and what the softmax losses share.
#pragma once

#include <stdlib.h>

#include "block.h"
#include "../arguments.h"

KD_NAMESPACE_BEGIN

KD_HD int64_t row_offset(const RowView& view, int64_t row) {
  if (view.dims <= 1) return view.dims ? row * view.stride[0] : 0;
  int64_t offset = 0;
  for (int d = view.dims - 1; d >= 0; --d) {
    offset += row % view.size[d] * view.stride[d];
    row /= view.size[d];
  }
  return offset;
}

// One row of one tensor, to be read block by block.
template <class A>
struct RowReader {
  const RowView& view;
  int64_t offset;
  A* scratch;

  RowReader(const RowView& v, int64_t row, A* buffer) : view(v), offset(row_offset(v, row)), scratch(buffer) {}
  const A* block(int64_t column, int n) const {
    return read_block(view.data, view.dtype, offset + column * view.column_stride, view.column_stride, n, scratch);
  }
};

template <class A>
KD_HD double maximum_of(const A* x, int n) {
  using V = vec<A>;
  V best = constant<V>(-INFINITY);
  for_each_vector<A>(
      n, [&](int i) { best = larger(load(x + i), best); },
      [&](int i, int k) { best = larger(load_part(x + i, k, A(-INFINITY)), best); });
  return max_lanes<A>(best);
}

// A row's sum of term(s, t, exp(t - maximum), column), once more, one by one in double under the final maximum. For the
// rare row whose fast sum is infinite: a block cannot know that a later maximum leaves its classes no probability,
// which contributes 0, and A overflows where the mean of its terms does not.
template <class A, class F>
double careful_dot(const RowReader<A>& s, const RowReader<A>& t, int64_t columns, double maximum, double k,
                   const F& term) {
  double dot = 0;
  for (int64_t column = 0; column < columns; column += block_size) {
    const int n = int(columns - column < block_size ? columns - column : block_size);
    const A *student = s.block(column, n), *teacher = t.block(column, n);
    for (int i = 0; i < n; ++i) {
      const A p = A(exp2((double(teacher[i]) - maximum) * k));  // A decides what is no probability
      dot += term(student[i], teacher[i], double(p), column + i);
    }
  }
  return dot;
}

// Rows are handed out in units whose size depends on the width alone, and unit sums are added in order: the same bits
// whatever the number of threads.
struct RowUnits {
  int64_t rows, size, count;
  RowUnits(int64_t rows_, int64_t columns) : rows(rows_), size(1 + 8192 / (columns > 0 ? columns : 1)) {
    count = (rows + size - 1) / size;
  }
};

// Runs row_value(row, stats_row) for every row: a weighted double. Sums, divides, or stores them, as the reduction
// says.
template <class A, class F>
void reduce_rows(const RowUnits& units, const RowReduction& reduction, int64_t columns, A* loss, const Threads& threads,
                 const F& row_value) {
  const bool keep = reduction.kind == RowReduction::none;
  double* parts = keep ? nullptr : static_cast<double*>(malloc(sizeof(double) * size_t(units.count + 1)));
  parallel(threads, units.count, 1 + 32768 / (units.size * (columns > 0 ? columns : 1)),
           [&](int64_t begin, int64_t end) {
             A scratch_s[block_size], scratch_t[block_size];
             for (int64_t unit = begin; unit < end; ++unit) {
               const int64_t last = (unit + 1) * units.size < units.rows ? (unit + 1) * units.size : units.rows;
               double sum = 0;
               for (int64_t row = unit * units.size; row < last; ++row) {
                 const double value = row_value(row, scratch_s, scratch_t);
                 if (keep) {
                   loss[row] = static_cast<A>(value);
                 } else {
                   sum += value;
                 }
               }
               if (!keep) parts[unit] = sum;
             }
           });
  if (keep) return;
  double total = 0;
  for (int64_t unit = 0; unit < units.count; ++unit) total += parts[unit];
  free(parts);
  *loss = static_cast<A>(total);
}

// Writes each row of a gradient: row_gradient(row, column, n, s, t, out) fills one block.
template <class A, class F>
void write_gradient(const RowUnits& units, int64_t columns, const RowView& student, const RowView& teacher,
                    const RowView& grad, const Threads& threads, const F& row_gradient) {
  parallel(threads, units.count, 1 + 32768 / (units.size * (columns > 0 ? columns : 1)),
           [&](int64_t begin, int64_t end) {
             A scratch_s[block_size], scratch_t[block_size], scratch_g[block_size];
             const int64_t last = end * units.size < units.rows ? end * units.size : units.rows;
             for (int64_t row = begin * units.size; row < last; ++row) {
               const RowReader<A> s(student, row, scratch_s), t(teacher, row, scratch_t);
               const int64_t offset = row_offset(grad, row);
               for (int64_t column = 0; column < columns; column += block_size) {
                 const int n = int(columns - column < block_size ? columns - column : block_size);
                 const int64_t at = offset + column * grad.column_stride;
                 A* out = result_block(grad.data, grad.dtype, at, grad.column_stride, scratch_g);
                 row_gradient(row, column, n, s.block(column, n), t.block(column, n), out);
                 write_block(grad.data, grad.dtype, at, grad.column_stride, n, out);
               }
             }
           });
}

KD_NAMESPACE_END
