"""The one table of tolerances: how far an op may be from float64, in units of plain torch's own error."""

from __future__ import annotations

import torch
from torch import Tensor

FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0

FLOOR = {torch.float64: 1e-12, torch.float32: 16 * 2.0**-23, torch.bfloat16: 2 * 2.0**-7, torch.float16: 2 * 2.0**-10}
"""Error relative to the largest value (to 1, where all are 0) that is always allowed, as plain torch may be exact by
luck; in float64, where plain torch is the yardstick itself, it is the whole budget."""


def budget(plain: Tensor, exact: Tensor, factor: float) -> float:
    """The largest absolute error allowed: `factor` times that of `plain` against float64 `exact`, or the floor."""
    own = factor * (plain.double() - exact).abs().max().item()
    return max(own, FLOOR[plain.dtype] * (exact.abs().max().item() or 1.0))


def used_budget(actual: Tensor, plain: Tensor, exact: Tensor, factor: float) -> float:
    """Largest error of `actual` as a part of its budget: at most 1 is right; infinity where it is not finite."""
    if not torch.isfinite(actual).all():
        return float("inf")
    return (actual.double() - exact).abs().max().item() / budget(plain, exact, factor)
