// The kernels' own source on the CPU, behind functions that ctypes can call: see csrc/host_emulation.h.
#include "../csrc/two_stream_attention.cu"

using namespace mapet;

// Functions that launch return what the launcher has against it, or null.
// views: content and query of q, k, v, content and query of out, of lse.
extern "C" const char* host_forward(const Sizes* sizes, int type, const View* views, const Device* device, int descending) {
  emulation::descending() = descending;
  const Streams q{views[0], views[1]}, out{views[4], views[5]}, lse{views[6], views[7]};
  return two_stream_forward(*sizes, static_cast<Type>(type), q, views[2], views[3], out, lse, *device, nullptr)
      .problem;
}

// What a forward launch passes to its kernel, as bytes; returns how many, -1 if there are more than `most`.
extern "C" int host_forward_call(
    const Sizes* sizes, int type, const View* views, const Device* device, void* bytes, int most) {
  const Streams q{views[0], views[1]}, out{views[4], views[5]}, lse{views[6], views[7]};
  const ForwardCall call =
      plan_forward(*sizes, static_cast<Type>(type), q, views[2], views[3], out, lse, *device);
  if (static_cast<int>(sizeof call) > most) return -1;
  std::memcpy(bytes, &call, sizeof call);
  return sizeof call;
}

// views: as for host_forward, then content and query of d_out, of dq; dk, dv.
extern "C" const char* host_backward(
    const Sizes* sizes, int type, const View* views, float* workspace, const Device* device, int descending) {
  emulation::descending() = descending;
  const Streams q{views[0], views[1]}, out{views[4], views[5]}, lse{views[6], views[7]};
  const Streams d_out{views[8], views[9]}, dq{views[10], views[11]};
  return two_stream_backward(
             *sizes, static_cast<Type>(type), q, views[2], views[3], out, lse, d_out, dq, views[12], views[13],
             workspace, *device, nullptr)
      .problem;
}

extern "C" void host_plan(const Sizes* sizes, int type, int is_backward, const Device* device, Plan* plan) {
  *plan = plan_rows(*sizes, static_cast<Type>(type), is_backward, *device);
}

extern "C" int host_key_gradient_bytes(int size, int stages) {
  switch (padded_size(size)) {
    case 32: return key_gradient_bytes<short, 32>(stages);
    case 64: return key_gradient_bytes<short, 64>(stages);
    default: return key_gradient_bytes<short, 128>(stages);
  }
}
