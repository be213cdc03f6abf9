// Launches of the k-means scores: checks, how many blocks, which of the kernel's forms.
//
// Compile: nvcc -c -O3 -std=c++17 -gencode arch=compute_80,code=sm_80 csrc/kmeans_assign.cu
// What is computed: kmeans_assign.cuh, with the account of its 48 KB of shared memory a block and at most 200 registers
// a thread. The interface: kmeans_assign.h.
// Without nvcc, c++ -x c++ -std=c++17 compiles the same source for the CPU (host_emulation.h), for tests.
#include "kmeans_assign.cuh"

#include <climits>
#include <initializer_list>

#include "launch.cuh"

namespace mapet {
namespace {

bool starts_at_16_bytes(std::initializer_list<const void*> pointers) {
  for (const void* p : pointers)
    if (reinterpret_cast<unsigned long long>(p) % 16 != 0) return false;
  return true;
}

constexpr Status BAD_SIZE{
    "centroids must be padded to multiples of 128, features to multiples of 32, blocks be fewer than 2^31"};

Status check(
    const AssignSizes& sizes, const AssignRows& rows, const AssignCentroids& centroids, int architecture) {
  if (architecture < 70) return {"tensor cores need a GPU of sm_70 or newer"};
  const bool padded = sizes.clusters % ASSIGN_CLUSTERS == 0 && sizes.features % ASSIGN_FEATURES == 0;
  if (!padded || sizes.clusters < 1 || sizes.features < 1 || sizes.shares < 1) return BAD_SIZE;
  const bool aligned = starts_at_16_bytes({rows.values, centroids.values, centroids.bias, centroids.slope});
  if (!aligned || rows.stride % 8 != 0) return {"operands must start at multiples of 16 bytes, and rows too"};
  return {};
}

Index row_tiles(const AssignSizes& sizes) { return (sizes.rows + ASSIGN_ROWS - 1) / ASSIGN_ROWS; }

AssignCall call_of(
    const AssignSizes& sizes, const AssignRows& rows, const AssignCentroids& centroids, const AssignLists& lists) {
  const int share_tiles = tiles_of(sizes.clusters / ASSIGN_CLUSTERS, sizes.shares);
  return {sizes, rows, centroids, lists, static_cast<int>(row_tiles(sizes)), share_tiles};
}

}  // namespace

#if defined(__CUDACC__) || defined(__FLT16_MAX__)  // some C++ compilers have no half precision
Status assign_scores(
    const AssignSizes& sizes, const AssignRows& rows, const AssignCentroids& centroids, bool exact,
    const AssignLists& lists, int architecture, void* stream) {
  if (const Status bad = check(sizes, rows, centroids, architecture); !bad.ok()) return bad;
  const Index blocks = sizes.groups * row_tiles(sizes) * sizes.shares;
  if (blocks == 0) return {};
  if (blocks > INT_MAX) return BAD_SIZE;
  const AssignCall call = call_of(sizes, rows, centroids, lists);
  const int count = static_cast<int>(blocks), bytes = assign_bytes<Half>();
  static_assert(assign_bytes<Half>() <= WITHOUT_ASKING);
  if (architecture >= 80)
    return exact ? launch<scores_kernel<Half, true, true>>(call, count, ASSIGN_THREADS, bytes, stream)
                 : launch<scores_kernel<Half, false, true>>(call, count, ASSIGN_THREADS, bytes, stream);
  return exact ? launch<scores_kernel<Half, true, false>>(call, count, ASSIGN_THREADS, bytes, stream)
               : launch<scores_kernel<Half, false, false>>(call, count, ASSIGN_THREADS, bytes, stream);
}
#endif

}  // namespace mapet
