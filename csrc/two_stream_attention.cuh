// Kernels of two-stream attention: forward; gradient of the queries; gradient of the keys and values.
//
// Compile: included by two_stream_attention.cu; or by NVRTC, which needs no other file of this folder than those
// included here:  mapet::forward_kernel<__half, 64>, query_gradient_kernel, key_gradient_kernel  with E = __half or,
// from sm_80 on, __nv_bfloat16, and BD = 32, 64 or 128: the head size D <= BD, padded with zeros.
//
//     forward           O = softmax(scale Q K^T over visible keys) V, and its log-sum-exp
//     query gradient    dQ = scale dS K    with    dS = P * (dO V^T - delta)    and    delta = rowsum(dO * O)
//     key gradient      dV = P^T dO    and    dK = scale dS^T Q
//
// A warp owns a tile of 16 rows (prefix_suffix.cuh) and walks the keys that they see, KEYS at a time; or owns 16 keys
// and walks the rows that see them. No atomics, one order of addition: results are the same bits every time, whether K
// and V are kept in shared memory or streamed. Statistics are those of softmax in base 2, in float.
//
// Shared memory of a block, in bytes, with s = 2 the size of E (plan_rows in two_stream_attention.cu):
//     forward, dQ    K and V of `keys` keys: 2 s BD keys, where keys is all of one head's, rounded up to 16 (resident:
//                    90112 for 344 keys of size 64, and 98304 with the scratch of 4 warps, all that a V100 has), or
//                    stage_keys(BD) times the number of stages (streamed). And scratch for each warp.
//     dK, dV         Q and dO of 32 rows: 128 BD a stage; scratch for each of 4 warps.
// Registers: at most 255 a thread everywhere with nothing spilled, which tests/test_cuda_compile.py checks. At BD = 128
// the operands that a warp keeps lie in its scratch and not in registers.
#pragma once

#include "device.cuh"
#include "two_stream_attention.h"

namespace mapet {

constexpr int WARP_SIZE = 32, MOST_WARPS = 8, KEY_WARPS = 4;
constexpr int TILE = ROWS * ROWS;  // elements of an operand tile
constexpr int KEYS = 32;           // keys in a step of a row tile
constexpr int STEP_TILES = 2;      // row tiles in a step of a key tile
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

// Whether a warp keeps its own operands in registers.
MAPET_HD constexpr bool held(int bd) { return bd <= 64; }

// Keys in a stage of the streamed form.
MAPET_HD constexpr int stage_keys(int bd) { return bd <= 64 ? 64 : 32; }

// Scratch of a warp in bytes, for elements of `size` bytes. It holds one after the other: its rows on their way into
// registers; the scores of a step in float; their weights with one statistic a row; the results on their way out.
MAPET_HD constexpr int work_bytes(int bd, int size) {
  const int scores = ROWS * KEYS * 4, weights = ROWS * KEYS * size + 3 * ROWS * 4;
  const int rows = held(bd) ? ROWS * bd * size : 0;
  const int most = scores > weights ? scores : weights;
  return ((most > rows ? most : rows) + 127) / 128 * 128;
}

// With the operands a warp keeps there where registers do not hold them: Q; Q and dO; or K and V.
MAPET_HD constexpr int warp_bytes(int bd, int size, int operands) {
  return work_bytes(bd, size) + (held(bd) ? 0 : operands * ROWS * bd * size);
}

// Cuts are in [N - T, N - 1] whatever was given: from others would follow rows and keys beyond the buffers.
MAPET_HD Image image_of(const Sizes& sizes, Index cut) {
  const int real = smaller(larger(sizes.tokens - index_below(cut, sizes.tokens), 1), sizes.targets);
  return {sizes.tokens, sizes.targets, sizes.tokens - real, sizes.mask_tokens, sizes.with_content};
}

struct Rule {
  Sizes sizes;
  int first_tiles, tiles;  // row tiles of one head
  bool aligned;            // every row of every tensor starts at a multiple of 16 bytes, and D fills whole ones

  MAPET_HD Image image(Index i_b) const { return image_of(sizes, sizes.cuts ? sizes.cuts[i_b] : sizes.cut); }
};

// One image and head of a problem.
struct Head {
  Index i_b, i_h;
  Image image;
  const long long* perm;  // of this image, or null

  MAPET_HD Head(const Rule& rule, int i_bh)
      : i_b(i_bh / rule.sizes.heads), i_h(i_bh % rule.sizes.heads), image(rule.image(i_b)),
        perm(rule.sizes.perm ? rule.sizes.perm + i_b * rule.sizes.tokens : nullptr) {}

  MAPET_HD Index in_memory(int row) const {
    return perm && row < image.tokens ? index_below(perm[row], image.tokens) : row;
  }

  template <class E>
  MAPET_HD E* key(const View& view, int p) const {
    return static_cast<E*>(view.data) + i_b * view.image + i_h * view.head + in_memory(key_row(image, p)) * view.row;
  }

  template <class E>
  MAPET_HD E* row(const Streams& streams, const Row& row) const {
    const View& view = row.is_query ? streams.query : streams.content;
    const Index at = row.is_query || !row.exists ? row.row : in_memory(row.row);
    return static_cast<E*>(view.data) + i_b * view.image + i_h * view.head + at * view.row;
  }

  MAPET_HD Index statistics(const Rule& rule) const {
    return (i_b * rule.sizes.heads + i_h) * (rule.sizes.tokens + 2 * static_cast<Index>(rule.sizes.targets));
  }
};

// Where element (row, d) of a matrix of BD columns lies in shared memory.
template <int BD>
MAPET_HD constexpr int tile_offset(int row, int d) {
  return (row / ROWS * (BD / ROWS) + d / ROWS) * TILE + row % ROWS * ROWS + d % ROWS;
}

template <class E>
struct alignas(16) Chunk {
  static constexpr int SIZE = 16 / sizeof(E);
  E x[SIZE];
};

struct alignas(16) Quad {
  float x[4];
};

// Copy rows into shared memory with zeros beyond D and for rows without a pointer; thread i of n does its share.
template <class E, int BD, class RowPointer>
MAPET_DEVICE void copy_rows(E* shared, int rows, const Rule& rule, int thread, int threads, RowPointer pointer) {
  constexpr int SIZE = Chunk<E>::SIZE, CHUNKS = BD / SIZE;
  for (int i = thread; i < rows * CHUNKS; i += threads) {
    const int row = i / CHUNKS, d = i % CHUNKS * SIZE;
    const E* from = pointer(row);
    E* to = shared + tile_offset<BD>(row, d);
    if (rule.aligned) {
      const bool real = from != nullptr && d < rule.sizes.size;
      copy_16(to, real ? from + d : nullptr, real);
    } else {
      for (int j = 0; j < SIZE; j++) to[j] = from && d + j < rule.sizes.size ? from[d + j] : from_float<E>(0.0f);
    }
  }
}

// Keys [p0, p0 + count) and their values.
template <class E, int BD>
MAPET_DEVICE void copy_keys(
    E* k_shared, E* v_shared, int p0, int count, const Rule& rule, const Head& head, const View& k, const View& v) {
  const int keys = head.image.keys();
  const auto key = [&](const View& view) {
    return [&, p0](int i) { return p0 + i < keys ? head.key<E>(view, p0 + i) : nullptr; };
  };
  copy_rows<E, BD>(k_shared, count, rule, threadIdx.x, blockDim.x, key(k));
  copy_rows<E, BD>(v_shared, count, rule, threadIdx.x, blockDim.x, key(v));
  end_of_group();
}

// 16 rows that a warp multiplies from the left again and again: in registers, or left in shared memory.
template <class E, int BD, bool HELD = held(BD)>
struct Operand {
  Left<E> fragments[BD / ROWS];

  MAPET_DEVICE void take(const E* shared) {
#pragma unroll
    for (int d = 0; d < BD / ROWS; d++) load(fragments[d], shared + d * TILE);
  }
  MAPET_DEVICE const Left<E>& part(int d) const { return fragments[d]; }
};

template <class E, int BD>
struct Operand<E, BD, false> {
  const E* memory;

  MAPET_DEVICE void take(const E* shared) { memory = shared; }
  MAPET_DEVICE Left<E> part(int d) const {
    Left<E> fragment;
    load(fragment, memory + d * TILE);
    return fragment;
  }
};

// Where in a 16 x 16 tile each element lies that a lane holds of a sum: a byte each, as registers are few.
struct Positions {
  unsigned packed[Sum::num_elements / 4] = {};

  MAPET_DEVICE void set(int i, unsigned position) { packed[i / 4] |= position << i % 4 * 8; }
  MAPET_DEVICE int at(int i) const { return packed[i / 4] >> i % 4 * 8 & 255; }
  MAPET_DEVICE int row(int i) const { return at(i) / ROWS; }
  MAPET_DEVICE int column(int i) const { return at(i) % ROWS; }
};

// What one warp has: its lane and its scratch.
template <class E, int BD>
struct Warp {
  int lane;
  unsigned char* scratch;
  unsigned char* operands;

  MAPET_DEVICE Warp(unsigned char* memory, int operand_count)
      : lane(threadIdx.x % WARP_SIZE),
        scratch(memory + threadIdx.x / WARP_SIZE * warp_bytes(BD, sizeof(E), operand_count)),
        operands(scratch + work_bytes(BD, sizeof(E))) {}

  MAPET_DEVICE int row() const { return lane / 2; }  // two lanes look after a row
  MAPET_DEVICE int half() const { return lane % 2; }
  MAPET_DEVICE float* scores() const { return reinterpret_cast<float*>(scratch); }
  MAPET_DEVICE E* weights() const { return reinterpret_cast<E*>(scratch); }
  MAPET_DEVICE float* statistics() const { return reinterpret_cast<float*>(scratch + ROWS * KEYS * sizeof(E)); }

  // Rows into an operand; `which` counts the operands of this warp.
  template <class RowPointer>
  MAPET_DEVICE void take(Operand<E, BD>& operand, int which, const Rule& rule, RowPointer pointer) const {
    E* to = reinterpret_cast<E*>(held(BD) ? scratch : operands + which * ROWS * BD * sizeof(E));
    copy_rows<E, BD>(to, ROWS, rule, lane, WARP_SIZE, pointer);
    end_of_group();
    finish_copies<0>();
    warp_barrier();
    operand.take(to);
    warp_barrier();
  }

  // WMMA does not say which elements of a sum a lane holds, but that is the same for all sums: look, do not guess.
  MAPET_DEVICE Positions look_at_sums() const {
    for (int i = lane; i < TILE; i += WARP_SIZE) scores()[i] = static_cast<float>(i);
    warp_barrier();
    Sum sum;
    load(sum, scores());
    Positions positions;
#pragma unroll
    for (int i = 0; i < Sum::num_elements; i++) positions.set(i, static_cast<unsigned>(sum.x[i]));
    warp_barrier();
    return positions;
  }

  // factor * sums to the memory of each row; factor and pointer are those of this lane's row, null to write nothing.
  MAPET_DEVICE void write(const Sum (&sums)[BD / ROWS], float factor, E* to, const Rule& rule) const {
#pragma unroll
    for (int d = 0; d < BD / ROWS; d++) {
      warp_barrier();
      store(scores(), sums[d]);
      warp_barrier();
      const int column = d * ROWS + half() * ROWS / 2;
      const float* from = scores() + row() * ROWS + half() * ROWS / 2;
      if (to == nullptr) continue;
#pragma unroll
      for (int j = 0; j < ROWS / 2; j += Chunk<E>::SIZE) {
        Chunk<E> chunk;
#pragma unroll
        for (int i = 0; i < Chunk<E>::SIZE; i++) chunk.x[i] = from_float<E>(from[j + i] * factor);
        if (rule.aligned) {
          if (column + j < rule.sizes.size) *reinterpret_cast<Chunk<E>*>(to + column + j) = chunk;
        } else {
#pragma unroll
          for (int i = 0; i < Chunk<E>::SIZE; i++)
            if (column + j + i < rule.sizes.size) to[column + j + i] = chunk.x[i];
        }
      }
    }
    warp_barrier();
  }
};

// sum = A B^T: 16 own rows against ROWS rows of B in shared memory, UNROLL products at once.
template <class E, int BD, int UNROLL = BD / ROWS>
MAPET_DEVICE void multiply_rows(Sum& sum, const Operand<E, BD>& a, const E* b) {
  clear(sum);
#pragma unroll(UNROLL)
  for (int d = 0; d < BD / ROWS; d++) {
    RightTransposed<E> right;
    load(right, b + d * TILE);
    multiply_add(sum, a.part(d), right);
  }
}

// sums += A B for a 16 x 16 tile A in shared memory and ROWS rows of B.
template <class E, int BD>
MAPET_DEVICE void add_product(Sum (&sums)[BD / ROWS], const E* a, const E* b) {
  Left<E> left;
  load(left, a);
#pragma unroll
  for (int d = 0; d < BD / ROWS; d++) {
    Right<E> right;
    load(right, b + d * TILE);
    multiply_add(sums[d], left, right);
  }
}

struct ForwardCall {
  Rule rule;
  Plan plan;
  View k, v;
  Streams q, out, lse;
};

// One row tile of the forward pass.
template <class E, int BD>
struct ForwardTile {
  using Call = ForwardCall;
  static constexpr int OPERANDS = 1;

  const Call& call;
  const Head& head;
  const Warp<E, BD>& warp;
  RowTile tile;
  KeyRange range;
  Row row;  // of this lane
  Operand<E, BD> q;
  Sum out[BD / ROWS];
  float maximum, total;
  Positions positions;

  MAPET_DEVICE ForwardTile(const Call& call, const Head& head, const Warp<E, BD>& warp, RowTile tile)
      : call(call), head(head), warp(warp), tile(tile), range(keys_of_tile(head.image, tile)),
        row(row_of(head.image, tile, warp.row())), maximum(minus_infinity()), total(0) {
    warp.take(q, 0, call.rule, [&](int r) {
      const Row one = row_of(head.image, tile, r);
      return one.sees ? head.row<E>(call.q, one) : nullptr;
    });
    positions = warp.look_at_sums();
#pragma unroll
    for (int d = 0; d < BD / ROWS; d++) clear(out[d]);
  }

  // Take the keys [p0, p0 + KEYS) into the online softmax.
  MAPET_DEVICE void step(const E* k, const E* v, int p0) {
#pragma unroll
    for (int n = 0; n < KEYS / ROWS; n++) {
      if (!range.meets(p0 + n * ROWS)) continue;
      Sum sum;
      multiply_rows<E, BD>(sum, q, k + n * ROWS * BD);
      store(warp.scores() + n * TILE, sum);
    }
    warp_barrier();
    // Each lane reads half a row, four at a time, rows and halves in turns: no two lanes meet in a bank.
    const int turn = warp.row() / 2 + 2 * warp.half();
    const bool masked = p0 < range.full_lo || p0 + KEYS > range.full_hi;
    const float scale = call.rule.sizes.scale * LOG2_E;
    float x[ROWS];
    float most = minus_infinity();
#pragma unroll
    for (int i = 0; i < ROWS / 4; i++) {
      const int column = (i + turn) % 4 * 4;
      const Quad quad = *reinterpret_cast<const Quad*>(warp.scores() + warp.half() * TILE + warp.row() * ROWS + column);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int p = p0 + warp.half() * ROWS + column + j;
        const bool sees = !masked || visible(head.image, p, row.shift);
        x[4 * i + j] = sees ? quad.x[j] * scale : minus_infinity();
        most = fmaxf(most, x[4 * i + j]);
      }
    }
    most = fmaxf(maximum, fmaxf(most, swap_with_neighbour(most)));
    // A row that has seen no key yet: -inf - -inf would be NaN.
    const float safe = most == minus_infinity() ? 0.0f : most;
    const float factor = exp2f(maximum - safe);
    maximum = most;
    warp_barrier();
    float sum = 0;
#pragma unroll
    for (int i = 0; i < ROWS / 4; i++) {
      E* to = warp.weights() + warp.half() * TILE + warp.row() * ROWS + (i + turn) % 4 * 4;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float weight = exp2f(x[4 * i + j] - safe);
        sum += weight;
        to[j] = from_float<E>(weight);
      }
    }
    total = total * factor + (sum + swap_with_neighbour(sum));
    if (warp.half() == 0) warp.statistics()[warp.row()] = factor;
    warp_barrier();
#pragma unroll
    for (int i = 0; i < Sum::num_elements; i++) {
      const float of_row = warp.statistics()[positions.row(i)];
#pragma unroll
      for (int d = 0; d < BD / ROWS; d++) out[d].x[i] *= of_row;
    }
#pragma unroll
    for (int n = 0; n < KEYS / ROWS; n++)
      if (range.meets(p0 + n * ROWS)) add_product<E, BD>(out, warp.weights() + n * TILE, v + n * ROWS * BD);
    warp_barrier();
  }

  MAPET_DEVICE void finish() {
    const bool sees = row.sees && total > 0;
    E* to = row.exists ? head.row<E>(call.out, row) : nullptr;
    if (row.exists && warp.half() == 0)
      *head.row<float>(call.lse, row) = sees ? (maximum + log2f(total)) * LN_2 : minus_infinity();
    // A row without keys has sums of 0 already.
    warp.write(out, sees ? 1.0f / total : 0.0f, to, call.rule);
  }
};

struct QueryGradientCall {
  Rule rule;
  Plan plan;
  View k, v;
  Streams q, out, lse, d_out, dq;
  float *lse_base_2, *delta;  // for the kernel of the keys: (B, H, N + 2 T)
};

// One row tile of the gradient of the queries.
template <class E, int BD>
struct QueryGradientTile {
  using Call = QueryGradientCall;
  static constexpr int OPERANDS = 2;
  static constexpr int UNROLL = held(BD) ? BD / ROWS : 2;  // more fragments at once would not fit the registers

  const Call& call;
  const Head& head;
  const Warp<E, BD>& warp;
  RowTile tile;
  KeyRange range;
  Row row;
  Operand<E, BD> q, d_out;
  Sum dq[BD / ROWS];
  Positions positions;

  MAPET_DEVICE QueryGradientTile(const Call& call, const Head& head, const Warp<E, BD>& warp, RowTile tile)
      : call(call), head(head), warp(warp), tile(tile), range(keys_of_tile(head.image, tile)),
        row(row_of(head.image, tile, warp.row())) {
    const auto rows = [&](const Streams& streams) {
      return [&](int r) {
        const Row one = row_of(head.image, tile, r);
        return one.sees ? head.row<E>(streams, one) : nullptr;
      };
    };
    warp.take(q, 0, call.rule, rows(call.q));
    warp.take(d_out, 1, call.rule, rows(call.d_out));
    positions = warp.look_at_sums();
    write_statistics();
#pragma unroll
    for (int d = 0; d < BD / ROWS; d++) clear(dq[d]);
  }

  // Sum of a[i] * b[i] over a chunk, or the `left` elements that are left of it.
  MAPET_DEVICE float product(const E* a, const E* b, int left) const {
    float sum = 0;
    if (call.rule.aligned) {
      const Chunk<E> x = *reinterpret_cast<const Chunk<E>*>(a), y = *reinterpret_cast<const Chunk<E>*>(b);
#pragma unroll
      for (int i = 0; i < Chunk<E>::SIZE; i++) sum += to_float(x.x[i]) * to_float(y.x[i]);
    } else {
      for (int i = 0; i < smaller(left, Chunk<E>::SIZE); i++) sum += to_float(a[i]) * to_float(b[i]);
    }
    return sum;
  }

  MAPET_DEVICE void write_statistics() {
    float delta = 0, lse = 0;
    if (row.sees) {
      const E* d_o = head.row<E>(call.d_out, row);
      const E* o = head.row<E>(call.out, row);
      // Two lanes share a row, a chunk each in turns.
      for (int d = warp.half() * Chunk<E>::SIZE; d < call.rule.sizes.size; d += 2 * Chunk<E>::SIZE)
        delta += product(d_o + d, o + d, call.rule.sizes.size - d);
      lse = *head.row<float>(call.lse, row) * LOG2_E;
    }
    delta += swap_with_neighbour(delta);
    if (warp.half() == 0) {
      const Index at = head.statistics(call.rule) + statistic_offset(head.image, tile, warp.row());
      if (row.sees) call.lse_base_2[at] = lse;
      if (row.sees) call.delta[at] = delta;
      warp.statistics()[warp.row()] = lse;
      warp.statistics()[ROWS + warp.row()] = delta;
      warp.statistics()[2 * ROWS + warp.row()] = static_cast<float>(row.shift);
    }
    warp_barrier();
  }

  // Add what the keys [p0, p0 + KEYS) give to dQ / scale.
  MAPET_DEVICE void step(const E* k, const E* v, int p0) {
    const bool masked = p0 < range.full_lo || p0 + KEYS > range.full_hi;
    const float scale = call.rule.sizes.scale * LOG2_E;
#pragma unroll
    for (int n = 0; n < KEYS / ROWS; n++) {
      if (!range.meets(p0 + n * ROWS)) continue;
      Sum scores, d_weights;
      multiply_rows<E, BD, UNROLL>(scores, q, k + n * ROWS * BD);
      multiply_rows<E, BD, UNROLL>(d_weights, d_out, v + n * ROWS * BD);
#pragma unroll
      for (int i = 0; i < Sum::num_elements; i++) {
        const int r = positions.row(i), p = p0 + n * ROWS + positions.column(i);
        const bool sees = !masked || visible(head.image, p, static_cast<int>(warp.statistics()[2 * ROWS + r]));
        const float weight = sees ? exp2f(scores.x[i] * scale - warp.statistics()[r]) : 0.0f;
        const float d_score = weight * (d_weights.x[i] - warp.statistics()[ROWS + r]);
        warp.weights()[n * TILE + positions.at(i)] = from_float<E>(d_score);
      }
    }
    warp_barrier();
#pragma unroll
    for (int n = 0; n < KEYS / ROWS; n++)
      if (range.meets(p0 + n * ROWS)) add_product<E, BD>(dq, warp.weights() + n * TILE, k + n * ROWS * BD);
    warp_barrier();
  }

  MAPET_DEVICE void finish() {
    E* to = row.exists ? head.row<E>(call.dq, row) : nullptr;
    warp.write(dq, call.rule.sizes.scale, to, call.rule);
  }
};

// Walk row tiles with all K and V of one image and head in shared memory: after the copy no warp waits for another.
template <class E, int BD, class Tile>
MAPET_DEVICE void walk_resident(const typename Tile::Call& call, unsigned char* memory) {
  const Rule& rule = call.rule;
  const int warps = blockDim.x / WARP_SIZE;
  const Head head(rule, blockIdx.x / call.plan.blocks_per_head);
  const int keys = tiles_of(head.image.keys(), ROWS) * ROWS;
  E* k = reinterpret_cast<E*>(memory);
  E* v = k + keys * BD;
  const int most_keys = tiles_of(head.image.content_rows(), ROWS) * ROWS;
  const Warp<E, BD> warp(memory + 2 * most_keys * BD * sizeof(E), Tile::OPERANDS);
  copy_keys<E, BD>(k, v, 0, keys, rule, head, call.k, call.v);
  finish_copies<0>();
  block_barrier();
  const int first = blockIdx.x % call.plan.blocks_per_head * warps + threadIdx.x / WARP_SIZE;
  for (int i = first; i < rule.tiles; i += warps * call.plan.blocks_per_head) {
    Tile tile(call, head, warp, row_tile(head.image, rule.first_tiles, i));
    for (int p = tile.range.lo / KEYS * KEYS; p < tile.range.hi; p += KEYS) tile.step(k + p * BD, v + p * BD, p);
    tile.finish();
  }
}

// One row tile a warp, K and V in stages that the block shares.
template <class E, int BD, class Tile>
MAPET_DEVICE void walk_streamed(const typename Tile::Call& call, unsigned char* memory) {
  constexpr int STAGE = stage_keys(BD);
  const Rule& rule = call.rule;
  const int warps = blockDim.x / WARP_SIZE, stages = call.plan.stages;
  const Head head(rule, blockIdx.x / call.plan.blocks_per_head);
  const Warp<E, BD> warp(memory + 2 * stages * STAGE * BD * sizeof(E), Tile::OPERANDS);
  const int first = blockIdx.x % call.plan.blocks_per_head * warps;
  int lo = head.image.keys(), hi = 0;
  for (int i = first; i < smaller(first + warps, rule.tiles); i++) {
    const KeyRange range = keys_of_tile(head.image, row_tile(head.image, rule.first_tiles, i));
    if (range.lo < range.hi) lo = smaller(lo, range.lo);
    hi = larger(hi, range.hi);
  }
  lo = lo / STAGE * STAGE;
  // A warp beyond the last row tile takes one without rows: it must come to the barriers too.
  const int mine = first + threadIdx.x / WARP_SIZE;
  const RowTile nothing = {false, rule.sizes.targets};
  Tile tile(call, head, warp, mine < rule.tiles ? row_tile(head.image, rule.first_tiles, mine) : nothing);
  const auto copy = [&](int p) {
    E* k = reinterpret_cast<E*>(memory) + p / STAGE % stages * 2 * STAGE * BD;
    copy_keys<E, BD>(k, k + STAGE * BD, p, STAGE, rule, head, call.k, call.v);
  };
  if (lo < hi) copy(lo);
  for (int p0 = lo; p0 < hi; p0 += STAGE) {
    const bool ahead = stages > 1 && p0 + STAGE < hi;
    if (ahead) copy(p0 + STAGE);
    if (ahead)
      finish_copies<1>();
    else
      finish_copies<0>();
    block_barrier();
    const E* k = reinterpret_cast<E*>(memory) + p0 / STAGE % stages * 2 * STAGE * BD;
    for (int p = p0; p < p0 + STAGE; p += KEYS)
      if (p + KEYS > tile.range.lo && p < tile.range.hi)
        tile.step(k + (p - p0) * BD, k + (STAGE + p - p0) * BD, p);
    block_barrier();
    if (stages == 1 && p0 + STAGE < hi) copy(p0 + STAGE);
  }
  tile.finish();
}

template <class E, int BD, class Tile>
MAPET_DEVICE void walk(const typename Tile::Call& call, unsigned char* memory) {
  if (call.plan.resident)
    walk_resident<E, BD, Tile>(call, memory);
  else
    walk_streamed<E, BD, Tile>(call, memory);
}

template <class E, int BD>
MAPET_KERNEL(MOST_WARPS* WARP_SIZE) forward_kernel(MAPET_CALL(ForwardCall) call) {
  MAPET_SHARED(memory);
  if constexpr (has_products<E>()) walk<E, BD, ForwardTile<E, BD>>(call, memory);
}

template <class E, int BD>
MAPET_KERNEL(MOST_WARPS* WARP_SIZE) query_gradient_kernel(MAPET_CALL(QueryGradientCall) call) {
  MAPET_SHARED(memory);
  if constexpr (has_products<E>()) walk<E, BD, QueryGradientTile<E, BD>>(call, memory);
}

struct KeyGradientCall {
  Rule rule;
  Plan plan;
  View k, v, dk, dv;
  Streams q, d_out;
  const float *lse_base_2, *delta;
};

// One step's rows in shared memory.
template <class E, int BD>
struct RowStage {
  E* q;  // STEP_TILES * ROWS rows
  E* d_out;
  float* lse;  // infinite for a row that takes no part: its weights are 0
  float* delta;
  int* shift;

  static constexpr int ROW_COUNT = STEP_TILES * ROWS;
  static constexpr int BYTES = 2 * ROW_COUNT * BD * sizeof(E) + 3 * ROW_COUNT * 4;

  MAPET_DEVICE explicit RowStage(unsigned char* memory)
      : q(reinterpret_cast<E*>(memory)), d_out(q + ROW_COUNT * BD),
        lse(reinterpret_cast<float*>(d_out + ROW_COUNT * BD)), delta(lse + ROW_COUNT),
        shift(reinterpret_cast<int*>(delta + ROW_COUNT)) {}
};

// Shared memory of a block of the key gradient.
template <class E, int BD>
MAPET_HD constexpr int key_gradient_bytes(int stages) {
  return stages * RowStage<E, BD>::BYTES + KEY_WARPS * warp_bytes(BD, sizeof(E), 2);
}

// The row tiles [n, n + STEP_TILES) of those that see some key of this block.
template <class E, int BD>
MAPET_DEVICE void copy_row_tiles(
    RowStage<E, BD> stage, int n, const TileRanges& ranges, const KeyGradientCall& call, const Head& head) {
  const auto row_at = [&](int r) {
    const int at = n + r / ROWS;
    if (at >= ranges.count()) return Row{0, true, 0, false, false};
    return row_of(head.image, nth_tile(head.image, ranges, at), r % ROWS);
  };
  const auto rows = [&](const Streams& streams) {
    return [&](int r) {
      const Row row = row_at(r);
      return row.sees ? head.row<E>(streams, row) : nullptr;
    };
  };
  constexpr int COUNT = RowStage<E, BD>::ROW_COUNT;
  copy_rows<E, BD>(stage.q, COUNT, call.rule, threadIdx.x, blockDim.x, rows(call.q));
  copy_rows<E, BD>(stage.d_out, COUNT, call.rule, threadIdx.x, blockDim.x, rows(call.d_out));
  end_of_group();
  const int r = threadIdx.x;
  if (r < COUNT) {
    const Row row = row_at(r);
    const Index at = row.sees ? head.statistics(call.rule) +
                                    statistic_offset(head.image, nth_tile(head.image, ranges, n + r / ROWS), r % ROWS)
                              : 0;
    stage.lse[r] = row.sees ? call.lse_base_2[at] : -minus_infinity();
    stage.delta[r] = row.sees ? call.delta[at] : 0.0f;
    stage.shift[r] = row.shift;
  }
}

// One program: KEY_WARPS tiles of 16 keys, one a warp; rows stream past them.
template <class E, int BD>
MAPET_DEVICE void walk_rows(const KeyGradientCall& call, unsigned char* memory) {
  // Where K and V are not held, all their fragments at once would not fit the registers beside dK and dV.
  constexpr int UNROLL = held(BD) ? BD / ROWS : 1;
  const Rule& rule = call.rule;
  const int stages = call.plan.stages;
  const Head head(rule, blockIdx.x / call.plan.blocks_per_head);
  const Warp<E, BD> warp(memory + stages * RowStage<E, BD>::BYTES, 2);
  const int block_p = blockIdx.x % call.plan.blocks_per_head * KEY_WARPS * ROWS;
  const int p0 = block_p + threadIdx.x / WARP_SIZE * ROWS, keys = head.image.keys();
  const float scale = rule.sizes.scale * LOG2_E;
  const auto key = [&](const View& view) {
    return [&](int i) { return p0 + i < keys ? head.key<E>(view, p0 + i) : nullptr; };
  };
  Operand<E, BD> k, v;
  warp.take(k, 0, rule, key(call.k));
  warp.take(v, 1, rule, key(call.v));
  const Positions positions = warp.look_at_sums();
  Sum dk[BD / ROWS], dv[BD / ROWS];
#pragma unroll
  for (int d = 0; d < BD / ROWS; d++) {
    clear(dk[d]);
    clear(dv[d]);
  }
  E* weights = warp.weights();
  E* d_scores = weights + TILE;
  const auto stage_of = [&](int n) {
    return RowStage<E, BD>(memory + n / STEP_TILES % stages * RowStage<E, BD>::BYTES);
  };
  const TileRanges ranges = tiles_of_keys(head.image, block_p, block_p + KEY_WARPS * ROWS);
  const int count = ranges.count();
  if (count > 0) copy_row_tiles<E, BD>(stage_of(0), 0, ranges, call, head);
  for (int n = 0; n < count; n += STEP_TILES) {
    const int next = n + STEP_TILES;
    const bool ahead = stages > 1 && next < count;
    if (ahead) copy_row_tiles<E, BD>(stage_of(next), next, ranges, call, head);
    if (ahead)
      finish_copies<1>();
    else
      finish_copies<0>();
    block_barrier();
    const RowStage<E, BD> stage = stage_of(n);
    for (int t = 0; t < smaller(STEP_TILES, count - n); t++) {
      const KeyRange range = keys_of_tile(head.image, nth_tile(head.image, ranges, n + t));
      if (!range.meets(p0)) continue;
      const E* q = stage.q + t * ROWS * BD;
      const E* d_out = stage.d_out + t * ROWS * BD;
      // All products transposed: (keys, rows).
      Sum scores, d_weights;
      multiply_rows<E, BD, UNROLL>(scores, k, q);
      multiply_rows<E, BD, UNROLL>(d_weights, v, d_out);
#pragma unroll
      for (int i = 0; i < Sum::num_elements; i++) {
        const int p = p0 + positions.row(i), r = t * ROWS + positions.column(i);
        const bool sees = visible(head.image, p, stage.shift[r]);
        const float weight = sees ? exp2f(scores.x[i] * scale - stage.lse[r]) : 0.0f;
        weights[positions.at(i)] = from_float<E>(weight);
        d_scores[positions.at(i)] = from_float<E>(weight * (d_weights.x[i] - stage.delta[r]));
      }
      warp_barrier();
      add_product<E, BD>(dv, weights, d_out);
      add_product<E, BD>(dk, d_scores, q);
      warp_barrier();
    }
    block_barrier();
    if (stages == 1 && next < count) copy_row_tiles<E, BD>(stage_of(next), next, ranges, call, head);
  }
  const int p = p0 + warp.row();
  const bool exists = p < head.image.content_rows();
  warp.write(dk, rule.sizes.scale, exists ? head.key<E>(call.dk, p) : nullptr, rule);
  warp.write(dv, 1.0f, exists ? head.key<E>(call.dv, p) : nullptr, rule);
}

// Not MAPET_CALL: ptxas then keeps more of the call in registers, and spills at BD = 128 on sm_90.
template <class E, int BD>
MAPET_KERNEL(KEY_WARPS* WARP_SIZE) key_gradient_kernel(KeyGradientCall call) {
  MAPET_SHARED(memory);
  if constexpr (has_products<E>()) walk_rows<E, BD>(call, memory);
}

}  // namespace mapet
