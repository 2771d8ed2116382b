// What the registrations for the GPU share: the current stream, the device guard, and how a failed launch is told.
//
// The function below exists only in a PyTorch built with CUDA. Declared weak, it lets this library load, and show what
// it registers, on any PyTorch. Compiled with KD_EMULATOR the same registrations serve the CPU's tensors, for
// tests of the kernels without a GPU.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>

#include "tensors.h"

#if defined(KD_EMULATOR)
#define KD_GPU_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(kdkernels_emulator, CPU, m)
#else
#define KD_GPU_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(kdkernels, CUDA, m)
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
}
#endif

namespace kdkernels {

// Makes a tensor's device the current one for as long as it lives, and knows its current stream.
class Gpu {
 public:
#if defined(KD_EMULATOR)
  explicit Gpu(const Tensor&) {}
  void* stream() const { return nullptr; }
#else
  explicit Gpu(const Tensor& x) : device_(x.get_device_index()), guard_(device_) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this PyTorch was built without CUDA");
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream_) == AOTI_TORCH_SUCCESS, "no current stream");
  }
  void* stream() const { return stream_; }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
#endif
};

// `error` is what a kernel's launch returned.
inline void check_launch(const char* error) { STD_TORCH_CHECK(error == nullptr, error ? error : ""); }

inline Tensor new_workspace(const Tensor& like, int64_t floats) {
  return new_buffer(like, {floats}, ScalarType::Float);
}

}  // namespace kdkernels
