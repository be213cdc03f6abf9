"""Codebooks of the official k-CLIP code: centroids in a .npy file, and the index of the faiss library beside it."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from mapet.errors import DataError
from mapet.files import UnreadableFile, map_array, unreadable
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
