"""Which kernels "auto" takes, and why."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

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


@pytest.fixture
def amd_gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """As a torch built for ROCm describes an MI300X, and every package installed."""
    monkeypatch.setattr(torch.version, "hip", "6.4.2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "AMD Instinct MI300X")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 4))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(backends, "_reason_against_cuda_library", lambda index: None)
    return torch.device("cuda:0")


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_an_amd_gpu_falls_back_with_a_reason(amd_gpu: torch.device, name: str) -> None:
    """`auto` takes torch's own attention, or the reference; asking by name says why not."""
    reason = "AMD GPUs are not supported yet, and this torch is built for ROCm 6.4.2"
    assert available_backends(amd_gpu, torch.float16)[name] == reason
    assert choose_backend("auto", amd_gpu, torch.float16, TWO_STREAM_BACKENDS, 64) == "sdpa"
    assert f"{name} does not run: {reason}" in explain_auto(amd_gpu, torch.float16)[1]
    assert choose_listed_backend("auto", ("reference", "triton", "cuda"), amd_gpu, torch.float32) == "reference"
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
