// The embedding kernels' own source on the CPU, behind functions that ctypes can call: see csrc/host_emulation.h.
#include "../csrc/permuted_embed.cu"

using namespace mapet;

// Every function returns what the launcher has against it, or null.

extern "C" const char* host_permuted_patches(
    const PatchSizes* sizes, int type, const Pixels* pixels, const long long* patches, const void* mean,
    const void* std, void* out, int descending) {
  emulation::descending() = descending;
  return permuted_patches(*sizes, static_cast<Element>(type), *pixels, patches, mean, std, out, nullptr).problem;
}

extern "C" const char* host_assemble(
    const BufferSizes* sizes, int type, const void* content, const void* position, const void* mask_token,
    const void* class_token, const long long* perm, void* out, int descending) {
  emulation::descending() = descending;
  return assemble_streams(
             *sizes, static_cast<Element>(type), content, position, mask_token, class_token, perm, out, nullptr)
      .problem;
}

extern "C" const char* host_position_gradient(
    const BufferSizes* sizes, int type, const void* d_rows, const long long* rank_of, void* d_position,
    void* d_masked, int descending) {
  emulation::descending() = descending;
  return assemble_position_gradient(
             *sizes, static_cast<Element>(type), d_rows, rank_of, d_position, d_masked, nullptr)
      .problem;
}
