// Stands in for the CUDA runtime where csrc/bindings.cpp runs on CPU tensors: an A100 without errors.
#pragma once

#include <string>

enum cudaError_t : int { cudaSuccess };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  const int a100[] = {8, 0, 108, 163 << 10};
  *value = a100[which];
  return cudaSuccess;
}
inline std::string cudaGetErrorString(cudaError_t error) { return "error " + std::to_string(static_cast<int>(error)); }
