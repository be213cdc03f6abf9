"""Two-stream attention in CUDA C++ without a GPU, beyond what test_ops.py runs: its forms, limits, how it is built."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import cuda_tools
import pytest
import torch
from emulation import AHEAD, RESIDENT, STREAMED, TYPES, AttentionHost, Device, Plan, Sizes, emulated_attention, library
from op_checks import GARBAGE, Fences, assert_same_bits, check, run

from mapet_kernels import two_stream_attention
from mapet_kernels.registry import REGISTRY, TwoStreamShape
from mapet_kernels.two_stream_attention.problem import Problem, Streams

ROOT = Path(__file__).parent.parent
SPEC = REGISTRY["two_stream_attention"]
V100, T4, A100, H200 = (
    Device(a, n, cuda_tools.SHARED_LIMITS[a]) for a, n in ((70, 80), (75, 40), (80, 108), (90, 132))
)


@pytest.mark.parametrize("shape", SPEC.shapes)
def test_the_same_bits_whatever_the_form_and_the_order_of_threads(shape: str) -> None:
    """K and V resident or streamed, one or two stages, threads and blocks ascending and descending."""
    case = SPEC.make_case(SPEC.shapes[shape], torch.float32)
    with emulated_attention() as use:
        results = run(SPEC, case, torch.float32)
        for device, descending in ((STREAMED, False), (AHEAD, True)):
            use.host = AttentionHost(device, descending)
            assert_same_bits(run(SPEC, case, torch.float32), results)


@pytest.mark.parametrize("size", [1, 3, 40, 96, 128])
@pytest.mark.parametrize("device", [RESIDENT, AHEAD], ids=["resident", "ahead"])
def test_head_sizes(device: Device, size: int) -> None:
    """Padded to 32, 64 or 128; sizes that fill no whole 16 bytes are copied by the element."""
    with emulated_attention(device):
        check(SPEC, SPEC.make_case(TwoStreamShape(37, 11, size=size, batch=1), torch.float32), torch.float32)


@pytest.mark.parametrize("scale", [0.01, 3.0])
def test_small_and_large_scales(scale: float) -> None:
    case = SPEC.make_case(TwoStreamShape(23, 9), torch.float32)
    with emulated_attention():
        exact, actual = (
            two_stream_attention(**case.inputs, **case.options, scale=scale, backend=name)
            for name in ("reference", "cuda")
        )
    torch.testing.assert_close(actual, exact)


@pytest.mark.parametrize("with_content", [True, False])
@pytest.mark.parametrize("mask_tokens", [True, False])
@pytest.mark.parametrize("device", [RESIDENT, AHEAD], ids=["resident", "ahead"])
def test_garbage_cuts_and_permutations_stay_within_the_buffers(
    device: Device, mask_tokens: bool, with_content: bool
) -> None:
    """Wrong numbers, but no read of what lies around the buffers (NaN would show) and no write to it."""
    tokens, targets, heads, size = 25, 12, 2, 16
    generator, host = torch.Generator().manual_seed(1), AttentionHost(device, fill=7.0)
    perm = torch.randint(-tokens, 2 * tokens, (1, tokens), generator=generator)
    perm[0, : len(GARBAGE)] = GARBAGE
    rows = tokens + targets * mask_tokens

    for cut in (*GARBAGE.tolist(), -30, 24):
        fences = Fences()

        def streams(*last: int, fences: Fences = fences) -> Streams:
            content, query = (fences.fenced(1, n, heads, *last) for n in (rows, targets))
            return Streams(content if with_content else None, query)

        q, d_out = streams(size), streams(size)
        out, dq, lse = streams(size), streams(size), streams()
        k, v, dk, dv = (fences.fenced(1, rows, heads, size) for _ in range(4))
        problem = Problem(tokens, targets, torch.tensor([cut]), mask_tokens, 0.25)
        host.forward(q, k, v, out, lse, problem, perm)
        host.backward(d_out, q, k, v, out, lse, dq, dk, dv, problem, perm)
        fences.assert_whole()
        assert not (out.query == 7).all(), "the kernels did not run"


def test_what_the_launcher_refuses() -> None:
    def refusal(size: int, type: int, device: Device) -> bytes:
        nothing = (ctypes.c_longlong * 32)()
        return library("attention").host_forward(
            ctypes.byref(Sizes(1, 1, size)), type, nothing, ctypes.byref(device), 0
        )

    assert refusal(129, TYPES[torch.float16], V100) == b"head sizes are 1 to 128"
    assert refusal(64, TYPES[torch.bfloat16], T4).endswith(b"bfloat16 one of sm_80 or newer")
    few = Device(70, 80, 1024)
    assert refusal(64, TYPES[torch.float16], few) == b"a block needs more shared memory than this GPU has"


def plan(device: Device, size: int, *, heads: int = 768, backward: bool = False) -> Plan:
    sizes, result = Sizes(heads, 1, size, 197, 147, 50, True, True), Plan()
    library("attention").host_plan(ctypes.byref(sizes), 0, backward, ctypes.byref(device), ctypes.byref(result))
    return result


@pytest.mark.parametrize("backward", [False, True])
def test_where_keys_and_values_stay(backward: bool) -> None:
    """344 keys of size 64 fit a V100's 96 KB, to the byte, and not a T4's 64 KB."""
    v100 = plan(V100, 64, backward=backward)
    assert (v100.resident, v100.warps, v100.shared) == (True, 4, 96 << 10)
    assert not plan(T4, 64, backward=backward).resident
    assert plan(H200, 64, backward=backward).warps == 8


@pytest.mark.parametrize("size", [16, 32, 64, 96, 128])
def test_shared_memory_is_within_every_limit(size: int) -> None:
    for device in (V100, T4, A100, H200):
        plans = [
            plan(device, size, heads=heads, backward=backward) for heads in (12, 768) for backward in (False, True)
        ]
        assert all(0 < one.shared <= device.shared_limit for one in plans)
        stages = 2 if device.architecture >= 80 else 1
        assert 0 < library("attention").host_key_gradient_bytes(size, stages) <= device.shared_limit


def run_setup(path: str, **environment: str) -> subprocess.CompletedProcess:
    """setup.py with PATH and variables, asked for its name only."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH")}
    return subprocess.run(
        [sys.executable, "setup.py", "--name"], capture_output=True, text=True, check=False, cwd=ROOT,
        env=inherited | {"PATH": path} | environment,
    )  # fmt: skip


def test_setup_builds_kernels_only_when_asked_and_says_what_is_missing(tmp_path: Path) -> None:
    asked = {"MAPET_BUILD_CUDA": "1"}
    assert run_setup(str(tmp_path)).returncode == 0, "without nvcc the package is pure Python"
    refused = run_setup(str(tmp_path), **asked)
    assert refused.returncode != 0 and "needs nvcc on PATH" in refused.stderr
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho compute_75\necho compute_80\necho '#$ TOP={tmp_path}/toolkit/bin/..' >&2\n")
    nvcc.chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    refused = run_setup(path, **asked, TORCH_CUDA_ARCH_LIST="7.0")
    assert refused.returncode != 0 and "it knows 7.5, 8.0. CUDA 12 is the last with 7.0" in refused.stderr
    (tmp_path / "torch.py").write_text("import os\nraise ImportError('toolkit ' + os.environ['CUDA_HOME'])")
    refused = run_setup(path, **asked, PYTHONPATH=str(tmp_path))
    assert refused.returncode != 0 and "no-build-isolation" in refused.stderr
    assert f"toolkit {tmp_path}/toolkit)" in refused.stderr, "of the nvcc that is run, wherever PATH finds it"
