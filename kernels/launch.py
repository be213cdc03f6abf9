"""Launch configurations of the Triton kernels: pure functions of shape, dtype and architecture; nothing is timed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Target:
    """What a kernel is compiled for: a GPU's compute capability, 80 for 8.0, and a program's bytes of shared memory."""

    architecture: int
    shared_memory: int

    @property
    def has_wgmma(self) -> bool:
        """Whether four warps together multiply tiles from shared memory: data center GPUs from 9.0 on.

        Capability 12.0 is newer, but has the tensor-core instructions and the shared memory of 8.6.
        """
        return 90 <= self.architecture < 120

    @property
    def takes_large_tiles(self) -> bool:
        """Whether attention can have its tiles for Hopper: the largest take 116 KiB of shared memory."""
        return self.has_wgmma and self.shared_memory >= 128 * 1024


TARGETS = {
    number: Target(number, kilobytes * 1024)
    for number, kilobytes in {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}.items()
}
"""By architecture, as the CUDA programming guide has them: for compiling without a GPU. A device's own is read off it
(`triton_launch.target`)."""

OLDEST = TARGETS[80]


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes and resources of one kernel."""

    rows: int  # query rows of a tile, BM
    keys: int  # keys of a tile, BN
    warps: int
    stages: int  # key or row tiles in flight
    registers: int | None = None  # most registers of a thread; left to the assembler where None


ALL_REGISTERS = 255
"""Left to itself, the assembler spills a few bytes of fp32 tiles where that lets more programs run on a processor."""


def padded_size(size: int) -> int:
    """The head size that kernels compute with: a power of two, at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def target_of(capability: tuple[int, int], shared_memory: int) -> Target:
    """The target of a device of this compute capability, which gives a program so many bytes of shared memory.

    Raises:
        ValueError: the device is older than the kernels.
    """
    number = 10 * capability[0] + capability[1]
    if number < OLDEST.architecture:
        raise ValueError(f"Triton kernels need compute capability 8.0 or newer, this device has {number / 10}")
    return Target(number, shared_memory)


def attention_forward(size: int, dtype: torch.dtype, target: Target) -> LaunchConfig:
    """Configuration of the forward kernel of an attention op for head size `size`, 1 to 128.

    Entries have the smallest static cost (python -m bench aot: its largest floor) of those that spill no registers and,
    up to D = 64, leave room for two programs on a processor; none was chosen by time on a GPU yet. In 16 bits two tiles
    are on their way while one is computed with, as far as the target's shared memory allows. Rows that do not start at
    multiples of 16 bytes are moved element by element, which spills at wide heads.
    """
    padded = padded_size(size)
    if dtype.itemsize > 2:
        rows, keys = 64 if padded <= 32 else 32, 16 if padded == 128 else 32
        return LaunchConfig(rows, keys, warps=8, stages=1, registers=ALL_REGISTERS)
    return LaunchConfig(rows=64, keys=32 if padded == 128 and not target.takes_large_tiles else 64, warps=4, stages=3)


def attention_query_gradient(size: int, dtype: torch.dtype, target: Target) -> LaunchConfig:
    """Configuration of the kernel of dQ of an attention op."""
    padded = padded_size(size)
    if dtype.itemsize > 2:
        rows, keys = {16: (64, 32), 32: (64, 32), 64: (32, 32), 128: (16, 16)}[padded]
        return LaunchConfig(rows, keys, warps=8, stages=1, registers=ALL_REGISTERS)
    if padded == 64 and target.takes_large_tiles:  # two programs of eight warps, and keys are read half as often
        return LaunchConfig(rows=128, keys=32, warps=8, stages=3)
    return LaunchConfig(rows=64, keys=32 if padded == 128 else 64, warps=4, stages=3)


def attention_key_gradient(size: int, dtype: torch.dtype, target: Target) -> LaunchConfig:
    """Configuration of the kernel of dK and dV of an attention op."""
    padded = padded_size(size)
    if dtype.itemsize > 2:
        keys, warps = (16, 8) if padded == 128 else (32, 4)
        return LaunchConfig(rows=32, keys=keys, warps=warps, stages=1, registers=ALL_REGISTERS)
    if padded == 128:
        return LaunchConfig(rows=32, keys=128 if target.takes_large_tiles else 64, warps=8, stages=3)
    return LaunchConfig(rows=64 if target.takes_large_tiles else 32, keys=64, warps=4, stages=3)


@dataclass(frozen=True)
class AssignConfig:
    """Tile sizes and resources of the score kernel of kmeans_assign."""

    rows: int  # rows of a tile, BM
    clusters: int  # centroids of a tile, BN
    features: int  # features of one product, BK
    warps: int
    stages: int  # products whose operands are in flight
    descriptors: bool  # tiles are moved by the tensor memory accelerator
    capacity: int = 8  # candidates a row can hold in the exact mode


def kmeans_assign_scores(features: int, exact: bool, target: Target) -> AssignConfig:
    """Configuration of the score kernel for D = `features` and 16-bit operands, within the target's shared memory.

    Entries are chosen so that registers are not spilled, not yet by time on a GPU. One product a tile (D <= 64) leaves
    the tensor cores idle while scores are looked through, so tiles are small and two programs share a processor. Where
    they do not fit, fewer products are in flight, and then tiles are smaller.

    Raises:
        ValueError: the target has less shared memory than the smallest tiles take.
    """
    config = _assign_tiles(features, exact, target)
    smaller = [replace(config, stages=stages) for stages in range(config.stages, 1, -1)]
    smaller += [replace(config, rows=rows, clusters=rows, stages=2) for rows in (128, 64, 32)]
    for fitting in smaller:
        if kmeans_assign_bytes(fitting) <= target.shared_memory:
            return fitting
    raise ValueError(
        f"kmeans_assign needs {kmeans_assign_bytes(smaller[-1])} bytes of shared memory, and this device gives a "
        f"program {target.shared_memory}"
    )


def _assign_tiles(features: int, exact: bool, target: Target) -> AssignConfig:
    if not target.has_wgmma:
        return AssignConfig(128, 128, 64, warps=8, stages=3, descriptors=False)
    if features <= 64:
        rows, warps = (64, 4) if exact else (128, 8)
        return AssignConfig(rows, 128, 64, warps, stages=3, descriptors=True)
    if exact:
        # What a row's candidates take leaves no registers for 256 rows on 10.0.
        return AssignConfig(256 if target.architecture < 100 else 128, 128, 64, warps=8, stages=4, descriptors=True)
    return AssignConfig(128, 256, 64, warps=8, stages=4, descriptors=True)


def kmeans_assign_bytes(config: AssignConfig) -> int:
    """Bytes of shared memory of a program of the score kernel at most; compiled kernels are held to it by tests."""
    return config.stages * (config.rows + config.clusters) * config.features * 2 + BARRIER_BYTES


BARRIER_BYTES = 1024
"""For the barriers of copies in flight, and whatever else a compiler keeps in shared memory beside the tiles."""


def kmeans_assign_shares(row_tiles: int, clusters: int, features: int, config: AssignConfig, processors: int) -> int:
    """How many programs share the centroids of one row tile, each taking some tiles of them.

    Many where the row tiles alone would not fill the processors. At least 8, where there are as many tiles, if the row
    tiles in use at a time would push each other out of the L2 cache, from where they are read for every centroid tile.
    """
    tiles = -(-clusters // config.clusters)
    filling = -(-2 * processors // row_tiles)
    cached = 8 if processors * config.rows * features * 2 > L2_ROW_BYTES else 1
    share_tiles = -(-tiles // min(tiles, max(filling, cached)))
    return -(-tiles // share_tiles)


L2_ROW_BYTES = 16 * 2**20
"""Row tiles of 16 bits that may be in use at a time without a thought for the L2 cache."""
