// The embedding kernels' own source on the CPU, behind functions that ctypes can call: see csrc/host_emulation.h.
#include "../csrc/permuted_embed.cu"

using namespace mapet;

extern "C" int host_permuted_patches(
    const PatchSizes* sizes, int type, const Pixels* pixels, const long long* patches, const void* mean,
    const void* std, void* out, int descending) {
  emulation::descending() = descending;
  return static_cast<int>(
      permuted_patches(*sizes, static_cast<Element>(type), *pixels, patches, mean, std, out, nullptr));
}

extern "C" int host_assemble(
    const BufferSizes* sizes, int type, const void* content, const void* position, const void* mask_token,
    const void* class_token, const long long* perm, void* out, int descending) {
  emulation::descending() = descending;
  return static_cast<int>(assemble_streams(
      *sizes, static_cast<Element>(type), content, position, mask_token, class_token, perm, out, nullptr));
}

extern "C" int host_position_gradient(
    const BufferSizes* sizes, int type, const void* d_rows, const long long* rank_of, void* d_position,
    void* d_masked, int descending) {
  emulation::descending() = descending;
  return static_cast<int>(assemble_position_gradient(
      *sizes, static_cast<Element>(type), d_rows, rank_of, d_position, d_masked, nullptr));
}

extern "C" const char* host_explain(int status) { return explain(static_cast<EmbedStatus>(status)); }
