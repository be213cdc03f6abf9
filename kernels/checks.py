"""Checks that the ops share; every text says what was given and what is allowed."""

from __future__ import annotations

import torch
from torch import Tensor


def check_tensors(**tensors: Tensor) -> None:
    """Raise unless the tensors share one floating-point dtype (TypeError) and one device (ValueError).

    Under autocast the dtypes may differ: the op casts them.
    """
    names = ", ".join(tensors)
    dtypes, devices = [t.dtype for t in tensors.values()], [t.device for t in tensors.values()]
    mixed = len(set(dtypes)) > 1 and not torch.is_autocast_enabled(devices[0].type)
    if mixed or not all(dtype.is_floating_point for dtype in dtypes):
        raise TypeError(f"{names} must share one floating-point dtype, got {', '.join(map(str, dtypes))}")
    if len(set(devices)) > 1:
        raise ValueError(f"{names} must be on one device, got {', '.join(map(str, devices))}")


def is_integer(x: Tensor) -> bool:
    """Whether x holds integers (bool is not one)."""
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
