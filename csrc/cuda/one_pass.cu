// Gradients that were formed in the forward, times the upstream gradient: one launch for all of a call. In place a
// block reads the upstream gradient first, and has nothing to do where it is 1.
#include "one_pass.h"

#include "packed.cuh"

KD_NAMESPACE_BEGIN

namespace {

constexpr int threads = 256;
constexpr int64_t least_vectors = 4 * threads;  // of a block
constexpr int64_t most_blocks = 2048;           // about: where the factor is 1, they are all that is left to pay

struct Segment {
  ScaledGradient gradient;
  int ahead;             // elements of the first vector that lie before the gradient: vectors are aligned
  int64_t first_block;   // of the launch
  int64_t last_element;  // one beyond, counted from the first vector
};
constexpr int max_gradients = 48;
struct Table {
  int count;
  int64_t blocks, vectors;  // vectors: of a block
  Segment segment[max_gradients];
};
static_assert(sizeof(Table) < 4000, "leaves room for a kernel's other arguments");

int element_size(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

template <class S>
KD_DEVICE void scale(const Segment& segment, int64_t first, int64_t last, float factor) {
  constexpr int batch = 8 / sizeof(S);
  const S* from = reinterpret_cast<const S*>(segment.gradient.from) - segment.ahead;
  S* to = reinterpret_cast<S*>(segment.gradient.to) - segment.ahead;
  const bool wide_from = starts_vector(from, 1), wide_to = starts_vector(to, 1);
  KD_NO_UNROLL for (int64_t v = first + thread_index(); v < last; v += batch * threads) {
    Packed<S> x[batch];
    Piece p[batch];
    KD_UNROLL for (int b = 0; b < batch; ++b) {
      const int64_t vector = v + b * threads, begin = vector * vector_size;
      const int64_t rest = segment.last_element - begin;
      p[b] = Piece{0, vector == 0 ? segment.ahead : 0, rest < vector_size ? int(rest) : vector_size};
      if (vector >= last) p[b].end = 0;
      if (p[b].any()) load_packed(x[b], from + begin, 1, p[b], wide_from);
    }
    KD_UNROLL for (int b = 0; b < batch; ++b) {
      if (!p[b].any()) continue;
      Packed<S> y;
      KD_UNROLL for (int i = 0; i < vector_size; i += 2) y.set(i, x[b][i] * factor, x[b][i + 1] * factor);
      store_packed(y, to + (v + b * threads) * vector_size, 1, p[b], wide_to);
    }
  }
}

KD_GLOBAL(threads, 2) one_pass_scale(const Table table, const float* upstream) {
  const float factor = *upstream;
  int index = 0;
  while (index + 1 < table.count && table.segment[index + 1].first_block <= block_index()) ++index;
  const Segment& segment = table.segment[index];
  if (factor == 1.0f && segment.gradient.from == segment.gradient.to) return;
  const int64_t first = (block_index() - segment.first_block) * table.vectors, last = first + table.vectors;
  if (segment.gradient.dtype == Dtype::float32) {
    scale<float>(segment, first, last, factor);
  } else if (segment.gradient.dtype == Dtype::bfloat16) {
    scale<BFloat16>(segment, first, last, factor);
  } else {
    scale<Half>(segment, first, last, factor);
  }
}

}  // namespace

const char* scale_gradients(const ScaledGradient* gradients, int count, const float* upstream, void* stream) {
  int64_t elements = 0;
  for (int i = 0; i < count; ++i) {
    if (gradients[i].dtype == Dtype::float64) return "float64 has no kernel on a GPU";
    elements += gradients[i].count;
  }
  const int64_t wanted = elements / vector_size / most_blocks;
  int next = 0;
  while (next < count) {
    Table table{};
    table.vectors = (wanted / least_vectors + 1) * least_vectors;
    for (; next < count && table.count < max_gradients; ++next) {
      const ScaledGradient& gradient = gradients[next];
      if (gradient.count == 0) continue;
      const uintptr_t address = reinterpret_cast<uintptr_t>(gradient.from);
      Segment segment{gradient, int(address / uintptr_t(element_size(gradient.dtype)) % vector_size), table.blocks, 0};
      segment.last_element = segment.ahead + gradient.count;
      const int64_t vectors = (segment.last_element + vector_size - 1) / vector_size;
      table.blocks += (vectors + table.vectors - 1) / table.vectors;
      table.segment[table.count++] = segment;
    }
    if (table.count == 0) continue;
    if (const char* error = launch(one_pass_scale, Launch{table.blocks, threads, 0, stream}, table, upstream)) {
      return error;
    }
  }
  return nullptr;
}

KD_NAMESPACE_END
