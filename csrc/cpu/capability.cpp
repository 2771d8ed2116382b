// Which instruction set the kernels run with. Compiled once, for the baseline.
#include "capability.h"

#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace kdkernels {

#if defined(__x86_64__)
// Not through __builtin_cpu_supports: clang 14 does not know "f16c".
static bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

Capability best_capability() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma") && has_f16c()) {
    return Capability::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) {
    return Capability::avx2;
  }
#endif
  return Capability::base;
}

static Capability lowered(Capability wanted) {
  const Capability best = best_capability();
  return wanted < best ? wanted : best;
}

static Capability from_environment() {
  const char* name = getenv("KDKERNELS_CPU_CAPABILITY");
  if (name && !strcmp(name, "base")) return Capability::base;
  if (name && !strcmp(name, "avx2")) return lowered(Capability::avx2);
  return best_capability();
}

static Capability& current() {
  static Capability value = from_environment();
  return value;
}

Capability capability() { return current(); }

Capability set_capability(Capability wanted) {
  current() = lowered(wanted);
  return current();
}

}  // namespace kdkernels

#define KD_EXPORT extern "C" __attribute__((visibility("default")))

// For Python (ctypes), which knows the names of the levels.
KD_EXPORT int kdkernels_cpu_capability() { return static_cast<int>(kdkernels::capability()); }
KD_EXPORT int kdkernels_cpu_best_capability() { return static_cast<int>(kdkernels::best_capability()); }
KD_EXPORT int kdkernels_cpu_set_capability(int wanted) {
  return static_cast<int>(kdkernels::set_capability(static_cast<kdkernels::Capability>(wanted)));
}
