// The rows of temperature_kl and decoupled_kl on the GPU. Forward: each logit is read once, those of rows whose sides
// turn out to be close once more; six numbers per row are kept. Backward: both logits once more, and the gradient. In
// one pass, a row's gradient follows its sums.
#include "kl_rows.cuh"

#include "row_gradients.cuh"

KD_NAMESPACE_BEGIN

namespace {

struct KlGradient {
  using Row = KlGradientRow;
  static constexpr int batch = 2;
  const float* statistics;
  const float* grad_loss;
  bool per_row;

  KD_DEVICE KlGradientRow row(int64_t r) const {
    const float* kept = statistics + r * kl_statistics;
    KlGradientRow row{kept[kl_shift_s],   kept[kl_inverse_s], kept[kl_shift_t],
                      kept[kl_inverse_t], kept[kl_k],         grad_loss[per_row ? r : 0] * kept[kl_coefficient]};
    return row;
  }
  KD_DEVICE float operator()(const KlGradientRow& row, float s, float t, int) const { return row(s, t); }
};

// Leaves the sums of the rows' values; `keep`: each value instead, at `loss`.
template <bool one_pass>
const char* launch_kl(const RowPair& pair, const KlRegions& regions, const DeviceScalar& loss_weight, float* workspace,
                      bool keep, float* loss, float* statistics, RowSums* sums, void* stream) {
  using Loss = KlLoss<one_pass>;
  const RowPlan plan = plan_rows(pair, rows_capability());
  float* counts = workspace + rows_workspace(plan, Loss::parts);
  const Loss kl = kl_loss<one_pass>(plan, pair, regions, loss_weight, counts, statistics);
  const ForegroundRow counted{regions.foreground};
  if (const char* e = launch_count_rows(counted, pair.rows, kl.counters, counts, stream)) return e;
  return launch_rows(plan, pair, kl, keep, workspace, loss, sums, stream);
}

}  // namespace

int64_t kl_rows_workspace(const RowPair& pair, const KlRegions& regions) {
  const int parts = pair.grad.data ? KlLoss<true>::parts : KlLoss<false>::parts;
  const RowPlan plan = plan_rows(pair, rows_capability());
  return rows_workspace(plan, parts) + kl_counters(plan, pair, regions);
}

const char* kl_rows_forward(const RowPair& pair, const KlRegions& regions, float* workspace, float* loss,
                            float* statistics, void* stream) {
  RowSums sums;
  const bool keep = regions.reduction.kind == RowReduction::none;
  const DeviceScalar one{1, nullptr};
  if (const char* e = launch_kl<false>(pair, regions, one, workspace, keep, loss, statistics, &sums, stream)) return e;
  return keep ? nullptr : launch_finish_rows(sums.values, sums.blocks, loss, stream);
}

const char* kl_rows_sums(const RowPair& pair, const KlRegions& regions, const DeviceScalar& loss_weight,
                         float* workspace, RowSums* sums, void* stream) {
  return launch_kl<true>(pair, regions, loss_weight, workspace, false, nullptr, nullptr, sums, stream);
}

const char* kl_rows_one_pass(const RowPair& pair, const KlRegions& regions, const DeviceScalar& loss_weight,
                             float* workspace, float* loss, float* parts, void* stream) {
  RowSums sums;
  if (const char* e = kl_rows_sums(pair, regions, loss_weight, workspace, &sums, stream)) return e;
  return launch_finish_rows<KlLoss<true>::parts>(sums.values, sums.blocks, loss, stream, parts);
}

const char* kl_rows_backward(const RowPair& pair, const float* grad_loss, bool per_row, const float* statistics,
                             void* stream) {
  return launch_gradients(pair, KlGradient{statistics, grad_loss, per_row}, stream);
}

KD_NAMESPACE_END
