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
