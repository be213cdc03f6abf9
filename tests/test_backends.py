"""Which kernels "auto" takes, and why."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.kernels_suite import OpCall, reason_against
from mapet_kernels import backends, dense_attention
from mapet_kernels.backends import (
    RECORDED_WINNERS,
    TWO_STREAM_BACKENDS,
    Winner,
    available_backends,
    choose_backend,
    choose_kernels,
    choose_listed_backend,
    explain_auto,
)
from mapet_kernels.registry import REGISTRY

RECORDS = Path(__file__).parent.parent / "bench" / "results"
BOTH = {"triton": None, "cuda": None}
OLD, MISSING = {"triton": "needs sm_80", "cuda": None}, {"triton": None, "cuda": "not built"}


def test_every_recorded_winner_has_its_record() -> None:
    for winner in RECORDED_WINNERS.values():
        assert winner.backend in BOTH and (RECORDS / winner.record).is_file(), winner


@pytest.mark.parametrize(
    ("reasons", "backend", "why"),
    [
        (BOTH, "triton", "no record compares it with cuda on compute capability 9.0"),
        (OLD, "cuda", "triton does not run: needs sm_80"),
        (MISSING, "triton", "cuda does not run: not built"),
        (OLD | MISSING | {"triton": "too old"}, "sdpa", "triton does not run: too old; cuda does not run: not built"),
        ({"triton": None}, "triton", "there are no other kernels"),
    ],
)
def test_kernels_that_run_are_taken_and_without_a_record_tritons(reasons: dict, backend: str, why: str) -> None:
    assert choose_kernels(reasons, (9, 0), "sdpa", {}) == (backend, why)


def test_of_two_the_faster_by_record_is_taken_on_the_gpu_of_the_record() -> None:
    winners = {(8, 0): Winner("cuda", "attention_a100.json"), (9, 0): Winner("triton", "attention_h200.json")}
    assert choose_kernels(BOTH, (8, 0), "sdpa", winners) == (
        "cuda", "the faster of triton and cuda by attention_a100.json",
    )  # fmt: skip
    assert choose_kernels(BOTH, (9, 0), "sdpa", winners)[0] == "triton"
    assert choose_kernels(BOTH, (8, 6), "sdpa", winners)[1].startswith("no record")
    assert choose_kernels(MISSING, (8, 0), "sdpa", winners)[0] == "triton", "the faster one is not built"


def test_auto_explains_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert explain_auto(torch.device("cpu")) == ("sdpa", "the kernels are for CUDA devices")
    monkeypatch.setattr(backends, "reason_against_triton", lambda *_: None)
    monkeypatch.setattr(backends, "reason_against_cuda", lambda *_: None)
    monkeypatch.setattr(backends, "_capability", lambda device: (8, 9))
    device = torch.device("cuda")
    assert explain_auto(device, torch.float16)[1].endswith("on compute capability 8.9")
    backend, why = explain_auto(device, torch.float16, size=256)
    assert backend == "sdpa" and "triton does not run: takes head sizes up to 128, not 256" in why


def pretend(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int]) -> None:
    """As torch describes a machine with this GPU, and every package installed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(backends, "_reason_against_cuda_library", lambda index: None)


V100 = ("Tesla V100", (7, 0))
HALF, SINGLE, DOUBLE, BRAIN = torch.float16, torch.float32, torch.float64, torch.bfloat16
LISTED = ("reference", "triton", "cuda")


@pytest.mark.parametrize(
    ("gpu", "dtype", "reason"),
    [
        (V100, None, None),
        (V100, HALF, None),
        (V100, SINGLE, "takes float16 and bfloat16, not float32"),
        (V100, BRAIN, "bfloat16 needs compute capability 8.0 or newer, Tesla V100 has 7.0: float16"),
        (("Tesla P4", (6, 1)), HALF, "needs compute capability 7.0 or newer, Tesla P4 has 6.1"),
    ],
    ids=str,
)
def test_reasons_against_the_cuda_kernels(monkeypatch, gpu: tuple, dtype: torch.dtype | None, reason: str) -> None:
    pretend(monkeypatch, *gpu)
    assert backends.reason_against_cuda(torch.device("cuda"), dtype) == reason
    assert available_backends("cpu")["cuda"] == "needs a CUDA device, not cpu"


def test_auto_takes_the_cuda_kernels_where_triton_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a V100 attention in half precision, the embedding, which multiplies no matrices, in every dtype, and k-means,
    which multiplies in float16 whatever the input, in all but float64.
    """

    def auto(dtype: torch.dtype, size: int = 64, among: tuple[str, ...] = TWO_STREAM_BACKENDS) -> str:
        return choose_backend("auto", "cuda", dtype, among, size)

    def listed(dtype: torch.dtype, products: bool, among: tuple[str, ...] = LISTED) -> str:
        return choose_listed_backend("auto", among, "cuda", dtype, products)

    find_spec = backends.importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(backends, "reason_against_triton", lambda *_: "needs compute capability 8.0")
        patch.setattr(
            backends.importlib.util, "find_spec", lambda name: None if name == "mapet_kernels._C" else find_spec(name)
        )
        with pytest.raises(ValueError, match=r"'cuda' cannot run here: the CUDA C\+\+ kernels are not built"):
            choose_backend("cuda", "cuda", HALF, TWO_STREAM_BACKENDS)
        assert listed(SINGLE, False) == listed(HALF, True) == "reference"
    pretend(monkeypatch, *V100)
    assert auto(HALF) == auto(HALF, 128) == "cuda"
    assert auto(HALF, 129) == auto(SINGLE) == auto(HALF, 64, backends.ATTENTION_BACKENDS) == "sdpa"
    assert {listed(dtype, products=False) for dtype in (HALF, BRAIN, SINGLE, DOUBLE)} == {"cuda"}
    assert {listed(dtype, products=True) for dtype in (HALF, BRAIN, SINGLE)} == {"cuda"}
    assert listed(DOUBLE, products=True) == listed(SINGLE, True, LISTED[:2]) == "reference"
    with pytest.raises(ValueError, match="'cuda' cannot run here: takes float16, bfloat16 and float32, not float64"):
        choose_listed_backend("cuda", LISTED, "cuda", DOUBLE)
    with pytest.raises(ValueError, match="'cuda' cannot run here: needs a CUDA device, not cpu"):
        choose_listed_backend("cuda", LISTED, "cpu", SINGLE, products=False)
    spec = REGISTRY["kmeans_assign"]
    call = OpCall(spec, spec.make_case(spec.shapes["one_row"], SINGLE), "cuda")
    assert reason_against(call, torch.device("cuda"), SINGLE) is None, "benchmarks do not refuse it either"
    monkeypatch.setattr(backends, "reason_against_triton", lambda *_: None)
    assert auto(HALF) == listed(SINGLE, False) == "triton"


@pytest.fixture
def amd_gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """As a torch built for ROCm describes an MI300X."""
    monkeypatch.setattr(torch.version, "hip", "6.4.2")
    pretend(monkeypatch, "AMD Instinct MI300X", (9, 4))
    return torch.device("cuda:0")


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_an_amd_gpu_falls_back_with_a_reason(amd_gpu: torch.device, name: str) -> None:
    """`auto` takes torch's own attention, or the reference; asking by name says why not."""
    reason = "AMD GPUs are not supported yet, and this torch is built for ROCm 6.4.2"
    assert available_backends(amd_gpu, torch.float16)[name] == reason
    assert choose_backend("auto", amd_gpu, torch.float16, TWO_STREAM_BACKENDS, 64) == "sdpa"
    assert f"{name} does not run: {reason}" in explain_auto(amd_gpu, torch.float16)[1]
    assert choose_listed_backend("auto", LISTED, amd_gpu, torch.float32) == "reference"
    with pytest.raises(ValueError, match=f"backend '{name}' cannot run here: {reason}"):
        choose_backend(name, amd_gpu, torch.float16, TWO_STREAM_BACKENDS, 64)
    with pytest.raises(ValueError, match=f"backend '{name}' cannot run here: {reason}"):
        choose_listed_backend(name, ("reference", name), amd_gpu, torch.float16)


def test_flash_on_an_amd_gpu_says_why_not(amd_gpu: torch.device) -> None:
    with pytest.raises(ValueError, match="backend 'flash' cannot run here: needs CUDA, this torch is built for ROCm"):
        choose_backend("flash", amd_gpu, torch.float16, TWO_STREAM_BACKENDS, 64)


def test_torchs_attention_on_an_amd_gpu_is_matrix_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory-efficient kernel is called with the log-sum-exps of CUDA's."""
    q = SimpleNamespace(shape=(2, 4, 16, 64), device=torch.device("cuda:0"), dtype=torch.float16)
    assert dense_attention._fused_kernel(q) == "cuda"
    monkeypatch.setattr(torch.version, "hip", "6.4.2")
    assert dense_attention._fused_kernel(q) is None


def test_what_a_process_cannot_change_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call looks for no package and asks no driver again; one GPU's answer is not another's."""
    asked = []

    def find_spec(name: str) -> object:
        asked.append(name)
        return object()

    def capability(index: int) -> tuple[int, int]:
        asked.append(index)
        return ((9, 0), (7, 0))[index]

    current = [0]
    monkeypatch.setattr(backends.importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(backends, "INTERPRETED", False)
    monkeypatch.setattr(backends, "_reason_against_cuda_library", lambda index: None)

    def auto(device: str) -> str:
        return choose_backend("auto", device, torch.float16, TWO_STREAM_BACKENDS, 64)

    for _ in range(3):
        assert (auto("cuda:0"), auto("cuda:1"), auto("cuda")) == ("triton", "cuda", "triton")
    current[0] = 1
    assert auto("cuda") == "cuda"
    assert sorted(map(str, asked)) == ["0", "1", "mapet_kernels._C", "triton"]
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert auto("cuda:0") == "sdpa", "another answer, as another function gives it"


@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference", "matmul"])
def test_the_choice_compiles_into_a_constant(backend: str) -> None:
    def choose(x: torch.Tensor) -> tuple[torch.Tensor, str]:
        return x + 1, choose_backend(backend, x.device, x.dtype, TWO_STREAM_BACKENDS, 64)

    torch._dynamo.reset()
    compiled = torch.compile(choose, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1))[1] == choose(torch.zeros(1))[1]


def test_backend_choice_is_a_pure_function_of_the_device() -> None:
    assert choose_backend("auto", "cpu") == "sdpa" and choose_backend("auto", "cuda") == "sdpa"
    assert choose_backend("auto", "meta") == "reference"
    assert choose_backend("auto", "cpu", torch.bfloat16) == "sdpa", "an op without matmul"
    assert choose_backend("auto", "cpu", torch.bfloat16, TWO_STREAM_BACKENDS) == "matmul"
    assert choose_backend("auto", "cpu", torch.float16, TWO_STREAM_BACKENDS) == "sdpa"
    available = available_backends("cpu")
    assert available.keys() == set(TWO_STREAM_BACKENDS) and available["sdpa"] is available["matmul"] is None
    with pytest.raises(ValueError, match="cannot run here: needs a CPU or CUDA device, not meta"):
        choose_backend("sdpa", "meta")


def test_auto_takes_triton_on_a_gpu_that_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decided by device, dtype and head size; a V100 or float64 falls back to torch's attention, or the reference."""
    monkeypatch.setattr(backends, "reason_against_triton", lambda device, dtype: None)
    assert choose_backend("auto", "cuda:1", torch.bfloat16, TWO_STREAM_BACKENDS, 128) == "triton"
    assert choose_backend("auto", "cuda", torch.float32, ("reference", "triton")) == "triton"
    assert choose_backend("auto", "cuda", torch.bfloat16, TWO_STREAM_BACKENDS, 129) == "sdpa"
    assert choose_backend("auto", "cpu", torch.float32, TWO_STREAM_BACKENDS, 64) == "sdpa"
    monkeypatch.setattr(backends, "reason_against_triton", lambda device, dtype: "too old")
    assert choose_backend("auto", "cuda", torch.float16, TWO_STREAM_BACKENDS, 64) == "sdpa"
    assert choose_backend("auto", "cuda", torch.float16, ("reference", "triton")) == "reference"
    with pytest.raises(ValueError, match="backend 'triton' cannot run here: too old"):
        choose_backend("triton", "cuda", torch.float16, TWO_STREAM_BACKENDS, 64)
