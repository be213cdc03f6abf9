// Kernels of the permuted embedding: patches in permuted order; the flat token buffer; its position gradient.
//
// Compile: included by permuted_embed.cu; or by NVRTC, which needs no other file of this folder than those included
// here:  mapet::permuted_patches_kernel<P, E, V>, assemble_kernel<E, V>, assemble_position_gradient_kernel<E>  with
// E = __half, __nv_bfloat16, float or double; P = unsigned char, or what E is computed in; V elements at a time.
//
//     permuted patches     out[b, r] = (pixels of patch patches[b, r] of image b - mean) / std
//     assemble             rows of the buffer, for token t = perm[b, r] at rank r:
//         A and B    content[b, r] + position[t]      r < ranks; the class token in place of content at rank 0
//         M and G    mask_token + position[t]         r >= cut, once for both streams
//     position gradient    d_position[t] = sum over b of d_rows of token t, A or B and M and G; d_masked[t] of M and G
//
// All three are bound by memory: there is no product of matrices here. Each number is one thread's sum in one order,
// without atomics, so that results are the same bits every time. Indices that are read, patches, perm and rank_of, are
// brought into range: wrong ones give wrong numbers, and no access out of bounds.
//
// Shared memory of a block: of uint8 images the 3 * 256 values that a pixel can become, 3072 bytes (6144 in double), so
// that the two divisions are done once for a block and not for each pixel; nothing else, and nothing elsewhere.
// Registers: at most 64 a thread, so that 32 warps fit a processor, and nothing spilled: tests/test_cuda_compile.py.
#pragma once

#include "device.cuh"
#include "permuted_embed.h"

namespace mapet {

constexpr int EMBED_THREADS = 256, GRADIENT_THREADS = 128, LANES = 32;
constexpr int BLOCK_PATCHES = 8, BLOCK_ROWS = EMBED_THREADS / LANES;  // of one block; a warp makes a row of the buffer
constexpr int CHANNELS = 3, BYTE_VALUES = 256;

// What an element is computed in.
template <class E>
struct WorkOf {
  using Type = float;
};
template <>
struct WorkOf<double> {
  using Type = double;
};
template <class E>
using Work = typename WorkOf<E>::Type;

template <class W>
MAPET_DEVICE W widen(float x) {
  return x;
}
template <class W>
MAPET_DEVICE W widen(double x) {
  return static_cast<W>(x);
}
template <class W, class E>
MAPET_DEVICE W widen(E x) {
  return to_float(x);
}

template <class E>
struct Narrow {
  static MAPET_DEVICE E from(float x) { return from_float<E>(x); }
};
template <>
struct Narrow<float> {
  static MAPET_DEVICE float from(float x) { return x; }
};
template <>
struct Narrow<double> {
  static MAPET_DEVICE double from(double x) { return x; }
};

// V neighbours, read or written at once.
template <class E, int V>
struct alignas(V * sizeof(E)) Pack {
  E x[V];
};

// A GPU faults where a pack is not aligned; a CPU does not mind.
template <class E, int V>
MAPET_DEVICE void check_aligned(const E* p) {
#if !defined(__CUDACC__)
  if (reinterpret_cast<std::size_t>(p) % alignof(Pack<E, V>) != 0) emulation::fail("a pack is not aligned");
#endif
}

template <class E, int V>
MAPET_DEVICE Pack<E, V> read(const E* p) {
  check_aligned<E, V>(p);
  return *reinterpret_cast<const Pack<E, V>*>(p);
}
template <class E, int V>
MAPET_DEVICE void write(E* p, const Pack<E, V>& pack) {
  check_aligned<E, V>(p);
  *reinterpret_cast<Pack<E, V>*>(p) = pack;
}

template <class P>
constexpr bool is_byte = false;
template <>
constexpr bool is_byte<unsigned char> = true;

// Where an element of a patch comes from.
struct Pixel {
  int channel, y, x;  // y and x within the patch
};

// columns of a patch: channel by channel, line by line.
MAPET_HD Pixel pixel_of(int column, int patch) {
  const int line = column / patch;
  return {line / patch, line % patch, column % patch};
}

struct PatchesCall {
  PatchSizes sizes;
  Pixels pixels;
  const long long* patches;
  const void *mean, *std;
  void* out;

  MAPET_HD int rows() const { return sizes.images * sizes.ranks; }
  MAPET_HD int columns() const { return CHANNELS * sizes.patch * sizes.patch; }

  // Offset in the images of a pixel of the patch at `row` of the result.
  MAPET_HD Index offset(int row, const Pixel& at) const {
    const int index = index_below(patches[row], sizes.grid * sizes.grid);
    const Index y = index / sizes.grid * sizes.patch + at.y, x = index % sizes.grid * sizes.patch + at.x;
    return row / sizes.ranks * pixels.image + at.channel * pixels.channel + y * pixels.y + x * pixels.x;
  }
};

template <class W>
MAPET_DEVICE W normalised(const PatchesCall& call, W value, int channel) {
  if (call.mean == nullptr) return value;
  return (value - static_cast<const W*>(call.mean)[channel]) / static_cast<const W*>(call.std)[channel];
}

// A block makes BLOCK_PATCHES rows; a thread V neighbouring columns at a time, which lie in one line of the patch.
template <class P, class E, int V>
MAPET_KERNEL(EMBED_THREADS) permuted_patches_kernel(MAPET_CALL(PatchesCall) call) {
  using W = Work<E>;
  MAPET_SHARED(memory);
  W* table = reinterpret_cast<W*>(memory);
  if constexpr (is_byte<P>) {
    for (int i = threadIdx.x; i < CHANNELS * BYTE_VALUES; i += EMBED_THREADS)
      table[i] = normalised(call, static_cast<W>(i % BYTE_VALUES) / 255, i / BYTE_VALUES);
    block_barrier();
  }
  const int columns = call.columns(), packs = columns / V;
  const int first = blockIdx.x * BLOCK_PATCHES, here = smaller(BLOCK_PATCHES, call.rows() - first);
  for (int i = threadIdx.x; i < here * packs; i += EMBED_THREADS) {
    const int row = first + i / packs;
    const int column = i % packs * V;
    const Pixel at = pixel_of(column, call.sizes.patch);
    const auto in = read<P, V>(static_cast<const P*>(call.pixels.data) + call.offset(row, at));
    Pack<E, V> out;
#pragma unroll
    for (int v = 0; v < V; v++) {
      if constexpr (is_byte<P>)
        out.x[v] = Narrow<E>::from(table[at.channel * BYTE_VALUES + in.x[v]]);
      else
        out.x[v] = Narrow<E>::from(normalised(call, in.x[v], at.channel));
    }
    write<E, V>(static_cast<E*>(call.out) + static_cast<Index>(row) * columns + column, out);
  }
}

// Rows of the flat buffer: the content streams of all images, then their query streams.
struct Buffer {
  BufferSizes sizes;

  MAPET_HD int targets() const { return sizes.tokens - sizes.cut; }
  MAPET_HD int content_rows() const { return sizes.ranks + (sizes.mask_tokens ? targets() : 0); }
  MAPET_HD Index content_row(int i_b, int rank) const { return static_cast<Index>(i_b) * content_rows() + rank; }
  MAPET_HD Index mask_row(int i_b, int i_target) const { return content_row(i_b, sizes.ranks + i_target); }
  MAPET_HD Index query_row(int i_b, int i_target) const {
    return static_cast<Index>(sizes.images) * content_rows() + static_cast<Index>(i_b) * targets() + i_target;
  }

  // Rows to make: those of content, and one for both rows of a target.
  MAPET_HD int made_by_image() const { return sizes.ranks + targets(); }
  MAPET_HD int made() const { return sizes.images * made_by_image(); }
};

struct AssembleCall {
  Buffer buffer;
  const void *content, *position, *mask_token, *class_token;
  const long long* perm;
  void* out;

  // What is added to the position of row i of image b: D numbers.
  template <class E>
  MAPET_HD const E* source(int i_b, int i) const {
    const BufferSizes& s = buffer.sizes;
    if (i >= s.ranks) return static_cast<const E*>(mask_token);
    if (s.class_token && i == 0) return static_cast<const E*>(class_token);
    const Index row = static_cast<Index>(i_b) * (s.ranks - s.class_token) + i - s.class_token;
    return static_cast<const E*>(content) + row * s.width;
  }
};

// A warp makes a row, or the two rows of a target.
template <class E, int V>
MAPET_KERNEL(EMBED_THREADS) assemble_kernel(MAPET_CALL(AssembleCall) call) {
  const Buffer& buffer = call.buffer;
  const BufferSizes& s = buffer.sizes;
  const int row = blockIdx.x * BLOCK_ROWS + threadIdx.x / LANES;
  if (row >= buffer.made()) return;
  const int i_b = row / buffer.made_by_image(), i = row % buffer.made_by_image();
  const bool is_content = i < s.ranks;
  const int i_target = i - s.ranks;
  const E* source = call.source<E>(i_b, i);
  const Index at = static_cast<Index>(i_b) * s.tokens + (is_content ? i : s.cut + i_target);
  const Index token = index_below(call.perm[at], s.tokens);
  const E* position = static_cast<const E*>(call.position) + token * s.width;
  E* out = static_cast<E*>(call.out);
  for (int column = threadIdx.x % LANES * V; column < s.width; column += LANES * V) {
    const auto a = read<E, V>(source + column), b = read<E, V>(position + column);
    Pack<E, V> sum;
#pragma unroll
    for (int v = 0; v < V; v++) sum.x[v] = Narrow<E>::from(widen<Work<E>>(a.x[v]) + widen<Work<E>>(b.x[v]));
    if (is_content || s.mask_tokens) write<E, V>(out + buffer.content_row(i_b, i) * s.width + column, sum);
    if (!is_content && s.query_stream) write<E, V>(out + buffer.query_row(i_b, i_target) * s.width + column, sum);
  }
}

struct PositionGradientCall {
  Buffer buffer;
  const void* d_rows;
  const long long* rank_of;
  void *d_position, *d_masked;
};

// A thread makes one number of each result.
template <class E>
MAPET_KERNEL(GRADIENT_THREADS) assemble_position_gradient_kernel(MAPET_CALL(PositionGradientCall) call) {
  using W = Work<E>;
  const Buffer& buffer = call.buffer;
  const BufferSizes& s = buffer.sizes;
  const int at = blockIdx.x * GRADIENT_THREADS + threadIdx.x, token = at / s.width;
  if (token >= s.tokens) return;
  const E* d_rows = static_cast<const E*>(call.d_rows) + at % s.width;
  W position = 0, masked = 0;
#pragma unroll 4
  for (int i_b = 0; i_b < s.images; i_b++) {
    const int rank = index_below(call.rank_of[static_cast<Index>(i_b) * s.tokens + token], s.tokens);
    if (rank < s.ranks) position += widen<W>(d_rows[buffer.content_row(i_b, rank) * s.width]);
    if (rank < s.cut) continue;
    if (s.mask_tokens) masked += widen<W>(d_rows[buffer.mask_row(i_b, rank - s.cut) * s.width]);
    if (s.query_stream) masked += widen<W>(d_rows[buffer.query_row(i_b, rank - s.cut) * s.width]);
  }
  static_cast<E*>(call.d_position)[at] = Narrow<E>::from(position + masked);
  static_cast<W*>(call.d_masked)[at] = masked;
}

}  // namespace mapet
