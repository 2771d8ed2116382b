// The entry points of binary_kl.cpp.
#pragma once

#include "capability.h"
#include "../arguments.h"

// coefficients: one per row. grad_loss: one number, or one per row.
KD_KERNEL(binary_kl_forward,
          (const RowPair& pair, double temperature, const RowReduction& reduction, void* loss, void* coefficients,
           const Threads& threads),
          (pair, temperature, reduction, loss, coefficients, threads))
KD_KERNEL(binary_kl_backward,
          (const RowPair& pair, double temperature, const void* grad_loss, bool per_row, const void* coefficients,
           const Threads& threads),
          (pair, temperature, grad_loss, per_row, coefficients, threads))
// In float32 alone. The loss and its gradient, which goes to pair.grad, times the loss weight.
KD_KERNEL(binary_kl_one_pass,
          (const RowPair& pair, double temperature, const RowReduction& reduction, const DeviceScalar& loss_weight,
           float* loss, const Threads& threads),
          (pair, temperature, reduction, loss_weight, loss, threads))
