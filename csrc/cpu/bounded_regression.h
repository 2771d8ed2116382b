// The entry points of bounded_regression.cpp.
#pragma once

#include "capability.h"
#include "../arguments.h"

// pair: student and teacher, four columns; target likewise. derivative: rows of four as well, d loss / d student but
// for the upstream gradient; in one pass it is the gradient.
KD_KERNEL(bounded_regression_forward,
          (const RowPair& pair, const RowView& target, const BoundedRegressionOptions& options, void* loss,
           const RowView& derivative, const Threads& threads),
          (pair, target, options, loss, derivative, threads))
KD_KERNEL(bounded_regression_backward,
          (const RowPair& pair, const void* grad_loss, bool per_row, const void* derivative, const Threads& threads),
          (pair, grad_loss, per_row, derivative, threads))
