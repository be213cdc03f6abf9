"""The one table of tolerances: how far an op may be from float64, in units of plain torch's own error."""

from __future__ import annotations

import torch
from torch import Tensor

FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0

FLOOR = {torch.float64: 1e-12, torch.float32: 16 * 2.0**-23, torch.bfloat16: 2 * 2.0**-7, torch.float16: 2 * 2.0**-10}
"""Error relative to the largest value (to 1, where all are 0) that is always allowed, as plain torch may be exact by
luck; in float64, where plain torch is the yardstick itself, it is the whole budget."""


def assert_within_budget(actual: Tensor, plain: Tensor, exact: Tensor, *, factor: float, what: str) -> None:
    """Largest error of `actual` against float64 `exact` <= factor * that of `plain`, which has the same dtype."""
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == plain.dtype, f"{what}: dtype {actual.dtype}, expected {plain.dtype}"
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    error = (actual.double() - exact).abs().max().item()
    budget = factor * (plain.double() - exact).abs().max().item()
    floor = FLOOR[actual.dtype] * (exact.abs().max().item() or 1.0)
    assert error <= max(budget, floor), f"{what}: error {error:.2e}, budget {budget:.2e}, floor {floor:.2e}"
