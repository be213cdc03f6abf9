// Two-stream attention as a library that knows neither torch nor Python: pointers, strides, sizes, a stream, a status.
//
// Compile: plain C++17. Link with two_stream_attention.cu (nvcc -c -O3 -std=c++17 csrc/two_stream_attention.cu).
// The rule of who sees whom is in prefix_suffix.cuh; what is computed, and in what memory, in two_stream_attention.cuh.
#pragma once

#include "status.h"

namespace mapet {

// A tensor (images, rows, heads, size) whose last dimension is contiguous; strides in elements.
struct View {
  void* data = nullptr;
  long long image = 0, row = 0, head = 0;
};

// One quantity of the content stream, rows A, B, M, and of the query stream, rows G.
struct Streams {
  View content, query;
};

enum class Type { float16, bfloat16, float32 };  // float32 exists on the host only, to test the arithmetic

struct Sizes {
  int images, heads, size;   // B, H, D
  int tokens, targets, cut;  // N, T, c; the cut is not read where `cuts` is given
  bool mask_tokens, with_content;
  float scale;
  const long long* cuts;  // (B,), one cut per image, or null; brought into [N - T, N - 1]
  const long long* perm;  // (B, N): content rows are in image order, row perm[b, r] having rank r; or null. Values
                          // out of range give wrong numbers, and no access out of bounds.
};

// What a launch is planned for.
struct Device {
  int architecture;  // 70, 75, 80, 90, ...
  int processors;
  int shared_limit;  // bytes of shared memory a block may ask for
};

// Whether this library holds code for the current GPU's architecture.
bool has_kernels_for_current_device();

// out (B, rows, H, D) = softmax(scale Q K^T over visible keys) V; lse (B, rows, H), natural, in float.
Status two_stream_forward(
    const Sizes& sizes, Type type, Streams q, View k, View v, Streams out, Streams lse, Device device, void* stream);

// Gradients of q, k, v. workspace: 2 * B * H * (N + 2 T) floats, of any content.
Status two_stream_backward(
    const Sizes& sizes, Type type, Streams q, View k, View v, Streams out, Streams lse, Streams d_out, Streams dq,
    View dk, View dv, float* workspace, Device device, void* stream);

// How many warps a block of the forward or dQ kernel has, how much shared memory, and whether it keeps all K and V of
// one image and head there. A pure function.
struct Plan {
  bool resident;
  int warps, stages, blocks_per_head, shared;
};

Plan plan_rows(const Sizes& sizes, Type type, bool is_backward, Device device);

}  // namespace mapet
