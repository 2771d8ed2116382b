// Binary KL on the GPU: elementwise in the logits, which are read once; one number per row is kept for the backward.
#include "binary_kl.cuh"

#include "row_gradients.cuh"

KD_NAMESPACE_BEGIN

namespace {

struct BinaryGradient {
  using Row = BinaryGradientRow;
  static constexpr int batch = 1;
  float inverse;
  const float* coefficients;
  const float* grad_loss;
  bool per_row;

  KD_DEVICE BinaryGradientRow row(int64_t r) const { return {grad_loss[per_row ? r : 0] * coefficients[r]}; }
  KD_DEVICE float operator()(const BinaryGradientRow& row, float s, float t, int) const {
    return binary_gradient(row, s, t, inverse);
  }
};

}  // namespace

int64_t binary_kl_workspace(const RowPair& pair) { return rows_workspace(plan_rows(pair, rows_capability())); }

const char* binary_kl_forward(const RowPair& pair, double temperature, const RowReduction& reduction, float* workspace,
                              float* loss, float* coefficients, void* stream) {
  const BinaryLoss<false> binary =
      binary_loss<false>(pair, temperature, reduction, DeviceScalar{1, nullptr}, coefficients);
  const bool keep = reduction.kind == RowReduction::none;
  RowSums sums;
  const char* error =
      launch_rows(plan_rows(pair, rows_capability()), pair, binary, keep, workspace, loss, &sums, stream);
  return error || keep ? error : launch_finish_rows(sums.values, sums.blocks, loss, stream);
}

const char* binary_kl_sums(const RowPair& pair, double temperature, const RowReduction& reduction,
                           const DeviceScalar& loss_weight, float* workspace, RowSums* sums, void* stream) {
  const BinaryLoss<true> binary = binary_loss<true>(pair, temperature, reduction, loss_weight, nullptr);
  return launch_rows(plan_rows(pair, rows_capability()), pair, binary, false, workspace, nullptr, sums, stream);
}

const char* binary_kl_one_pass(const RowPair& pair, double temperature, const RowReduction& reduction,
                               const DeviceScalar& loss_weight, float* workspace, float* loss, void* stream) {
  RowSums sums;
  if (const char* e = binary_kl_sums(pair, temperature, reduction, loss_weight, workspace, &sums, stream)) return e;
  return launch_finish_rows(sums.values, sums.blocks, loss, stream);
}

const char* binary_kl_backward(const RowPair& pair, double temperature, const float* grad_loss, bool per_row,
                               const float* coefficients, void* stream) {
  return launch_gradients(pair, BinaryGradient{float(1 / temperature), coefficients, grad_loss, per_row}, stream);
}

KD_NAMESPACE_END
