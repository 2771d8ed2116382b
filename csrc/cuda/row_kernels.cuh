// The kernels of the losses over rows of logits, for a loss that says what a thread does with columns.
//
// A Loss, which travels by value, has for the forward:
//
// - Context context(scratch): what it must know of all rows. The whole block takes part; `scratch` is a float per warp,
//   free again afterwards.
// - batch: vectors of each side that a thread has in flight, in the first read.
// - Row row(context, r): what it must know of a row. row.skip: none of its columns counts.
// - Sums start(row), as rows.cuh wants Sums to be.
// - add(sums, row, s, t, at, columns): takes n columns, at(i) the i-th; -inf on both sides where it is not in the row.
// - Look look(row, sums): whether the row must be read again, now that its sums are known, and what for.
// - Second, and add_again(second, row, sums, look, s, t, at): the same for the second read.
// - float finish(row, r, sums, look, second, sides): the row's value. Keeps what the backward needs.
// - one_pass: whether the kernel writes the gradient too, once a row's sums are known: from shared memory where the
//   rows are there, else from where they lie, most likely a cache. Then it also has GradientRow gradient_row(row, r,
//   sums), and float gradient(gradient row, s, t, column).
// - parts, and int part(row): which of so many sums a row's value belongs to.
//
// What a block does is a function of the block's number among those of the loss: in a launch of the loss's own it is
// the block's index, in that of several losses (detection_distillation_heads.cu) it is not.
#pragma once

#include "row_gradients.cuh"
#include "row_sums.cuh"
#include "row_sums.h"
#include "rows.cuh"

KD_NAMESPACE_BEGIN

// Which part of a forward a launch is. Of wide rows that have several blocks without a cluster, the first launch leaves
// each block's sums; in the second, one block per row reads them again, or as many as before if there is a gradient to
// write.
enum class Pass : int { whole, parts, rest };

// What a forward leaves: each row's value, or one sum per group of blocks; between passes, the sums of each part.
struct RowResults {
  bool keep;
  float* values;
  float* parts;
};

// with_blocks: whether a group may have more than a warp.
// Once a group's sums are complete: looks again where the row asks for it. Every thread of the block takes part. The
// group's first thread gets the row's value; others, and groups without a row, get 0.
template <bool with_blocks, class Loss, class S, class T>
KD_DEVICE float finish_row(const RowPlan& plan, const Loss& loss, const typename Loss::Row& row, int64_t r, bool inside,
                           const typename Loss::Sums& sums, const RowSides<S, T>& sides, Share share,
                           Exchange& exchange, const RowResults& results) {
  const typename Loss::Look look = loss.look(row, sums);
  typename Loss::Second second;
  second.clear();
  if (look.again) {
    walk_row<1>(sides, share, [&](const auto& s, const auto& t, const Columns& at) {
      loss.add_again(second, row, sums, look, s, t, at);
    });
  }
  if (!with_blocks || !plan.block) {
    merge_lanes(second, plan.lanes);
  } else if (look.again) {  // all threads of the row's blocks have the same sums
    exchange.merge(second, plan.cluster);
  }
  if (share.thread != 0 || !inside) return 0;
  const float value = loss.finish(row, r, sums, look, second, sides);
  if (results.keep) results.values[r] = value;
  return value;
}

// Leaves what the group's threads found: `totals` are 0 but in the first thread of a row's group.
template <int n>
KD_DEVICE void store_group(const RowResults& results, int64_t group, bool leader, float (&totals)[n], float* scratch) {
  if (results.keep) return;
  block_sync();  // the scratch has been read
  sum_of_block(totals, scratch);
  if (leader && thread_index() == 0) {
    KD_UNROLL for (int k = 0; k < n; ++k) results.values[group * n + k] = totals[k];
  }
}

template <class Loss>
KD_DEVICE void add_to_part(const Loss& loss, const typename Loss::Row& row, float value, float (&totals)[Loss::parts]) {
  KD_UNROLL for (int k = 0; k < Loss::parts; ++k) {
    if (loss.part(row) == k) totals[k] += value;
  }
}

template <class Loss, class S, class T>
KD_DEVICE void block_of_rows_in_place(int64_t block, const RowPlan& plan, const Loss& loss, const RowView& student,
                                      const RowView& teacher, const RowView& grad, Pass pass,
                                      const RowResults& results) {
  Exchange exchange{shared_memory<float>(), 0};
  const int blocks = pass == Pass::parts || (Loss::one_pass && pass == Pass::rest) ? plan.parts : plan.cluster;
  const int64_t group = block / blocks;
  const int rank = int(block % blocks), thread = thread_index();
  const Share share =
      plan.block ? Share{rank * row_threads + thread, row_threads * blocks} : Share{thread % plan.lanes, plan.lanes};
  const typename Loss::Context context = loss.context(exchange.memory);
  float totals[Loss::parts] = {};
  KD_NO_UNROLL for (int turn = 0; turn < plan.turns; ++turn) {
    const int64_t first = (group * plan.turns + turn) * plan.at_once;
    if (first >= plan.rows) break;
    const int64_t wanted = first + (plan.block ? 0 : thread / plan.lanes);
    const bool inside = wanted < plan.rows;
    const int64_t r = inside ? wanted : plan.rows - 1;  // threads behind the last row help to exchange
    const typename Loss::Row row = loss.row(context, r);
    RowSides<S, T> sides = row_in_place<S, T>(student, teacher, r, inside && !row.skip ? plan.columns : 0);
    typename Loss::Sums sums = loss.start(row);
    if (pass != Pass::rest) {
      walk_row<Loss::batch>(sides, share, [&](const auto& s, const auto& t, const Columns& at) {
        loss.add(sums, row, s, t, at, plan.columns);
      });
    } else if (thread % warp_size < plan.parts) {
      Exchange::get(sums, results.parts + (r * plan.parts + thread % warp_size) * exchange_floats);
    }
    if (!plan.block || pass == Pass::rest) {
      merge_lanes(sums, plan.lanes);
    } else {
      exchange.merge(sums, plan.cluster);
    }
    if (pass == Pass::parts) {
      if (thread == 0) Exchange::put(sums, results.parts + (r * plan.parts + rank) * exchange_floats);
      continue;
    }
    // A second read: by each of a row's blocks, where they have no cluster to add up its sums.
    const Share again = Loss::one_pass && pass == Pass::rest ? Share{thread, row_threads} : share;
    add_to_part(loss, row, finish_row<true>(plan, loss, row, r, inside, sums, sides, again, exchange, results), totals);
    if constexpr (Loss::one_pass) {
      if (!inside) continue;
      const typename Loss::GradientRow found = loss.gradient_row(row, r, sums);
      write_row(sides.s, sides.step_s, sides.t, sides.step_t, reinterpret_cast<S*>(grad.data) + row_offset(grad, r),
                grad.column_stride, plan.columns, share,
                [&](float s, float t, int column) { return loss.gradient(found, s, t, column); });
    }
  }
  if (pass == Pass::parts) return;
  store_group(results, group, rank == 0, totals, exchange.memory);
  if (plan.cluster > 1) cluster_sync();  // the other blocks have read what this one has
}

template <class Loss, class S, class T>
KD_GLOBAL(row_threads, 3)
rows_in_place(const RowPlan plan, const Loss loss, const RowView student, const RowView teacher, const RowView grad,
              Pass pass, RowResults results) {
  block_of_rows_in_place<Loss, S, T>(block_index(), plan, loss, student, teacher, grad, pass, results);
}

// Starts to copy neighbouring elements to shared memory, as far from a multiple of 16 bytes as they were, and says
// where the first will be. `area` has 30 bytes more than they need.
template <class T>
KD_DEVICE const T* stage(const T* from, int count, char* area) {
  constexpr int per_vector = 16 / int(sizeof(T));
  const int ahead = int(reinterpret_cast<uintptr_t>(from) % 16);
  T* to = reinterpret_cast<T*>(area + ahead);
  int head = (16 - ahead) % 16 / int(sizeof(T));
  if (head > count) head = count;
  const int moved = (count - head) / per_vector * per_vector, rest = count - moved;  // the rest: at most 14
  for (int i = thread_index() * per_vector; i < moved; i += row_threads * per_vector) {
    copy16_to_shared(to + head + i, from + head + i);
  }
  if (thread_index() < rest) {
    const int i = thread_index() < head ? thread_index() : thread_index() + moved;
    to[i] = from[i];
  }
  return to;
}

// The way back, of elements that `stage` put at `from` or that took their places.
template <class T>
KD_DEVICE void unstage(const T* from, int count, T* to) {
  constexpr int per_vector = 16 / int(sizeof(T));
  const int ahead = int(reinterpret_cast<uintptr_t>(to) % 16);
  if (int(reinterpret_cast<uintptr_t>(from) % 16) != ahead) {
    for (int i = thread_index(); i < count; i += row_threads) to[i] = from[i];
    return;
  }
  int head = (16 - ahead) % 16 / int(sizeof(T));
  if (head > count) head = count;
  const int moved = (count - head) / per_vector * per_vector, rest = count - moved;  // the rest: at most 14
  for (int i = thread_index() * per_vector; i < moved; i += row_threads * per_vector) {
    store16(to + head + i, load16_from_shared(from + head + i));
  }
  if (thread_index() < rest) {
    const int i = thread_index() < head ? thread_index() : thread_index() + moved;
    to[i] = from[i];
  }
}

template <class Loss, class S, class T>
KD_DEVICE void block_of_rows_staged(int64_t block, const RowPlan& plan, const Loss& loss, const RowView& student,
                                    const RowView& teacher, const RowView& grad, const RowResults& results) {
  Exchange exchange{shared_memory<float>(), 0};
  char* area_s = shared_memory<char>() + exchange_bytes;
  char* area_t = area_s + (plan.at_once * plan.columns * int(sizeof(S)) + 31) / 16 * 16;
  const Share share{thread_index() % plan.lanes, plan.lanes};
  const typename Loss::Context context = loss.context(exchange.memory);
  float totals[Loss::parts] = {};
  KD_NO_UNROLL for (int turn = 0; turn < plan.turns; ++turn) {
    const int64_t first = (block * plan.turns + turn) * plan.at_once;
    if (first >= plan.rows) break;
    const int64_t left = plan.rows - first;
    const int count = int(left < plan.at_once ? left : plan.at_once);
    if (turn > 0) block_sync();  // the last turn's rows have been read
    const int64_t begin = first * plan.columns;
    const S* s = stage(reinterpret_cast<const S*>(student.data) + begin, count * plan.columns, area_s);
    const T* t = stage(reinterpret_cast<const T*>(teacher.data) + begin, count * plan.columns, area_t);
    copies_wait();
    block_sync();
    const int wanted = thread_index() / plan.lanes;
    const bool inside = wanted < count;
    const int local = inside ? wanted : count - 1;
    const typename Loss::Row row = loss.row(context, first + local);
    const int columns = inside && !row.skip ? plan.columns : 0;
    const RowSides<S, T> sides{s + local * plan.columns, t + local * plan.columns, 1, 1, columns, columns, 0};
    typename Loss::Sums sums = loss.start(row);
    walk_row<1>(sides, share,
                [&](const auto& x, const auto& y, const Columns& at) { loss.add(sums, row, x, y, at, plan.columns); });
    merge_lanes(sums, plan.lanes);
    add_to_part(loss, row,
                finish_row<false>(plan, loss, row, first + local, inside, sums, sides, share, exchange, results),
                totals);
    if constexpr (Loss::one_pass) {
      block_sync();  // each row has been read, but for the elements that its threads now replace
      const typename Loss::GradientRow found = loss.gradient_row(row, first + local, sums);
      RowSides<S, T> whole = sides;
      whole.columns = whole.head = inside ? plan.columns : 0;
      S* own = const_cast<S*>(sides.s);
      walk_row<1>(whole, share, [&](const auto& x, const auto& y, const Columns& at) {
        KD_UNROLL for (int i = 0; i < int(sizeof(x) / sizeof(x[0])); ++i) {
          const int column = at(i);
          if (column < plan.columns) own[column] = from_float<S>(loss.gradient(found, x[i], y[i], column));
        }
      });
      block_sync();
      unstage(s, count * plan.columns, reinterpret_cast<S*>(grad.data) + begin);
    }
  }
  store_group(results, block, true, totals, exchange.memory);
}

template <class Loss, class S, class T>
KD_GLOBAL(row_threads, 3)
rows_staged(const RowPlan plan, const Loss loss, const RowView student, const RowView teacher, const RowView grad,
            RowResults results) {
  block_of_rows_staged<Loss, S, T>(block_index(), plan, loss, student, teacher, grad, results);
}

// Host: what the kernels of this file run as. The finishing kernel, of the same source, speaks for all.
static inline int rows_capability() { return capability_of(finish_rows<1>); }

// Host: floats of workspace that a forward with this plan needs.
inline int64_t rows_workspace(const RowPlan& plan, int parts = 1) {
  return plan.groups * parts + (plan.parts > 1 ? plan.rows * plan.parts * exchange_floats : 0);
}

// Host: the row kernels. They leave their sums in the workspace; `keep`: each row's value instead, at `values`.
template <class Loss>
const char* launch_rows(const RowPlan& plan, const RowPair& pair, const Loss& loss, bool keep, float* workspace,
                        float* values, RowSums* sums, void* stream) {
  if (pair.columns > most_columns) return "more classes than a kernel can number";
  *sums = RowSums{workspace, plan.groups, Loss::parts};
  return with_types(pair.student.dtype, pair.teacher.dtype, [&](auto s, auto t) -> const char* {
    using S = decltype(s);
    using T = decltype(t);
    const RowResults results{keep, keep ? values : workspace, workspace + plan.groups * Loss::parts};
    Launch how{plan.groups, row_threads, plan.shared_bytes, stream};
    if (plan.staged) {
      return launch(rows_staged<Loss, S, T>, how, plan, loss, pair.student, pair.teacher, pair.grad, results);
    }
    Pass pass = Pass::whole;
    if (plan.parts > 1) {
      how.blocks = plan.groups * plan.parts;
      const char* e = launch(rows_in_place<Loss, S, T>, how, plan, loss, pair.student, pair.teacher, pair.grad,
                             Pass::parts, results);
      if (e) return e;
      pass = Pass::rest;
    }
    how.blocks = plan.groups * (Loss::one_pass && plan.parts > 1 ? plan.parts : plan.cluster);
    how.cluster = plan.cluster;
    return launch(rows_in_place<Loss, S, T>, how, plan, loss, pair.student, pair.teacher, pair.grad, pass, results);
  });
}

KD_NAMESPACE_END
