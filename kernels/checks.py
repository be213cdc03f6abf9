"""Checks that operations share, and the choice of a backend by name."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def check_floating(name: str, values: Tensor) -> None:
    """Raise TypeError unless the tensor is float16, bfloat16, float32 or float64."""
    if values.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {values.dtype}")


def check_finite_rows(name: str, values: Tensor) -> None:
    """Raise ValueError that names the first rows holding NaN or infinity. Waits for the device."""
    # The largest magnitude of all takes no memory; row by row is only for the message.
    if values.numel() == 0 or torch.linalg.vector_norm(values, ord=math.inf).isfinite():
        return
    bad = (~torch.linalg.vector_norm(values, ord=math.inf, dim=-1).isfinite()).nonzero().tolist()
    first = ", ".join(str(row[0] if len(row) == 1 else tuple(row)) for row in bad[:5])
    raise ValueError(
        f"{name} must be finite, but {len(bad)} of its rows hold NaN or infinity; the first are {first}; "
        "drop or repair them"
    )


def choose_backend(backend: str, available: Mapping[str, object]) -> str:
    """The backend to run; "auto" is the first one available. An unknown name is a ValueError that lists them."""
    if backend == "auto":
        return next(iter(available))
    if backend not in available:
        raise ValueError(f"unknown backend {backend!r}; choose auto or one of {', '.join(available)}")
    return backend
