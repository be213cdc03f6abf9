"""Codebooks of the official k-CLIP code: centroids in a .npy file, and the index of the faiss library beside it."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from mapet.errors import DataError
from mapet.files import UnreadableFile, map_array, replacing, unreadable
from mapet_kernels.regular import open_regular

FLAT_L2 = b"IxF2"
"""How a file of an IndexFlatL2 begins."""
HEADER = struct.Struct("<iqqq?iQ")
"""What follows: features, vectors, two numbers without meaning, whether trained, the metric, and how many numbers are
in the rest of the file, all float32."""
METRIC_L2 = 1


def read_official_codebook(path: str | Path) -> Tensor:
    """The (K, F) float32 centroids in a .npy file or in a faiss IndexFlatL2, as the official k-CLIP code writes them.

    That code gives the index, too, a name that ends in .npy; the two are told apart by their content. DataError names
    the file.
    """
    path = Path(path)
    try:
        with open_regular(path) as file:
            start = file.read(4)
            centroids = _read_index(file, start) if start[:2] in (b"Ix", b"IV", b"IB") else np.array(map_array(path))
    except UnreadableFile as error:
        raise DataError(f"cannot read the codebook {path}: {error.reason}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the codebook {path}: {unreadable(path, error).reason}") from error
    if centroids.ndim != 2 or centroids.dtype != np.float32:
        raise DataError(
            f"{path} must hold float32 centroids (entries, features), it holds {centroids.dtype} {centroids.shape}"
        )
    return torch.from_numpy(centroids)


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


def _read_index(file: BinaryIO, kind: bytes) -> np.ndarray:
    """The vectors of an index whose file is at the end of its first four bytes. ValueError where there are none.

    Read here, since the faiss library takes the sizes in a file at their word.
    """
    if kind != FLAT_L2:
        raise ValueError(
            f"it is an index of the faiss library of kind {kind.decode('latin-1')}; only IndexFlatL2 holds a codebook"
        )
    header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        raise ValueError("it is a damaged index of the faiss library: it ends within its header")
    features, entries, _, _, _, metric, numbers = HEADER.unpack(header)
    left = os.fstat(file.fileno()).st_size - file.tell()
    if metric != METRIC_L2 or features < 1 or entries < 1 or numbers != features * entries or left != 4 * numbers:
        raise ValueError(
            f"it is a damaged index of the faiss library: {entries} vectors of {features} numbers, metric {metric}, "
            f"{numbers} numbers in all, and {left} bytes of them"
        )
    return np.frombuffer(bytearray(file.read()), "<f4").reshape(entries, features)


def _faiss(why: str) -> ModuleType:
    try:
        import faiss
    except ImportError as error:
        raise DataError(f"{why}: pip install faiss-cpu") from error
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
