"""Which kernels "auto" takes, and why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mapet_kernels import backends
from mapet_kernels.backends import RECORDED_WINNERS, Winner, choose_kernels, explain_auto

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
