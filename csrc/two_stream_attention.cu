// Launches of two-stream attention: which kernel, how many blocks, how much shared memory.
//
// Compile: nvcc -c -O3 -std=c++17 -gencode arch=compute_80,code=sm_80 csrc/two_stream_attention.cu
// What is computed, and in what memory and registers: two_stream_attention.cuh. The interface: two_stream_attention.h.
// Without nvcc, c++ -x c++ -std=c++17 compiles the same source for the CPU (host_emulation.h), for tests.
#include "two_stream_attention.cuh"

#include "launch.cuh"

namespace mapet {
namespace {

int padded_size(int size) { return size <= 32 ? 32 : size <= 64 ? 64 : 128; }

int bytes_of(Type type) { return type == Type::float32 ? 4 : 2; }

bool rows_aligned(const View& view, int bytes) {
  const auto start = reinterpret_cast<unsigned long long>(view.data);
  return start % 16 == 0 && view.image * bytes % 16 == 0 && view.row * bytes % 16 == 0 && view.head * bytes % 16 == 0;
}

template <class... Views>
Rule rule_of(const Sizes& sizes, Type type, const Views&... views) {
  const Image image = image_of(sizes, sizes.cut);
  const int first = first_tiles(image, sizes.cuts == nullptr), bytes = bytes_of(type);
  const bool aligned = sizes.size * bytes % 16 == 0 && (rows_aligned(views, bytes) && ...);
  return {sizes, first, first + target_tiles(image), aligned};
}

template <auto KERNEL, class Call>
Status launch_planned(const Call& call, int warps, void* stream) {
  const int blocks = call.rule.sizes.images * call.rule.sizes.heads * call.plan.blocks_per_head;
  return launch<KERNEL>(call, blocks, warps * WARP_SIZE, call.plan.shared, stream);
}

constexpr Status NO_SUCH_SIZE{"head sizes are 1 to 128"};
constexpr Status NO_SUCH_TYPE{"float16 needs a GPU of sm_70 or newer, bfloat16 one of sm_80 or newer"};
constexpr Status TOO_MUCH_MEMORY{"a block needs more shared memory than this GPU has"};

Status check(const Sizes& sizes, Type type, Device device) {
  if (sizes.size < 1 || sizes.size > 128) return NO_SUCH_SIZE;
  if (device.architecture < 70 || (type == Type::bfloat16 && device.architecture < 80)) return NO_SUCH_TYPE;
  return {};
}

// Call run.template operator()<E, BD>() for the element type and the padded head size.
template <class E, class Run>
Status with_size(int size, const Run& run) {
  switch (padded_size(size)) {
    case 32: return run.template operator()<E, 32>();
    case 64: return run.template operator()<E, 64>();
    default: return run.template operator()<E, 128>();
  }
}

template <class Run>
Status with_type(const Sizes& sizes, Type type, const Run& run) {
#if defined(__CUDACC__)
  if (type == Type::float16) return with_size<Half>(sizes.size, run);
  if (type == Type::bfloat16) return with_size<Bfloat>(sizes.size, run);
#else
#if defined(__FLT16_MAX__)
  if (type == Type::float16) return with_size<Half>(sizes.size, run);
#endif
  if (type == Type::float32) return with_size<float>(sizes.size, run);
#endif
  return NO_SUCH_TYPE;
}

struct RunForward {
  ForwardCall call;
  void* stream;

  template <class E, int BD>
  Status operator()() const {
    return launch_planned<forward_kernel<E, BD>>(call, call.plan.warps, stream);
  }
};

struct RunQueryGradient {
  QueryGradientCall call;
  void* stream;

  template <class E, int BD>
  Status operator()() const {
    return launch_planned<query_gradient_kernel<E, BD>>(call, call.plan.warps, stream);
  }
};

struct RunKeyGradient {
  KeyGradientCall call;
  Device device;
  void* stream;

  template <class E, int BD>
  Status operator()() const {
    KeyGradientCall planned = call;
    planned.plan.shared = key_gradient_bytes<E, BD>(call.plan.stages);
    if (planned.plan.shared > device.shared_limit) return TOO_MUCH_MEMORY;
    return launch_planned<key_gradient_kernel<E, BD>>(planned, KEY_WARPS, stream);
  }
};

// Copies that run ahead of the products need hardware for it.
int stages_of(Device device) { return device.architecture >= 80 ? 2 : 1; }

}  // namespace

bool has_kernels_for_current_device() {
#if defined(__CUDACC__)
  cudaFuncAttributes attributes;
  const bool found = cudaFuncGetAttributes(&attributes, forward_kernel<Half, 64>) == cudaSuccess;
  if (!found) cudaGetLastError();
  return found;
#else
  return true;
#endif
}

Plan plan_rows(const Sizes& sizes, Type type, bool is_backward, Device device) {
  const Rule rule = rule_of(sizes, type);
  const int bd = padded_size(sizes.size), bytes = bytes_of(type), operands = is_backward ? 2 : 1;
  const int scratch = warp_bytes(bd, bytes, operands);
  const int rows = sizes.tokens + (sizes.mask_tokens ? sizes.targets : 0);
  const Index resident = 2LL * tiles_of(rows, ROWS) * ROWS * bd * bytes;
  // One block a head: with fewer heads than processors some would have nothing to do.
  const bool enough = sizes.images * sizes.heads >= device.processors;
  for (int warps = MOST_WARPS; warps >= MOST_WARPS / 2 && enough; warps /= 2)
    if (resident + warps * scratch <= device.shared_limit)
      return {true, warps, 1, 1, static_cast<int>(resident) + warps * scratch};
  const int warps = MOST_WARPS / 2, stages = stages_of(device);
  const int shared = 2 * stages * stage_keys(bd) * bd * bytes + warps * scratch;
  return {false, warps, stages, tiles_of(rule.tiles, warps), shared};
}

ForwardCall plan_forward(
    const Sizes& sizes, Type type, Streams q, View k, View v, Streams out, Streams lse, Device device) {
  const Rule rule = rule_of(sizes, type, q.content, q.query, k, v, out.content, out.query);
  return {rule, plan_rows(sizes, type, false, device), k, v, q, out, lse};
}

Status two_stream_forward(
    const Sizes& sizes, Type type, Streams q, View k, View v, Streams out, Streams lse, Device device, void* stream) {
  if (const Status bad = check(sizes, type, device); !bad.ok()) return bad;
  const ForwardCall call = plan_forward(sizes, type, q, k, v, out, lse, device);
  if (call.plan.shared > device.shared_limit) return TOO_MUCH_MEMORY;
  return with_type(sizes, type, RunForward{call, stream});
}

Status two_stream_backward(
    const Sizes& sizes, Type type, Streams q, View k, View v, Streams out, Streams lse, Streams d_out, Streams dq,
    View dk, View dv, float* workspace, Device device, void* stream) {
  if (const Status bad = check(sizes, type, device); !bad.ok()) return bad;
  const Rule rule = rule_of(
      sizes, type, q.content, q.query, k, v, out.content, out.query, d_out.content, d_out.query, dq.content, dq.query,
      dk, dv);
  const Plan plan = plan_rows(sizes, type, true, device);
  if (plan.shared > device.shared_limit) return TOO_MUCH_MEMORY;
  float* delta = workspace + static_cast<Index>(sizes.images) * sizes.heads * (sizes.tokens + 2LL * sizes.targets);
  const RunQueryGradient rows{{rule, plan, k, v, q, out, lse, d_out, dq, workspace, delta}, stream};
  if (const Status bad = with_type(sizes, type, rows); !bad.ok()) return bad;
  const int key_rows = sizes.tokens + (sizes.mask_tokens ? sizes.targets : 0);
  const Plan key_plan{false, KEY_WARPS, stages_of(device), tiles_of(key_rows, KEY_WARPS * ROWS), 0};
  return with_type(
      sizes, type, RunKeyGradient{{rule, key_plan, k, v, dk, dv, q, d_out, workspace, delta}, device, stream});
}

}  // namespace mapet
