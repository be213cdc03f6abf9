// Stands in for torch's header where csrc/bindings.cpp runs on CPU tensors: tests/test_cuda_bindings.py.
#pragma once

namespace c10::cuda {
struct CUDAStream {
  void* stream() const { return nullptr; }
};
inline CUDAStream getCurrentCUDAStream(int) { return {}; }
}  // namespace c10::cuda
