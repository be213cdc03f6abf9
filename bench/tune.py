"""Other tiles for a kernel of two-stream attention: which can work, and how one kernel is run alone.

The harvest times them: `python bench/harvest.py --parts tune` all that can work, its other parts a chosen few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from unittest.mock import patch

import torch
from torch import Tensor

from bench.attention_pass import Pass, random_on
from bench.guard import guarded
from mapet_kernels import launch
from mapet_kernels.launch import LaunchConfig
from mapet_kernels.registry import TwoStreamShape
from mapet_kernels.two_stream_attention import triton_backend

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OPS = {"attention_forward": "forward", "attention_query_gradient": "dq", "attention_key_gradient": "dkdv"}
"""Function of mapet_kernels.launch -> op as rows tell it, in the order of the launches of a pass."""
KERNELS = tuple(OPS)

ROWS, KEYS, WARPS, STAGES = (16, 32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3)
MOST_REGISTERS = 224
"""Registers of a thread that accumulators may take, of 255."""


@dataclass(frozen=True)
class Entry:
    """One place in the launch table, architecture included."""

    kernel: str
    dtype: str
    size: int
    target: launch.Target

    def present(self) -> LaunchConfig:
        """What the table holds now."""
        return getattr(launch, self.kernel)(self.size, DTYPES[self.dtype], self.target)


def candidates(entry: Entry) -> Iterator[LaunchConfig]:
    """Configurations that can work, going by sizes alone."""
    configs = (LaunchConfig(*numbers) for numbers in product(ROWS, KEYS, WARPS, STAGES))
    return (config for config in configs if can_work(config, entry))


def can_work(config: LaunchConfig, entry: Entry) -> bool:
    """Whether tiles in flight fit the shared memory, and accumulators the registers, of a program.

    Operands: `stages` pairs of tiles that pass by, (keys, size) or, for the gradient of keys, (rows, size).
    Accumulators in fp32: scores, in the backward pass also their gradient, and what is summed up, (rows, size) or two
    of (keys, size). A thread has 255 registers.
    """
    size, itemsize = launch.padded_size(entry.size), DTYPES[entry.dtype].itemsize
    by_key = entry.kernel.endswith("key_gradient")
    passes = config.rows if by_key else config.keys
    summed = 2 * config.keys if by_key else config.rows
    score_tiles = 1 if entry.kernel.endswith("forward") else 2
    shared = 2 * config.stages * passes * size * itemsize
    registers = (score_tiles * config.rows * config.keys + summed * size) / (32 * config.warps)
    return shared <= entry.target.shared_memory and registers <= MOST_REGISTERS


@contextmanager
def override(kernel: str, config: LaunchConfig) -> Iterator[None]:
    """Inside, the launch table has this configuration for all sizes, dtypes and architectures of a kernel."""
    with patch.object(launch, kernel, lambda *_: config):
        yield


class Runner:
    """One kernel of an entry on tensors of one shape."""

    def __init__(self, entry: Entry, shape: TwoStreamShape, device: torch.device) -> None:
        self.entry, self.device, self.part = entry, device, KERNELS.index(entry.kernel)
        self.tensors = Pass.make(shape, DTYPES[entry.dtype], random_on(device))
        found = self.tensors.run(triton_backend)
        names = (("out_content", "out_query"), ("dq_content", "dq_query"), ("dk", "dv"))[self.part]
        self.results = tuple(found[name] for name in names)

    def call(self, config: LaunchConfig) -> Callable[[], None]:
        """The kernel with this configuration, ready to launch; for dK and dV after the statistics they need."""
        with override(self.entry.kernel, config):
            parts = self.tensors.launches(self.entry.target)
        if self.part == 2:  # reads the statistics that the kernel of dQ leaves in the same workspace
            parts[1].run(self.device)
        return partial(parts[self.part].run, self.device)

    def agrees(self, config: LaunchConfig, old: LaunchConfig) -> bool:
        """Whether the kernel runs and gives what it gives with the old configuration, up to a few roundings."""
        self.call(old)()
        expected = [x.clone() for x in self.results]
        for x in self.results:
            x.fill_(float("nan"))
        _, failure = guarded(lambda: self.call(config)())
        return failure is None and all(close(x, e) for x, e in zip(self.results, expected, strict=True))


def close(actual: Tensor, expected: Tensor) -> bool:
    """Whether the largest difference is within 8 roundings of the largest value."""
    largest = expected.abs().max().float()
    return bool((actual.float() - expected.float()).abs().max() <= 8 * torch.finfo(actual.dtype).eps * largest)
