// Temperature KL on the CPU: forward reads both logits once (rows whose sides are
// close: once more, from the cache) and keeps six numbers per row; backward reads them again
// and writes the gradient.
#include "temperature_kl.h"

#include "kl_rows.h"

KD_NAMESPACE_BEGIN

namespace {

template <class A>
void forward(const RowPair& pair, double temperature, const RowReduction& reduction, A* loss, A* statistics,
             const Threads& threads) {
  const RowScale<A> scale(pair, reduction);
  reduce_rows<A>(RowUnits(pair.rows, pair.columns), reduction, loss, threads, [&](int64_t row, RowScratch<A>& scratch) {
    A* kept = statistics + row * kl_statistics;
    return kl_row<false, A>(pair, row, temperature, scale(row), kept, scratch);
  });
}

}  // namespace

void temperature_kl_forward(const RowPair& pair, double temperature, const RowReduction& reduction, void* loss,
                            void* statistics, const Threads& threads) {
  if (pair.wide) {
    forward(pair, temperature, reduction, static_cast<double*>(loss), static_cast<double*>(statistics), threads);
  } else {
    forward(pair, temperature, reduction, static_cast<float*>(loss), static_cast<float*>(statistics), threads);
  }
}

void temperature_kl_backward(const RowPair& pair, const void* grad_loss, bool per_row, const void* statistics,
                             const Threads& threads) {
  if (pair.wide) {
    kl_gradient(pair, static_cast<const double*>(grad_loss), per_row, static_cast<const double*>(statistics), threads);
  } else {
    kl_gradient(pair, static_cast<const float*>(grad_loss), per_row, static_cast<const float*>(statistics), threads);
  }
}

void temperature_kl_one_pass(const RowPair& pair, double temperature, const RowReduction& reduction,
                             const DeviceScalar& loss_weight, float* loss, const Threads& threads) {
  const double factor = loss_weight.get();
  const RowScale<float> scale(pair, reduction);
  reduce_rows<float>(RowUnits(pair.rows, pair.columns), reduction, loss, threads,
                     [&](int64_t row, RowScratch<float>& scratch) {
                       return kl_row_one_pass<float>(pair, row, temperature, factor * scale(row), scratch);
                     });
}

KD_NAMESPACE_END
