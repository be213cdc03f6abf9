// The one launch of all kernels.
//
// Compile: included by the .cu files beside it. Without nvcc a C++ compiler runs the blocks on the CPU
// (host_emulation.h), for tests.
#pragma once

#include "device.cuh"
#include "status.h"

#if defined(__CUDACC__)
#include <atomic>
#include <cuda_runtime.h>
#endif

namespace mapet {

constexpr int WITHOUT_ASKING = 48 << 10;  // bytes of shared memory that a block has on every GPU

inline Status after_launch(int error) {
  if (error == 0) return {};
  return {"the kernel could not be launched", error};
}

#if defined(__CUDACC__)
// Let blocks of a kernel have all the shared memory of the current device: said once, to each of the first 64 devices.
template <auto KERNEL>
cudaError_t allow_all_shared_memory() {
  static std::atomic<unsigned long long> told{0};
  int device = 0, most = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const unsigned long long bit = device < 64 ? 1ull << device : 0;
  if (told.load() & bit) return cudaSuccess;
  cudaError_t error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error == cudaSuccess) told.fetch_or(bit);
  return error;
}
#endif

// `shared`: bytes of shared memory of a block. The runtime's error is taken from it and given to the caller, so that
// the next call that looks for one does not find this one's.
template <auto KERNEL, class Call>
Status launch(const Call& call, int blocks, int threads, int shared, void* stream) {
  if (blocks == 0) return {};
#if defined(__CUDACC__)
  if (shared > WITHOUT_ASKING) {
    if (const cudaError_t error = allow_all_shared_memory<KERNEL>(); error != cudaSuccess) {
      cudaGetLastError();
      return after_launch(error);
    }
  }
  KERNEL<<<blocks, threads, shared, static_cast<cudaStream_t>(stream)>>>(call);
  return after_launch(cudaGetLastError());
#else
  (void)stream;
  if (const int error = emulation::launch_error()) return after_launch(error);
  emulation::launch(KERNEL, blocks, threads, shared, call);
  return {};
#endif
}

}  // namespace mapet
