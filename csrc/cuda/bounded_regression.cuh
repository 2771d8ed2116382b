// Teacher-bounded regression, block by block: bounded_regression.cu has the kernels of its own,
// detection_distillation_heads.cu those of all heads together. A thread has two rows at a time, eight coordinates,
// which where rows follow each other are one or two 16-byte accesses of each tensor.
#pragma once

#include "bounded_regression.h"

#include "../math/bounded_regression.h"
#include "pairs.cuh"
#include "row_sums.cuh"
#include "row_view.cuh"

KD_NAMESPACE_BEGIN

namespace {

constexpr int coordinates = 4;
constexpr int rows_at_once = vector_size / coordinates;
constexpr int64_t max_box_blocks = 2048;  // beyond, threads take several turns

KD_DEVICE float to_float(double x) { return float(x); }  // a target may be float64

// Two rows of coordinates. What lies beyond the last row is 0.
template <class T>
KD_DEVICE Vector load_rows(const RowView& view, bool vectors, int64_t row, int64_t rows) {
  const T* data = reinterpret_cast<const T*>(view.data);
  if constexpr (sizeof(T) <= 4) {
    if (vectors && row + rows_at_once <= rows) return load_vector(data + row * coordinates);
  }
  Vector v;
  KD_UNROLL for (int i = 0; i < rows_at_once; ++i) {
    const T* x = data + (row + i < rows ? row_offset(view, row + i) : 0);
    KD_UNROLL for (int c = 0; c < coordinates; ++c) {
      v.x[i * coordinates + c] = row + i < rows ? to_float(x[c * view.column_stride]) : 0.0f;
    }
  }
  return v;
}
template <class T>
KD_DEVICE void store_rows(const RowView& view, bool vectors, int64_t row, int64_t rows, const Vector& v) {
  T* data = reinterpret_cast<T*>(view.data);
  if (vectors && row + rows_at_once <= rows) {
    store_vector(data + row * coordinates, v);
    return;
  }
  KD_UNROLL for (int i = 0; i < rows_at_once; ++i) {
    if (row + i >= rows) break;
    T* x = data + row_offset(view, row + i);
    KD_UNROLL for (int c = 0; c < coordinates; ++c) {
      x[c * view.column_stride] = from_float<T>(v.x[i * coordinates + c]);
    }
  }
}

// What a launch reads.
struct BoxInputs {
  RowView student, teacher, target;
  int64_t rows, blocks;
  bool student_vectors, teacher_vectors, target_vectors;
};

// The differences to the target of two rows.
struct BoxDifferences {
  float student[vector_size], teacher[vector_size];
};

template <class S, class T>
KD_DEVICE BoxDifferences load_differences(const BoxInputs& in, int64_t row) {
  const Vector s = load_rows<S>(in.student, in.student_vectors, row, in.rows);
  const Vector t = load_rows<T>(in.teacher, in.teacher_vectors, row, in.rows);
  Vector y;
  switch (in.target.dtype) {
    case Dtype::bfloat16:
      y = load_rows<BFloat16>(in.target, in.target_vectors, row, in.rows);
      break;
    case Dtype::float16:
      y = load_rows<Half>(in.target, in.target_vectors, row, in.rows);
      break;
    case Dtype::float64:
      y = load_rows<double>(in.target, in.target_vectors, row, in.rows);
      break;
    default:
      y = load_rows<float>(in.target, in.target_vectors, row, in.rows);
  }
  BoxDifferences d;
  KD_UNROLL for (int i = 0; i < vector_size; ++i) {
    d.student[i] = s.x[i] - y.x[i];
    d.teacher[i] = t.x[i] - y.x[i];
  }
  return d;
}

KD_DEVICE float squares(const float* d) { return (d[0] * d[0] + d[1] * d[1]) + (d[2] * d[2] + d[3] * d[3]); }

// The first row of a thread's first turn, and how far it is to the next.
KD_DEVICE int64_t first_row(int64_t block) { return (block * block_threads() + thread_index()) * rows_at_once; }
KD_DEVICE int64_t rows_of_turn(int64_t blocks) { return blocks * block_threads() * rows_at_once; }

struct BoxOptions {
  float margin, beta;
  DeviceScalar bound_weight, smooth_l1_weight, loss_weight;
  Gate gate;
  RowFactor factor;
  bool keep_rows;
  const float* weight;      // one per row, or null
  const float* batch_gate;  // read for Gate::batch
};

// What one of the blocks does. It leaves its sum at loss[block]; the derivatives of its rows, in D, go to `slopes`.
template <class S, class T, class D>
KD_DEVICE void block_of_boxes(int64_t block, const BoxInputs& in, const BoxOptions& options, float* loss,
                              const RowView& slopes, bool slopes_vectors) {
  const float factor = options.factor.get() * scalar_value(options.loss_weight);
  const float bound = scalar_value(options.bound_weight), smooth = scalar_value(options.smooth_l1_weight);
  const float batch_gate = options.gate == Gate::batch ? *options.batch_gate : 0.0f;
  float sum = 0;
  KD_NO_UNROLL for (int64_t row = first_row(block); row < in.rows; row += rows_of_turn(in.blocks)) {
    const BoxDifferences d = load_differences<S, T>(in, row);
    Vector slope;
    KD_UNROLL for (int i = 0; i < rows_at_once; ++i) {
      if (row + i >= in.rows) break;
      const float *own = d.student + i * coordinates, *other = d.teacher + i * coordinates;
      const float scale = options.weight ? factor * options.weight[row + i] : factor;
      const float smooth_scale = scale * smooth, bound_scale = scale * bound;
      const float row_gate =
          options.gate == Gate::row ? bound_gate(squares(own), squares(other), options.margin) : batch_gate;
      float value = 0;
      KD_UNROLL for (int c = 0; c < coordinates; ++c) {
        const float x = own[c];
        const float open =
            options.gate == Gate::element ? bound_gate(x * x, other[c] * other[c], options.margin) : row_gate;
        // A closed gate gives 0 whatever the square is, infinity included. The scale comes first, as it may bring a
        // square back into range.
        const float step = open == 0 ? 0.0f : bound_scale * x;
        value += smooth_scale * smooth_l1(x, options.beta) + (open == 0 ? 0.0f : step * x);
        slope.x[i * coordinates + c] = smooth_scale * smooth_l1_gradient(x, options.beta) + 2.0f * step;
      }
      if (options.keep_rows) loss[row + i] = value;
      sum += value;
    }
    store_rows<D>(slopes, slopes_vectors, row, in.rows, slope);
  }
  if (!options.keep_rows) store_partial(block, sum, shared_memory<float>(), loss);
}

// Host: whether rows follow each other, from a multiple of 16 bytes on.
inline bool takes_vectors(const RowView& view) {
  return view.dims == 1 && view.stride[0] == coordinates && view.column_stride == 1 &&
         reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
}

// Host: blocks of so many threads.
inline int64_t box_blocks(int64_t rows, int threads) {
  const int64_t wanted = (rows + threads * rows_at_once - 1) / (threads * rows_at_once);
  return wanted < max_box_blocks ? wanted : max_box_blocks;
}

inline int box_scratch_bytes(int threads) { return int(sizeof(float)) * (threads / warp_size); }

// Host: what a launch of so many threads reads, and its options. `gate`: where Gate::batch finds its own.
inline BoxInputs box_inputs(const RowPair& pair, const RowView& target, int threads) {
  return {pair.student,
          pair.teacher,
          target,
          pair.rows,
          box_blocks(pair.rows, threads),
          takes_vectors(pair.student),
          takes_vectors(pair.teacher),
          takes_vectors(target)};
}
inline BoxOptions box_options(const RowPair& pair, const BoundedRegressionOptions& options,
                              const DeviceScalar& loss_weight, const float* gate) {
  return {float(options.margin),
          float(options.beta),
          options.bound_weight,
          options.smooth_l1_weight,
          loss_weight,
          static_cast<Gate>(options.gate),
          row_factor(options.reduction, double(pair.rows), 1),
          options.reduction.kind == RowReduction::none,
          static_cast<const float*>(pair.weight),
          gate};
}

}  // namespace

KD_NAMESPACE_END
