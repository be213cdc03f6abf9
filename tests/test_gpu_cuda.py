"""What the CUDA C++ kernels do on a GPU beyond the tests of every backend (tests/test_gpu.py): both forms, Volta's PTX.

Needs the kernels built on that machine: MAPET_BUILD_CUDA=1 pip install --no-build-isolation --no-deps -e .
"""

from __future__ import annotations

import ctypes
from dataclasses import fields

import cuda_tools
import pytest
import torch
from budget import FORWARD_FACTOR, assert_within_budget
from emulation import AssignHost, Device, forward_call, has_half, launch_arguments, library, poison
from kmeans_checks import FOR_KERNELS, assert_float64_argmin, attack, relu
from op_checks import assert_same_bits, check, run
from test_cuda_kmeans import parts, scored, whole_numbers

from mapet_kernels import kmeans_assign
from mapet_kernels.backends import available_backends, reason_against_cuda, reason_against_listed
from mapet_kernels.kmeans_assign import candidates
from mapet_kernels.kmeans_assign import op as kmeans_op
from mapet_kernels.kmeans_assign.bound import Centroids, Rows, rows_of
from mapet_kernels.kmeans_assign.candidates import Lists
from mapet_kernels.permuted_embed.op import permuted_embed, permuted_patches_op
from mapet_kernels.registry import REGISTRY, PermutedEmbedShape, TwoStreamShape
from mapet_kernels.two_stream_attention import op
from mapet_kernels.two_stream_attention.problem import Problem, Streams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SPEC, EMBED, ASSIGN = (REGISTRY[name] for name in ("two_stream_attention", "permuted_embed", "kmeans_assign"))
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
STREAMED = 64 << 10
"""Bytes of shared memory: K and V of 344 keys do not fit."""
VOLTA = Device(70, 80, 48 << 10)
"""With as much shared memory as a kernel has without asking the driver for more."""


def results(shape: TwoStreamShape, dtype: torch.dtype, shared_limit: int) -> list[torch.Tensor]:
    """Outputs, statistics and gradients with so much shared memory."""
    backend = op._backend("cuda")
    case = SPEC.make_case(shape, dtype, "cuda")
    q = Streams(case.inputs["q_content"], case.inputs["q_query"])
    k, v = case.inputs["k"], case.inputs["v"]
    problem = Problem(shape.tokens, shape.targets, shape.cuts, True, shape.size**-0.5)
    out = q.empty_like()
    lse = Streams(*(x.new_empty(x.shape[:3], dtype=torch.float32) for x in (q.content, q.query)))
    dq, dk, dv = q.empty_like(), torch.empty_like(k), torch.empty_like(v)
    backend.forward(q, k, v, out, lse, problem, None, shared_limit)
    backend.backward(q, q, k, v, out, lse, dq, dk, dv, problem, None, shared_limit)
    return [out.content, out.query, lse.content, lse.query, dq.content, dq.query, dk, dv]


@pytest.mark.parametrize("size", [32, 64])
def test_keys_resident_or_streamed_give_the_same_bits(size: int) -> None:
    if reason := available_backends("cuda", torch.float16)["cuda"]:
        pytest.skip(f"backend cuda does not run here: {reason}")
    shape = TwoStreamShape(197, 50, batch=64, heads=12, size=size)
    assert_same_bits(*(results(shape, torch.float16, limit) for limit in (-1, STREAMED)))


class Driver:
    """The few calls of libcuda that start a kernel from PTX, in torch's context."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")
        torch.cuda.current_stream().synchronize()  # makes torch's context the current one

    def check(self, status: int) -> None:
        assert status == 0, f"CUDA driver status {status}"

    def function(self, ptx: str, name: str) -> ctypes.c_void_p:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self.check(self.library.cuModuleLoadData(ctypes.byref(module), ptx.encode() + b"\0"))
        self.check(self.library.cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
        return function

    def launch(self, function: ctypes.c_void_p, blocks: int, threads: int, shared: int, call: ctypes.Array) -> None:
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(call))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self.check(self.library.cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, shared, stream, arguments, None))


@pytest.mark.parametrize("shape", ["vit", "image_order_cut_per_image", "last_block", "pim"])
def test_voltas_code_runs_on_newer_gpus(shape: str) -> None:
    """PTX for compute_70, from NVRTC 12, translated by the driver: the forward kernel as a V100 gets it."""
    if not has_half():
        pytest.skip("needs a C++ compiler, for what the host passes to the kernel")
    spec = SPEC.shapes[shape]
    case = SPEC.make_case(spec, torch.float16, "cuda")
    size = 64 if spec.size > 32 else 32
    _, ptx = cuda_tools.nvrtc_12().compile([f"mapet::forward_kernel<__half, {size}>"], "compute_70")
    q = Streams(case.inputs.get("q_content"), case.inputs["q_query"])
    k, v, cut = case.inputs["k"], case.inputs["v"], case.options["cut"]
    problem = Problem(spec.tokens, spec.targets, cut, spec.mask_tokens, spec.size**-0.5)
    out = q.empty_like()
    lse = Streams(*(None if x is None else x.new_empty(x.shape[:3], dtype=torch.float32) for x in (q.content, q.query)))
    call, plan = forward_call(VOLTA, q, k, v, out, lse, problem, case.options.get("perm"))
    driver, (name,) = Driver(), cuda_tools.entry_names(ptx)
    blocks = spec.batch * spec.heads * plan.blocks_per_head
    driver.launch(driver.function(ptx, name), blocks, 32 * plan.warps, plan.shared, call)
    torch.cuda.synchronize()
    exact = SPEC.plain(**{name: x.double() for name, x in case.inputs.items()}, **case.options)
    plain = SPEC.plain(**case.inputs, **case.options)
    for a, p, e in zip((out.content, out.query), plain, exact, strict=True):
        if e is not None:
            assert_within_budget(a, p, e, factor=FORWARD_FACTOR, what="output")


def skip_without_embedding_kernels() -> None:
    if reason := reason_against_cuda(torch.device("cuda"), None, products=False):
        pytest.skip(f"backend cuda does not run here: {reason}")


def skip_without_assignment_kernel() -> None:
    if reason := reason_against_listed("cuda", "cuda"):
        pytest.skip(f"backend cuda does not run here: {reason}")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", EMBED.shapes)
def test_embedding_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    """Also those that attention's kernels refuse on this GPU."""
    skip_without_embedding_kernels()
    check(EMBED, EMBED.make_case(EMBED.shapes[name], dtype, "cuda"), dtype, backend="cuda")


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("name", ASSIGN.shapes)
def test_assignment_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    """Also in float32 and bfloat16, which attention's kernels refuse on V100."""
    skip_without_assignment_kernel()
    check(ASSIGN, ASSIGN.make_case(ASSIGN.shapes[name], dtype, "cuda"), dtype, rounding=2, backend="cuda")


def test_embedding_repeats_bit_for_bit() -> None:
    skip_without_embedding_kernels()
    case = EMBED.make_case(PermutedEmbedShape(224, 16, 384, cut=50, batch=64), torch.float32, "cuda")
    weights = [list(case.inputs).index(name) + 1 for name in ("pos_embed", "mask_token", "class_token")]
    first = None
    for _ in range(50):
        results = run(EMBED, case, torch.float32, backend="cuda")
        result = [results[0], *(results[i] for i in weights)]
        first = first or result
        assert_same_bits(result, first)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 14e9, reason="needs 14 GB"
)
def test_embedding_beyond_2_to_the_31_elements() -> None:
    """The last rows of results that are larger: of patches, and of a buffer whose content is the class token alone."""
    skip_without_embedding_kernels()
    batch, generator = 14_400, torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (1, 3, 224, 224), generator=generator).to("cuda", torch.uint8)
    order = torch.rand(196, generator=generator).argsort().cuda().expand(batch, -1)
    patches = permuted_patches_op(
        image.expand(batch, -1, -1, -1), order.contiguous(), 16, None, None, torch.float16, "cuda"
    )
    assert patches.numel() > 2**31
    expected = permuted_patches_op(image, order[:1], 16, None, None, torch.float32, "reference")[0]
    torch.testing.assert_close(patches[-1].float(), expected, rtol=1e-3, atol=1e-3)
    del patches
    numbers = [
        torch.randn(*shape, generator=generator).to("cuda", torch.float16) for shape in ((768, 3, 16, 16), (197, 768))
    ]
    token = numbers[1][0]
    options = {"class_token": token, "target_content": False, "query_stream": False}
    perm = torch.nn.functional.pad(order + 1, (1, 0))

    def rows(count: int, backend: str) -> torch.Tensor:
        images = image.expand(count, -1, -1, -1)
        return permuted_embed(images, numbers[0], None, numbers[1], token, perm[:count], 1, **options, backend=backend)

    large = rows(batch, "cuda")
    assert large.numel() > 2**31 and torch.equal(large[-197:], rows(1, "reference"))


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
def test_assignment_repeats_bit_for_bit(exact: bool) -> None:
    """All lists of the kernel, not only the ids made of them."""
    skip_without_assignment_kernel()
    x, centroids = relu(1, 4000, 256).to("cuda", torch.float16), relu(1, 8000, 256, seed=1).cuda()
    prepared = candidates.prepare(centroids, x.dtype, True, candidates.CONFIG)
    rows, shares, first = rows_of(x, prepared, True), 4, None
    for _ in range(250):
        lists = candidates.empty_lists(shares, 4000, exact, x.device)
        poison(lists)
        kmeans_op._backend("cuda")._scores(rows, prepared, 1, 4000, shares, lists)
        first = first or lists
        assert_same_bits(parts(lists), parts(first))
    assert not first.bounds.isnan().any()


def test_assignment_beyond_2_to_the_31_elements() -> None:
    """The rows of two problems that lie one after the other, read where they lie."""
    skip_without_assignment_kernel()
    if torch.cuda.get_device_properties(0).total_memory < 14e9:
        pytest.skip("needs 14 GB")
    some, centroids = relu(1000, 2048).to("cuda", torch.float16), relu(50, 2048, seed=1).cuda()
    x = some.repeat(1200, 1).view(2, 600_000, 2048)
    assert x.numel() > 2**31
    ids = kmeans_assign(x, torch.stack([centroids, centroids]), backend="cuda")
    expected = kmeans_assign(some, centroids, backend="reference")
    assert torch.equal(ids.view(1200, 1000), expected.expand(1200, 1000))


@pytest.fixture(scope="module")
def volta_scores():
    """Launches PTX for compute_70, from NVRTC 12, that the driver translates: the kernel as a V100 gets it."""
    _, ptx = cuda_tools.nvrtc_12().compile(cuda_tools.ASSIGN_KERNELS, "compute_70", header="kmeans_assign.cuh")
    driver = Driver()
    # Template arguments in the names: exact or not, copies ahead of the products or not.
    functions = {
        exact: driver.function(ptx, next(name for name in cuda_tools.entry_names(ptx) if f"Lb{exact:d}ELb0E" in name))
        for exact in (True, False)
    }

    def scores(rows: Rows, centroids: Centroids, groups: int, n: int, shares: int, lists: Lists) -> None:
        poison(lists)
        call = launch_arguments(rows, centroids, groups, n, shares, lists)
        blocks = groups * -(-n // candidates.CONFIG.rows) * shares
        shared = library("kmeans").host_assign_shared_bytes()
        driver.launch(functions[lists.reach is not None], blocks, 32 * candidates.CONFIG.warps, shared, call)
        torch.cuda.synchronize()

    return scores


@pytest.mark.parametrize("name", FOR_KERNELS)
def test_voltas_assignment_is_the_float64_argmin(volta_scores, name: str) -> None:
    x, centroids = (values.to("cuda") for values in attack(name, for_kernels=True))
    ids, _, _ = candidates.kmeans_assign(x, centroids, True, False, volta_scores)
    assert_float64_argmin(ids, x, centroids)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
@pytest.mark.parametrize("shares", [1, 3])
def test_voltas_lists_are_those_of_the_emulation(volta_scores, shares: int, exact: bool) -> None:
    """Bit for bit, on numbers for which nothing is rounded."""
    operands = whole_numbers(groups=2, n=150, clusters=384, features=64)
    expected = scored(AssignHost(), *operands, 2, shares, exact)
    lists = candidates.empty_lists(shares, 300, exact, torch.device("cuda"))
    volta_scores(*(on_gpu(part) for part in operands), 2, 150, shares, lists)
    assert_same_bits([x.cpu() for x in parts(lists)], parts(expected))


def on_gpu(part: Rows | Centroids) -> Rows | Centroids:
    return type(part)(*(getattr(part, field.name).cuda() for field in fields(part)))
