"""What images are to everybody: pictures of a source, and uint8 squares of one size that are read by number."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mapet.data.decode import centre_square
from mapet.errors import DataError


class ImageSource(ABC):
    """Images in a fixed order.

    Attributes:
        names: one per image, unique; for files the path relative to the root, with forward slashes.
        labels: (n,) int64 class numbers, or None where the source has no labels.
        classes: class names, `classes[labels[i]]`; None where the source has no labels.
    """

    names: list[str]
    labels: np.ndarray | None = None
    classes: list[str] | None = None

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def load(self, index: int) -> Image.Image:
        """Image `index` as 8-bit RGB. DataError naming the image where it cannot be read."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256, as hexadecimal text, of what the source consists of."""


class Subset(ImageSource):
    """The images `ids` of another source, in that order, with their names and labels; the classes stay as they are.

    Raises:
        IndexError: an id outside the source.
    """

    def __init__(self, source: ImageSource, ids: Sequence[int] | np.ndarray) -> None:
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < len(source):
            raise IndexError(f"image ids {ids.min()} to {ids.max()}, the source holds 0 to {len(source) - 1}")
        self.source, self.ids = source, ids
        self.names = [source.names[i] for i in ids]
        self.labels = None if source.labels is None else source.labels[ids]
        self.classes = source.classes

    def load(self, index: int) -> Image.Image:
        return self.source.load(int(self.ids[index]))

    def fingerprint(self) -> str:
        return fingerprint_of([self.source.fingerprint(), *map(str, self.ids)])


class Images(ABC):
    """Square images in a fixed order, of a source, a token cache or random views.

    Attributes:
        size: side in pixels.
        names, labels, classes: as in ImageSource.
    """

    size: int
    names: Sequence[str]
    labels: np.ndarray | None = None
    classes: list[str] | None = None

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def read(self, ids: Sequence[int] | np.ndarray) -> Tensor:
        """uint8 (b, 3, size, size). DataError for one that cannot be read, IndexError for an id outside."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256, as hexadecimal text, that changes when the images do."""

    def __getitem__(self, which: slice) -> Tensor:
        return self.read(range(*which.indices(len(self))))


class Squares(Images):
    """The centre squares of a source's images, `size` pixels wide, decoded whenever they are read."""

    def __init__(self, source: ImageSource, size: int) -> None:
        self.source, self.size = source, size
        self.names, self.labels, self.classes = source.names, source.labels, source.classes

    def read(self, ids: Sequence[int] | np.ndarray) -> Tensor:
        try:
            squares = [centre_square(self.source.load(int(i)), self.size) for i in ids]
        except DataError as error:
            raise DataError(f"{error}; take it away, or give a token cache of these images, made without it") from error
        return torch.from_numpy(np.stack(squares))

    def fingerprint(self) -> str:
        return fingerprint_of([self.source.fingerprint(), str(self.size)])


class Some(Images):
    """The images `ids` of others, in that order."""

    def __init__(self, images: Images, ids: Sequence[int] | np.ndarray) -> None:
        self.images, self.ids, self.size = images, np.asarray(ids, dtype=np.int64), images.size
        self.labels = None if images.labels is None else images.labels[self.ids]
        self.classes = images.classes

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def names(self) -> list[str]:
        return [self.images.names[i] for i in self.ids]

    def read(self, ids: Sequence[int] | np.ndarray) -> Tensor:
        return self.images.read(self.ids[np.asarray(ids, dtype=np.int64)])

    def fingerprint(self) -> str:
        return fingerprint_of([self.images.fingerprint(), *map(str, self.ids)])


def fingerprint_of(lines: Iterable[str]) -> str:
    """SHA-256 of lines of text; file names that are not valid UTF-8 keep their bytes."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()
