// The entry points of decoupled_kl.cpp.
#pragma once

#include "capability.h"
#include "../arguments.h"

// statistics: (rows, 6), see kl_rows.h. grad_loss: one number, or one per row.
KD_KERNEL(decoupled_kl_forward,
          (const RowPair& pair, const DecoupledKlOptions& options, void* loss, void* statistics,
           const Threads& threads),
          (pair, options, loss, statistics, threads))
KD_KERNEL(decoupled_kl_backward,
          (const RowPair& pair, const void* grad_loss, bool per_row, const void* statistics, const Threads& threads),
          (pair, grad_loss, per_row, statistics, threads))
// In float32 alone. The loss and its gradient, which goes to pair.grad, times the loss weight. parts: the foreground's
// share of the loss, and the background's.
KD_KERNEL(decoupled_kl_one_pass,
          (const RowPair& pair, const DecoupledKlOptions& options, const DeviceScalar& loss_weight, float* loss,
           float* parts, const Threads& threads),
          (pair, options, loss_weight, loss, parts, threads))
