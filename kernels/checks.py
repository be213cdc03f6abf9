"""Checks that the ops share; every text says what was given and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence

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


def check_is_tensor(**values: object) -> None:
    """Raise TypeError unless every value is a torch.Tensor; the text says how what was given becomes one."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type_name(value)}{how_to_make_a_tensor(name, value)}")


def type_name(value: object) -> str:
    """The type of a value as a caller writes it: "float", "numpy.ndarray"."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def how_to_make_a_tensor(name: str, value: object) -> str:
    """Advice for an error text; empty where the value is no array of numbers."""
    if type_name(value) == "numpy.ndarray":
        return f": torch.from_numpy({name})"
    return f": torch.tensor({name})" if isinstance(value, list | tuple) else ""


def is_integer(x: Tensor) -> bool:
    """Whether x holds integers (bool is not one)."""
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def check_floating(name: str, values: Tensor) -> None:
    """Raise TypeError unless the tensor is float16, bfloat16, float32 or float64."""
    if values.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {values.dtype}")


def check_finite_rows(name: str, values: Tensor) -> None:
    """Raise ValueError that names the first rows holding NaN or infinity. Waits for the device."""
    # The bounds of all take no memory and little time; row by row is only for the message.
    if values.numel() == 0 or all_finite(values):
        return
    bad = (~torch.linalg.vector_norm(values, ord=math.inf, dim=-1).isfinite()).nonzero().tolist()
    raise ValueError(not_finite(name, len(bad), [row[0] if len(row) == 1 else tuple(row) for row in bad]))


def all_finite(values: Tensor) -> bool:
    """Whether a tensor that is not empty holds neither NaN nor infinity. Waits for the device."""
    return all(math.isfinite(bound) for bound in torch.stack(torch.aminmax(values)).tolist())


def not_finite(name: str, count: int, rows: Sequence[object]) -> str:
    """The text for `count` rows that hold NaN or infinity; it names the first of them."""
    first = ", ".join(map(str, rows[:5]))
    return (
        f"{name} must be finite, but {count} of its rows hold NaN or infinity; the first are {first}; "
        "drop or repair them"
    )
