// The instruction sets that the kernels are built for, and the choice among them at run time.
#pragma once

namespace kdkernels {

enum class Capability : int { base = 0, avx2 = 1, avx512 = 2 };

// What this CPU can run of what was built.
Capability best_capability();

// What the next call runs: the best one, unless KDKERNELS_CPU_CAPABILITY or set_capability lowered it.
Capability capability();

// Lowers (or restores) the choice; more than the CPU has is reduced to what it has. Returns what is in force.
Capability set_capability(Capability wanted);

}  // namespace kdkernels

// Declares a kernel in each capability's namespace, and a caller in `kdkernels` that picks. aarch64 has the base alone:
// its 128-bit vectors are in every CPU.
#if defined(__x86_64__)
#define KD_KERNEL(name, parameters, arguments) \
  namespace kdkernels {                        \
  namespace base {                             \
  void name parameters;                        \
  }                                            \
  namespace avx2 {                             \
  void name parameters;                        \
  }                                            \
  namespace avx512 {                           \
  void name parameters;                        \
  }                                            \
  namespace cpu {                              \
  inline void name parameters {                \
    switch (capability()) {                    \
      case Capability::avx512:                 \
        return avx512::name arguments;         \
      case Capability::avx2:                   \
        return avx2::name arguments;           \
      default:                                 \
        return base::name arguments;           \
    }                                          \
  }                                            \
  }                                            \
  }
#else
#define KD_KERNEL(name, parameters, arguments)                 \
  namespace kdkernels {                                        \
  namespace base {                                             \
  void name parameters;                                        \
  }                                                            \
  namespace cpu {                                              \
  inline void name parameters { return base::name arguments; } \
  }                                                            \
  }
#endif
