"""Codebooks of the official k-CLIP code: centroids in a .npy file, and the index of the faiss library beside it."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from mapet.errors import DataError
from mapet.files import UnreadableFile, map_array, read_bytes, replacing, unreadable
from mapet_kernels.regular import open_regular

FLAT_L2 = b"IxF2"
"""How a file of an IndexFlatL2 begins; then come HEADER, the COUNT of what follows, and the numbers, float32."""
HEADER = struct.Struct("<iqqq?i")
"""Features, entries, twice a number without meaning, whether it is trained, the metric."""
COUNT = struct.Struct("<Q")
L2 = 1


def read_official_codebook(path: str | Path) -> Tensor:
    """The (K, F) float32 centroids in a .npy file or in a faiss IndexFlatL2, as the official k-CLIP code writes them.

    That code gives the index, too, a name that ends in .npy; the two are told apart by their content. DataError names
    the file.
    """
    path = Path(path)
    try:
        with open_regular(path) as file:
            start = file.read(4)
    except OSError as error:
        raise unreadable(path, error) from error
    centroids = _read_index(path, start) if start[:2] in (b"Ix", b"IV", b"IB") else map_array(path)
    if centroids.ndim != 2 or centroids.dtype != np.float32:
        shape = f"{centroids.dtype} {centroids.shape}"
        raise DataError(f"{path} must hold float32 centroids (entries, features), it holds {shape}")
    return torch.from_numpy(np.array(centroids))


def write_official_centroids(path: str | Path, codebook: Tensor) -> None:
    """Write a codebook (K, F) as the official codebook_centroids_*.npy: float32. DataError where it cannot be."""
    with _replacing(Path(path)) as partial, partial.open("wb") as file:
        np.save(file, _array(codebook))


def write_faiss_index(path: str | Path, codebook: Tensor) -> None:
    """Write a codebook (K, F) as the official codebook_index_*.npy, a faiss IndexFlatL2. DataError where it cannot be,
    and without the faiss package."""
    faiss = _faiss(f"{path} is to be an index of the faiss library")
    values = _array(codebook)
    index = faiss.IndexFlatL2(values.shape[1])
    index.add(values)
    with _replacing(Path(path)) as partial:
        faiss.write_index(index, str(partial))


def _read_index(path: Path, start: bytes) -> np.ndarray:
    kind = start.decode("latin-1")
    if start != FLAT_L2:
        raise DataError(f"{path} is an index of the faiss library of kind {kind}; only IndexFlatL2 holds a codebook")
    content = read_bytes(path)
    try:
        features, entries, _, _, _, metric = HEADER.unpack_from(content, len(FLAT_L2))
        (size,) = COUNT.unpack_from(content, len(FLAT_L2) + HEADER.size)
    except struct.error as error:
        raise UnreadableFile(path, "it is a damaged index of the faiss library: it is cut off") from error
    begin = len(FLAT_L2) + HEADER.size + COUNT.size
    if metric != L2 or min(features, entries) < 1 or size not in (features * entries, 4 * features * entries):
        raise UnreadableFile(path, f"it is a damaged index of the faiss library: {entries} entries of {features}")
    if len(content) != begin + 4 * features * entries:
        raise UnreadableFile(path, f"it is a damaged index of the faiss library: {len(content)} bytes")
    return np.frombuffer(content, "<f4", offset=begin).reshape(entries, features)


def _faiss(why: str) -> ModuleType:
    try:
        import faiss
    except ImportError as error:
        raise DataError(f"{why}; or pip install faiss-cpu") from error
    return faiss


def _array(codebook: Tensor) -> np.ndarray:
    if codebook.dim() != 2:
        raise DataError(f"a codebook is (entries, features), got shape {tuple(codebook.shape)}")
    return codebook.detach().to("cpu", torch.float32).contiguous().numpy()


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """As `mapet.files.replacing`, with DataError."""
    try:
        with replacing(path) as partial:
            yield partial
    except (OSError, RuntimeError) as error:
        raise DataError(f"cannot write the codebook {path}: {error}") from error
