// Runs the bodies of CUDA kernels on the host, for csrc/cuda/primitives.cuh compiled without nvcc: one fiber per
// thread, the blocks of a cluster at once, clusters one after the other.
//
// What a GPU leaves undefined shows here: shared memory starts as NaN and is NaN again when its block has ended; with a
// seed, threads run in a permuted order and each warp runs ahead as far as barriers let it; a barrier that not all
// threads reach ends the launch with an error, and 16-byte accesses check their address. Built with
// -fsanitize=address,undefined every access to memory is checked as well.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace emulator {

// What a kernel asks of its thread.
int thread_index();
int block_threads();
int64_t block_index();
int cluster_rank();
int cluster_blocks();
void* shared_memory();
void* peer_shared(void* own, int rank);
void block_sync();
void cluster_sync();
uint32_t shuffle_xor(uint32_t word, int bits);

// What a test asks: the seed of the order of threads, and the architecture that launches see (10 * major + minor).
void set_seed(uint64_t seed);
void set_compute_capability(int capability);
int compute_capability();
int64_t launch_count();  // of the process
// What kernels were compiled for, if a driver translated them from the PTX of an older architecture; 0: for the device.
void set_code_capability(int capability);
int code_capability();

// Ends the launch with an error.
[[noreturn]] void fail(const char* format, ...);

using Body = void (*)(void* context);
const char* run_body(int64_t blocks, int threads, int shared_bytes, int cluster, Body body, void* context);

template <class F>
const char* run(int64_t blocks, int threads, int shared_bytes, int cluster, const F& kernel) {
  return run_body(
      blocks, threads, shared_bytes, cluster, [](void* context) { (*static_cast<const F*>(context))(); },
      const_cast<void*>(static_cast<const void*>(&kernel)));
}

template <class Bytes16>
Bytes16 load16(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16) fail("16-byte load from %p", address);
  return *static_cast<const Bytes16*>(address);
}
template <class Bytes16>
void store16(void* address, const Bytes16& x) {
  if (reinterpret_cast<uintptr_t>(address) % 16) fail("16-byte store to %p", address);
  *static_cast<Bytes16*>(address) = x;
}

// 16-bit floats in integer arithmetic, to nearest even as the GPU's conversions.

inline float float_of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t bits_of_float(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

inline float float_of_bfloat16(uint16_t x) { return float_of_bits(uint32_t(x) << 16); }
inline uint16_t bfloat16_of_float(float x) {
  if (x != x) return 0x7fff;
  const uint32_t bits = bits_of_float(x);
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float float_of_half(uint16_t x) {
  const uint32_t sign = uint32_t(x & 0x8000u) << 16, exponent = (x >> 10) & 31u, fraction = x & 1023u;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * float(fraction) * (1.0f / 16777216.0f);
  if (exponent == 31) return float_of_bits(sign | 0x7f800000u | fraction << 13);
  return float_of_bits(sign | (exponent + 112u) << 23 | fraction << 13);
}
inline uint16_t half_of_float(float x) {
  const uint32_t bits = bits_of_float(x), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return 0x7fff;
  if (rest >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // 65520 and above round to infinity
  if (rest < 0x38800000u) {                                  // below 2^-14: a multiple of 2^-24
    const float scaled = float_of_bits(rest) * 16777216.0f;  // exact
    const float magic = 8388608.0f;                          // adding 2^23 rounds to an integer, to even
    return uint16_t(sign | uint32_t((scaled + magic) - magic));
  }
  return uint16_t(sign | ((rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13));
}

}  // namespace emulator
