// Launches of the permuted embedding: element types, whole packs or single elements, how many blocks.
//
// Compile: nvcc -c -O3 -std=c++17 -gencode arch=compute_80,code=sm_80 csrc/permuted_embed.cu
// What is computed, and in what memory and registers: permuted_embed.cuh. The interface: permuted_embed.h.
// Without nvcc, c++ -x c++ -std=c++17 compiles the same source for the CPU (host_emulation.h), for tests.
#include "permuted_embed.cuh"

#include <climits>

#include "launch.cuh"

namespace mapet {
namespace {

constexpr int PIXELS = 4;  // pixels of a line that are read at once

// Elements that are read at once where rows allow it: 16 bytes.
template <class E>
constexpr int packed = 16 / sizeof(E);

bool aligned(const void* p, int bytes) { return reinterpret_cast<unsigned long long>(p) % bytes == 0; }

// Whether a product can be counted in an int, with room for the last block. Offsets in memory are 64 bits wide.
bool counts(Index a, Index b) { return a * b <= INT_MAX - EMBED_THREADS; }

constexpr Status TOO_MANY{"more than 2^31 rows of a result, or numbers in a patch or in the positions"};

// Call run.template operator()<E>() for the element type.
template <class Run>
Status with_element(Element type, const Run& run) {
  switch (type) {
#if defined(__CUDACC__)
    case Element::float16: return run.template operator()<Half>();
    case Element::bfloat16: return run.template operator()<Bfloat>();
#elif defined(__FLT16_MAX__)
    case Element::float16: return run.template operator()<Half>();
#endif
    case Element::float32: return run.template operator()<float>();
    case Element::float64: return run.template operator()<double>();
    default: return {"this build has no kernels for the element type"};
  }
}

struct RunPatches {
  PatchesCall call;
  void* stream;

  template <class E>
  Status operator()() const {
    return call.pixels.is_uint8 ? with_pixels<unsigned char, E>() : with_pixels<Work<E>, E>();
  }

  template <class P, class E>
  Status with_pixels() const {
    const int blocks = tiles_of(call.rows(), BLOCK_PATCHES);
    const int shared = is_byte<P> ? CHANNELS * BYTE_VALUES * sizeof(Work<E>) : 0;
    if (in_packs<P, E>())
      return launch<permuted_patches_kernel<P, E, PIXELS>>(call, blocks, EMBED_THREADS, shared, stream);
    return launch<permuted_patches_kernel<P, E, 1>>(call, blocks, EMBED_THREADS, shared, stream);
  }

  // Whether every PIXELS columns of a row lie side by side in the image, at a multiple of their size.
  template <class P, class E>
  bool in_packs() const {
    const Pixels& p = call.pixels;
    const bool strides = p.x == 1 && p.y % PIXELS == 0 && p.channel % PIXELS == 0 && p.image % PIXELS == 0;
    const bool starts = aligned(p.data, PIXELS * sizeof(P)) && aligned(call.out, PIXELS * sizeof(E));
    return strides && starts && call.sizes.patch % PIXELS == 0;
  }
};

struct RunAssemble {
  AssembleCall call;
  void* stream;

  template <class E>
  Status operator()() const {
    const int blocks = tiles_of(call.buffer.made(), BLOCK_ROWS);
    if (in_packs<E>()) return launch<assemble_kernel<E, packed<E>>>(call, blocks, EMBED_THREADS, 0, stream);
    return launch<assemble_kernel<E, 1>>(call, blocks, EMBED_THREADS, 0, stream);
  }

  template <class E>
  bool in_packs() const {
    bool starts = true;
    for (const void* p : {call.content, call.position, call.mask_token, call.class_token, (const void*)call.out})
      starts = starts && aligned(p, 16);
    return starts && call.buffer.sizes.width % packed<E> == 0;
  }
};

struct RunPositionGradient {
  PositionGradientCall call;
  void* stream;

  template <class E>
  Status operator()() const {
    const int blocks = tiles_of(call.buffer.sizes.tokens * call.buffer.sizes.width, GRADIENT_THREADS);
    return launch<assemble_position_gradient_kernel<E>>(call, blocks, GRADIENT_THREADS, 0, stream);
  }
};

}  // namespace

Status permuted_patches(
    const PatchSizes& sizes, Element type, const Pixels& pixels, const long long* patches, const void* mean,
    const void* std, void* out, void* stream) {
  const Index line = static_cast<Index>(CHANNELS) * BLOCK_PATCHES * sizes.patch;
  if (!counts(sizes.images, sizes.ranks) || !counts(line, sizes.patch)) return TOO_MANY;
  return with_element(type, RunPatches{{sizes, pixels, patches, mean, std, out}, stream});
}

Status assemble_streams(
    const BufferSizes& sizes, Element type, const void* content, const void* position, const void* mask_token,
    const void* class_token, const long long* perm, void* out, void* stream) {
  if (!counts(sizes.images, Buffer{sizes}.made_by_image())) return TOO_MANY;
  return with_element(type, RunAssemble{{{sizes}, content, position, mask_token, class_token, perm, out}, stream});
}

Status assemble_position_gradient(
    const BufferSizes& sizes, Element type, const void* d_rows, const long long* rank_of, void* d_position,
    void* d_masked, void* stream) {
  if (!counts(sizes.tokens, sizes.width)) return TOO_MANY;
  return with_element(type, RunPositionGradient{{{sizes}, d_rows, rank_of, d_position, d_masked}, stream});
}

}  // namespace mapet
