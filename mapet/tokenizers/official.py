"""Codebooks of the official k-CLIP code: centroids in a .npy file, and the index of the faiss library beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from mapet.errors import DataError
from mapet.files import replacing

FLAT_L2 = b"IxF2"
"""How a file of an IndexFlatL2 begins."""


def read_official_codebook(path: str | Path) -> Tensor:
    """The (K, F) float32 centroids in a .npy file or in a faiss IndexFlatL2, as the official k-CLIP code writes them.

    That code gives the index, too, a name that ends in .npy; the two are told apart by their content. The index needs
    the faiss package. DataError names the file.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(4)
        centroids = _read_index(path, start) if start[:2] in (b"Ix", b"IV", b"IB") else np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"cannot read the codebook {path}: {error}") from error
    if not isinstance(centroids, np.ndarray) or centroids.ndim != 2 or centroids.dtype != np.float32:
        shape = f"{centroids.dtype} {centroids.shape}" if isinstance(centroids, np.ndarray) else "no single array"
        raise DataError(f"{path} must hold float32 centroids (entries, features), it holds {shape}")
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


def _read_index(path: Path, start: bytes) -> np.ndarray:
    kind = start.decode("latin-1")
    if start != FLAT_L2:
        raise DataError(f"{path} is an index of the faiss library of kind {kind}; only IndexFlatL2 holds a codebook")
    faiss = _faiss(
        f"{path} is an index of the faiss library ({kind}), not an array, despite its name. Give the file of centroids "
        "that was written beside it (codebook_centroids_*.npy)"
    )
    try:
        index = faiss.read_index(str(path))
    except RuntimeError as error:
        raise DataError(f"{path} is a damaged index of the faiss library: {error}") from error
    return index.reconstruct_n(0, index.ntotal)


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
