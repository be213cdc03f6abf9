"""Assert that a result is within the error budget of mapet_kernels/tolerances.py."""

from __future__ import annotations

import torch
from torch import Tensor

from mapet_kernels.tolerances import FORWARD_FACTOR, GRADIENT_FACTOR, budget

__all__ = ["FORWARD_FACTOR", "GRADIENT_FACTOR", "assert_within_budget"]


def assert_within_budget(actual: Tensor, plain: Tensor, exact: Tensor, *, factor: float, what: str) -> None:
    """Largest error of `actual` against float64 `exact` <= factor * that of `plain`, which has the same dtype."""
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == plain.dtype, f"{what}: dtype {actual.dtype}, expected {plain.dtype}"
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    error = (actual.double() - exact).abs().max().item()
    allowed = budget(plain, exact, factor)
    assert error <= allowed, f"{what}: error {error:.2e}, budget {allowed:.2e}"
