"""What the CUDA C++ kernels do on a GPU beyond the tests of every backend (tests/test_gpu.py): both forms, Volta's PTX.

Needs the kernels built on that machine: MAPET_BUILD_CUDA=1 pip install --no-build-isolation --no-deps -e .
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import cuda_tools
import pytest
import torch
from budget import FORWARD_FACTOR, assert_within_budget
from cuda_host import COMPILER, Device, compile_library, forward_call

from mapet_kernels.backends import available_backends
from mapet_kernels.registry import REGISTRY, TwoStreamShape
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
