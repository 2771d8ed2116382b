// What the blocks of a row loss leave for whoever adds it up.
#pragma once

#include <stdint.h>

namespace kdkernels {
namespace cuda {

constexpr int most_row_parts = 2;
constexpr int told_columns = 1 + most_row_parts;  // of a loss: the whole, and its parts
constexpr int most_heads = 8;                     // of a call

// Of each of `blocks` blocks, the sums of `parts` kinds of rows, which together are the loss.
struct RowSums {
  const float* values;
  int64_t blocks;
  int parts;
};

}  // namespace cuda
}  // namespace kdkernels
