// Scores of rows against all centroids with a running list of the lowest: no score is ever stored.
//
// Compile: included by kmeans_assign.cu; or by NVRTC, which needs no other file of this folder than those included
// here:  mapet::scores_kernel<__half, EXACT, AHEAD>
//
//     score = bias_k + scale_i (X_i . C_k)               X.C on tensor cores, added up in float
//     fast      the lowest score of a list and its id, ties to the lowest id
//     exact     the three lowest lower bounds l_k = score - radius_i slope_k with their ids, and
//               reach = min of h_k = l_k + 2 (radius_i slope_k + slack_k) over those k that ever were in the list
//
// h_k is an upper bound, so the nearest centroid has l_k <= reach over all lists of its row. A list whose third entry
// is within reach may have dropped it; else it is among the entries (kernels/kmeans_assign/candidates.py decides).
//
// A block has 128 rows and a share of the centroids, 128 at a time. 8 warps, 4 by 2, take 32 x 64 scores each. Operands
// come 32 features at a time in two buffers: the next are on their way while the present ones are multiplied. AHEAD:
// cp.async brings them (sm_80 and newer); otherwise registers hold them until the products are done. One barrier a
// step. Scores go through shared memory, a 16 x 16 tile of a warp at a time, as WMMA does not say which lane holds
// what. Two lanes look after a row: it has one list for each of them in each of the two warps, ASSIGN_LISTS in all. Who
// writes where follows from sizes alone, there are no atomics: the same bits every time.
//
// Shared memory of a block, in bytes: 2 * 2 * (128 + 128) * 40 operands, rows padded from 32 elements to 40 so that 8
// of them lie in different banks, and 8 * 1024 scores: 49152, which every GPU gives without being asked.
// Registers: 64 of sums, at most 200 a thread in all, nothing spilled (tests/test_cuda_compile.py checks it): one block
// of 8 warps a processor, as a product kernel of this tile has it.
#pragma once

#include "device.cuh"
#include "kmeans_assign.h"

namespace mapet {

constexpr int SIDE = ROWS;  // of one matrix product
constexpr int ASSIGN_WARPS = 8, ASSIGN_THREADS = ASSIGN_WARPS * 32;
constexpr int WARP_ROWS = 32, WARP_CLUSTERS = 64, WARPS_ACROSS = ASSIGN_CLUSTERS / WARP_CLUSTERS;
constexpr int PITCH = ASSIGN_FEATURES + 8;                         // elements from one row of an operand to the next
constexpr int OPERANDS = (ASSIGN_ROWS + ASSIGN_CLUSTERS) * PITCH;  // elements of a buffer: rows, then centroids
constexpr int NOBODY = -1;

static_assert(ASSIGN_ROWS / WARP_ROWS * WARPS_ACROSS == ASSIGN_WARPS);
static_assert(ASSIGN_LISTS == 2 * WARPS_ACROSS);

template <class E>
MAPET_HD constexpr int assign_bytes() {
  return 2 * OPERANDS * static_cast<int>(sizeof(E)) + ASSIGN_WARPS * SIDE * SIDE * 4;
}

struct AssignCall {
  AssignSizes sizes;
  AssignRows rows;
  AssignCentroids centroids;
  AssignLists lists;
  int row_tiles, share_tiles;  // tiles of rows of a group, and of centroids of a share
};

// What a block works on: rows from `first` of a group, the centroid tiles [tile, stop) of the group.
struct AssignTask {
  int group, share, tile, stop;
  Index first;

  MAPET_HD AssignTask(const AssignCall& call, int block)
      : group(block / call.sizes.shares / call.row_tiles), share(block % call.sizes.shares),
        tile(share * call.share_tiles),
        stop(smaller(tile + call.share_tiles, call.sizes.clusters / ASSIGN_CLUSTERS)),
        first(static_cast<Index>(block / call.sizes.shares % call.row_tiles) * ASSIGN_ROWS) {}
};

// 16 bytes of an operand: a thread moves PIECES of them a step, every other ROW_STEP rows.
struct alignas(16) Piece {
  unsigned x[4];
};

constexpr int PIECE = 8, ROW_PIECES = ASSIGN_FEATURES / PIECE;
constexpr int PIECES = (ASSIGN_ROWS + ASSIGN_CLUSTERS) * ROW_PIECES / ASSIGN_THREADS;
constexpr int ROW_STEP = ASSIGN_THREADS / ROW_PIECES;

static_assert(ASSIGN_ROWS % ROW_STEP == 0 && ASSIGN_CLUSTERS % ROW_STEP == 0);

struct alignas(16) Four {
  float x[4];
};

MAPET_DEVICE Four four_of(const float* p) { return *reinterpret_cast<const Four*>(p); }

// Moves the operands of one step after the other into shared memory.
template <class E, bool AHEAD>
struct Feed {
  const AssignCall& call;
  const AssignTask& task;
  const E* row_sources[ASSIGN_ROWS / ROW_STEP];
  const E* centroids;  // this thread's first centroid of the present tile
  int feature;         // of the present step
  int to;              // this thread's first element of a buffer
  Piece held[PIECES];  // not used with AHEAD

  MAPET_DEVICE Feed(const AssignCall& call, const AssignTask& task) : call(call), task(task), feature(0) {
    const int row = threadIdx.x / ROW_PIECES, column = threadIdx.x % ROW_PIECES * PIECE;
    const Index start = task.group * call.sizes.rows + task.first, last = call.sizes.groups * call.sizes.rows - 1;
#pragma unroll
    for (int i = 0; i < ASSIGN_ROWS / ROW_STEP; i++) {
      // Rows beyond the group's last are multiplied too, and ignored: any real row will do.
      const Index at = start + row + i * ROW_STEP;
      row_sources[i] = static_cast<const E*>(call.rows.values) + (at < last ? at : last) * call.rows.stride + column;
    }
    const Index first = static_cast<Index>(task.group) * call.sizes.clusters + task.tile * ASSIGN_CLUSTERS + row;
    centroids = static_cast<const E*>(call.centroids.values) + first * call.sizes.features + column;
    to = row * PITCH + column;
  }

  MAPET_DEVICE const E* source(int i) const {
    constexpr int OF_ROWS = ASSIGN_ROWS / ROW_STEP;
    if (i < OF_ROWS) return row_sources[i] + feature;
    return centroids + static_cast<Index>(i - OF_ROWS) * ROW_STEP * call.sizes.features + feature;
  }

  // Begin to move the present step's operands, and make the next step the present one.
  MAPET_DEVICE void begin(E* buffer) {
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
      if constexpr (AHEAD)
        copy_16(buffer + to + i * ROW_STEP * PITCH, source(i), true);
      else
        held[i] = *reinterpret_cast<const Piece*>(source(i));
    }
    if constexpr (AHEAD) end_of_group();
    feature += ASSIGN_FEATURES;
    if (feature < call.sizes.features) return;
    feature = 0;
    centroids += static_cast<Index>(ASSIGN_CLUSTERS) * call.sizes.features;
  }

  // After the products of the step before: what is held goes into its buffer.
  MAPET_DEVICE void put(E* buffer) {
    if constexpr (!AHEAD) {
#pragma unroll
      for (int i = 0; i < PIECES; i++) *reinterpret_cast<Piece*>(buffer + to + i * ROW_STEP * PITCH) = held[i];
    }
  }
};

MAPET_HD bool comes_before(float a, int i, float b, int j) { return a < b || (a == b && i < j); }

// The lowest of the bounds of one row that one lane has seen, ascending, ties by id.
template <bool EXACT>
struct Lowest {
  static constexpr int SLOTS = assign_slots(EXACT);

  float bounds[SLOTS], reach;
  int ids[SLOTS];

  // Nothing comes before minus infinity with id NOBODY: such a list takes no part.
  MAPET_DEVICE void clear(bool takes_part) {
#pragma unroll
    for (int i = 0; i < SLOTS; i++) {
      bounds[i] = takes_part ? -minus_infinity() : minus_infinity();
      ids[i] = NOBODY;
    }
    reach = -minus_infinity();
  }

  MAPET_DEVICE bool takes(float bound, int id) const {
    return comes_before(bound, id, bounds[SLOTS - 1], ids[SLOTS - 1]);
  }

  MAPET_DEVICE void take(float bound, int id) {
    bounds[SLOTS - 1] = bound;
    ids[SLOTS - 1] = id;
#pragma unroll
    for (int i = SLOTS - 1; i > 0; i--) {
      if (!comes_before(bounds[i], ids[i], bounds[i - 1], ids[i - 1])) continue;
      const float higher = bounds[i - 1];
      const int later = ids[i - 1];
      bounds[i - 1] = bounds[i];
      ids[i - 1] = ids[i];
      bounds[i] = higher;
      ids[i] = later;
    }
  }
};

// One warp's 32 x 64 scores of a tile, and the lists of its rows.
template <class E, bool EXACT>
struct ScoreTile {
  static constexpr int DOWN = WARP_ROWS / SIDE, ACROSS = WARP_CLUSTERS / SIDE;

  const AssignCall& call;
  const AssignTask& task;
  float* scratch;  // SIDE x SIDE scores
  int row, half;   // of this lane: two lanes look after a row
  int warp_row, warp_cluster;
  Sum sums[DOWN][ACROSS];
  Lowest<EXACT> lists[DOWN];
  float scale[DOWN], radius[DOWN];

  MAPET_DEVICE ScoreTile(const AssignCall& call, const AssignTask& task, float* memory)
      : call(call), task(task), scratch(memory + threadIdx.x / 32 * SIDE * SIDE), row(threadIdx.x % 32 / 2),
        half(threadIdx.x % 2), warp_row(threadIdx.x / 32 / WARPS_ACROSS * WARP_ROWS),
        warp_cluster(threadIdx.x / 32 % WARPS_ACROSS * WARP_CLUSTERS) {
#pragma unroll
    for (int m = 0; m < DOWN; m++) {
      const Index i = of_group(m);
      const bool exists = i < call.sizes.rows;
      scale[m] = exists ? call.rows.scale[in_memory(m)] : 0.0f;
      radius[m] = EXACT && exists ? call.rows.radius[in_memory(m)] : 0.0f;
      lists[m].clear(exists && radius[m] < -minus_infinity());
#pragma unroll
      for (int n = 0; n < ACROSS; n++) clear(sums[m][n]);
    }
  }

  MAPET_DEVICE Index of_group(int m) const { return task.first + warp_row + m * SIDE + row; }
  MAPET_DEVICE Index in_memory(int m) const { return task.group * call.sizes.rows + of_group(m); }

  MAPET_DEVICE void multiply(const E* operands) {
    const E* x = operands + warp_row * PITCH;
    const E* c = operands + (ASSIGN_ROWS + warp_cluster) * PITCH;
#pragma unroll
    for (int d = 0; d < ASSIGN_FEATURES; d += SIDE) {
      Left<E> left[DOWN];
#pragma unroll
      for (int m = 0; m < DOWN; m++) load(left[m], x + m * SIDE * PITCH + d, PITCH);
#pragma unroll
      for (int n = 0; n < ACROSS; n++) {
        RightTransposed<E> right;
        load(right, c + n * SIDE * PITCH + d, PITCH);
#pragma unroll
        for (int m = 0; m < DOWN; m++) multiply_add(sums[m][n], left[m], right);
      }
    }
  }

  // Look through the scores of centroids from `tile` on, and clear the sums.
  MAPET_DEVICE void look_through(int tile) {
    const int first = tile * ASSIGN_CLUSTERS + warp_cluster;
#pragma unroll
    for (int n = 0; n < ACROSS; n++)
#pragma unroll
      for (int m = 0; m < DOWN; m++) {
        store(scratch, sums[m][n]);
        clear(sums[m][n]);
        warp_barrier();
        look_at_half_row(m, first + n * SIDE + half * SIDE / 2);
        warp_barrier();
      }
  }

  // Eight scores, those of centroids from k on, four at a time; in turns, so that no two lanes meet in a bank.
  MAPET_DEVICE void look_at_half_row(int m, int k) {
    const Index of_centroids = static_cast<Index>(task.group) * call.sizes.clusters;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int column = (i + row / 2) % 2 * 4;
      const Index at = of_centroids + k + column;
      const Four products = four_of(scratch + row * SIDE + half * SIDE / 2 + column);
      const Four bias = four_of(call.centroids.bias + at);
      Four slope{};
      if constexpr (EXACT) slope = four_of(call.centroids.slope + at);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float bound = products.x[j] * scale[m] + bias.x[j];
        if constexpr (EXACT) bound -= radius[m] * slope.x[j];
        if (!lists[m].takes(bound, k + column + j)) continue;
        lists[m].take(bound, k + column + j);
        if constexpr (EXACT) {
          const float width = radius[m] * slope.x[j] + call.centroids.slack[at + j];
          lists[m].reach = fminf(lists[m].reach, bound + 2 * width);
        }
      }
    }
  }

  MAPET_DEVICE void write() const {
    const Index rows = call.sizes.groups * call.sizes.rows;
    const Index list = static_cast<Index>(task.share) * ASSIGN_LISTS + warp_cluster / WARP_CLUSTERS * 2 + half;
#pragma unroll
    for (int m = 0; m < DOWN; m++) {
      if (of_group(m) >= call.sizes.rows) continue;
      const Index at = in_memory(m);
#pragma unroll
      for (int i = 0; i < Lowest<EXACT>::SLOTS; i++) {
        call.lists.bounds[(list * Lowest<EXACT>::SLOTS + i) * rows + at] = lists[m].bounds[i];
        call.lists.ids[(list * Lowest<EXACT>::SLOTS + i) * rows + at] = lists[m].ids[i];
      }
      if constexpr (EXACT) call.lists.reach[list * rows + at] = lists[m].reach;
    }
  }
};

template <class E, bool EXACT, bool AHEAD>
MAPET_KERNEL(ASSIGN_THREADS) scores_kernel(MAPET_CALL(AssignCall) call) {
  MAPET_SHARED(memory);
  E* buffers = reinterpret_cast<E*>(memory);
  const AssignTask task(call, blockIdx.x);
  ScoreTile<E, EXACT> scores(call, task, reinterpret_cast<float*>(buffers + 2 * OPERANDS));
  Feed<E, AHEAD> feed(call, task);
  const int tile_steps = call.sizes.features / ASSIGN_FEATURES;
  const int steps = larger(task.stop - task.tile, 0) * tile_steps;
  if (steps > 0) {
    feed.begin(buffers);
    feed.put(buffers);
  }
  for (int step = 0, tile = task.tile, left = tile_steps; step < steps; step++) {
    E* next = buffers + (step + 1) % 2 * OPERANDS;
    const bool more = step + 1 < steps;
    if constexpr (AHEAD) finish_copies<0>();
    block_barrier();  // this step's operands are there, and the other buffer is no longer read
    if (more) feed.begin(next);
    scores.multiply(buffers + step % 2 * OPERANDS);
    if (more) feed.put(next);
    if (--left > 0) continue;
    left = tile_steps;
    scores.look_through(tile++);
  }
  scores.write();
}

}  // namespace mapet
