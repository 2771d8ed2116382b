// Everything that a kernel asks of the machine: indices, barriers, shuffles, shared memory, clusters, 16-byte accesses,
// streaming stores, 16-bit floats, launches. Each has two bodies, one for nvcc and one for the host, where a fiber
// stands for each thread (emulator.h, given by whoever compiles for the host). Inline assembly, cluster intrinsics and
// cache hints may appear in this file and nowhere else.
#pragma once

#include <stdint.h>
#include <string.h>

#include "../arguments.h"

#if defined(__CUDACC__)
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define KD_DEVICE __device__ __forceinline__
#define KD_GLOBAL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define KD_UNROLL _Pragma("unroll")
#define KD_NO_UNROLL _Pragma("unroll 1")
#else
#include "emulator.h"
#define KD_DEVICE inline
#define KD_GLOBAL(threads, blocks) void
#define KD_UNROLL
#define KD_NO_UNROLL
#endif

#include "../math/number.h"

KD_NAMESPACE_BEGIN

constexpr int warp_size = 32;

// How deep a loop that is short of registers may read ahead. Where memory is GDDR less is in flight, and that
// architecture's compiler spills the other half.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int read_ahead = 1;
#else
constexpr int read_ahead = 2;
#endif

// Threads and blocks, in one dimension.

#if defined(__CUDACC__)
KD_DEVICE int thread_index() { return int(threadIdx.x); }
KD_DEVICE int block_threads() { return int(blockDim.x); }
KD_DEVICE int64_t block_index() { return int64_t(blockIdx.x); }
KD_DEVICE void block_sync() { __syncthreads(); }
#else
KD_DEVICE int thread_index() { return emulator::thread_index(); }
KD_DEVICE int block_threads() { return emulator::block_threads(); }
KD_DEVICE int64_t block_index() { return emulator::block_index(); }
KD_DEVICE void block_sync() { emulator::block_sync(); }
#endif

// The value of the lane whose index differs by `bits`. The whole warp must take part.
KD_DEVICE float shuffle_xor(float value, int bits) {
#if defined(__CUDACC__)
  return __shfl_xor_sync(0xffffffffu, value, bits);
#else
  uint32_t word;
  memcpy(&word, &value, 4);
  word = emulator::shuffle_xor(word, bits);
  memcpy(&value, &word, 4);
  return value;
#endif
}

// Bit i: whether lane i said yes. The whole warp must take part.
KD_DEVICE uint32_t ballot(bool yes) {
#if defined(__CUDACC__)
  return __ballot_sync(0xffffffffu, yes);
#else
  uint32_t lanes = uint32_t(yes) << (emulator::thread_index() % warp_size);
  for (int bits = 1; bits < warp_size; bits *= 2) lanes |= emulator::shuffle_xor(lanes, bits);
  return lanes;
#endif
}

KD_DEVICE int count_bits(uint32_t word) {
#if defined(__CUDACC__)
  return __popc(word);
#else
  return __builtin_popcount(word);
#endif
}

// The block's dynamic shared memory, aligned to 16 bytes. Its content is undefined until it is written.
template <class T>
KD_DEVICE T* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char kdkernels_shared[];
  return reinterpret_cast<T*>(kdkernels_shared);
#else
  return static_cast<T*>(emulator::shared_memory());
#endif
}

// Clusters: blocks that run at once and see each other's shared memory (sm_90 and later; elsewhere a cluster is one
// block).
#if defined(__CUDACC__)
KD_DEVICE int cluster_blocks() {
#if __CUDA_ARCH__ >= 900
  return int(cooperative_groups::this_cluster().num_blocks());
#else
  return 1;
#endif
}
KD_DEVICE int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  return int(cooperative_groups::this_cluster().block_rank());
#else
  return 0;
#endif
}
KD_DEVICE void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#else
  __syncthreads();
#endif
}
// Where the block `rank` of the cluster has what this block has at `own`. A block must not end while others read it.
template <class T>
KD_DEVICE T* peer_shared(T* own, int rank) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(own, rank);
#else
  return own;
#endif
}
#else
KD_DEVICE int cluster_blocks() { return emulator::cluster_blocks(); }
KD_DEVICE int cluster_rank() { return emulator::cluster_rank(); }
KD_DEVICE void cluster_sync() { emulator::cluster_sync(); }
template <class T>
KD_DEVICE T* peer_shared(T* own, int rank) {
  return static_cast<T*>(emulator::peer_shared(own, rank));
}
#endif

// 16-bit floats, as they lie in memory.

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

#if defined(__CUDACC__)
KD_DEVICE float to_float(BFloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
KD_DEVICE float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }
template <class T>
KD_DEVICE T from_float(float x);
template <>
KD_DEVICE BFloat16 from_float<BFloat16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
KD_DEVICE Half from_float<Half>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}
#else
KD_DEVICE float to_float(BFloat16 x) { return emulator::float_of_bfloat16(x.bits); }
KD_DEVICE float to_float(Half x) { return emulator::float_of_half(x.bits); }
template <class T>
KD_DEVICE T from_float(float x);
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  return {emulator::bfloat16_of_float(x)};
}
template <>
inline Half from_float<Half>(float x) {
  return {emulator::half_of_float(x)};
}
#endif
KD_DEVICE float to_float(float x) { return x; }

// Two neighbouring elements in one word, the first in its low half.
template <class T>
KD_DEVICE uint32_t pack(float first, float second) {
  return uint32_t(from_float<T>(first).bits) | uint32_t(from_float<T>(second).bits) << 16;
}
#if defined(__CUDACC__)
template <>
KD_DEVICE uint32_t pack<BFloat16>(float first, float second) {  // one instruction for both
  const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
  uint32_t word;
  memcpy(&word, &both, 4);
  return word;
}
template <>
KD_DEVICE uint32_t pack<Half>(float first, float second) {
  const __half2 both = __floats2half2_rn(first, second);
  uint32_t word;
  memcpy(&word, &both, 4);
  return word;
}
#endif
template <>
KD_DEVICE float from_float<float>(float x) {
  return x;
}

// Sixteen bytes: the widest access a thread has. Addresses must be multiples of 16. Reads of what a kernel reads once
// do not stay in the first-level cache; writes that nobody in the kernel reads leave the caches first.

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

KD_DEVICE Bytes16 load16(const void* address) {
#if defined(__CUDACC__)
  const uint4 x = __ldcs(static_cast<const uint4*>(address));
  return {{x.x, x.y, x.z, x.w}};
#else
  return emulator::load16<Bytes16>(address);
#endif
}

// What other blocks read too: it stays in the caches.
KD_DEVICE Bytes16 load16_shared_by_blocks(const void* address) {
#if defined(__CUDACC__)
  const uint4 x = __ldg(static_cast<const uint4*>(address));
  return {{x.x, x.y, x.z, x.w}};
#else
  return emulator::load16<Bytes16>(address);
#endif
}

KD_DEVICE void store16(void* address, const Bytes16& x) {
#if defined(__CUDACC__)
  __stcs(static_cast<uint4*>(address), make_uint4(x.word[0], x.word[1], x.word[2], x.word[3]));
#else
  emulator::store16(address, x);
#endif
}

KD_DEVICE Bytes16 load16_from_shared(const void* address) {
#if defined(__CUDACC__)
  return *static_cast<const Bytes16*>(address);
#else
  return emulator::load16<Bytes16>(address);
#endif
}

// Copies 16 bytes from global to shared memory, past the registers where the machine can. They are there for this
// thread after copies_wait, for the block after a barrier behind that.
KD_DEVICE void copy16_to_shared(void* to, const void* from) {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(uint32_t(__cvta_generic_to_shared(to))), "l"(from));
#elif defined(__CUDACC__)
  *static_cast<Bytes16*>(to) = load16(from);
#else
  emulator::store16(to, emulator::load16<Bytes16>(from));
#endif
}
KD_DEVICE void copies_wait() {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Eight neighbouring elements as floats: one 16-byte access of 16-bit elements, two of float32. What every kernel moves
// at a time; the address must be a multiple of 16.
constexpr int vector_size = 8;
struct Vector {
  float x[vector_size];
};

KD_DEVICE Vector load_vector(const float* p) {
  const Bytes16 a = load16(p), b = load16(p + 4);
  Vector v;
  memcpy(v.x, &a, 16);
  memcpy(v.x + 4, &b, 16);
  return v;
}
template <class T>
KD_DEVICE Vector load_vector(const T* p) {
  static_assert(sizeof(T) == 2, "a 16-bit float");
  const Bytes16 bytes = load16(p);
  Vector v;
  KD_UNROLL for (int i = 0; i < 4; ++i) {
    v.x[2 * i] = to_float(T{uint16_t(bytes.word[i] & 0xffffu)});
    v.x[2 * i + 1] = to_float(T{uint16_t(bytes.word[i] >> 16)});
  }
  return v;
}

KD_DEVICE void store_vector(float* p, const Vector& v) {
  Bytes16 a, b;
  memcpy(&a, v.x, 16);
  memcpy(&b, v.x + 4, 16);
  store16(p, a);
  store16(p + 4, b);
}
template <class T>
KD_DEVICE void store_vector(T* p, const Vector& v) {
  static_assert(sizeof(T) == 2, "a 16-bit float");
  Bytes16 bytes;
  KD_UNROLL for (int i = 0; i < 4; ++i) { bytes.word[i] = pack<T>(v.x[2 * i], v.x[2 * i + 1]); }
  store16(p, bytes);
}

// exp2 of x <= 0, to 2 units in the last place, denormal results included; NaN stays.
KD_DEVICE float exp2_nonpositive(float x) { return exp2f(x); }

// a / b for normal a, b and b^-1, to a unit in the last place: the general division must look for other numbers. NaN
// stays.
template <>
KD_HD float quotient<float>(float a, float b) {
#if defined(__CUDA_ARCH__)
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
  const float q = a * inverse;
  return fmaf(inverse, fmaf(-b, q, a), q);
#else
  return a / b;
#endif
}

// A weight that is a number, or lives in a 0-d float32 tensor.
KD_DEVICE float scalar_value(const DeviceScalar& s) { return s.pointer ? *s.pointer : float(s.value); }

// Launches. The kernel's arguments travel by value. Returns what went wrong, or null.

struct Launch {
  int64_t blocks;
  int threads;
  int shared_bytes;
  void* stream;
  int cluster = 1;  // blocks per cluster; divides `blocks`
};

#if defined(__CUDACC__)
template <class... P, class... A>
const char* launch(void (*kernel)(P...), const Launch& how, A... arguments) {
  if (how.blocks == 0) return nullptr;
  if (how.blocks > 0x7fffffff) return "more blocks than a launch can have";
  if (how.shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, how.shared_bytes);
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  if (how.cluster > 8) {  // what every device with clusters has
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(how.blocks));
  config.blockDim = dim3(unsigned(how.threads));
  config.dynamicSmemBytes = size_t(how.shared_bytes);
  config.stream = static_cast<cudaStream_t>(how.stream);
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = unsigned(how.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  if (how.cluster > 1) {
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, P(arguments)...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// 10 * major + minor of the current device.
inline int compute_capability() {
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return 10 * major + minor;
}
// What a kernel runs as: the device's, or older where a driver translated it from the PTX of an older architecture.
template <class K>
int capability_of(K kernel) {
  cudaFuncAttributes attributes = {};
  if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) return 0;
  const int device = compute_capability();
  return attributes.ptxVersion < device ? attributes.ptxVersion : device;
}
#else
template <class... P, class... A>
const char* launch(void (*kernel)(P...), const Launch& how, A... arguments) {
  if (how.blocks == 0) return nullptr;
  return emulator::run(how.blocks, how.threads, how.shared_bytes, how.cluster, [&] { kernel(P(arguments)...); });
}
inline int compute_capability() { return emulator::compute_capability(); }
template <class K>
int capability_of(K) {
  return emulator::code_capability();
}
#endif

KD_NAMESPACE_END
