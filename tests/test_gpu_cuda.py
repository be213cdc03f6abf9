"""What the CUDA C++ kernels do on a GPU beyond the tests of every backend (tests/test_gpu.py): both forms, Volta's PTX.

Needs the kernels built on that machine: MAPET_BUILD_CUDA=1 pip install --no-build-isolation --no-deps -e .
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import cuda_tools
import pytest
import torch
from budget import FORWARD_FACTOR, GRADIENT_FACTOR, assert_within_budget
from cuda_host import COMPILER, Device, compile_library, forward_call
from test_ops import outputs_and_gradients, with_inputs

from mapet_kernels.backends import available_backends, reason_against_cuda
from mapet_kernels.permuted_embed.op import permuted_embed, permuted_patches_op
from mapet_kernels.registry import REGISTRY, PermutedEmbedShape, TwoStreamShape
from mapet_kernels.two_stream_attention import op
from mapet_kernels.two_stream_attention.problem import Problem, Streams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SPEC = REGISTRY["two_stream_attention"]
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
    for a, b in zip(results(shape, torch.float16, -1), results(shape, torch.float16, STREAMED), strict=True):
        assert torch.equal(a, b)


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
def test_voltas_code_runs_on_newer_gpus(shape: str, tmp_path: Path) -> None:
    """PTX for compute_70, from NVRTC 12, translated by the driver: the forward kernel as a V100 gets it."""
    compiler = cuda_tools.Nvrtc12.find()
    if isinstance(compiler, str):
        pytest.skip(f"needs the CUDA 12 compiler: {compiler}")
    if COMPILER is None:
        pytest.skip("needs a C++ compiler, for what the host passes to the kernel")
    spec = SPEC.shapes[shape]
    case = SPEC.make_case(spec, torch.float16, "cuda")
    size = 64 if spec.size > 32 else 32
    _, ptx = compiler.compile([f"mapet::forward_kernel<__half, {size}>"], "compute_70")
    q = Streams(case.inputs.get("q_content"), case.inputs["q_query"])
    k, v, cut = case.inputs["k"], case.inputs["v"], case.options["cut"]
    problem = Problem(spec.tokens, spec.targets, cut, spec.mask_tokens, spec.size**-0.5)
    out = q.empty_like()
    lse = Streams(*(None if x is None else x.new_empty(x.shape[:3], dtype=torch.float32) for x in (q.content, q.query)))
    library = compile_library(tmp_path)
    call, plan = forward_call(library, VOLTA, q, k, v, out, lse, problem, case.options.get("perm"))
    driver, (name,) = Driver(), cuda_tools.entry_names(ptx)
    blocks = spec.batch * spec.heads * plan.blocks_per_head
    driver.launch(driver.function(ptx, name), blocks, 32 * plan.warps, plan.shared, call)
    torch.cuda.synchronize()
    exact = SPEC.plain(**{name: x.double() for name, x in case.inputs.items()}, **case.options)
    plain = SPEC.plain(**case.inputs, **case.options)
    for a, p, e in zip((out.content, out.query), plain, exact, strict=True):
        if e is not None:
            assert_within_budget(a, p, e, factor=FORWARD_FACTOR, what="output")


EMBED = REGISTRY["permuted_embed"]


def skip_without_embedding_kernels() -> None:
    if reason := reason_against_cuda(torch.device("cuda"), None, products=False):
        pytest.skip(f"backend cuda does not run here: {reason}")


def embedded(shape: PermutedEmbedShape, dtype: torch.dtype, backend: str) -> tuple[list, dict[str, torch.Tensor]]:
    """Output and gradients of the embedding on random input."""
    case = EMBED.make_case(shape, dtype, "cuda")
    return outputs_and_gradients(EMBED.function, with_inputs(case, dtype), case.options, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", EMBED.shapes)
def test_embedding_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    """Also those that attention's kernels refuse on this GPU."""
    skip_without_embedding_kernels()
    case = EMBED.make_case(EMBED.shapes[name], dtype, "cuda")
    exact, exact_gradients = outputs_and_gradients(EMBED.plain, with_inputs(case, torch.float64), case.options)
    plain, plain_gradients = outputs_and_gradients(EMBED.plain, with_inputs(case, dtype), case.options)
    actual, gradients = embedded(EMBED.shapes[name], dtype, "cuda")
    assert_within_budget(actual[0], plain[0], exact[0], factor=FORWARD_FACTOR, what="output")
    for key, gradient in gradients.items():
        parts = gradient, plain_gradients[key], exact_gradients[key]
        assert_within_budget(*parts, factor=GRADIENT_FACTOR, what=f"gradient of {key}")


def test_embedding_repeats_bit_for_bit() -> None:
    skip_without_embedding_kernels()
    shape = PermutedEmbedShape(224, 16, 384, cut=50, batch=64)
    first = None
    for _ in range(50):
        out, gradients = embedded(shape, torch.float32, "cuda")
        result = [*out, gradients["pos_embed"], gradients["mask_token"], gradients["class_token"]]
        first = first or result
        assert all(torch.equal(a, b) for a, b in zip(first, result, strict=True))


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
