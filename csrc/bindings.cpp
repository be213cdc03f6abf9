// The kernels as torch operators: the one file that knows torch. It checks what it is given, and fills given outputs.
//
// Compile: setup.py with MAPET_BUILD_CUDA=1, together with the .cu files beside it, as mapet_kernels._C.
// Autograd, autocast and torch.compile live in the ops' op.py, above these operators.
#include <Python.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "kmeans_assign.h"
#include "permuted_embed.h"
#include "two_stream_attention.h"

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// (content, query) of one quantity; content is absent in the last block.
struct Pair {
  const OptionalTensor& content;
  const Tensor& query;
};

void check_shape(const char* name, const Tensor& x, at::IntArrayRef shape, const Tensor& like, bool same_type = true) {
  TORCH_CHECK_VALUE(x.device() == like.device(), name, " must be on ", like.device(), ", got ", x.device());
  TORCH_CHECK_VALUE(x.sizes() == shape, name, " must be ", shape, ", got ", x.sizes());
  TORCH_CHECK_VALUE(
      x.dim() < 4 || x.stride(-1) == 1 || x.size(-1) == 1, name, " must have a last dimension of stride 1, got ",
      x.strides());
  TORCH_CHECK_TYPE(
      !same_type || x.scalar_type() == like.scalar_type(), name, " must be ", like.scalar_type(), ", got ",
      x.scalar_type());
}

mapet::View view(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

mapet::Streams streams(const Pair& pair) {
  const mapet::View query = view(pair.query);
  return {pair.content ? view(*pair.content) : query, query};
}

// Sizes of one call, every tensor checked against them.
struct Call {
  mapet::Sizes sizes;
  const Tensor& like;
  int64_t content_rows;

  Call(
      const Pair& q, const Tensor& k, int64_t tokens, int64_t cut, const OptionalTensor& cuts,
      const OptionalTensor& perm, bool mask_tokens, double scale)
      : like(k) {
    TORCH_CHECK_VALUE(k.is_cuda(), "backend 'cuda' takes tensors on a CUDA device, got ", k.device());
    TORCH_CHECK_VALUE(k.dim() == 4 && q.query.dim() == 4, "q_query and k must be (B, rows, H, D)");
    const int64_t targets = q.query.size(1);
    content_rows = tokens + (mask_tokens ? targets : 0);
    TORCH_CHECK_VALUE(
        tokens >= 1 && targets >= 1 && (cuts || (std::max<int64_t>(0, tokens - targets) <= cut && cut < tokens)),
        "N and T must be positive and the cut in [N - T, N - 1], got N ", tokens, ", T ", targets, " and cut ", cut);
    check_integers("cuts", cuts, {k.size(0)});
    check_integers("perm", perm, {k.size(0), tokens});
    sizes = {
        static_cast<int>(k.size(0)), static_cast<int>(k.size(2)), static_cast<int>(k.size(3)),
        static_cast<int>(tokens), static_cast<int>(targets), static_cast<int>(cut), mask_tokens,
        q.content.has_value(), static_cast<float>(scale), pointer(cuts), pointer(perm)};
  }

  void check_keys(const char* name, const Tensor& x) const {
    check_shape(name, x, {sizes.images, content_rows, sizes.heads, sizes.size}, like);
  }

  void check_rows(const char* name, const Pair& pair) const {
    check_shape(name, pair.query, {sizes.images, sizes.targets, sizes.heads, sizes.size}, like);
    check_content(name, pair);
    if (pair.content) check_shape(name, *pair.content, {sizes.images, content_rows, sizes.heads, sizes.size}, like);
  }

  void check_statistics(const char* name, const Pair& pair) const {
    check_shape(name, pair.query, {sizes.images, sizes.targets, sizes.heads}, like, false);
    check_content(name, pair);
    if (pair.content) check_shape(name, *pair.content, {sizes.images, content_rows, sizes.heads}, like, false);
    TORCH_CHECK_TYPE(pair.query.scalar_type() == at::kFloat, name, " must be Float, got ", pair.query.scalar_type());
  }

  mapet::Type type() const {
    TORCH_CHECK_TYPE(
        like.scalar_type() == at::kHalf || like.scalar_type() == at::kBFloat16,
        "backend 'cuda' takes float16 and bfloat16, got ", like.scalar_type());
    return like.scalar_type() == at::kHalf ? mapet::Type::float16 : mapet::Type::bfloat16;
  }

 private:
  void check_content(const char* name, const Pair& pair) const {
    TORCH_CHECK_VALUE(
        pair.content.has_value() == sizes.with_content, name, " must have a content stream if and only if q has one");
  }

  void check_integers(const char* name, const OptionalTensor& x, at::IntArrayRef shape) const {
    if (!x) return;
    check_shape(name, *x, shape, like, false);
    TORCH_CHECK_TYPE(
        x->scalar_type() == at::kLong && x->is_contiguous(), name, " must be contiguous int64, got ", x->scalar_type());
  }

  static const long long* pointer(const OptionalTensor& x) {
    static_assert(sizeof(long long) == sizeof(int64_t));
    return x ? reinterpret_cast<const long long*>(x->data_ptr<int64_t>()) : nullptr;
  }
};

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

// The current device; shared_limit >= 0 lowers its shared memory, so that a test reaches the streamed form.
mapet::Device describe(int device, int64_t shared_limit) {
  const int architecture = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                           attribute(cudaDevAttrComputeCapabilityMinor, device);
  const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const int limit = shared_limit < 0 ? most : std::min<int64_t>(most, shared_limit);
  return {architecture, attribute(cudaDevAttrMultiProcessorCount, device), limit};
}

// Raise unless all is well, with what was asked for and the CUDA runtime's reason where there is one.
template <class... Parts>
void check_status(mapet::Status status, const Parts&... asked) {
  if (status.ok()) return;
  const auto error = static_cast<cudaError_t>(status.error);
  TORCH_CHECK_VALUE(
      false, "backend 'cuda' cannot ", asked..., ": ", status.problem,
      error == cudaSuccess ? "" : std::string(" (") + cudaGetErrorString(error) + ")");
}

void forward(
    const OptionalTensor& q_content, const Tensor& q_query, const Tensor& k, const Tensor& v,
    const OptionalTensor& out_content, const Tensor& out_query, const OptionalTensor& lse_content,
    const Tensor& lse_query, int64_t tokens, int64_t cut, const OptionalTensor& cuts, const OptionalTensor& perm,
    bool mask_tokens, double scale, int64_t shared_limit) {
  const Pair q{q_content, q_query}, out{out_content, out_query}, lse{lse_content, lse_query};
  const Call call(q, k, tokens, cut, cuts, perm, mask_tokens, scale);
  call.check_keys("k", k);
  call.check_keys("v", v);
  call.check_rows("q", q);
  call.check_rows("out", out);
  call.check_statistics("lse", lse);
  const c10::cuda::CUDAGuard guard(k.device());
  const auto stream = c10::cuda::getCurrentCUDAStream(k.get_device());
  check_status(
      mapet::two_stream_forward(
          call.sizes, call.type(), streams(q), view(k), view(v), streams(out), streams(lse),
          describe(k.get_device(), shared_limit), stream.stream()),
      "run on head size ", call.sizes.size);
}

void backward(
    const OptionalTensor& d_out_content, const Tensor& d_out_query, const OptionalTensor& q_content,
    const Tensor& q_query, const Tensor& k, const Tensor& v, const OptionalTensor& out_content, const Tensor& out_query,
    const OptionalTensor& lse_content, const Tensor& lse_query, const OptionalTensor& dq_content,
    const Tensor& dq_query, const Tensor& dk, const Tensor& dv, const Tensor& workspace, int64_t tokens, int64_t cut,
    const OptionalTensor& cuts, const OptionalTensor& perm, bool mask_tokens, double scale, int64_t shared_limit) {
  const Pair q{q_content, q_query}, out{out_content, out_query}, lse{lse_content, lse_query};
  const Pair d_out{d_out_content, d_out_query}, dq{dq_content, dq_query};
  const Call call(q, k, tokens, cut, cuts, perm, mask_tokens, scale);
  for (const auto& [name, x] : {std::pair{"k", &k}, {"v", &v}, {"dk", &dk}, {"dv", &dv}}) call.check_keys(name, *x);
  for (const auto& [name, pair] : {std::pair{"q", &q}, {"out", &out}, {"d_out", &d_out}, {"dq", &dq}})
    call.check_rows(name, *pair);
  call.check_statistics("lse", lse);
  check_shape(
      "workspace", workspace, {2, call.sizes.images, call.sizes.heads, tokens + 2 * q_query.size(1)}, k, false);
  TORCH_CHECK_TYPE(
      workspace.scalar_type() == at::kFloat && workspace.is_contiguous(), "workspace must be contiguous Float");
  const c10::cuda::CUDAGuard guard(k.device());
  const auto stream = c10::cuda::getCurrentCUDAStream(k.get_device());
  check_status(
      mapet::two_stream_backward(
          call.sizes, call.type(), streams(q), view(k), view(v), streams(out), streams(lse), streams(d_out),
          streams(dq), view(dk), view(dv), workspace.data_ptr<float>(), describe(k.get_device(), shared_limit),
          stream.stream()),
      "run on head size ", call.sizes.size);
}

// The permuted embedding: every tensor is contiguous but the images.
void check_dense(const char* name, const Tensor& x, at::IntArrayRef shape, const Tensor& like, at::ScalarType type) {
  check_shape(name, x, shape, like, false);
  TORCH_CHECK_TYPE(
      x.scalar_type() == type && x.is_contiguous(), name, " must be contiguous ", type, ", got ", x.scalar_type(),
      x.is_contiguous() ? "" : ", not contiguous");
}

mapet::Element element(const Tensor& x) {
  TORCH_CHECK_VALUE(x.is_cuda(), "backend 'cuda' takes tensors on a CUDA device, got ", x.device());
  switch (x.scalar_type()) {
    case at::kHalf: return mapet::Element::float16;
    case at::kBFloat16: return mapet::Element::bfloat16;
    case at::kFloat: return mapet::Element::float32;
    case at::kDouble: return mapet::Element::float64;
    default: TORCH_CHECK_TYPE(false, "backend 'cuda' takes floating-point tensors, got ", x.scalar_type());
  }
}

const void* pointer(const OptionalTensor& x) { return x ? x->data_ptr() : nullptr; }

const long long* integers(const Tensor& x) { return reinterpret_cast<const long long*>(x.data_ptr<int64_t>()); }

void permuted_patches(
    const Tensor& images, const Tensor& patches, const Tensor& out, const OptionalTensor& mean,
    const OptionalTensor& std, int64_t patch_size) {
  const auto work = out.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto type = element(out);
  TORCH_CHECK_VALUE(
      images.dim() == 4 && images.size(1) == 3 && images.size(2) == images.size(3), "images must be (B, 3, S, S), got ",
      images.sizes());
  TORCH_CHECK_VALUE(images.device() == out.device(), "images must be on ", out.device(), ", got ", images.device());
  TORCH_CHECK_TYPE(
      images.scalar_type() == at::kByte || images.scalar_type() == work, "images must be Byte or ", work, ", got ",
      images.scalar_type());
  TORCH_CHECK_VALUE(
      patch_size >= 1 && images.size(2) % patch_size == 0 && patches.dim() == 2,
      "patches must be (B, R) and image size ", images.size(2), " divisible by the patch size, got ", patch_size);
  TORCH_CHECK_VALUE(mean.has_value() == std.has_value(), "give both mean and std, or neither");
  check_dense("patches", patches, {images.size(0), patches.size(1)}, out, at::kLong);
  check_dense("out", out, {images.size(0), patches.size(1), 3 * patch_size * patch_size}, out, out.scalar_type());
  if (mean) check_dense("mean", *mean, {3}, out, work);
  if (std) check_dense("std", *std, {3}, out, work);
  const mapet::PatchSizes sizes{
      static_cast<int>(images.size(0)), static_cast<int>(patches.size(1)),
      static_cast<int>(images.size(2) / patch_size), static_cast<int>(patch_size)};
  const mapet::Pixels pixels{images.data_ptr(),  images.scalar_type() == at::kByte, images.stride(0), images.stride(1),
                             images.stride(2), images.stride(3)};
  const c10::cuda::CUDAGuard guard(out.device());
  const auto stream = c10::cuda::getCurrentCUDAStream(out.get_device());
  check_status(
      mapet::permuted_patches(
          sizes, type, pixels, integers(patches), pointer(mean), pointer(std), out.data_ptr(), stream.stream()),
      "embed ", images.sizes());
}

// Sizes of a buffer (rows, D) of B images of N tokens, which `rows` must have.
mapet::BufferSizes buffer_sizes(
    const char* name, const Tensor& rows, const Tensor& by_image, int64_t ranks, int64_t cut, bool class_token,
    bool mask_tokens, bool query_stream) {
  TORCH_CHECK_VALUE(by_image.dim() == 2 && rows.dim() == 2, "need (B, N) integers and a buffer (rows, D)");
  const int64_t images = by_image.size(0), tokens = by_image.size(1), targets = tokens - cut;
  TORCH_CHECK_VALUE(
      1 <= cut && cut < tokens && (ranks == cut || ranks == tokens), "need a cut in [1, N - 1] and cut or N content ",
      "rows of an image, got N ", tokens, ", cut ", cut, " and ", ranks, " rows");
  check_dense(
      name, rows, {images * (ranks + targets * (mask_tokens + query_stream)), rows.size(1)}, rows, rows.scalar_type());
  check_dense("perm and rank_of", by_image, {images, tokens}, rows, at::kLong);
  return {
      static_cast<int>(images), static_cast<int>(tokens), static_cast<int>(ranks), static_cast<int>(cut),
      static_cast<int>(rows.size(1)), class_token, mask_tokens, query_stream};
}

void assemble_streams(
    const Tensor& content, const Tensor& position, const Tensor& mask_token, const OptionalTensor& class_token,
    const Tensor& perm, const Tensor& out, int64_t cut, bool mask_tokens, bool query_stream) {
  const auto type = element(out);
  TORCH_CHECK_VALUE(content.dim() == 3, "content must be (B, R, D), got ", content.sizes());
  const bool first = class_token.has_value();
  const auto sizes = buffer_sizes(
      "out", out, perm, content.size(1) + first, cut, first, mask_tokens, query_stream);
  const auto dtype = out.scalar_type();
  check_dense("content", content, {sizes.images, sizes.ranks - first, sizes.width}, out, dtype);
  check_dense("pos_embed", position, {sizes.tokens, sizes.width}, out, dtype);
  check_dense("mask_token", mask_token, {sizes.width}, out, dtype);
  if (class_token) check_dense("class_token", *class_token, {sizes.width}, out, dtype);
  const c10::cuda::CUDAGuard guard(out.device());
  const auto stream = c10::cuda::getCurrentCUDAStream(out.get_device());
  check_status(
      mapet::assemble_streams(
          sizes, type, content.data_ptr(), position.data_ptr(), mask_token.data_ptr(), pointer(class_token),
          integers(perm), out.data_ptr(), stream.stream()),
      "assemble ", out.sizes());
}

void assemble_position_gradient(
    const Tensor& d_rows, const Tensor& rank_of, const Tensor& d_position, const Tensor& d_masked, int64_t ranks,
    int64_t cut, bool mask_tokens, bool query_stream) {
  const auto type = element(d_rows);
  const auto sizes = buffer_sizes("d_rows", d_rows, rank_of, ranks, cut, false, mask_tokens, query_stream);
  const auto work = d_rows.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  check_dense("d_position", d_position, {sizes.tokens, sizes.width}, d_rows, d_rows.scalar_type());
  check_dense("d_masked", d_masked, {sizes.tokens, sizes.width}, d_rows, work);
  const c10::cuda::CUDAGuard guard(d_rows.device());
  const auto stream = c10::cuda::getCurrentCUDAStream(d_rows.get_device());
  check_status(
      mapet::assemble_position_gradient(
          sizes, type, d_rows.data_ptr(), integers(rank_of), d_position.data_ptr(), d_masked.data_ptr(),
          stream.stream()),
      "sum the position gradient of ", d_rows.sizes());
}

// k-means assignment: operands are made by kernels/kmeans_assign/bound.py, and all but the rows are contiguous.
void assign_scores(
    const Tensor& rows, const Tensor& scale, const OptionalTensor& radius, const Tensor& centroids, const Tensor& bias,
    const OptionalTensor& slope, const OptionalTensor& slack, const Tensor& bounds, const Tensor& ids,
    const OptionalTensor& reach, int64_t groups, int64_t n, int64_t shares) {
  TORCH_CHECK_VALUE(rows.is_cuda(), "backend 'cuda' takes tensors on a CUDA device, got ", rows.device());
  TORCH_CHECK_VALUE(
      rows.dim() == 2 && centroids.dim() == 2, "rows and centroids must be (G n, D) and (G K, D), got ", rows.sizes(),
      " and ", centroids.sizes());
  TORCH_CHECK_VALUE(
      groups >= 1 && n >= 0 && shares >= 1 && centroids.size(0) % groups == 0, "G and S must be positive, and K whole, "
      "got G ", groups, ", n ", n, ", S ", shares, " and G K ", centroids.size(0));
  const bool exact = reach.has_value();
  TORCH_CHECK_VALUE(
      !exact || (radius && slope && slack), "the exact mode, with reach, needs radius, slope and slack");
  const int64_t total = groups * n, features = centroids.size(1), lists = shares * mapet::ASSIGN_LISTS;
  check_shape("rows", rows, {total, features}, rows, false);
  TORCH_CHECK_TYPE(rows.scalar_type() == at::kHalf, "rows must be ", at::kHalf, ", got ", rows.scalar_type());
  TORCH_CHECK_VALUE(rows.stride(1) == 1, "rows must have a last dimension of stride 1, got ", rows.strides());
  check_dense("centroids", centroids, centroids.sizes(), rows, at::kHalf);
  check_dense("scale", scale, {total}, rows, at::kFloat);
  check_dense("bias", bias, {centroids.size(0)}, rows, at::kFloat);
  check_dense("bounds", bounds, {lists, mapet::assign_slots(exact), total}, rows, at::kFloat);
  check_dense("ids", ids, {lists, mapet::assign_slots(exact), total}, rows, at::kInt);
  if (exact) {
    check_dense("radius", *radius, {total}, rows, at::kFloat);
    check_dense("slope", *slope, {centroids.size(0)}, rows, at::kFloat);
    check_dense("slack", *slack, {centroids.size(0)}, rows, at::kFloat);
    check_dense("reach", *reach, {lists, total}, rows, at::kFloat);
  }
  const auto floats = [](const OptionalTensor& x) { return x ? x->data_ptr<float>() : nullptr; };
  const int64_t clusters = centroids.size(0) / groups;
  TORCH_CHECK_VALUE(
      std::max({groups, clusters, features, shares}) <= std::numeric_limits<int>::max(),
      "G, K, D and S must be below 2^31, got ", groups, ", ", clusters, ", ", features, " and ", shares);
  const mapet::AssignSizes sizes{
      static_cast<int>(groups), n, static_cast<int>(clusters), static_cast<int>(features), static_cast<int>(shares)};
  const c10::cuda::CUDAGuard guard(rows.device());
  const auto stream = c10::cuda::getCurrentCUDAStream(rows.get_device());
  check_status(
      mapet::assign_scores(
          sizes, {rows.data_ptr(), rows.stride(0), floats(scale), floats(radius)},
          {centroids.data_ptr(), floats(bias), floats(slope), floats(slack)}, exact,
          {floats(bounds), ids.data_ptr<int>(), floats(reach)}, describe(rows.get_device(), -1).architecture,
          stream.stream()),
      "assign ", rows.sizes(), " to ", centroids.sizes());
}

bool built_for(int64_t device) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  return mapet::has_kernels_for_current_device();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mapet_kernels, m) {
  m.def(
      "cuda_two_stream_forward(Tensor? q_content, Tensor q_query, Tensor k, Tensor v, Tensor(a!)? out_content, "
      "Tensor(b!) out_query, Tensor(c!)? lse_content, Tensor(d!) lse_query, int tokens, int cut, Tensor? cuts, "
      "Tensor? perm, bool mask_tokens, float scale, int shared_limit=-1) -> ()");
  m.def(
      "cuda_two_stream_backward(Tensor? d_out_content, Tensor d_out_query, Tensor? q_content, Tensor q_query, "
      "Tensor k, Tensor v, Tensor? out_content, Tensor out_query, Tensor? lse_content, Tensor lse_query, "
      "Tensor(a!)? dq_content, Tensor(b!) dq_query, Tensor(c!) dk, Tensor(d!) dv, Tensor(e!) workspace, int tokens, "
      "int cut, Tensor? cuts, Tensor? perm, bool mask_tokens, float scale, int shared_limit=-1) -> ()");
  m.def(
      "cuda_permuted_patches(Tensor images, Tensor patches, Tensor(a!) out, Tensor? mean, Tensor? std, "
      "int patch_size) -> ()");
  m.def(
      "cuda_assemble_streams(Tensor content, Tensor pos_embed, Tensor mask_token, Tensor? class_token, Tensor perm, "
      "Tensor(a!) out, int cut, bool mask_tokens, bool query_stream) -> ()");
  m.def(
      "cuda_assemble_position_gradient(Tensor d_rows, Tensor rank_of, Tensor(a!) d_position, Tensor(b!) d_masked, "
      "int ranks, int cut, bool mask_tokens, bool query_stream) -> ()");
  m.def("cuda_built_for(int device) -> bool", built_for);
  m.def(
      "cuda_assign_scores(Tensor rows, Tensor scale, Tensor? radius, Tensor centroids, Tensor bias, Tensor? slope, "
      "Tensor? slack, Tensor(a!) bounds, Tensor(b!) ids, Tensor(c!)? reach, int groups, int n, int shares) -> ()");
}

TORCH_LIBRARY_IMPL(mapet_kernels, CUDA, m) {
  m.impl("cuda_two_stream_forward", forward);
  m.impl("cuda_two_stream_backward", backward);
  m.impl("cuda_permuted_patches", permuted_patches);
  m.impl("cuda_assemble_streams", assemble_streams);
  m.impl("cuda_assemble_position_gradient", assemble_position_gradient);
  m.impl("cuda_assign_scores", assign_scores);
}

// Importing mapet_kernels._C loads the library, and with it the operators above; the module itself is empty.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
