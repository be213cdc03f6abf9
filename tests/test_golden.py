"""The official code's logits and gradients in float64, through the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from check_golden import TOLERANCE, compare, main

GOLDEN = Path(__file__).parent / "data" / "mapet_official_forward_backward.safetensors"


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_float64_agrees_with_the_official_code(backend: str) -> None:
    result = compare(GOLDEN, backend=backend)
    assert result.largest <= TOLERANCE
    assert len(result.gradients) == 41


def test_float32_agrees_to_single_precision() -> None:
    assert compare(GOLDEN, dtype=torch.float32).largest <= 1e-5


def test_the_command_prints_differences_and_fails_over_the_tolerance(monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["check_golden.py", str(GOLDEN)])
    assert main() == 0
    assert "gradients" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["check_golden.py", str(GOLDEN), "--tolerance", "1e-30"])
    assert main() == 1
    assert "FAILED" in capsys.readouterr().out
