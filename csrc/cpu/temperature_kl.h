// The entry points of temperature_kl.cpp.
#pragma once

#include "capability.h"
#include "../arguments.h"

// statistics: (rows, 6), see kl_rows.h. grad_loss: one number, or one per row.
KD_KERNEL(temperature_kl_forward,
          (const RowPair& pair, double temperature, const RowReduction& reduction, void* loss, void* statistics,
           const Threads& threads),
          (pair, temperature, reduction, loss, statistics, threads))
KD_KERNEL(temperature_kl_backward,
          (const RowPair& pair, const void* grad_loss, bool per_row, const void* statistics, const Threads& threads),
          (pair, grad_loss, per_row, statistics, threads))
// In float32 alone. The loss and its gradient, which goes to pair.grad, times the loss weight.
KD_KERNEL(temperature_kl_one_pass,
          (const RowPair& pair, double temperature, const RowReduction& reduction, const DeviceScalar& loss_weight,
           float* loss, const Threads& threads),
          (pair, temperature, reduction, loss_weight, loss, threads))
