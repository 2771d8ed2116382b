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
      n, [&](int i) { best = larger(load_and_ask(x + i), best); },
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
// whatever the number of threads. `row_cost`: what a row costs beside its columns, in columns.
struct RowUnits {
  int64_t rows, size, count, grain;
  RowUnits(int64_t rows_, int64_t columns, int64_t row_cost = 64) : rows(rows_) {
    const int64_t cost = columns + row_cost > 0 ? columns + row_cost : 1;
    size = 1 + 8192 / cost;
    count = (rows + size - 1) / size;
    grain = 1 + 32768 / (size * cost);
  }
};

// What a row's value is multiplied by: its weight over the divisor.
template <class A>
struct RowScale {
  double factor;
  const A* weight;

  RowScale(const RowPair& pair, const RowReduction& reduction) : RowScale(pair, reduction, pair.rows) {}
  RowScale(const RowPair& pair, const RowReduction& reduction, int64_t counted)
      : factor(reduction.factor(double(counted), double(pair.columns))), weight(static_cast<const A*>(pair.weight)) {}
  double operator()(int64_t row) const { return weight ? factor * weight[row] : factor; }
};

// What a thread works with: blocks for either side and the gradient, where the tensors' own memory is no block, and for
// what a row keeps between its sums and its gradient.
template <class A>
struct RowScratch {
  A s[block_size], t[block_size], g[block_size], kept[3][block_size];
};

// Runs body(unit, first row, last row, scratch) for every unit.
template <class A, class F>
void for_each_unit(const RowUnits& units, const Threads& threads, const F& body) {
  parallel(threads, units.count, units.grain, [&](int64_t begin, int64_t end) {
    RowScratch<A> scratch;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit * units.size, last = first + units.size;
      body(unit, first, last < units.rows ? last : units.rows, scratch);
    }
  });
}

// Sums over all units: add_unit(first row, last row, scratch, sums) adds a unit's share to n sums.
template <class A, int n, class F>
void sum_units(const RowUnits& units, const Threads& threads, double (&totals)[n], const F& add_unit) {
  double* parts = static_cast<double*>(malloc(sizeof(double) * n * size_t(units.count + 1)));
  for_each_unit<A>(units, threads, [&](int64_t unit, int64_t first, int64_t last, RowScratch<A>& scratch) {
    double sums[n] = {};
    add_unit(first, last, scratch, sums);
    for (int i = 0; i < n; ++i) parts[unit * n + i] = sums[i];
  });
  for (int i = 0; i < n; ++i) {
    totals[i] = 0;
    for (int64_t unit = 0; unit < units.count; ++unit) totals[i] += parts[unit * n + i];
  }
  free(parts);
}

// Sums over all rows: add_row(row, scratch, sums) adds a row's share to n sums.
template <class A, int n, class F>
void sum_rows(const RowUnits& units, const Threads& threads, double (&totals)[n], const F& add_row) {
  sum_units<A>(units, threads, totals, [&](int64_t first, int64_t last, RowScratch<A>& scratch, double (&sums)[n]) {
    for (int64_t row = first; row < last; ++row) add_row(row, scratch, sums);
  });
}

// Runs row_value(row, scratch) for every row: a weighted double. Sums or stores them, as the reduction says.
template <class A, class F>
void reduce_rows(const RowUnits& units, const RowReduction& reduction, A* loss, const Threads& threads,
                 const F& row_value) {
  if (reduction.kind == RowReduction::none) {
    for_each_unit<A>(units, threads, [&](int64_t, int64_t first, int64_t last, RowScratch<A>& scratch) {
      for (int64_t row = first; row < last; ++row) loss[row] = static_cast<A>(row_value(row, scratch));
    });
    return;
  }
  double total[1];
  sum_rows<A>(units, threads, total,
              [&](int64_t row, RowScratch<A>& scratch, double (&sums)[1]) { sums[0] += row_value(row, scratch); });
  *loss = static_cast<A>(total[0]);
}

// One row of a gradient, to be written block by block: fill(out) leaves a block's n values.
template <class A>
struct RowWriter {
  const RowView& view;
  int64_t offset;
  A* scratch;

  RowWriter(const RowView& v, int64_t row, A* buffer) : view(v), offset(row_offset(v, row)), scratch(buffer) {}
  template <class F>
  void block(int64_t column, int n, const F& fill) const {
    const int64_t at = offset + column * view.column_stride;
    A* out = result_block(view.data, view.dtype, at, view.column_stride, scratch);
    fill(out);
    write_block(view.data, view.dtype, at, view.column_stride, n, out);
  }
};

// A row's gradient from its two sides: row_gradient(column, n, s, t, out) fills one block.
template <class A, class F>
void write_row(const RowPair& pair, int64_t row, RowScratch<A>& scratch, const F& row_gradient) {
  const RowReader<A> s(pair.student, row, scratch.s), t(pair.teacher, row, scratch.t);
  const RowWriter<A> grad(pair.grad, row, scratch.g);
  for (int64_t column = 0; column < pair.columns; column += block_size) {
    const int n = int(pair.columns - column < block_size ? pair.columns - column : block_size);
    grad.block(column, n, [&](A* out) { row_gradient(column, n, s.block(column, n), t.block(column, n), out); });
  }
}

// All rows: of_row(row) gives what write_row wants.
template <class A, class F>
void write_gradient(const RowPair& pair, const Threads& threads, const F& of_row) {
  for_each_unit<A>(RowUnits(pair.rows, pair.columns), threads,
                   [&](int64_t, int64_t first, int64_t last, RowScratch<A>& scratch) {
                     for (int64_t row = first; row < last; ++row) write_row<A>(pair, row, scratch, of_row(row));
                   });
}

KD_NAMESPACE_END
