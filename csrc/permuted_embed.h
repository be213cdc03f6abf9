// The permuted embedding as a library that knows neither torch nor Python: pointers, strides, sizes, stream, status.
//
// Compile: plain C++17. Link with permuted_embed.cu (nvcc -c -O3 -std=c++17 csrc/permuted_embed.cu).
// The rows of the buffer are described in permuted_embed.cuh. The patch projection between the two forward passes is a
// matrix product for cuBLAS: content = patches W^T + b.
#pragma once

#include "status.h"

namespace mapet {

enum class Element { float16, bfloat16, float32, float64 };

// Images (B, 3, S, S) with strides in elements: uint8, or what patches are computed in, which is float64 for patches in
// float64 and float32 for all others.
struct Pixels {
  const void* data = nullptr;
  bool is_uint8 = false;
  long long image = 0, channel = 0, y = 0, x = 0;
};

struct PatchSizes {
  int images, ranks;  // B, R
  int grid, patch;    // S / p, p
};

// out (B, R, 3 p p) in `type`: the patches with raster indices `patches` (B, R) of their image; uint8 divided by 255;
// then (x - mean) / std by channel unless `mean` is null. mean and std (3,) are in what patches are computed in.
Status permuted_patches(
    const PatchSizes& sizes, Element type, const Pixels& pixels, const long long* patches, const void* mean,
    const void* std, void* out, void* stream);

struct BufferSizes {
  int images, tokens, ranks, cut, width;  // B; N; content rows of an image without mask tokens; c; D
  bool class_token, mask_tokens, query_stream;
};

// out (rows, D) from content (B, ranks without the class token, D), position (N, D), mask_token and class_token (D,),
// null where there is none, and perm (B, N), the token at each rank. All contiguous.
Status assemble_streams(
    const BufferSizes& sizes, Element type, const void* content, const void* position, const void* mask_token,
    const void* class_token, const long long* perm, void* out, void* stream);

// Gradient of position (N, D), and of the mask token by token (N, D), in float64 for float64 and else in float32; both
// summed over images in rising order. d_rows (rows, D), rank_of (B, N), the rank of each token.
Status assemble_position_gradient(
    const BufferSizes& sizes, Element type, const void* d_rows, const long long* rank_of, void* d_position,
    void* d_masked, void* stream);

}  // namespace mapet
