// The entry points of soft_cross_entropy.cpp.
#pragma once

#include "capability.h"
#include "../arguments.h"

// statistics: (rows, 8), see soft_cross_entropy.cpp. grad_loss: one number, or one per row.
KD_KERNEL(soft_cross_entropy_forward,
          (const RowPair& pair, const SoftCrossEntropyOptions& options, void* loss, void* statistics,
           const Threads& threads),
          (pair, options, loss, statistics, threads))
KD_KERNEL(soft_cross_entropy_backward,
          (const RowPair& pair, double temperature, const void* class_weight, const int64_t* target,
           const void* grad_loss, bool per_row, const void* statistics, const Threads& threads),
          (pair, temperature, class_weight, target, grad_loss, per_row, statistics, threads))
// In float32 alone. The loss and its gradient, which goes to pair.grad, times the loss weight.
KD_KERNEL(soft_cross_entropy_one_pass,
          (const RowPair& pair, const SoftCrossEntropyOptions& options, const DeviceScalar& loss_weight, float* loss,
           const Threads& threads),
          (pair, options, loss_weight, loss, threads))
