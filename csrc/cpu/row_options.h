// How a row loss is reduced; shared by torch/ and all builds of cpu/.
#pragma once

#include "tensor.h"

namespace kdkernels {

struct RowReduction {
  // "mean over rows", and "mean over rows and classes", divide by `average` where it is given.
  enum Kind : int { none = 0, sum = 1, mean_rows = 2, mean_elements = 3 };
  int kind;
  bool has_average;
  DeviceScalar average;

  // What a row's value is multiplied by. A divisor that is not positive gives 0.
  double factor(double counted_rows, double columns) const {
    if (kind == none || kind == sum) return 1;
    double divisor = has_average ? average.get() : counted_rows;
    if (divisor <= 0) return 0;
    if (kind == mean_elements) divisor *= columns;
    return 1 / divisor;
  }
};

// One pair of logits (or coordinates), rows x columns.
struct RowPair {
  int64_t rows, columns;
  RowView student, teacher, grad;
  bool wide;           // arithmetic, loss and statistics in double
  const void* weight;  // one per row, contiguous, in the type of the arithmetic; or null
};

}  // namespace kdkernels
