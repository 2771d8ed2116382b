// Teacher-bounded regression on the GPU. Forward: one launch, a second that adds up the blocks' sums if there are
// several, and two before them for the gate over the batch. It keeps the derivative of each row; the backward, one
// launch, multiplies it by the upstream gradient. In one pass the derivative is the gradient, in the student's dtype.
// Workspace: at most 24 KB.
#include "bounded_regression.cuh"

KD_NAMESPACE_BEGIN

namespace {

constexpr int threads = 128;

enum Side : int { student_error, teacher_error, sides };

// Each block's share of the two mean squared errors over all coordinates.
template <class S, class T>
KD_GLOBAL(threads, 4)
bounded_regression_errors(const BoxInputs in, float* partials) {
  const float share = 1.0f / (float(coordinates) * float(in.rows));
  float sums[sides] = {};
  KD_NO_UNROLL for (int64_t row = first_row(block_index()); row < in.rows; row += rows_of_turn(in.blocks)) {
    const BoxDifferences d = load_differences<S, T>(in, row);
    KD_UNROLL for (int i = 0; i < vector_size; ++i) {  // the share first: a sum of squares may be too large
      sums[student_error] += share * d.student[i] * d.student[i];
      sums[teacher_error] += share * d.teacher[i] * d.teacher[i];
    }
  }
  store_partials(block_index(), sums, shared_memory<float>(), partials);
}

KD_GLOBAL(finish_row_threads, 1)
bounded_regression_batch_gate(const float* partials, int64_t blocks, double margin, float* gate) {
  double errors[sides];
  add_partials(partials, blocks, errors, shared_memory<double>());
  if (thread_index() == 0) *gate = float(bound_gate(errors[student_error], errors[teacher_error], margin));
}

template <class S, class T, class D>
KD_GLOBAL(threads, 4)
bounded_regression_rows(const BoxInputs in, const BoxOptions options, float* loss, const RowView slopes,
                        bool slopes_vectors) {
  block_of_boxes<S, T, D>(block_index(), in, options, loss, slopes, slopes_vectors);
}

template <class S>
KD_GLOBAL(threads, 4)
bounded_regression_gradients(const RowView grad, bool grad_vectors, int64_t rows, int64_t blocks,
                             const float* grad_loss, bool per_row, const RowView derivative, bool derivative_vectors) {
  KD_NO_UNROLL for (int64_t row = first_row(block_index()); row < rows; row += rows_of_turn(blocks)) {
    Vector v = load_rows<float>(derivative, derivative_vectors, row, rows);
    KD_UNROLL for (int i = 0; i < rows_at_once; ++i) {
      if (row + i >= rows) break;
      const float upstream = grad_loss[per_row ? row + i : 0];
      KD_UNROLL for (int c = 0; c < coordinates; ++c) v.x[i * coordinates + c] *= upstream;
    }
    store_rows<S>(grad, grad_vectors, row, rows, v);
  }
}

int64_t blocks_for(int64_t rows) { return box_blocks(rows, threads); }

// In float32 or in the student's dtype, (rows, 4).
RowView slopes_view(float* derivative, int64_t rows) {
  return {reinterpret_cast<char*>(derivative), Dtype::float32, 1, {rows}, {coordinates}, 1};
}

// Leaves the derivatives at `slopes`, which says in which dtype, and the blocks' sums; at `values`, unless that is
// null, each row's value, or the sum of a single block, which is the loss.
const char* launch_boxes(const RowPair& pair, const RowView& target, const BoundedRegressionOptions& options,
                         const DeviceScalar& loss_weight, const RowView& slopes, float* workspace, float* values,
                         RowSums* sums, void* stream) {
  const int64_t blocks = blocks_for(pair.rows);
  float *gate = workspace, *errors = gate + 1, *left = errors + sides * blocks;
  *sums = RowSums{left, blocks, 1};
  const BoxInputs in = box_inputs(pair, target, threads);
  const BoxOptions o = box_options(pair, options, loss_weight, gate);
  return with_types(pair.student.dtype, pair.teacher.dtype, [&](auto s, auto t) -> const char* {
    using S = decltype(s);
    using T = decltype(t);
    Launch how{blocks, threads, sides * box_scratch_bytes(threads), stream};
    if (o.gate == Gate::batch && blocks > 0) {
      if (const char* e = launch(bounded_regression_errors<S, T>, how, in, errors)) return e;
      const Launch one{1, finish_row_threads, int(sizeof(double)) * sides * finish_row_threads, stream};
      if (const char* e = launch(bounded_regression_batch_gate, one, errors, blocks, options.margin, gate)) return e;
    }
    const bool vectors = takes_vectors(slopes);
    float* to = values && (o.keep_rows || blocks == 1) ? values : left;
    if (slopes.dtype == Dtype::float32) {
      return launch(bounded_regression_rows<S, T, float>, how, in, o, to, slopes, vectors);
    }
    return launch(bounded_regression_rows<S, T, S>, how, in, o, to, slopes, vectors);
  });
}

}  // namespace

// The gate, the blocks' errors, the blocks' sums.
int64_t bounded_regression_workspace(int64_t rows) { return 1 + (sides + 1) * blocks_for(rows); }

const char* bounded_regression_forward(const RowPair& pair, const RowView& target,
                                       const BoundedRegressionOptions& options, float* workspace, float* loss,
                                       float* derivative, void* stream) {
  RowSums sums;
  const char* error = launch_boxes(pair, target, options, DeviceScalar{1, nullptr}, slopes_view(derivative, pair.rows),
                                   workspace, loss, &sums, stream);
  if (error || sums.blocks == 1 || options.reduction.kind == RowReduction::none) return error;
  return launch_finish_rows(sums.values, sums.blocks, loss, stream);
}

const char* bounded_regression_sums(const RowPair& pair, const RowView& target, const BoundedRegressionOptions& options,
                                    const DeviceScalar& loss_weight, float* workspace, RowSums* sums, void* stream) {
  return launch_boxes(pair, target, options, loss_weight, pair.grad, workspace, nullptr, sums, stream);
}

const char* bounded_regression_one_pass(const RowPair& pair, const RowView& target,
                                        const BoundedRegressionOptions& options, const DeviceScalar& loss_weight,
                                        float* workspace, float* loss, void* stream) {
  RowSums sums;
  const char* error = launch_boxes(pair, target, options, loss_weight, pair.grad, workspace, loss, &sums, stream);
  return error || sums.blocks == 1 ? error : launch_finish_rows(sums.values, sums.blocks, loss, stream);
}

const char* bounded_regression_backward(const RowPair& pair, const float* grad_loss, bool per_row,
                                        const float* derivative, void* stream) {
  const RowView saved = slopes_view(const_cast<float*>(derivative), pair.rows);
  return with_types(pair.student.dtype, pair.student.dtype, [&](auto s, auto) -> const char* {
    const int64_t blocks = blocks_for(pair.rows);
    return launch(bounded_regression_gradients<decltype(s)>, Launch{blocks, threads, 0, stream}, pair.grad,
                  takes_vectors(pair.grad), pair.rows, blocks, grad_loss, per_row, saved, takes_vectors(saved));
  });
}

KD_NAMESPACE_END
