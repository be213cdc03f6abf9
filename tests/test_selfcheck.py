"""The check of a backend on the device at hand: right attention passes, slightly wrong attention does not."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mapet_kernels import selfcheck
from mapet_kernels.registry import REGISTRY, TwoStreamShape
from mapet_kernels.selfcheck import two_stream_agreement

SHAPE = TwoStreamShape(31, 9, size=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
def test_backends_that_are_right_agree(backend: str, dtype: torch.dtype) -> None:
    agreement = two_stream_agreement(backend, "cpu", dtype, SHAPE)
    assert agreement.holds and 0 < agreement.outputs <= 1 and 0 < agreement.gradients <= 1


@pytest.mark.parametrize("wrong", ["output", "gradient", "nan"])
def test_one_wrong_row_is_found(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    spec = REGISTRY["two_stream_attention"]

    def broken(q_query, **arguments):
        if wrong == "gradient":  # the value stays, a tenth of the last row's gradient goes
            q_query = torch.cat([q_query[:, :-1], 0.9 * q_query[:, -1:] + 0.1 * q_query[:, -1:].detach()], dim=1)
        content, query = spec.function(q_query=q_query, **arguments)
        factor = {"output": 1.01, "gradient": 1.0, "nan": float("nan")}[wrong]
        return content, torch.cat([query[:, :-1], factor * query[:, -1:]], dim=1)

    changed = dataclasses.replace(spec, function=broken)
    monkeypatch.setattr(selfcheck, "REGISTRY", {"two_stream_attention": changed})
    agreement = two_stream_agreement("auto", "cpu", torch.float32, SHAPE)
    assert not agreement.holds
    assert (agreement.outputs > 1) == (wrong != "gradient") and agreement.gradients > 1


def test_a_backend_that_cannot_run_says_why() -> None:
    with pytest.raises(ValueError, match=r"backend 'triton' cannot run here: "):
        two_stream_agreement("triton", "meta", torch.float32)
