// A gradient that was formed in the forward, times the upstream gradient.
#include "one_pass.h"

#include "block.h"

KD_NAMESPACE_BEGIN

void scale_gradient(const char* from, char* to, Dtype dtype, int64_t count, float factor, const Threads& threads) {
  const int64_t blocks = (count + block_size - 1) / block_size;
  parallel(threads, blocks, 8, [&](int64_t begin, int64_t end) {
    float scratch[block_size], result[block_size];
    for (int64_t block = begin; block < end; ++block) {
      const int64_t at = block * block_size;
      const int n = int(count - at < block_size ? count - at : block_size);
      const float* x = read_block(from, dtype, at, 1, n, scratch);
      float* out = result_block(to, dtype, at, 1, result);
      for (int i = 0; i < n; ++i) out[i] = x[i] * factor;
      write_block(to, dtype, at, 1, n, out);
    }
  });
}

KD_NAMESPACE_END
