// The backwards of the losses over rows of logits: each element from its own two logits and a few numbers of its row.
// Where rows follow each other in all three tensors they are one line, whatever their width; else rows are taken as in
// the forward.
//
// A Gradient, which travels by value, has Row row(r), float operator()(row, s, t, column), whose column may lie outside
// the row where the result is not used, and `batch`, the vectors that a thread has in flight.
#pragma once

#include "pieces.cuh"
#include "rows.cuh"

KD_NAMESPACE_BEGIN

// Vectors that a thread takes, one batch after the other.
constexpr int gradient_vectors = 4;
constexpr int gradient_span = row_threads * vector_size * gradient_vectors;

// Position in a line of rows.
struct Place {
  int64_t row;
  int column;
};

template <class G, class S, class T>
KD_GLOBAL(row_threads, 3)
gradients_of_line(const G gradient, const S* student, const T* teacher, S* grad, int64_t rows, int columns) {
  const int64_t count = rows * columns;
  // Vectors begin where `grad` is at a multiple of 16 bytes; the first one may begin before the line.
  const int ahead = int(reinterpret_cast<uintptr_t>(grad) / sizeof(S) % vector_size);
  const int64_t origin = block_index() * gradient_span - ahead;
  const int64_t first = origin < 0 ? 0 : origin;
  const Place start{first / columns, int(first % columns)};
  // From here on, relative to the origin.
  const S* s = student + origin;
  const T* t = teacher + origin;
  S* out = grad + origin;
  const int begin = int(first - origin);
  const int end = int(count - origin < gradient_span ? count - origin : gradient_span);
  KD_NO_UNROLL for (int b0 = 0; b0 < gradient_vectors; b0 += G::batch) {
    Piece piece[G::batch];
    Vector x[G::batch], y[G::batch];
    KD_UNROLL for (int b = 0; b < G::batch; ++b) {
      Piece& p = piece[b];
      p.first = ((b0 + b) * row_threads + thread_index()) * vector_size;
      p.begin = p.first < begin ? begin - p.first : 0;
      p.end = end - p.first < vector_size ? end - p.first : vector_size;
      if (!p.any()) continue;
      x[b] = load_piece(s, 1, p);
      y[b] = load_piece(t, 1, p);
    }
    KD_UNROLL for (int b = 0; b < G::batch; ++b) {
      const Piece& p = piece[b];
      if (!p.any()) continue;
      const unsigned place = unsigned(start.column) + unsigned(p.first + p.begin - begin);
      int r = int(place / unsigned(columns));  // behind the first
      int column = int(place % unsigned(columns)) - p.begin;
      typename G::Row row = gradient.row(start.row + r);
      Vector g;
      KD_UNROLL for (int i = 0; i < vector_size; ++i) {
        if (column == columns) {
          column = 0;
          if (start.row + ++r < rows) row = gradient.row(start.row + r);
        }
        g.x[i] = gradient(row, x[b].x[i], y[b].x[i], column);
        ++column;
      }
      store_piece(out, 1, p, g);
    }
  }
}

// Writes the columns that a thread has of a row: gradient(s, t, column), with `step` between a side's columns. Vectors
// begin where `out` is at a multiple of 16 bytes.
template <class S, class T, class F>
KD_DEVICE void write_row(const S* s, int64_t step_s, const T* t, int64_t step_t, S* out, int64_t step, int columns,
                         Share share, const F& gradient) {
  const int ahead = step == 1 ? int(reinterpret_cast<uintptr_t>(out) / sizeof(S) % vector_size) : 0;
  const int vectors = int(ceil_div(columns + ahead, vector_size));
  KD_NO_UNROLL for (int v = share.thread; v < vectors; v += share.threads) {
    Piece p{v * vector_size - ahead, 0, vector_size};
    if (p.first < 0) p.begin = -p.first;
    if (columns - p.first < vector_size) p.end = columns - p.first;
    const Vector x = load_piece(s, step_s, p), y = load_piece(t, step_t, p);
    Vector g;
    KD_UNROLL for (int i = 0; i < vector_size; ++i) g.x[i] = gradient(x.x[i], y.x[i], p.first + i);
    store_piece(out, step, p, g);
  }
}

// Threads of a group per row, and `parts` blocks for the rows that have blocks.
template <class G, class S, class T>
KD_GLOBAL(row_threads, 3)
gradients_of_rows(const RowPlan plan, const G gradient, const RowView student, const RowView teacher,
                  const RowView grad) {
  const int64_t group = block_index() / plan.parts;
  const int rank = int(block_index() % plan.parts), thread = thread_index();
  const Share share = plan.block ? Share{rank * row_threads + thread, row_threads * plan.parts}
                                 : Share{thread % plan.lanes, plan.lanes};
  KD_NO_UNROLL for (int turn = 0; turn < plan.turns; ++turn) {
    const int64_t r = (group * plan.turns + turn) * plan.at_once + (plan.block ? 0 : thread / plan.lanes);
    if (r >= plan.rows) return;
    const typename G::Row row = gradient.row(r);
    const S* s = reinterpret_cast<const S*>(student.data) + row_offset(student, r);
    const T* t = reinterpret_cast<const T*>(teacher.data) + row_offset(teacher, r);
    S* out = reinterpret_cast<S*>(grad.data) + row_offset(grad, r);
    write_row(s, student.column_stride, t, teacher.column_stride, out, grad.column_stride, plan.columns, share,
              [&](float x, float y, int column) { return gradient(row, x, y, column); });
  }
}

// Host.
template <class G>
const char* launch_gradients(const RowPair& pair, const G& gradient, void* stream) {
  if (pair.columns > most_columns) return "more classes than a kernel can number";
  if (pair.rows == 0) return nullptr;
  return with_types(pair.student.dtype, pair.teacher.dtype, [&](auto s, auto t) -> const char* {
    using S = decltype(s);
    using T = decltype(t);
    if (rows_follow(pair.student, pair.columns) && rows_follow(pair.teacher, pair.columns) &&
        rows_follow(pair.grad, pair.columns)) {
      const int64_t most_ahead = vector_size - 1;
      const Launch how{ceil_div(pair.rows * pair.columns + most_ahead, gradient_span), row_threads, 0, stream};
      return launch(gradients_of_line<G, S, T>, how, gradient, reinterpret_cast<const S*>(pair.student.data),
                    reinterpret_cast<const T*>(pair.teacher.data), reinterpret_cast<S*>(pair.grad.data), pair.rows,
                    int(pair.columns));
    }
    const RowPlan plan = plan_gradients(pair);
    const Launch how{plan.groups * plan.parts, row_threads, 0, stream};
    return launch(gradients_of_rows<G, S, T>, how, plan, gradient, pair.student, pair.teacher, pair.grad);
  });
}

KD_NAMESPACE_END
