// Binary KL as a Loss of row_kernels.cuh.
#pragma once

#include "binary_kl.h"

#include "../math/binary_kl.h"
#include "row_kernels.cuh"

KD_NAMESPACE_BEGIN

namespace {

// log(1 + x) for 0 <= x <= 1, as 2 artanh(x / (2 + x)).
KD_DEVICE float log1p_unit(float x) {
  const float y = quotient(x, x + 2.0f), y2 = y * y;
  constexpr int terms = 8;
  float p = 1.0f / (2 * terms + 1);
  KD_UNROLL for (int k = terms - 1; k >= 0; --k) p = p * y2 + 1.0f / (2 * k + 1);
  return (y + y) * p;
}

KD_DEVICE Logistic<float> logistic(float logit, float inverse_temperature) {
  const float x = logit * inverse_temperature;
  const float e = exp2_nonpositive(magnitude(x) * -float(log2_e));
  return {x, e, log1p_unit(e)};
}

// Without the logarithm, which the gradient does not need.
KD_DEVICE Logistic<float> sigmoids(float logit, float inverse_temperature) {
  const float x = logit * inverse_temperature;
  return {x, exp2_nonpositive(magnitude(x) * -float(log2_e)), 0.0f};
}

struct BinarySums {
  float total;

  KD_DEVICE void clear() { total = 0; }
  template <class F>
  KD_DEVICE void rebase(const F&) {}
  template <class F>
  KD_DEVICE void each_sum(const F& f) {
    f(total);
  }
  template <class F>
  KD_DEVICE void all(F f) {
    f(total);
  }
};

struct BinaryRow {
  float scale;
  static constexpr bool skip = false;
};

struct BinaryLook {
  static constexpr bool again = false;
};

struct BinaryGradientRow {
  float coefficient;
};

KD_DEVICE float binary_gradient(const BinaryGradientRow& row, float s, float t, float inverse) {
  return row.coefficient * sigmoid_difference(sigmoids(s, inverse), sigmoids(t, inverse));
}

template <bool with_gradient>
struct BinaryLoss {
  static constexpr bool one_pass = with_gradient;
  static constexpr int parts = 1;
  using GradientRow = BinaryGradientRow;
  using Context = float;
  using Row = BinaryRow;
  using Sums = BinarySums;
  using Look = BinaryLook;
  using Second = BinarySums;
  static constexpr int batch = 1;

  float temperature, inverse;
  RowFactor factor;
  DeviceScalar loss_weight;
  const float* weight;
  float* coefficients;

  KD_DEVICE float context(float*) const { return scalar_value(loss_weight) * factor.get(); }
  KD_DEVICE BinaryRow row(float scale, int64_t r) const { return {weight ? scale * weight[r] : scale}; }
  KD_DEVICE int part(const BinaryRow&) const { return 0; }
  KD_DEVICE BinarySums start(const BinaryRow&) const { return {0}; }

  // Columns that are not in the row are -inf on both sides: equal, which is 0.
  template <int n>
  KD_DEVICE void add(BinarySums& sums, const BinaryRow&, const float (&s)[n], const float (&t)[n], const Columns&,
                     int) const {
    float total = 0;
    KD_UNROLL for (int i = 0; i < n; ++i) {
      total += binary_kl_value(logistic(s[i], inverse), logistic(t[i], inverse), (s[i] - t[i]) * inverse);
    }
    sums.total += total;
  }

  KD_DEVICE BinaryLook look(const BinaryRow&, const BinarySums&) const { return {}; }
  template <int n>
  KD_DEVICE void add_again(BinarySums&, const BinaryRow&, const BinarySums&, const BinaryLook&, const float (&)[n],
                           const float (&)[n], const Columns&) const {}

  KD_DEVICE BinaryGradientRow gradient_row(const BinaryRow& row, int64_t, const BinarySums&) const {
    return {row.scale * temperature};
  }
  KD_DEVICE float gradient(const BinaryGradientRow& row, float s, float t, int) const {
    return binary_gradient(row, s, t, inverse);
  }

  template <class Sides>
  KD_DEVICE float finish(const BinaryRow& row, int64_t r, const BinarySums& sums, const BinaryLook&, const BinarySums&,
                         const Sides&) const {
    if (!one_pass) coefficients[r] = row.scale * temperature;
    return row.scale * temperature * temperature * sums.total;
  }
};

// Host: the loss of a call.
template <bool one_pass>
BinaryLoss<one_pass> binary_loss(const RowPair& pair, double temperature, const RowReduction& reduction,
                                 const DeviceScalar& loss_weight, float* coefficients) {
  return {float(temperature),
          float(1 / temperature),
          row_factor(reduction, double(pair.rows), double(pair.columns)),
          loss_weight,
          static_cast<const float*>(pair.weight),
          coefficients};
}

}  // namespace

KD_NAMESPACE_END
