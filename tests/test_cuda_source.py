"""The CUDA C++ kernels without a GPU: their own source run on the CPU, and compiled for every kind of GPU.

csrc/host_emulation.h runs a block's threads one by one from barrier to barrier, so that index maps, tile schedules and
the online softmax are tested as the GPU gets them. nvcc compiles for sm_75, 80 and 90, NVRTC of CUDA 12 for sm_70.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import cuda_tools
import pytest
import torch
from budget import FORWARD_FACTOR, GRADIENT_FACTOR, assert_within_budget
from cuda_host import COMPILER, TYPES, Device, HostBackend, Plan, Sizes, compile_library, views
from test_ops import outputs_and_gradients, with_inputs

from mapet_kernels import backends
from mapet_kernels.registry import REGISTRY, TwoStreamShape
from mapet_kernels.two_stream_attention import op
from mapet_kernels.two_stream_attention.problem import Streams

ROOT = Path(__file__).parent.parent
SPEC = REGISTRY["two_stream_attention"]
PLENTY = 1 << 20  # bytes: float32, which only the host has, needs more shared memory than a GPU's
RESIDENT, STREAMED, AHEAD = Device(70, 1, PLENTY), Device(70, 1000, PLENTY), Device(80, 1000, PLENTY)
V100, T4, A100, H200 = (
    Device(a, n, cuda_tools.SHARED_LIMITS[a]) for a, n in ((70, 80), (75, 40), (80, 108), (90, 132))
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    return compile_library(tmp_path_factory.mktemp("cuda_host"))


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch, library: ctypes.CDLL):
    """use(device, descending) makes the op take the emulated kernels."""

    def use(device: Device, descending: bool = False) -> None:
        monkeypatch.setattr(op, "choose_backend", lambda *_: "cuda")
        monkeypatch.setattr(op, "_backend", lambda name: HostBackend(library, device, descending))

    return use


def check(case, dtype: torch.dtype, inputs=None) -> list[torch.Tensor]:
    """Results of the op, each within the error budget against float64."""
    exact, exact_gradients = outputs_and_gradients(SPEC.plain, with_inputs(case, torch.float64), case.options)
    plain, plain_gradients = outputs_and_gradients(SPEC.plain, with_inputs(case, dtype), case.options)
    actual, gradients = outputs_and_gradients(SPEC.function, inputs or with_inputs(case, dtype), case.options)
    for i, parts in enumerate(zip(actual, plain, exact, strict=True)):
        assert_within_budget(*parts, factor=FORWARD_FACTOR, what=f"output {i}")
    for name, gradient in gradients.items():
        parts = gradient, plain_gradients[name], exact_gradients[name]
        assert_within_budget(*parts, factor=GRADIENT_FACTOR, what=f"gradient of {name}")
    return [*actual, *gradients.values()]


@pytest.mark.parametrize("shape", SPEC.shapes)
def test_kernels_on_the_host_are_within_budget(use, shape: str) -> None:
    """And the same bits with K and V resident or streamed, one or two stages, threads in either order."""
    case = SPEC.make_case(SPEC.shapes[shape], torch.float32)
    use(RESIDENT)
    results = check(case, torch.float32)
    for device, descending in ((STREAMED, False), (AHEAD, True)):
        use(device, descending)
        out, gradients = outputs_and_gradients(SPEC.function, with_inputs(case, torch.float32), case.options)
        assert all(torch.equal(a, b) for a, b in zip(results, [*out, *gradients.values()], strict=True))


@pytest.mark.parametrize("shape", [name for name in SPEC.shapes if name not in ("vit", "long")])
def test_kernels_on_the_host_in_half_precision(use, library: ctypes.CDLL, shape: str) -> None:
    sizes = Sizes(0, 0, 32)  # no image: asks for the type only
    if library.host_forward(ctypes.byref(sizes), TYPES[torch.float16], _no_views(), ctypes.byref(RESIDENT), 0):
        pytest.skip("the C++ compiler has no _Float16")
    use(RESIDENT, True)
    check(SPEC.make_case(SPEC.shapes[shape], torch.float16), torch.float16)


@pytest.mark.parametrize("size", [1, 3, 40, 96, 128])
@pytest.mark.parametrize("device", [RESIDENT, AHEAD], ids=["resident", "ahead"])
def test_head_sizes(use, device: Device, size: int) -> None:
    """Padded to 32, 64 or 128; sizes that fill no whole 16 bytes are copied by the element."""
    use(device)
    check(SPEC.make_case(TwoStreamShape(37, 11, size=size, batch=1), torch.float32), torch.float32)


def test_strided_inputs_with_poisoned_gaps(use) -> None:
    use(AHEAD)
    case = SPEC.make_case(SPEC.shapes["image_order_cut_per_image"], torch.float32)
    check(case, torch.float32, with_inputs(case, torch.float32, strided=True))


@pytest.mark.parametrize("scale", [0.01, 3.0])
def test_small_and_large_scales(use, scale: float) -> None:
    case = SPEC.make_case(TwoStreamShape(23, 9), torch.float32)
    exact = op.two_stream_attention(**case.inputs, **case.options, scale=scale, backend="reference")
    use(RESIDENT)
    actual = op.two_stream_attention(**case.inputs, **case.options, scale=scale)
    for a, e in zip(actual, exact, strict=True):
        torch.testing.assert_close(a, e)


def test_head_sizes_beyond_the_kernels_are_refused(library: ctypes.CDLL) -> None:
    def refusal(size: int, type: int, device: Device) -> bytes:
        return library.host_forward(ctypes.byref(Sizes(1, 1, size)), type, _no_views(), ctypes.byref(device), 0)

    assert refusal(129, 0, V100) == b"head sizes are 1 to 128"
    assert refusal(64, 1, T4).endswith(b"bfloat16 one of sm_80 or newer")
    assert refusal(64, 0, Device(70, 80, 1024)) == b"a block needs more shared memory than this GPU has"


GARBAGE = torch.tensor([-(2**62), -(2**31), -30, -1, 40, 2**31, 2**40 + 3, 2**62])


def guarded(*shape: int, value: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """One image (1, rows, ...) between two of NaN, and all three; random numbers, or a value."""
    memory = torch.full((3, *shape), torch.nan)
    memory[1] = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) if value is None else value
    return memory[1:2], memory


@pytest.mark.parametrize("with_content", [True, False])
@pytest.mark.parametrize("mask_tokens", [True, False])
@pytest.mark.parametrize("device", [RESIDENT, AHEAD], ids=["resident", "ahead"])
@pytest.mark.parametrize("cut", [*GARBAGE.tolist(), 9, 24])
def test_garbage_cuts_and_permutations_stay_within_the_buffers(
    library: ctypes.CDLL, device: Device, mask_tokens: bool, with_content: bool, cut: int
) -> None:
    """Wrong numbers, but no read of what lies around the buffers (NaN would show) and no write to it."""
    tokens, targets, heads, size = 25, 12, 2, 16
    generator = torch.Generator().manual_seed(1)
    perm = torch.randint(-tokens, 2 * tokens, (tokens,), generator=generator)
    perm[: len(GARBAGE)] = GARBAGE
    cuts = torch.tensor([cut])
    rows = tokens + (targets if mask_tokens else 0)
    q, k, v, d_out, out, dq, dk, dv = (
        [guarded(n, heads, size, value=value) for n in (rows, targets)]
        for value in (None, None, None, None, 7.0, 7.0, 7.0, 7.0)
    )
    lse = [guarded(n, heads, value=1.0) for n in (rows, targets)]
    workspace_memory = torch.full((4, heads, tokens + 2 * targets), torch.nan)
    workspace_memory[1:3] = 1.0
    sizes = Sizes(1, heads, size, tokens, targets, 0, mask_tokens, with_content, 0.25, cuts.data_ptr(), perm.data_ptr())

    def streams(pair: list) -> Streams:
        return Streams(pair[0][0] if with_content else None, pair[1][0])

    forward = views(streams(q), k[0][0], v[0][0], streams(out), streams(lse))
    backward = views(
        streams(q), k[0][0], v[0][0], streams(out), streams(lse), streams(d_out), streams(dq), dk[0][0], dv[0][0]
    )
    options = ctypes.byref(device), False
    assert library.host_forward(ctypes.byref(sizes), TYPES[torch.float32], forward, *options) is None
    at = ctypes.c_void_p(workspace_memory[1].data_ptr())
    assert library.host_backward(ctypes.byref(sizes), TYPES[torch.float32], backward, at, *options) is None
    for pair in (q, k, v, d_out, out, dq, dk, dv, lse):
        for _, memory in pair:
            assert memory[[0, 2]].isnan().all(), "written beyond the buffer"
            assert not memory[1].isnan().any(), "read beyond the buffer"
    assert workspace_memory[[0, 3]].isnan().all()
    assert not (out[1][0] == 7).all(), "the kernels did run"


def _no_views() -> ctypes.Array:
    return (ctypes.c_longlong * 32)()


def plan(library: ctypes.CDLL, device: Device, size: int, *, heads: int = 768, backward: bool = False) -> Plan:
    sizes, result = Sizes(heads, 1, size, 197, 147, 50, True, True), Plan()
    library.host_plan(ctypes.byref(sizes), 0, backward, ctypes.byref(device), ctypes.byref(result))
    return result


@pytest.mark.parametrize("backward", [False, True])
def test_where_keys_and_values_stay(library: ctypes.CDLL, backward: bool) -> None:
    """344 keys of size 64 fit a V100's 96 KB, to the byte, and not a T4's 64 KB."""
    v100 = plan(library, V100, 64, backward=backward)
    assert (v100.resident, v100.warps, v100.shared) == (True, 4, 96 << 10)
    assert not plan(library, T4, 64, backward=backward).resident
    assert plan(library, H200, 64, backward=backward).warps == 8
    assert not plan(library, V100, 64, heads=12, backward=backward).resident, "most processors would be idle"
    assert [plan(library, device, 64, heads=12).stages for device in (V100, A100)] == [1, 2]


@pytest.mark.parametrize("size", [16, 32, 64, 96, 128])
def test_shared_memory_is_within_every_limit(library: ctypes.CDLL, size: int) -> None:
    for device in (V100, T4, A100, H200):
        for heads in (12, 768):
            for backward in (False, True):
                assert 0 < plan(library, device, size, heads=heads, backward=backward).shared <= device.shared_limit
        stages = 2 if device.architecture >= 80 else 1
        assert 0 < library.host_key_gradient_bytes(size, stages) <= device.shared_limit


@pytest.mark.long
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize(("architecture", "elements"), [(75, ("Half",)), (90, ("Bfloat",))])
def test_nvcc_compiles_without_spills(architecture: int, elements: tuple[str, ...], tmp_path: Path) -> None:
    """Head sizes 64 and 128, forward and backward; bf16 on sm_90, where it is most used."""
    source, cubin = tmp_path / "kernels.cu", tmp_path / "kernels.cubin"
    source.write_text(cuda_tools.instantiations(elements, (64, 128)))
    resources = cuda_tools.nvcc_cubin(source, architecture, cubin)
    assert len(resources) == 6
    for one in resources:
        assert one.spilled == 0 and one.registers <= 255, one
    if cuda_tools.cuobjdump() is None:
        pytest.skip("compiled without spills; cuobjdump is not there to count tensor-core instructions")
    # Copies run ahead of the products from sm_80 on (LDGSTS is cp.async).
    wanted = {"HMMA.16816", "LDGSTS"} if architecture >= 80 else {"HMMA.1688"}
    found = cuda_tools.instructions(cubin)
    assert len(found) == 6 and all(counts.keys() == wanted for counts in found.values()), found


def test_nvrtc_12_compiles_for_volta_without_spills() -> None:
    """V100, sm_70: CUDA 13 cannot compile for it any more."""
    compiler = cuda_tools.Nvrtc12.find()
    if isinstance(compiler, str):
        pytest.skip(f"needs the CUDA 12 compiler: {compiler}")
    log, ptx = compiler.compile(cuda_tools.kernel_names("__half", (32, 64, 128)), "sm_70")
    resources = cuda_tools.parse_resources(log)
    assert len(resources) == 9 and all("sm_70" in entry for entry in log.split("Compiling entry function")[1:])
    for one in resources:
        assert one.spilled == 0 and one.registers <= 255, one
    for body in ptx.split(".entry ")[1:]:
        assert "wmma.mma.sync.aligned" in body


@pytest.mark.long
def test_bindings_compile_against_this_torch() -> None:
    include_paths = pytest.importorskip("torch.utils.cpp_extension").include_paths  # needs setuptools
    python = Path(sysconfig.get_paths()["include"])
    cuda = cuda_tools.runtime_headers()
    if COMPILER is None or not (python / "Python.h").is_file() or not cuda:
        pytest.skip("needs a C++ compiler, Python.h and the headers of the CUDA runtime")
    folders = [*include_paths("cpu"), *cuda, python]
    command = [COMPILER, "-std=c++20", "-fsyntax-only", "-Wall", *(f"-I{folder}" for folder in folders)]
    done = subprocess.run([*command, str(ROOT / "csrc/bindings.cpp")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


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


def test_the_backend_explains_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = backends.importlib.util.find_spec
    monkeypatch.setattr(
        backends.importlib.util, "find_spec", lambda name: None if name == "mapet_kernels._C" else find_spec(name)
    )
    with pytest.raises(ValueError, match=r"'cuda' cannot run here: the CUDA C\+\+ kernels are not built"):
        backends.choose_backend("cuda", "cuda", torch.float16, backends.TWO_STREAM_BACKENDS)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: object())
    assert backends.available_backends("cpu")["cuda"] == "needs a CUDA device, not cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(backends, "_reason_against_cuda_library", lambda index: None)

    def reason(dtype: torch.dtype | None) -> str | None:
        return backends.reason_against_cuda(torch.device("cuda"), dtype)

    assert reason(None) is None and reason(torch.float16) is None
    assert reason(torch.float32) == "takes float16 and bfloat16, not float32"
    assert reason(torch.bfloat16).startswith("bfloat16 needs compute capability 8.0 or newer, Tesla V100 has 7.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert reason(torch.float16) == "needs compute capability 7.0 or newer, Tesla V100 has 6.1"


def test_auto_takes_the_cuda_kernels_where_triton_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def auto(dtype: torch.dtype, size: int, among: tuple[str, ...] = backends.TWO_STREAM_BACKENDS) -> str:
        return backends.choose_backend("auto", "cuda", dtype, among, size)

    def only_half(device: torch.device, dtype: torch.dtype) -> str | None:
        return None if dtype == torch.float16 else "takes float16"

    monkeypatch.setattr(backends, "reason_against_triton", lambda *_: "needs compute capability 8.0")
    monkeypatch.setattr(backends, "reason_against_cuda", only_half)
    assert auto(torch.float16, 64) == auto(torch.float16, 128) == "cuda"
    assert auto(torch.float16, 129) == auto(torch.float32, 64) == "sdpa"
    assert auto(torch.float16, 64, backends.ATTENTION_BACKENDS) == "sdpa"
    monkeypatch.setattr(backends, "reason_against_triton", lambda *_: None)
    assert auto(torch.float16, 64) == "triton"
