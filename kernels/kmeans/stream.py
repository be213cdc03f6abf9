"""Chunks of a source on the device that works on them; what is not there already is read one chunk ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from mapet_kernels.kmeans.sources import RowSource

CHUNK_BYTES = 512 * 2**20
"""Default size of a chunk on a GPU."""
CHUNK_ROWS = 4096
"""Default rows of a chunk on the CPU, but two a cluster at least: scores of a chunk should stay in the cache, and the
sums of all clusters are added up once a chunk."""


def rows_of_a_chunk(source: RowSource, device: torch.device, clusters: int, chunk_bytes: int | None) -> int:
    """How many rows of the source are worked on at once."""
    if chunk_bytes is None and device.type == "cpu":
        return max(CHUNK_ROWS, 2 * clusters)
    return max(1, (chunk_bytes or CHUNK_BYTES) // (source.shape[1] * source.dtype.itemsize))


def chunks(source: RowSource, device: torch.device, rows: int) -> Iterator[tuple[int, Tensor]]:
    """First row number and rows (at most `rows`, D) of every chunk, in order. A chunk is only good until the next."""
    bounds = [(start, min(start + rows, source.shape[0])) for start in range(0, source.shape[0], rows)]
    if source.resident and source.device == device:
        for start, stop in bounds:
            yield start, source.read(start, stop)
    elif bounds:
        yield from _read_ahead(source, device, bounds)


def _read_ahead(source: RowSource, device: torch.device, bounds: list[tuple[int, int]]) -> Iterator[tuple[int, Tensor]]:
    read: Callable[[int, int], Tensor] = (_Upload if device.type == "cuda" else _Read)(source, device, bounds[0])
    with ThreadPoolExecutor(1, "kmeans-reader") as pool:
        ahead = pool.submit(read, *bounds[0])
        for (start, _), following in zip(bounds, [*bounds[1:], None], strict=True):
            chunk = ahead.result()
            if following is not None:
                ahead = pool.submit(read, *following)
            if device.type == "cuda":
                # Its memory comes from the reader's stream, and must not be reused before this one is done with it.
                chunk.record_stream(torch.cuda.current_stream(device))
            yield start, chunk


class _Read:
    """Reads into two buffers in turn: one is worked on while the other is filled."""

    def __init__(self, source: RowSource, device: torch.device, largest: tuple[int, int]) -> None:
        shape = (largest[1] - largest[0], source.shape[1])
        self.source, self.device = source, device
        self.buffers = [torch.empty(shape, dtype=source.dtype, device=source.device) for _ in range(2)]

    def __call__(self, start: int, stop: int) -> Tensor:
        self.buffers.reverse()
        return self.source.read(start, stop, self.buffers[0][: stop - start]).to(self.device)


class _Upload:
    """Reads into page-locked memory, and copies from there on a stream of its own, beside the computation."""

    def __init__(self, source: RowSource, device: torch.device, largest: tuple[int, int]) -> None:
        self.source, self.device = source, device
        shape = (largest[1] - largest[0], source.shape[1])
        self.buffer = torch.empty(
            shape, dtype=source.dtype, device=source.device, pin_memory=source.device.type == "cpu"
        )
        self.stream = torch.cuda.Stream(device)

    def __call__(self, start: int, stop: int) -> Tensor:
        rows = self.source.read(start, stop, self.buffer[: stop - start])
        with torch.cuda.stream(self.stream):
            chunk = rows.to(self.device, non_blocking=True)
        # The buffer is filled again only after this, and the chunk is complete when it is handed over.
        self.stream.synchronize()
        return chunk
