// The k-means kernel's own source on the CPU, behind functions that ctypes can call: see csrc/host_emulation.h.
#include "../csrc/kmeans_assign.cu"

using namespace mapet;

#if defined(__FLT16_MAX__)
// Returns what the launcher has against it, or null.
extern "C" const char* host_assign_scores(
    const AssignSizes* sizes, const AssignRows* rows, const AssignCentroids* centroids, int exact,
    const AssignLists* lists, int architecture, int descending, int coarse) {
  emulation::descending() = descending;
  emulation::coarse() = coarse;
  return assign_scores(*sizes, *rows, *centroids, exact, *lists, architecture, nullptr).problem;
}
#endif

// What a launch passes to its kernel, as bytes; returns how many, -1 if there are more than `most`.
extern "C" int host_assign_call(
    const AssignSizes* sizes, const AssignRows* rows, const AssignCentroids* centroids, const AssignLists* lists,
    void* bytes, int most) {
  const AssignCall call = call_of(*sizes, *rows, *centroids, *lists);
  if (static_cast<int>(sizeof call) > most) return -1;
  std::memcpy(bytes, &call, sizeof call);
  return sizeof call;
}

extern "C" int host_assign_shared_bytes() { return assign_bytes<short>(); }

// Rows, centroids and features of a tile; lists of a row and share; slots of a list in the exact and the fast mode.
extern "C" void host_assign_constants(int* values) {
  const int all[] = {ASSIGN_ROWS, ASSIGN_CLUSTERS, ASSIGN_FEATURES, ASSIGN_LISTS, assign_slots(true),
                     assign_slots(false)};
  std::copy(std::begin(all), std::end(all), values);
}
