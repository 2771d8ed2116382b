// Teacher-bounded regression on the GPU: a thread has two rows at a time, eight coordinates, which where rows follow
// each other are one or two 16-byte accesses of each tensor. Forward: one launch, a second that adds up the blocks'
// sums if there are several, and two before them for the gate over the batch. It keeps the derivative of each row; the
// backward, one launch, multiplies it by the upstream gradient. Workspace: at most 24 KB.
#include "bounded_regression.h"

#include "../math/bounded_regression.h"
#include "pairs.cuh"
#include "row_sums.cuh"
#include "row_view.cuh"

KD_NAMESPACE_BEGIN

namespace {

constexpr int threads = 128;
constexpr int coordinates = 4;
constexpr int rows_at_once = vector_size / coordinates;
constexpr int64_t max_blocks = 2048;  // beyond, threads take several turns

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
struct Inputs {
  RowView student, teacher, target;
  int64_t rows, blocks;
  bool student_vectors, teacher_vectors, target_vectors;
};

// The differences to the target of two rows.
struct Differences {
  float student[vector_size], teacher[vector_size];
};

template <class S, class T>
KD_DEVICE Differences load_differences(const Inputs& in, int64_t row) {
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
  Differences d;
  KD_UNROLL for (int i = 0; i < vector_size; ++i) {
    d.student[i] = s.x[i] - y.x[i];
    d.teacher[i] = t.x[i] - y.x[i];
  }
  return d;
}

KD_DEVICE float squares(const float* d) { return (d[0] * d[0] + d[1] * d[1]) + (d[2] * d[2] + d[3] * d[3]); }

// The first row of a thread's turn.
KD_DEVICE int64_t first_row() { return (block_index() * threads + thread_index()) * rows_at_once; }

enum Side : int { student_error, teacher_error, sides };

// Each block's share of the two mean squared errors over all coordinates.
template <class S, class T>
KD_GLOBAL(threads, 4)
bounded_regression_errors(const Inputs in, float* partials) {
  const float share = 1.0f / (float(coordinates) * float(in.rows));
  float sums[sides] = {};
  KD_NO_UNROLL for (int64_t row = first_row(); row < in.rows; row += in.blocks * threads * rows_at_once) {
    const Differences d = load_differences<S, T>(in, row);
    KD_UNROLL for (int i = 0; i < vector_size; ++i) {  // the share first: a sum of squares may be too large
      sums[student_error] += share * d.student[i] * d.student[i];
      sums[teacher_error] += share * d.teacher[i] * d.teacher[i];
    }
  }
  store_partials(sums, shared_memory<float>(), partials);
}

KD_GLOBAL(finish_row_threads, 1)
bounded_regression_batch_gate(const float* partials, int64_t blocks, double margin, float* gate) {
  double errors[sides];
  add_partials(partials, blocks, errors, shared_memory<double>());
  if (thread_index() == 0) *gate = float(bound_gate(errors[student_error], errors[teacher_error], margin));
}

struct Options {
  float margin, beta;
  DeviceScalar bound_weight, smooth_l1_weight;
  Gate gate;
  RowFactor factor;
  bool keep_rows;
  const float* weight;      // one per row, or null
  const float* batch_gate;  // read for Gate::batch
};

template <class S, class T>
KD_GLOBAL(threads, 4)
bounded_regression_rows(const Inputs in, const Options options, float* loss, float* derivative) {
  const float factor = options.factor.get();
  const float bound = scalar_value(options.bound_weight), smooth = scalar_value(options.smooth_l1_weight);
  const float batch_gate = options.gate == Gate::batch ? *options.batch_gate : 0.0f;
  const bool vectors = reinterpret_cast<uintptr_t>(derivative) % 16 == 0;
  float sum = 0;
  KD_NO_UNROLL for (int64_t row = first_row(); row < in.rows; row += in.blocks * threads * rows_at_once) {
    const Differences d = load_differences<S, T>(in, row);
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
    float* out = derivative + row * coordinates;
    if (vectors && row + rows_at_once <= in.rows) {
      store_vector(out, slope);
    } else {
      KD_UNROLL for (int i = 0; i < vector_size; ++i) {
        if (row + i / coordinates < in.rows) out[i] = slope.x[i];
      }
    }
  }
  if (!options.keep_rows) store_partial(sum, shared_memory<float>(), loss);
}

template <class S>
KD_GLOBAL(threads, 4)
bounded_regression_gradients(const RowView grad, bool grad_vectors, int64_t rows, int64_t blocks,
                             const float* grad_loss, bool per_row, const RowView derivative, bool derivative_vectors) {
  KD_NO_UNROLL for (int64_t row = first_row(); row < rows; row += blocks * threads * rows_at_once) {
    Vector v = load_rows<float>(derivative, derivative_vectors, row, rows);
    KD_UNROLL for (int i = 0; i < rows_at_once; ++i) {
      if (row + i >= rows) break;
      const float upstream = grad_loss[per_row ? row + i : 0];
      KD_UNROLL for (int c = 0; c < coordinates; ++c) v.x[i * coordinates + c] *= upstream;
    }
    store_rows<S>(grad, grad_vectors, row, rows, v);
  }
}

// Host: whether rows follow each other, from a multiple of 16 bytes on.
bool takes_vectors(const RowView& view) {
  return view.dims == 1 && view.stride[0] == coordinates && view.column_stride == 1 &&
         reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
}

int64_t blocks_for(int64_t rows) {
  const int64_t wanted = (rows + threads * rows_at_once - 1) / (threads * rows_at_once);
  return wanted < max_blocks ? wanted : max_blocks;
}

constexpr int scratch_bytes = int(sizeof(float)) * sides * (threads / warp_size);

}  // namespace

// The gate, the blocks' errors, the blocks' sums.
int64_t bounded_regression_workspace(int64_t rows) { return 1 + (sides + 1) * blocks_for(rows); }

const char* bounded_regression_forward(const RowPair& pair, const RowView& target,
                                       const BoundedRegressionOptions& options, float* workspace, float* loss,
                                       float* derivative, void* stream) {
  const int64_t blocks = blocks_for(pair.rows);
  float *gate = workspace, *errors = gate + 1, *sums = errors + sides * blocks;
  const Inputs in{pair.student,
                  pair.teacher,
                  target,
                  pair.rows,
                  blocks,
                  takes_vectors(pair.student),
                  takes_vectors(pair.teacher),
                  takes_vectors(target)};
  const bool keep_rows = options.reduction.kind == RowReduction::none;
  const Options o{float(options.margin),
                  float(options.beta),
                  options.bound_weight,
                  options.smooth_l1_weight,
                  static_cast<Gate>(options.gate),
                  row_factor(options.reduction, double(pair.rows), 1),
                  keep_rows,
                  static_cast<const float*>(pair.weight),
                  gate};
  const char* error = with_types(pair.student.dtype, pair.teacher.dtype, [&](auto s, auto t) -> const char* {
    using S = decltype(s);
    using T = decltype(t);
    const Launch how{blocks, threads, scratch_bytes, stream};
    if (o.gate == Gate::batch && blocks > 0) {
      if (const char* e = launch(bounded_regression_errors<S, T>, how, in, errors)) return e;
      const Launch one{1, finish_row_threads, int(sizeof(double)) * sides * finish_row_threads, stream};
      if (const char* e = launch(bounded_regression_batch_gate, one, errors, blocks, options.margin, gate)) return e;
    }
    // The sum of a single block is the loss.
    return launch(bounded_regression_rows<S, T>, how, in, o, keep_rows || blocks == 1 ? loss : sums, derivative);
  });
  if (error || keep_rows || blocks == 1) return error;
  return launch_finish_rows(sums, blocks, loss, stream);
}

const char* bounded_regression_backward(const RowPair& pair, const float* grad_loss, bool per_row,
                                        const float* derivative, void* stream) {
  const RowView saved{
      reinterpret_cast<char*>(const_cast<float*>(derivative)), Dtype::float32, 1, {pair.rows}, {coordinates}, 1};
  return with_types(pair.student.dtype, pair.student.dtype, [&](auto s, auto) -> const char* {
    const int64_t blocks = blocks_for(pair.rows);
    return launch(bounded_regression_gradients<decltype(s)>, Launch{blocks, threads, 0, stream}, pair.grad,
                  takes_vectors(pair.grad), pair.rows, blocks, grad_loss, per_row, saved, takes_vectors(saved));
  });
}

KD_NAMESPACE_END
