// How groups of threads share the rows of a (..., C) tensor: what a launch looks like, and how a group walks over a row
// and adds up what its threads found.
//
// A group is some lanes of a warp, a block, or a cluster of blocks. Short rows are first copied to shared memory as one
// span, if their width leaves them at odd addresses, or if a gradient is to be made of them; all others are read in
// place. A walk moves vectors that are
// aligned to the row's own addresses; what lies before the first and behind the last of them goes one by one, as do
// rows whose columns are strided or whose two sides are aligned differently.
#pragma once

#include "pairs.cuh"
#include "primitives.cuh"
#include "reduce.cuh"
#include "row_view.cuh"

KD_NAMESPACE_BEGIN

constexpr int row_threads = 256;
constexpr int row_warps = row_threads / warp_size;
// Vectors of each side that a thread has in flight, at most.
constexpr int row_batch = 2;

// Shared memory for what a group of several warps exchanges: two areas that take turns, so that one barrier per
// exchange is enough, each with a slot per warp and one for the block.
constexpr int exchange_floats = 8;
constexpr int exchange_area = (row_warps + 1) * exchange_floats;
constexpr int exchange_bytes = int(sizeof(float)) * 2 * exchange_area;

// A launch. Travels by value.
struct RowPlan {
  bool staged;  // rows go through shared memory
  int lanes;    // threads of a warp that share a row; warp_size where a row has more than one warp
  bool block;   // a row has a whole block
  int cluster;  // blocks of a cluster that share a row
  int parts;    // blocks that share a row in a launch of their own, before one block finishes it; 1: no such launch
  int at_once;  // rows of a block at a time
  int turns;    // how many times
  int64_t rows;
  int columns;
  int64_t groups;  // blocks, or clusters: each leaves a partial sum
  int shared_bytes;

  // Of the largest launch.
  int64_t blocks() const { return groups * (cluster > parts ? cluster : parts); }
};

constexpr int staged_bytes = 32768;      // both sides of a block's rows
constexpr int64_t busy_threads = 16384;  // fewer leave processors idle: then more threads share a row
constexpr int64_t busy_rows = 2048;      // a block for each fills every processor several times
constexpr int lanes_columns = 2048;      // wider rows have a block
constexpr int cluster_columns = 16384;   // wider rows may have several
constexpr int columns_per_block = 8192;  // of them, at least
constexpr int64_t most_groups = 8192;    // partial sums that one block then adds up

constexpr int64_t most_columns = int64_t(1) << 30;

KD_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Host: the size of an element.
inline int size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : dtype == Dtype::float64 ? 8 : 2; }

// Host: whether rows follow each other without gaps, and whether each begins at a multiple of 16 bytes.
inline bool rows_follow(const RowView& v, int64_t columns) {
  return (v.column_stride == 1 || columns == 1) && (v.dims == 0 || (v.dims == 1 && v.stride[0] == columns));
}
inline bool rows_aligned(const RowView& v) {
  const int64_t size = size_of(v.dtype);
  bool aligned = v.column_stride == 1 && reinterpret_cast<uintptr_t>(v.data) % 16 == 0;
  for (int d = 0; d < v.dims; ++d) aligned = aligned && v.stride[d] * size % 16 == 0;
  return aligned;
}

// Host: whether neighbours in memory are the same column of neighbouring rows: then neighbouring threads take rows.
inline bool rows_interleave(const RowView& v) {
  return v.dims > 0 && v.stride[v.dims - 1] == 1 && v.column_stride > 1 && v.size[v.dims - 1] >= warp_size / 2;
}

// Host: how many lanes share a row whose lanes take `step` columns at a time: the fewest instructions, where one walk
// over `step` columns costs as much as six exchanges between lanes.
inline int lanes_for(int64_t rows, int64_t columns, int step, int least) {
  int best = least;
  int64_t best_cost = -1;
  for (int lanes = least; lanes <= warp_size; lanes *= 2) {
    int exchanges = 0;
    for (int bits = 1; bits < lanes; bits *= 2) ++exchanges;
    const int64_t cost = lanes * (6 * ceil_div(columns, int64_t(step) * lanes) + exchanges);
    if (best_cost < 0 || cost < best_cost) {
      best_cost = cost;
      best = lanes;
    }
  }
  while (best < warp_size && rows * best < busy_threads && int64_t(best) * step / row_batch < columns) best *= 2;
  return best;
}

// Host: the plan for a forward; pair.grad says whether it writes the gradient too. `capability` is the device's.
inline RowPlan plan_rows(const RowPair& pair, int capability) {
  RowPlan plan{};
  plan.rows = pair.rows;
  plan.columns = int(pair.columns);
  plan.cluster = plan.parts = plan.turns = 1;
  plan.shared_bytes = exchange_bytes;
  const int64_t rows = pair.rows, columns = pair.columns;
  const int64_t row_bytes = columns * (size_of(pair.student.dtype) + size_of(pair.teacher.dtype));
  const bool one_pass = pair.grad.data;
  const bool in_place =
      !one_pass && columns >= 2 * vector_size && rows_aligned(pair.student) && rows_aligned(pair.teacher);
  if (!in_place && row_bytes * row_warps <= staged_bytes && rows_follow(pair.student, columns) &&
      rows_follow(pair.teacher, columns) && (!one_pass || rows_follow(pair.grad, columns))) {
    int least = 1;
    while (row_threads / least * row_bytes > staged_bytes) least *= 2;
    plan.staged = true;
    plan.lanes = lanes_for(rows, columns, vector_size, least);
    plan.at_once = row_threads / plan.lanes;
    plan.shared_bytes += int(plan.at_once * row_bytes) + 4 * 16;  // each side begins and ends inside 16 bytes
  } else if (columns <= lanes_columns) {
    plan.lanes = rows_interleave(pair.student) ? 1 : lanes_for(rows, columns, row_batch * vector_size, 2);
    plan.at_once = row_threads / plan.lanes;
  } else {
    plan.lanes = warp_size;
    plan.block = true;
    plan.at_once = 1;
    if (columns >= cluster_columns && rows < busy_rows) {
      const int most = capability >= 90 ? 8 : 32;
      int blocks = 2;
      while (blocks < most && columns >= int64_t(columns_per_block) * 2 * blocks) blocks *= 2;
      (capability >= 90 ? plan.cluster : plan.parts) = blocks;
    }
  }
  plan.turns = int(ceil_div(ceil_div(rows, plan.at_once), most_groups));
  if (plan.turns < 1) plan.turns = 1;
  plan.groups = ceil_div(rows, int64_t(plan.at_once) * plan.turns);
  return plan;
}

// Host: the plan for a backward whose rows do not follow each other.
inline RowPlan plan_gradients(const RowPair& pair) {
  RowPlan plan{};
  plan.rows = pair.rows;
  plan.columns = int(pair.columns);
  plan.cluster = plan.parts = plan.turns = 1;
  plan.block = pair.columns > lanes_columns;
  plan.lanes = warp_size;
  plan.at_once = 1;
  if (plan.block) {
    plan.parts = int(ceil_div(pair.columns, columns_per_block));
  } else {
    plan.lanes = rows_interleave(pair.grad) ? 1 : lanes_for(pair.rows, pair.columns, vector_size, 2);
    plan.at_once = row_threads / plan.lanes;
  }
  plan.groups = ceil_div(plan.rows, plan.at_once);
  return plan;
}

// A thread among those that share a row.
struct Share {
  int thread, threads;
};

// Two sides of one row: column c is at s[c * step_s] and t[c * step_t]. Columns [head, head + 8 * vectors) are vectors
// at multiples of 16 bytes on both sides.
template <class S, class T>
struct RowSides {
  const S* s;
  const T* t;
  int64_t step_s, step_t;
  int columns, head, vectors;

  KD_DEVICE void find_vectors() {
    head = columns;
    vectors = 0;
    if (step_s != 1 || step_t != 1) return;
    const int ahead = int((16 - reinterpret_cast<uintptr_t>(s) % 16) % 16 / sizeof(S));
    if (ahead >= columns || reinterpret_cast<uintptr_t>(t + ahead) % 16 != 0) return;
    head = ahead;
    vectors = (columns - ahead) / vector_size;
  }
};

template <class S, class T>
KD_DEVICE RowSides<S, T> row_in_place(const RowView& student, const RowView& teacher, int64_t row, int columns) {
  RowSides<S, T> sides{reinterpret_cast<const S*>(student.data) + row_offset(student, row),
                       reinterpret_cast<const T*>(teacher.data) + row_offset(teacher, row),
                       student.column_stride,
                       teacher.column_stride,
                       columns,
                       0,
                       0};
  sides.find_vectors();
  return sides;
}

// Columns of one step of a walk: element i of n is column at(i); those with at(i) >= columns are not in the row, and
// read as -inf.
struct Columns {
  int first, step, jump;  // element i is first + i % 8 * step + i / 8 * jump

  KD_DEVICE int operator()(int i) const { return first + i % vector_size * step + i / vector_size * jump; }
};

// Calls add(s, t, at) with n values of either side, n a constant, until each column of the row was in one call of one
// of its threads.
template <int batch, class S, class T, class F>
KD_DEVICE void walk_row(const RowSides<S, T>& row, Share share, const F& add) {
  const int jump = share.threads * vector_size;
  KD_NO_UNROLL for (int v = share.thread; v < row.vectors; v += batch * share.threads) {
    float s[batch * vector_size], t[batch * vector_size];
    KD_UNROLL for (int b = 0; b < batch; ++b) {
      const int first = row.head + v * vector_size + b * jump;
      const bool inside = b == 0 || v + b * share.threads < row.vectors;
      Vector vs, vt;
      KD_UNROLL for (int i = 0; i < vector_size; ++i) vs.x[i] = vt.x[i] = -INFINITY;
      if (inside) {
        vs = load_vector(row.s + first);
        vt = load_vector(row.t + first);
      }
      KD_UNROLL for (int i = 0; i < vector_size; ++i) {
        s[b * vector_size + i] = vs.x[i];
        t[b * vector_size + i] = vt.x[i];
      }
    }
    add(s, t, Columns{row.head + v * vector_size, 1, jump});
  }
  const int main = row.vectors * vector_size, rest = row.columns - main;
  if (row.vectors > 0) {  // at most 14, before and behind the vectors
    KD_NO_UNROLL for (int j = share.thread; j < rest; j += share.threads) {
      const int column = j < row.head ? j : j + main;
      const float s[1] = {to_float(row.s[column])}, t[1] = {to_float(row.t[column])};
      add(s, t, Columns{column, 0, 0});
    }
    return;
  }
  KD_NO_UNROLL for (int j = share.thread; j < rest; j += jump) {
    float s[vector_size], t[vector_size];
    KD_UNROLL for (int i = 0; i < vector_size; ++i) {
      const int column = j + i * share.threads;
      const bool inside = column < row.columns;
      s[i] = inside ? to_float(row.s[column * row.step_s]) : -INFINITY;
      t[i] = inside ? to_float(row.t[column * row.step_t]) : -INFINITY;
    }
    add(s, t, Columns{j, share.threads, 0});
  }
}

KD_DEVICE float max_of_lanes(float value, int lanes = warp_size) {
  KD_UNROLL for (int bits = warp_size / 2; bits > 0; bits /= 2) {
    if (bits < lanes) value = fmaxf(value, shuffle_xor(value, bits));
  }
  return value;
}

// Sums is what a thread has found of a row: maxima, and numbers that add up once the maxima agree. rebase(f) takes the
// maxima to those that f gives for them; each_sum(f) and all(f) call f with the other numbers, and with all; clear()
// makes it what a thread without columns has.

template <class Sums>
KD_DEVICE void merge_lanes(Sums& sums, int lanes) {
  sums.rebase([&](float maximum) { return max_of_lanes(maximum, lanes); });
  sums.each_sum([&](float& x) { x = sum_of_lanes(x, lanes); });
}

// What the threads of a block or cluster exchange. All its threads take part in every call.
struct Exchange {
  float* memory;
  int area;

  // After this every thread of the group has the same bits.
  template <class Sums>
  KD_DEVICE void merge(Sums& sums, int cluster) {
    float* slots = memory + area * exchange_area;
    area ^= 1;
    const int warp = thread_index() / warp_size, lane = thread_index() % warp_size;
    merge_lanes(sums, warp_size);
    if (lane == 0) put(sums, slots + warp * exchange_floats);
    block_sync();
    sums.clear();
    if (lane < row_warps) get(sums, slots + lane * exchange_floats);
    merge_lanes(sums, warp_size);
    if (cluster == 1) return;
    float* own = slots + row_warps * exchange_floats;
    if (thread_index() == 0) put(sums, own);
    cluster_sync();
    sums.clear();
    if (lane < cluster) get(sums, peer_shared(own, lane));
    merge_lanes(sums, warp_size);
  }

  template <class Sums>
  KD_DEVICE static void put(Sums& sums, float* to) {
    sums.all([&](float& x) { *to++ = x; });
  }
  template <class Sums>
  KD_DEVICE static void get(Sums& sums, const float* from) {
    sums.all([&](float& x) { x = *from++; });
  }
};

KD_NAMESPACE_END
