// Reading and writing tensors in blocks that stay in the first-level cache.
//
// A kernel computes on contiguous blocks of A (float or double). Where the tensor already is that, the block is the
// tensor's own memory; otherwise (16-bit values, a strided last dimension) the block is converted into a
// scratch buffer of `block_size` values on the stack. No tensor is ever copied as a whole.
#pragma once

#include <string.h>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "../arguments.h"
#include "vec.h"

KD_NAMESPACE_BEGIN

constexpr int block_size = 2048;

KD_HD float bits_to_float(uint32_t u) {
  float f;
  memcpy(&f, &u, sizeof(f));
  return f;
}
KD_HD uint32_t float_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, sizeof(u));
  return u;
}

KD_HD float bfloat16_to_float(uint16_t x) { return bits_to_float(static_cast<uint32_t>(x) << 16); }
// Round to nearest even; NaN stays NaN.
KD_HD uint16_t float_to_bfloat16(float f) {
  const uint32_t u = float_to_bits(f);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : rounded);
}

KD_HD float float16_to_float(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16;
  const uint32_t body = static_cast<uint32_t>(x & 0x7fffu) << 13;
  if (body >= 0x0f800000u) return bits_to_float(sign | 0x7f800000u | (body & 0x007fffffu));  // inf, NaN
  // 2^112 moves the exponent's bias; as a product it also makes subnormal halves right.
  return bits_to_float(sign | float_to_bits(bits_to_float(body) * 5.192296858534828e33f));
}
KD_HD uint16_t float_to_float16(float f) {
  const uint32_t u = float_to_bits(f), sign = (u >> 16) & 0x8000u, body = u & 0x7fffffffu;
  if (body > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (body >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds beyond 65504
  if (body < 0x38800000u) {  // subnormal half: adding 1/2 rounds at 2^-24, to nearest even
    return static_cast<uint16_t>(sign | (float_to_bits(bits_to_float(body) + 0.5f) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((body - 0x38000000u + 0xfffu + ((body >> 13) & 1u)) >> 13));
}

// Asks for what a reader that goes on through memory needs a page later. Processors ask by themselves, but seldom
// across the end of a page. The address may lie outside the tensor: that is no access.
KD_HD void ask_ahead(const void* p) {
  constexpr uintptr_t page = 4096;
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + page), 0, 2);
}

// A vector of a stream that comes from memory where the block is the tensor's own.
template <class A>
KD_HD vec<A> load_and_ask(const A* p) {
  ask_ahead(p);
  return load(p);
}

constexpr int values_per_line = 64 / int(sizeof(uint16_t));  // of 16 bits, in a cache line

template <class A>
inline void read_bfloat16(const uint16_t* from, int64_t stride, int n, A* to) {
  if (stride != 1) {
    for (int i = 0; i < n; ++i) to[i] = bfloat16_to_float(from[i * stride]);
    return;
  }
  int i = 0;
  for (; i + values_per_line <= n; i += values_per_line) {
    ask_ahead(from + i);
    for (int k = 0; k < values_per_line; ++k) to[i + k] = bfloat16_to_float(from[i + k]);
  }
  for (; i < n; ++i) to[i] = bfloat16_to_float(from[i]);
}

template <class A>
inline void read_float16(const uint16_t* from, int64_t stride, int n, A* to) {
  int i = 0;
#if defined(__F16C__)
  if (stride == 1 && sizeof(A) == 4) {
    for (; i + 8 <= n; i += 8) {
      if (i % values_per_line == 0) ask_ahead(from + i);
      const __m256 v = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
      memcpy(to + i, &v, sizeof(v));
    }
  }
#endif
  for (; i < n; ++i) to[i] = float16_to_float(from[i * stride]);
}

// n values of type A, starting at element `offset`, `stride` elements apart.
template <class A>
inline const A* read_block(const char* data, Dtype dtype, int64_t offset, int64_t stride, int n, A* scratch) {
  switch (dtype) {
    case Dtype::float32: {
      const float* from = reinterpret_cast<const float*>(data) + offset;
      if (stride == 1 && sizeof(A) == sizeof(float)) return reinterpret_cast<const A*>(from);
      for (int i = 0; i < n; ++i) scratch[i] = static_cast<A>(from[i * stride]);
      break;
    }
    case Dtype::float64: {
      const double* from = reinterpret_cast<const double*>(data) + offset;
      if (stride == 1 && sizeof(A) == sizeof(double)) return reinterpret_cast<const A*>(from);
      for (int i = 0; i < n; ++i) scratch[i] = static_cast<A>(from[i * stride]);
      break;
    }
    case Dtype::bfloat16:
      read_bfloat16(reinterpret_cast<const uint16_t*>(data) + offset, stride, n, scratch);
      break;
    case Dtype::float16:
      read_float16(reinterpret_cast<const uint16_t*>(data) + offset, stride, n, scratch);
      break;
  }
  return scratch;
}

// Where a block of results goes: the tensor itself when it can, else scratch, and then write_block moves it.
template <class A>
inline A* result_block(char* data, Dtype dtype, int64_t offset, int64_t stride, A* scratch) {
  const bool direct = stride == 1 && ((dtype == Dtype::float32 && sizeof(A) == sizeof(float)) ||
                                      (dtype == Dtype::float64 && sizeof(A) == sizeof(double)));
  return direct ? reinterpret_cast<A*>(data) + offset : scratch;
}

template <class A>
inline void write_block(char* data, Dtype dtype, int64_t offset, int64_t stride, int n, const A* from) {
  switch (dtype) {
    case Dtype::float32: {
      float* to = reinterpret_cast<float*>(data) + offset;
      if (reinterpret_cast<const char*>(to) == reinterpret_cast<const char*>(from)) return;
      for (int i = 0; i < n; ++i) to[i * stride] = static_cast<float>(from[i]);
      break;
    }
    case Dtype::float64: {
      double* to = reinterpret_cast<double*>(data) + offset;
      if (reinterpret_cast<const char*>(to) == reinterpret_cast<const char*>(from)) return;
      for (int i = 0; i < n; ++i) to[i * stride] = static_cast<double>(from[i]);
      break;
    }
    case Dtype::bfloat16: {
      uint16_t* to = reinterpret_cast<uint16_t*>(data) + offset;
      if (stride == 1) {
        for (int i = 0; i < n; ++i) to[i] = float_to_bfloat16(static_cast<float>(from[i]));
      } else {
        for (int i = 0; i < n; ++i) to[i * stride] = float_to_bfloat16(static_cast<float>(from[i]));
      }
      break;
    }
    case Dtype::float16: {
      uint16_t* to = reinterpret_cast<uint16_t*>(data) + offset;
      int i = 0;
#if defined(__F16C__)
      if (stride == 1 && sizeof(A) == 4) {
        for (; i + 8 <= n; i += 8) {
          __m256 v;
          memcpy(&v, from + i, sizeof(v));
          const __m128i half = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
          memcpy(to + i, &half, sizeof(half));
        }
      }
#endif
      for (; i < n; ++i) to[i * stride] = float_to_float16(static_cast<float>(from[i]));
      break;
    }
  }
}

// Threads over [0, count): body(begin, end).
template <class F>
inline void parallel(const Threads& threads, int64_t count, int64_t grain, const F& body) {
  if (count <= 0) return;
  threads.run(count, grain > 0 ? grain : 1, const_cast<void*>(static_cast<const void*>(&body)),
              [](void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); });
}

KD_NAMESPACE_END
