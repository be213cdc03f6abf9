"""What torch.library's own helpers leave out: an autocast rule that follows the dtype the autocast region asks for."""

from __future__ import annotations

import torch
from torch import Tensor


def register_autocast(op: torch.library.CustomOpDef) -> None:
    """Under autocast, cast the op's floating-point tensors (float64 excepted) to the region's dtype and run it.

    torch.library.register_autocast fixes one dtype per op; here fp16 and bf16 regions both get their own.
    """
    overload = op._opoverload
    library = torch.library.Library(overload.namespace, "FRAGMENT")
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        library.impl(overload._schema.name.split("::")[1], _autocast_kernel(overload, device_type, key), key)
    op._mapet_autocast_library = library  # the registration lives as long as its Library object


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which an op registered here runs on x: under autocast the region's, otherwise its own."""
    device_type = x.device.type
    if device_type in ("cpu", "cuda") and x.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def _autocast_kernel(overload, device_type: str, key: str):
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(*args):
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return overload(*(_cast(arg, dtype) for arg in args))

    return kernel


def _cast(value, dtype: torch.dtype):
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        return value.to(dtype)
    return value
