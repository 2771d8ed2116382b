// Decoupled KL on the CPU: temperature_kl's row with its region's weight, temperature and count.
#include "decoupled_kl.h"

#include "../math/decoupled_kl.h"
#include "kl_rows.h"

KD_NAMESPACE_BEGIN

namespace {

template <class A>
void forward(const RowPair& pair, const DecoupledKlOptions& options, A* loss, A* statistics, const Threads& threads) {
  double inside = 0;
  for (int64_t row = 0; row < pair.rows; ++row) inside += options.foreground[row] ? 1 : 0;
  const Region foreground{options.foreground_weight.get(), options.foreground_temperature, inside};
  const Region background{options.background_weight.get(), options.background_temperature, double(pair.rows) - inside};
  const bool divide = options.reduction == RowReduction::mean_rows;
  const double shares[2] = {background.share(divide), foreground.share(divide)};
  const RowReduction reduction{options.reduction, false, DeviceScalar{0, nullptr}};
  const A* weight = static_cast<const A*>(pair.weight);
  reduce_rows<A>(RowUnits(pair.rows, pair.columns), reduction, pair.columns, loss, threads,
                 [&](int64_t row, A* scratch_s, A* scratch_t) {
                   const bool inside_row = options.foreground[row];
                   const double share = shares[inside_row];
                   return kl_row<A>(pair, row, inside_row ? foreground.temperature : background.temperature,
                                    weight ? share * weight[row] : share, statistics + row * kl_statistics, scratch_s,
                                    scratch_t);
                 });
}

}  // namespace

void decoupled_kl_forward(const RowPair& pair, const DecoupledKlOptions& options, void* loss, void* statistics,
                          const Threads& threads) {
  if (pair.wide) {
    forward(pair, options, static_cast<double*>(loss), static_cast<double*>(statistics), threads);
  } else {
    forward(pair, options, static_cast<float*>(loss), static_cast<float*>(statistics), threads);
  }
}

void decoupled_kl_backward(const RowPair& pair, const void* grad_loss, bool per_row, const void* statistics,
                           const Threads& threads) {
  if (pair.wide) {
    kl_gradient(pair, static_cast<const double*>(grad_loss), per_row, static_cast<const double*>(statistics), threads);
  } else {
    kl_gradient(pair, static_cast<const float*>(grad_loss), per_row, static_cast<const float*>(statistics), threads);
  }
}

KD_NAMESPACE_END
