// The pybind11 module kdkernels.native.lib._C: facts about the build, the CPU and the launch plans that a person or a
// test can read without torch and without running a kernel. It is built at install only and may be absent; nothing
// depends on it but `python -m kdkernels info`.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <variant>

#include "cpu/capability.h"
#include "cuda/feature_plan.h"

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

using Shape = std::array<int64_t, 4>;
using Levels = std::variant<bool, std::vector<int>>;  // all or none, or some

bool has(const Levels& levels, int index) {
  if (const bool* all = std::get_if<bool>(&levels)) return *all;
  for (const int i : std::get<std::vector<int>>(levels)) {
    if (i == index) return true;
  }
  return false;
}

const char* name_of(kdkernels::plan::FeatureKernel kernel) {
  constexpr const char* names[] = {"none", "tiles", "planes", "pixels"};
  return names[static_cast<int>(kernel)];
}

py::list feature_plan(const std::vector<Shape>& levels, const std::string& dtype, int capability,
                      const Levels& masked_mse, const Levels& pearson, bool channels_last) {
  namespace plan = kdkernels::plan;
  if (dtype != "float32" && dtype != "bfloat16" && dtype != "float16") {
    throw std::invalid_argument("dtype: expected 'float32', 'bfloat16' or 'float16', got '" + dtype + "'");
  }
  const int bytes = dtype == "float32" ? 4 : 2;
  std::vector<plan::FeatureShape> shapes;
  for (const Shape& s : levels) {
    const int index = int(shapes.size());
    shapes.push_back({s[0], s[1], s[2], s[3], 0, bytes, bytes, channels_last, true, has(masked_mse, index),
                      has(pearson, index), true});
  }
  const plan::FeaturePlans plans = plan::plan_features(shapes, plan::architecture(capability, capability));
  py::list result;
  for (size_t i = 0; i < shapes.size(); ++i) {
    const plan::FeaturePlan& p = plans.levels[i];
    const bool planes = p.kernel == plan::FeatureKernel::planes;
    py::dict level;
    level["kernel"] = name_of(p.kernel);
    level["blocks"] = p.blocks;
    level["threads"] = p.threads;
    level["cluster"] = p.cluster;
    level["blocks_per_channel"] = planes ? p.chunks : 0;
    level["channels_per_block"] = planes ? p.channels_per_block() : 0;
    level["shared_bytes"] = p.shared_bytes;
    level["bytes_on_chip"] = planes ? p.kept * plan::slice_bytes(shapes[i]) * p.chunks : 0;
    level["transfers"] = p.transfers;
    level["launches"] = plans.launches;
    result.append(level);
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about the build of kdkernels, about this CPU, and the plans of launches.";
  m.def("build_info", &build_info, "Compiler, C++ standard and pybind11 version of this module.");
  m.def(
      "cpu_capability", [] { return name_of(kdkernels::best_capability()); },
      "The widest of 'base', 'avx2', 'avx512' that this CPU can run.");
  m.def(
      "feature_plan", &feature_plan, py::arg("levels"), py::arg("dtype") = "bfloat16", py::arg("capability") = 90,
      py::arg("masked_mse") = true, py::arg("pearson") = true, py::arg("channels_last") = false,
      R"(How the CUDA kernels form masked MSE and Pearson, loss and gradient, of levels [(n, c, h, w), ...]: a dict each.

masked_mse, pearson: whether all levels have the term, or the indices of those that do. capability: 10 * major + minor.

kernel: "planes" (a channel stays in shared memory between its statistics and its gradient), "pixels" (channels_last with
Pearson: sums first), "tiles" (masked MSE alone), or "none" for an empty level. blocks, threads, cluster: of the launch.
blocks_per_channel, channels_per_block: of planes. shared_bytes: of each block. bytes_on_chip: of student and teacher of
one channel. transfers: of a feature's bytes, 3 where everything stays on chip, 5 where everything is read again.
launches: of the whole call, the masks' counts and the last sums among them.)");
}
