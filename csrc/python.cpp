// The pybind11 module kdkernels.native.lib._C: facts about the build and the CPU that a person or a test can read
// without torch and without running a kernel. It is built at install only and may be absent; nothing depends on it but
// `python -m kdkernels info`.
#include <pybind11/pybind11.h>

#include "cpu/capability.h"

namespace py = pybind11;

namespace {

const char* name_of(kdkernels::Capability capability) {
  switch (capability) {
    case kdkernels::Capability::avx512:
      return "avx512";
    case kdkernels::Capability::avx2:
      return "avx2";
    default:
      return "base";
  }
}

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["cxx_standard"] = static_cast<long>(__cplusplus);
  info["pybind11"] = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_MINOR);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about the build of kdkernels and about this CPU.";
  m.def("build_info", &build_info, "Compiler, C++ standard and pybind11 version of this module.");
  m.def(
      "cpu_capability", [] { return name_of(kdkernels::best_capability()); },
      "The widest of 'base', 'avx2', 'avx512' that this CPU can run.");
}
