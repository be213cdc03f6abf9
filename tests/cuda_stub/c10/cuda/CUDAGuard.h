// Stands in for torch's header where csrc/bindings.cpp runs on CPU tensors: tests/test_cuda_bindings.py.
#pragma once
#include <c10/core/Device.h>

namespace c10::cuda {
struct CUDAGuard {
  explicit CUDAGuard(c10::Device) {}
  explicit CUDAGuard(c10::DeviceIndex) {}
};
}  // namespace c10::cuda
