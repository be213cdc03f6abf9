"""How much memory a call needs at its peak: the allocator's count on a GPU, the bytes of live tensors on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mapet.planning.trace import LiveBytes

COUNTED = "tensors that operators returned, counted on a CPU: neither what an operator needs inside nor the allocator"
ALLOCATED = "the CUDA allocator's peak"


def peak(
    call: Callable[[], Any], device: torch.device, resident: Callable[[], Iterable[Tensor]] = tuple
) -> dict[str, int | str]:
    """Peak bytes of a call: beyond what is there before it, and together with what belongs to it from the start.

    resident: those tensors, such as weights and gradients. They are not held on to, as the call may free some, and an
        operator that returns one of them, as those that work in place do, does not make it count twice.
    """
    held = storage_bytes(resident())
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        extra, how = torch.cuda.max_memory_allocated(device) - before, ALLOCATED
    else:
        with LiveBytes() as live:
            live.add_all(resident())
            live.peak = live.live
            call()
        extra, how = live.peak - held, COUNTED
    return {"peak_bytes": held + extra, "extra_bytes": extra, "resident_bytes": held, "how": how}


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all storages behind the tensors, each once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
