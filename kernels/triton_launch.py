"""What launches of Triton kernels share: a launch as a value, which the ahead-of-time check compiles as well."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from mapet_kernels import launch


@dataclass(frozen=True)
class Launch:
    """A kernel with its number of programs, its arguments in order, and its constants and compiler options by name.

    Arguments are tensors, tensor descriptors, integers or None.
    """

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    def run(self, device: torch.device) -> None:
        """Launch on `device`, which need not be the current one."""
        with on_device(device):
            self.kernel[(self.programs,)](*self.arguments, **self.constants)


def on_device(device: torch.device) -> AbstractContextManager:
    """Inside, `device` is the one that Triton launches on; nothing to do in the interpreter."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def target(device: torch.device) -> launch.Target:
    """What kernels for a device are compiled for; the interpreter takes the tiles of the oldest GPU."""
    if device.type != "cuda":
        return launch.OLDEST
    return _target_of_gpu(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _target_of_gpu(index: int) -> launch.Target:
    properties = torch.cuda.get_device_properties(index)
    return launch.target_of((properties.major, properties.minor), properties.shared_memory_per_block_optin)
