// Decoupled KL on the CPU: temperature_kl's row with its region's weight, temperature and count.
#include "decoupled_kl.h"

#include "../math/decoupled_kl.h"
#include "kl_rows.h"

KD_NAMESPACE_BEGIN

namespace {

// Both regions: background and foreground.
template <class A>
struct Regions {
  const bool* foreground;
  const A* weight;
  double temperatures[2], shares[2];

  Regions(const RowPair& pair, const DecoupledKlOptions& options)
      : foreground(options.foreground), weight(static_cast<const A*>(pair.weight)) {
    double inside = 0;
    for (int64_t row = 0; row < pair.rows; ++row) inside += foreground[row] ? 1 : 0;
    const Region regions[2] = {
        {options.background_weight.get(), options.background_temperature, double(pair.rows) - inside},
        {options.foreground_weight.get(), options.foreground_temperature, inside}};
    for (int i = 0; i < 2; ++i) {
      temperatures[i] = regions[i].temperature;
      shares[i] = regions[i].share(options.reduction == RowReduction::mean_rows);
    }
  }
  double temperature(int64_t row) const { return temperatures[foreground[row]]; }
  double scale(int64_t row) const {
    const double share = shares[foreground[row]];
    return weight ? share * weight[row] : share;
  }
};

template <class A>
void forward(const RowPair& pair, const DecoupledKlOptions& options, A* loss, A* statistics, const Threads& threads) {
  const Regions<A> regions(pair, options);
  const RowReduction reduction{options.reduction, false, DeviceScalar{0, nullptr}};
  reduce_rows<A>(RowUnits(pair.rows, pair.columns), reduction, loss, threads, [&](int64_t row, RowScratch<A>& scratch) {
    return kl_row<false, A>(pair, row, regions.temperature(row), regions.scale(row), statistics + row * kl_statistics,
                            scratch);
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

void decoupled_kl_one_pass(const RowPair& pair, const DecoupledKlOptions& options, const DeviceScalar& loss_weight,
                           float* loss, float* parts, const Threads& threads) {
  const double factor = loss_weight.get();
  const Regions<float> regions(pair, options);
  double totals[2];
  sum_rows<float>(RowUnits(pair.rows, pair.columns), threads, totals,
                  [&](int64_t row, RowScratch<float>& scratch, double (&sums)[2]) {
                    sums[options.foreground[row]] += kl_row_one_pass<float>(pair, row, regions.temperature(row),
                                                                            factor * regions.scale(row), scratch);
                  });
  *loss = float(totals[0] + totals[1]);
  parts[0] = float(totals[1]);
  parts[1] = float(totals[0]);
}

KD_NAMESPACE_END
