// What a kernel asks of the machine: matrix products of a warp, copies into shared memory, conversions, barriers.
//
// Compile: included by two_stream_attention.cuh. nvcc and NVRTC give the GPU's own; a C++ compiler takes the same names
// from host_emulation.h, which runs the kernels thread by thread on the CPU, for tests.
//
// Matrix products are WMMA's 16 x 16 x 16 with float sums, which every GPU from sm_70 on has in hardware: m8n8k4 there,
// m16n8k8 on sm_75, m16n8k16 from sm_80 on, where copies into shared memory are asynchronous too. Operand tiles lie in
// shared memory as 16 x 16 elements in one piece (512 bytes in half precision). No padding is needed, which lets K and
// V of 344 keys of size 64 stay in a V100's 96 KB, at the price of two rows of a tile in the same banks.
#pragma once

#include "prefix_suffix.cuh"

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <mma.h>

#define MAPET_DEVICE __device__ __forceinline__
#define MAPET_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
// A kernel's argument, read where the launch left it: nothing to copy, and fewer registers.
#define MAPET_CALL(type) const __grid_constant__ type
#define MAPET_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace mapet {

using Half = __half;
using Bfloat = __nv_bfloat16;

template <class E>
constexpr bool is_bfloat = false;
template <>
constexpr bool is_bfloat<Bfloat> = true;

// Whether the architecture being compiled for has matrix products of E.
template <class E>
MAPET_DEVICE constexpr bool has_products() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  return !is_bfloat<E>;
#else
  return true;
#endif
}

namespace wmma = nvcuda::wmma;

template <class E>
using Left = wmma::fragment<wmma::matrix_a, 16, 16, 16, E, wmma::row_major>;
template <class E>
using Right = wmma::fragment<wmma::matrix_b, 16, 16, 16, E, wmma::row_major>;
template <class E>
using RightTransposed = wmma::fragment<wmma::matrix_b, 16, 16, 16, E, wmma::col_major>;
using Sum = wmma::fragment<wmma::accumulator, 16, 16, 16, float>;

template <class Fragment, class E>
MAPET_DEVICE void load(Fragment& fragment, const E* tile, int stride = 16) {
  wmma::load_matrix_sync(fragment, tile, stride);
}
MAPET_DEVICE void load(Sum& sum, const float* tile) { wmma::load_matrix_sync(sum, tile, 16, wmma::mem_row_major); }
MAPET_DEVICE void store(float* tile, const Sum& sum) { wmma::store_matrix_sync(tile, sum, 16, wmma::mem_row_major); }
MAPET_DEVICE void clear(Sum& sum) { wmma::fill_fragment(sum, 0.0f); }
template <class A, class B>
MAPET_DEVICE void multiply_add(Sum& sum, const A& a, const B& b) {
  wmma::mma_sync(sum, a, b, sum);
}

MAPET_DEVICE float to_float(Half x) { return __half2float(x); }
MAPET_DEVICE float to_float(Bfloat x) { return __bfloat162float(x); }
template <class E>
MAPET_DEVICE E from_float(float x);
template <>
MAPET_DEVICE Half from_float<Half>(float x) { return __float2half_rn(x); }
template <>
MAPET_DEVICE Bfloat from_float<Bfloat>(float x) { return __float2bfloat16_rn(x); }

MAPET_DEVICE float minus_infinity() { return __int_as_float(0xff800000); }
MAPET_DEVICE float swap_with_neighbour(float x) { return __shfl_xor_sync(0xffffffffu, x, 1); }
MAPET_DEVICE void warp_barrier() { __syncwarp(); }
MAPET_DEVICE void block_barrier() { __syncthreads(); }

// 16 bytes from global into shared memory, or zeros; they are there after `finish_copies` and a barrier.
MAPET_DEVICE void copy_16(void* shared, const void* global, bool real) {
  if (!real) {
    *static_cast<uint4*>(shared) = make_uint4(0, 0, 0, 0);
    return;
  }
#if __CUDA_ARCH__ >= 800
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
#else
  *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
#endif
}

MAPET_DEVICE void end_of_group() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Wait for this thread's copies: for all, or for all but the newest group.
template <int PENDING>
MAPET_DEVICE void finish_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

}  // namespace mapet

#else

#include "host_emulation.h"

#endif
